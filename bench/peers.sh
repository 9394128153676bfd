#!/usr/bin/env bash
# Measures the operators beside other implementations on one GPU, each case in a process of its own:
#   bench/peers.sh OUT SECONDS      for example bench/peers.sh out_peers 600
#   PASS=compile                    only the first pass: it compiles and times nothing, so other programs may use the GPU meanwhile
#   PASS=measure                    only the second pass, on an idle GPU, with the OUT of a first pass; its cases need about 350 s (an estimate)
#   PYTHON=.venv/bin/python         the interpreter that has pgolf and the other implementations; default: python3
# Ends after about SECONDS. A case that fails, is stopped or would begin too late is named. Writes one file of result lines per bench,
# OUT/newton_schulz.jsonl and so on, OUT/log.txt and OUT/table.txt. docs/benchmarks.md says how to install the others.
set -euo pipefail
if [ $# -ne 2 ] || ! [[ $2 =~ ^[1-9][0-9]*$ ]] || ! [[ ${PASS:=both} =~ ^(both|compile|measure)$ ]]; then
  sed -n '2,8p' "$0" | cut -c3- >&2
  exit 2
fi
limit=$2 python=$(command -v "${PYTHON:-python3}") || { echo "there is no ${PYTHON:-python3}; name the interpreter with PYTHON" >&2; exit 2; }
# Not realpath: python in a virtual environment is a link that must not be followed.
case $python in /*) ;; *) python=$PWD/$python ;; esac
"$python" -c "import pgolf, torch" || { echo "$python has no pgolf: name the interpreter of its environment, for example PYTHON=.venv/bin/python" >&2; exit 2; }
out=$(realpath -m "$1")
cd "$(dirname "$0")/.."
SECONDS=0
mkdir -p "$out"
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
trap 'exit 130' INT TERM
say() { echo "[$SECONDS s] $*" | tee -a "$out/log.txt"; }

# Compiled code is shared by all processes. Which of the kernels is the fastest is not: each case tunes for itself, in the second pass.
export QUACK_CACHE_DIR=${QUACK_CACHE_DIR:-$out/cache/quack} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$out/cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$out/cache/inductor} PYTHONUNBUFFERED=1
mkdir -p "$QUACK_CACHE_DIR" "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR"

polar="bench.ops.bench_newton_schulz" loss="bench.ops.bench_linear_softcap_ce" step="bench.ops.bench_muon_step"
# Parts of the names of the other iterations, in groups that compile beside each other; torch's eager and compiled forms, which
# compile for long, are not among them.
groups=("baddbmm speedrun optim.Muon emerging" "gram-newton" "dion")
others="--only ${groups[*]}"
# name | seconds at most | module and arguments, from the case that matters most to the one that can be missed
cases=(
  "bank66|120|$polar --cases bank66_steps5 $others"
  "eighth|90|$polar --cases eighth_steps5 $others"
  "1x1536x7168|60|$polar --cases 1x1536x7168 $others"
  "1x18432x1536|60|$polar --cases 1x18432x1536 $others"
  "1x12288x7168|75|$polar --cases 1x12288x7168 --repeats 6 $others"
  "loss_fast|60|$loss --cases n4096_v128256_d4096_fast"
  "step|75|$step --cases 384x768x2048 --repeats 6"
  "loss_memory|60|$loss --cases n4096_v128256_d4096_memory"
  "small|30|$polar --cases 64x128x128 64x32x32 64x64x64 64x96x96 64x160x160 64x192x192 64x256x256 8x128x128 512x128x128 64x64x128 64x128x256 --only baddbmm"
)

# 1. All at the same time, to compile. "small" has nothing to compile.
if [ "$PASS" != measure ]; then
  rm -rf "$out/compile" && mkdir "$out/compile" && : >"$out/log.txt"
  most=$limit
  [ "$PASS" = compile ] || [ "$most" -le 180 ] || most=180
  for case in "${cases[@]}"; do
    IFS='|' read -r name _ command <<<"$case"
    [ "$name" != small ] || continue
    for group in "${groups[@]}"; do
      read -ra words <<<"${command/"$others"/--only $group}"
      TORCHINDUCTOR_COMPILE_THREADS=2 timeout -k 5 "$most" \
        nice "$python" -m bench.peers_case compile "${words[@]}" >"$out/compile/$name.${group%% *}.log" 2>&1 &
      pids+=($!)
      [[ $command == *"$others" ]] || break
    done
  done
  status=0
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  pids=()
  say "compiled, within at most $most s$([ $status -eq 0 ] || echo "; not everything, see $out/compile")"
  cat "$out"/compile/*.log | grep -E 'not usable|not installed|failed:|left out|Error' | sort | uniq -c | tee -a "$out/log.txt" || true
  [ "$PASS" != compile ] || exit 0
fi

# 2. One after another, on an idle GPU. While one case runs, the next one imports and waits for its turn.
export QUACK_FORCE_CACHE_UPDATE=1
rm -rf "$out/cases" && mkdir "$out/cases"
rm -f "$out"/{newton_schulz,muon_step,linear_softcap_ce}.jsonl "$out/table.txt"
begin() {
  local name command words
  [ -n "${cases[$1]:-}" ] || return 0
  IFS='|' read -r name _ command <<<"${cases[$1]}"
  read -ra words <<<"$command"
  "$python" -m bench.peers_case "$out/cases/$name.turn" "${words[@]}" --out "$out/cases/$name" >"$out/cases/$name.log" 2>&1 &
  pids[$1]=$!
}
begin 0
missing=()
for i in "${!cases[@]}"; do
  IFS='|' read -r name most command <<<"${cases[$i]}"
  left=$((limit - SECONDS))
  if [ "$left" -lt 12 ]; then
    say "$name: left out, $left s are left"
    missing+=("$name")
    continue
  fi
  [ "$most" -le "$left" ] || most=$left
  began=$SECONDS status=0
  echo "$most" >"$out/turn" && mv "$out/turn" "$out/cases/$name.turn"
  begin $((i + 1))
  wait "${pids[$i]}" || status=$?
  unset "pids[$i]"
  { echo "== $name: $command"; cat "$out/cases/$name.log"; } >>"$out/log.txt"
  case $status in
    0) say "$name: measured in $((SECONDS - began)) s" ;;
    142) say "$name: stopped after $most s; what it measured until then is kept" ;;
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

shown = ("ms_graph", "ms_launched", "ms_fwd", "ms_fwd_bwd", "ms_fwd_bwd_graph", "peak_mib", "s_first_call")
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.jsonl")):
    rows = collections.defaultdict(dict)
    for line in map(json.loads, file.read_text().splitlines()):
        if line["metric"] in shown:
            rows[line["case"], line["impl"]][line["metric"]] = f"{line['value']:.4g} +- {line['spread']:.2g}"
    print(f"== {file.stem}: medians and interquartile ranges, less is better; s_first_call: loading and tuning")
    for (case, name), values in rows.items():
        print(f"{case:<28} {name[:56]:<56}", *(f"{metric} {value}" for metric, value in values.items()), sep="  ")
PYTHON
