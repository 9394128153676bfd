#!/usr/bin/env bash
# Does everything from text to a submission folder, on all GPUs of this machine:
#   bench/headline.sh OUT SECONDS VAL TRAIN [TRAIN ...]    for example bench/headline.sh out 600 val.jsonl.xz train_*.jsonl.xz
#   SEEDS="42 43 44"   one run per seed; default: the preset's seed       TTT=1           also score with test-time training
#   SUBMIT="--author me --github-id me"   options of `pgolf submit`       PRESET=tiny     preset; default: pr1855
#   EXTRA="--train.attention varlen"      further settings of the runs    RESULTS=folder  for result lines; default: bench/results
# Uses OUT/tokenizer.model and OUT/shards if they exist. Writes one folder OUT/runs/... per seed, and OUT/submission.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 4 ]; then
  sed -n '2,7p' "$0" | cut -c3- >&2
  exit 2
fi
out=$1 seconds=$2 val=$3
shift 3
python=${PYTHON:-python3} preset=${PRESET:-pr1855}
# The number of GPUs that torch sees, and the vocabulary size of the preset.
facts='import sys, torch, pgolf.presets as p; print(torch.cuda.device_count(), p.PRESETS[sys.argv[1]]().model.vocab_size)'
read -r gpus vocab < <("$python" -c "$facts" "$preset")
mkdir -p "$out"

if [ ! -f "$out/shards/manifest.json" ]; then
  # The manifest is written last, so shards without one come from a preparation that was stopped.
  SECONDS=0
  if [ ! -f "$out/tokenizer.model" ]; then
    "$python" -m pgolf data tokenizer --inputs "$@" --vocab-size "$vocab" --out "$out/tokenizer.model"
  fi
  "$python" -m pgolf data shards --train "$@" --val "$val" --tokenizer "$out/tokenizer.model" --out "$out/shards" --overwrite
  echo "$SECONDS" > "$out/prepare_seconds"
fi

launch=("$python" -m pgolf)
if [ "$gpus" -gt 1 ]; then
  launch=("$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus" -m pgolf)
fi
settings=(--data "$out/shards" --seconds "$seconds" --out "$out/runs")
if [ "${TTT:-0}" = 1 ]; then
  settings+=(--evaluate.ttt)
fi
runs=()
for seed in ${SEEDS:-default}; do
  # In the names of result lines, preset pr1855 keeps its earlier name, record.
  one=() name="${preset/pr1855/record}_${seconds}s_${gpus}gpu"
  if [ "$seed" != default ]; then
    one=(--seed "$seed") name="${name}_seed$seed"
  fi
  # shellcheck disable=SC2086
  "${launch[@]}" train "$preset" "${settings[@]}" "${one[@]}" ${EXTRA:-}
  runs+=("$(ls -td "$out"/runs/*/ | head -1)")
  echo "run folder: ${runs[-1]}"
  "$python" -m bench.run "${runs[-1]}" --case "$name" --out "${RESULTS:-bench/results}"
done

prepared=()
if [ -f "$out/prepare_seconds" ]; then
  prepared=(--prepare-seconds "$(cat "$out/prepare_seconds")")
fi
# shellcheck disable=SC2086
"$python" -m pgolf submit "${runs[@]}" --out "$out/submission" --overwrite "${prepared[@]}" ${SUBMIT:-}
