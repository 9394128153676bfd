#!/usr/bin/env bash
# Does everything from text to a submission folder, on all GPUs of this machine:
#   bench/headline.sh OUT SECONDS VAL TRAIN [TRAIN ...]    for example bench/headline.sh out 600 val.jsonl.xz train_*.jsonl.xz
#   SEEDS="42 43 44"   one run per seed; default: the preset's seed       TTT=1           also score with test-time training
#   SUBMIT="--author me --github-id me"   options of `pgolf submit`       PRESET=tiny     preset; default: pr1855
#   EXTRA="--train.attention varlen"      further settings of the runs    RESULTS=folder  for result lines; default: bench/results
#   PYTHON=.venv/bin/python               the interpreter that has pgolf; default: python3
# Uses OUT/tokenizer.model and OUT/shards if they exist. Writes one folder OUT/runs/... per seed, and OUT/submission.
set -euo pipefail
if [ $# -lt 4 ]; then
  sed -n '2,8p' "$0" | cut -c3- >&2
  exit 2
fi
python=$(command -v "${PYTHON:-python3}") preset=${PRESET:-pr1855}
# Not realpath: python in a virtual environment is a link that must not be followed.
case $python in /*) ;; *) python=$PWD/$python ;; esac
"$python" -c "import pgolf, torch" || { echo "$python has no pgolf: name the interpreter of its environment, for example PYTHON=.venv/bin/python" >&2; exit 2; }
# Paths are meant from where the script is called.
out=$(realpath -m "$1") seconds=$2 val=$(realpath -m "$3") results=$(realpath -m "${RESULTS:-$(dirname "$0")/results}")
shift 3
train=()
for file in "$@"; do train+=("$(realpath -m "$file")"); done
cd "$(dirname "$0")/.."
# The number of GPUs that torch sees, and the vocabulary size of the preset.
facts='import sys, torch, pgolf.presets as p; print(torch.cuda.device_count(), p.PRESETS[sys.argv[1]]().model.vocab_size)'
read -r gpus vocab < <("$python" -c "$facts" "$preset")
mkdir -p "$out"

if [ ! -f "$out/shards/manifest.json" ]; then
  # The manifest is written last, so shards without one come from a preparation that was stopped.
  SECONDS=0
  if [ ! -f "$out/tokenizer.model" ]; then
    "$python" -m pgolf data tokenizer --inputs "${train[@]}" --vocab-size "$vocab" --out "$out/tokenizer.model"
  fi
  "$python" -m pgolf data shards --train "${train[@]}" --val "$val" --tokenizer "$out/tokenizer.model" --out "$out/shards" --overwrite
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
  "${launch[@]}" train "$preset" "${settings[@]}" "${one[@]}" ${EXTRA:-} && status=0 || status=$?
  # 3: the run is complete, but took more seconds than its clock allows; under torchrun that is 1.
  if [ "$status" != 0 ] && [ ! -f "$(ls -td "$out"/runs/*/ | head -1)summary.json" ]; then
    echo "the run of seed $seed ended with status $status; go on with pgolf train --resume, finished runs are in $out/runs" >&2
    exit "$status"
  fi
  runs+=("$(ls -td "$out"/runs/*/ | head -1)")
  echo "run folder: ${runs[-1]}"
  "$python" -m bench.run "${runs[-1]}" --case "$name" --out "$results"
done

prepared=()
if [ -f "$out/prepare_seconds" ]; then
  prepared=(--prepare-seconds "$(cat "$out/prepare_seconds")")
fi
# shellcheck disable=SC2086
"$python" -m pgolf submit "${runs[@]}" --out "$out/submission" --overwrite "${prepared[@]}" ${SUBMIT:-}
