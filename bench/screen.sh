#!/usr/bin/env bash
# Screens candidates: runs plans of bench/ablations on a text that is held out of the training text.
#
#   bench/screen.sh SHARDS OUT PER_GPU PLAN.json ...
#
# SHARDS: a folder of `pgolf data shards`; its validation text is not used. OUT/held-out gets the text without its
# last HELD_OUT_TOKENS tokens (2,000,000), on which the runs are scored; OUT/NAME gets the results of a plan.
# PER_GPU: runs that share a GPU, 1 for plans at full size. A second start goes on where the first one ended.
set -euo pipefail

if [ $# -lt 4 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0"
  exit 2
fi
shards=$1 out=$2 per_gpu=$3
shift 3
python=${PYTHON:-python}
mkdir -p "$out"
if [ ! -d "$out/held-out" ]; then
  "$python" -m pgolf data held-out "$shards" --out "$out/held-out" --tokens "${HELD_OUT_TOKENS:-2000000}"
fi
for plan in "$@"; do
  name=$(basename "$plan" .json)
  "$python" -m pgolf ablate "$plan" --data "$out/held-out" --out "$out/$name" --per-gpu "$per_gpu"
done
