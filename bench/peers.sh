#!/usr/bin/env bash
# Measures the operators beside other implementations on one GPU, each case in a process of its own:
#   bench/peers.sh OUT SECONDS      for example bench/peers.sh out_peers 900
#   COMPILE=60                      seconds at most of the first pass, which only compiles; 0: each case compiles for itself
#   PYTHON=.venv/bin/python         the interpreter that has pgolf and the other implementations; default: python3
# Ends after about SECONDS. A case that fails, is stopped or would begin too late is named. Writes one file of result lines per bench,
# OUT/newton_schulz.jsonl and so on, OUT/log.txt and OUT/table.txt. docs/benchmarks.md says how to install the others.
set -euo pipefail
if [ $# -ne 2 ] || ! [[ $2 =~ ^[1-9][0-9]*$ ]] || ! [[ ${COMPILE:=60} =~ ^[0-9]+$ ]]; then
  sed -n '2,7p' "$0" | cut -c3- >&2
  exit 2
fi
limit=$2 python=$(command -v "${PYTHON:-python3}") || { echo "there is no ${PYTHON:-python3}; name the interpreter with PYTHON" >&2; exit 2; }
# Not realpath: python in a virtual environment is a link that must not be followed.
case $python in /*) ;; *) python=$PWD/$python ;; esac
"$python" -c "import pgolf, torch" || { echo "$python has no pgolf: name the interpreter of its environment, for example PYTHON=.venv/bin/python" >&2; exit 2; }
out=$(realpath -m "$1")
cd "$(dirname "$0")/.."
SECONDS=0
rm -rf "$out/compile" "$out/cases"
mkdir -p "$out/compile" "$out/cases"
rm -f "$out"/{newton_schulz,muon_step,linear_softcap_ce}.jsonl "$out/table.txt"
: >"$out/log.txt"
say() { echo "[$SECONDS s] $*" | tee -a "$out/log.txt"; }

# Compiled kernels are shared by all processes. Which of them is the fastest is not: see below.
export QUACK_CACHE_DIR=${QUACK_CACHE_DIR:-$out/cache/quack} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$out/cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$out/cache/inductor} PYTHONUNBUFFERED=1
mkdir -p "$QUACK_CACHE_DIR" "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR"

polar="bench.ops.bench_newton_schulz" loss="bench.ops.bench_linear_softcap_ce" step="bench.ops.bench_muon_step"
# Parts of the names of the other iterations; torch's eager and compiled forms, which compile for long, are not among them.
others="--only baddbmm gram-newton emerging dion speedrun optim.Muon"
# name | seconds at most | module and arguments, from the case that matters most to the one that can be missed
cases=(
  "bank66|150|$polar --cases bank66_steps5 $others"
  "eighth|100|$polar --cases eighth_steps5 $others"
  "loss_memory|75|$loss --cases n4096_v128256_d4096_memory"
  "1x1536x7168|90|$polar --cases 1x1536x7168 $others"
  "1x12288x7168|90|$polar --cases 1x12288x7168 --repeats 10 $others"
  "1x18432x1536|90|$polar --cases 1x18432x1536 $others"
  "small|30|$polar --cases 64x128x128 64x32x32 64x64x64 64x96x96 64x160x160 64x192x192 64x256x256 8x128x128 512x128x128 64x64x128 64x128x256 --only baddbmm"
  "step|60|$step --cases 384x768x2048 --repeats 10"
  "loss_fast|45|$loss --cases n4096_v128256_d4096_fast"
)

# 1. All at the same time, to compile; what is timed here counts for nothing. "small" has nothing to compile.
pids=()
trap '[ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null; exit 130' INT TERM
if [ "$COMPILE" -gt 0 ]; then
  [ "$COMPILE" -lt "$limit" ] || COMPILE=$limit
  for case in "${cases[@]}"; do
    IFS='|' read -r name _ command <<<"$case"
    [ "$name" != small ] || continue
    read -ra words <<<"$command"
    QUACK_COMPILE_WORKERS=4 TORCHINDUCTOR_COMPILE_THREADS=4 timeout -k 5 "$COMPILE" \
      "$python" -m "${words[@]}" --repeats 2 --out "$out/compile/$name" >"$out/compile/$name.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || true; done
  pids=()
  say "compiled, within at most $COMPILE s"
  cat "$out"/compile/*.log | grep -E 'not usable|not installed|failed:|left out|Error' | sort | uniq -c | tee -a "$out/log.txt" || true
fi

# 2. One after another, on an idle GPU. quack and Triton choose among their kernels by times, so they choose again now.
export QUACK_FORCE_CACHE_UPDATE=1
missing=()
for case in "${cases[@]}"; do
  IFS='|' read -r name most command <<<"$case"
  left=$((limit - SECONDS))
  if [ "$left" -lt 12 ]; then
    say "$name: left out, $left s are left"
    missing+=("$name")
    continue
  fi
  [ "$most" -le "$left" ] || most=$left
  began=$SECONDS status=0
  read -ra words <<<"$command"
  timeout -k 5 "$most" "$python" -m "${words[@]}" --out "$out/cases/$name" >"$out/cases/$name.log" 2>&1 || status=$?
  { echo "== $name: $command"; cat "$out/cases/$name.log"; } >>"$out/log.txt"
  case $status in
    0) say "$name: measured in $((SECONDS - began)) s" ;;
    124 | 137) say "$name: stopped after $most s; what it measured until then is kept" ;;
    *)
      say "$name: left out, exit status $status; the end of what it wrote:"
      tail -n 5 "$out/cases/$name.log"
      rm -rf "${out:?}/cases/$name"
      ;;
  esac
  [ "$status" -eq 0 ] || missing+=("$name")
  # Joined after each case, in case this script is stopped. A stopped bench leaves its lines in a file that ends in .part.
  for bench in newton_schulz muon_step linear_softcap_ce; do
    find "$out/cases" \( -name "*$bench.jsonl" -o -name "*$bench.jsonl.part" \) -print0 | sort -z | xargs -0 -r cat >"$out/$bench.jsonl"
    [ -s "$out/$bench.jsonl" ] || rm "$out/$bench.jsonl"
  done
done
[ ${#missing[@]} -eq 0 ] || say "not measured, or not to the end: ${missing[*]}"
compgen -G "$out/*.jsonl" >/dev/null || { say "no case was measured; $out/log.txt says why"; exit 1; }

"$python" - "$out" <<'PYTHON' | tee "$out/table.txt"
import collections, json, pathlib, sys

shown = ("ms_graph", "ms_launched", "ms_fwd", "ms_fwd_bwd", "ms_fwd_bwd_graph", "peak_mib")
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.jsonl")):
    rows = collections.defaultdict(dict)
    for line in map(json.loads, file.read_text().splitlines()):
        if line["metric"] in shown:
            rows[line["case"], line["impl"]][line["metric"]] = f"{line['value']:.4g} +- {line['spread']:.2g}"
    print(f"== {file.stem}: medians and interquartile ranges, less is better")
    for (case, name), values in rows.items():
        print(f"{case:<28} {name[:56]:<56}", *(f"{metric} {value}" for metric, value in values.items()), sep="  ")
PYTHON
