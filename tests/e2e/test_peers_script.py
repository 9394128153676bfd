"""bench/peers.sh: a fake Python records its commands, measures, fails, and does not end."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.ops import bench_linear_softcap_ce, bench_muon_step, bench_newton_schulz

SCRIPT = Path(__file__).parents[2] / "bench" / "peers.sh"
CASES = {
    "newton_schulz": bench_newton_schulz.CASES,
    "muon_step": bench_muon_step.CASES,
    "linear_softcap_ce": bench_linear_softcap_ce.CASES,
}
STAND_IN = """#!/bin/sh
case $1 in -c) exit;; -) exec "$REAL" "$@";; esac
bench=${2#bench.ops.bench_} case=$4
for out; do :; done
echo "${QUACK_FORCE_CACHE_UPDATE:-0} $*" >> "$CALLS"
mkdir -p "$out"
printf '{"case": "%s", "impl": "pgolf", "metric": "ms_graph", "value": 0.25, "spread": 0.01}\\n' "$case" \\
  > "$out/$bench.jsonl.part"
[ "$case" = "$FAILS" ] && { echo "RuntimeError: this case cannot run"; exit 3; }
[ "$case" = "$HANGS" ] && exec sleep 100
mv "$out/$bench.jsonl.part" "$out/20261201_gpu_$bench.jsonl"
"""


def script(folder: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a folder, from which its paths are meant."""
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    tools = {"PATH": "/usr/bin:/bin", "PYTHON": "./python", "REAL": sys.executable, "COMPILE": "0"}
    names = {"CALLS": str(folder / "calls"), "FAILS": "", "HANGS": ""}
    return subprocess.run(
        ["bash", str(SCRIPT), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | tools | names | settings,
    )


def measured(out: Path) -> dict[str, list[str]]:
    """Return the cases of each joined file."""
    files = {path.stem: path.read_text().splitlines() for path in out.glob("*.jsonl")}
    return {bench: [json.loads(line)["case"] for line in lines] for bench, lines in files.items()}


def test_each_case_is_compiled_and_then_measured_alone(tmp_path):
    done = script(tmp_path, "out", "900", COMPILE="20")
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    first, then = ([c[2:].split() for c in calls if c.startswith(flag)] for flag in "01")
    assert (len(first), len(then)) == (8, 9)
    assert calls == sorted(calls, key=lambda call: call[0]), "everything is compiled before anything is timed"
    for words in first + then:
        assert words[0] == "-m" and words[2] == "--cases"
        bench = words[1].removeprefix("bench.ops.bench_")
        named = words[3 : next(i for i, word in enumerate(words) if i > 3 and word.startswith("--"))]
        assert set(named) <= set(CASES[bench])
    found = measured(tmp_path / "out")
    assert sorted(itertools.chain.from_iterable(found.values())) == sorted(words[3] for words in then)
    assert found["muon_step"] == ["384x768x2048"]
    table = (tmp_path / "out" / "table.txt").read_text()
    assert table in done.stdout and table.count("ms_graph 0.25 +- 0.01") == 9
    assert "not measured" not in done.stdout


def test_a_case_that_cannot_run_is_named_and_left_out(tmp_path):
    done = script(tmp_path, "out", "900", FAILS="1x12288x7168")
    assert done.returncode == 0, done.stderr
    assert "1x12288x7168: left out, exit status 3" in done.stdout
    assert "this case cannot run" in done.stdout
    assert "not measured, or not to the end: 1x12288x7168\n" in done.stdout
    cases = measured(tmp_path / "out")
    assert len(cases["newton_schulz"]) == 5 and "1x12288x7168" not in cases["newton_schulz"]


@pytest.mark.slow
def test_a_case_that_does_not_end_is_stopped_and_later_ones_do_not_begin(tmp_path):
    done = script(tmp_path, "out", "12", HANGS="bank66_steps5")
    assert done.returncode == 0, done.stderr
    assert "bank66: stopped after 12 s; what it measured until then is kept" in done.stdout
    assert done.stdout.count("s are left") == 8
    assert measured(tmp_path / "out") == {"newton_schulz": ["bank66_steps5"]}


def test_without_any_measurement_the_script_fails(tmp_path):
    done = script(tmp_path, "out", "5")
    assert done.returncode == 1 and "no case was measured" in done.stdout


@pytest.mark.parametrize("words", [[], ["out"], ["out", "soon"], ["out", "0"]], ids=str)
def test_wrong_arguments_are_answered_with_the_usage(tmp_path, words):
    done = script(tmp_path, *words)
    assert done.returncode == 2 and "bench/peers.sh OUT SECONDS" in done.stderr
    assert not (tmp_path / "calls").exists()
