#!/usr/bin/env bash
# From text to a scored artifact on every GPU of this machine, with every second accounted for in summary.json:
#   bench/headline.sh OUT SECONDS VAL TRAIN [TRAIN ...]      e.g. bench/headline.sh out 600 val.jsonl.xz train_*.jsonl.xz
# Keeps OUT/tokenizer.model and OUT/shards if they are there. Writes the result lines to bench/results.
# More settings for the run: EXTRA="--train.seed 1 --train.attention varlen" bench/headline.sh ...
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 4 ]; then
  sed -n '2,5p' "$0" | cut -c3- >&2
  exit 2
fi
out=$1 seconds=$2 val=$3
shift 3
python=${PYTHON:-python3}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')  # the visible ones
mkdir -p "$out"

if [ ! -f "$out/tokenizer.model" ]; then
  "$python" -m pgolf data tokenizer --inputs "$@" --out "$out/tokenizer.model"
fi
if [ ! -f "$out/shards/manifest.json" ]; then
  # The manifest is written last: shards without one are those of a run that was stopped.
  "$python" -m pgolf data shards --train "$@" --val "$val" --tokenizer "$out/tokenizer.model" --out "$out/shards" --overwrite
fi

launch=("$python" -m pgolf)
if [ "$gpus" -gt 1 ]; then
  launch=("$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus" -m pgolf)
fi
# shellcheck disable=SC2086
"${launch[@]}" train record --data "$out/shards" --seconds "$seconds" --out "$out/runs" ${EXTRA:-}

run=$(ls -td "$out"/runs/*/ | head -1)
"$python" -m bench.run "$run" --case "record_${seconds}s_${gpus}gpu"
echo "run folder: $run"
