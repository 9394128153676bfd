"""bench/peers.sh: a fake Python records its commands, measures, fails, and does not end."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.common import torch_name
from bench.ops import bench_linear_softcap_ce, bench_muon_step, bench_newton_schulz

SCRIPT = Path(__file__).parents[2] / "bench" / "peers.sh"
CASES = {
    "newton_schulz": bench_newton_schulz.CASES,
    "muon_step": bench_muon_step.CASES,
    "linear_softcap_ce": bench_linear_softcap_ce.CASES,
}
STAND_IN = """#!/bin/sh
case $1 in -c) exit;; -) exec "$REAL" "$@";; esac
turn=$3 bench=${4#bench.ops.bench_} case=$6
for out; do :; done
until [ "$turn" = compile ] || [ -e "$turn" ]; do sleep 0.02; done
shift 3
echo "${QUACK_FORCE_CACHE_UPDATE:-0} $*" >> "$CALLS"
[ "$turn" != compile ] || exit 0
mkdir -p "$out"
printf '{"case": "%s", "impl": "pgolf", "metric": "ms_graph", "value": 0.25, "spread": 0.01}\\n' "$case" \\
  > "$out/$bench.jsonl.part"
[ "$case" = "$FAILS" ] && { echo "RuntimeError: this case cannot run"; exit 3; }
[ "$case" = "$HANGS" ] && exec timeout --preserve-status -s ALRM "$(cat "$turn")" sleep 100
mv "$out/$bench.jsonl.part" "$out/20261201_gpu_$bench.jsonl"
"""


def script(folder: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a folder, from which its paths are meant."""
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    tools = {"PATH": "/usr/bin:/bin", "PYTHON": "./python", "REAL": sys.executable, "PASS": "measure"}
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
    done = script(tmp_path, "out", "900", PASS="both")
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    first, then = ([c[2:].split() for c in calls if c.startswith(flag)] for flag in "01")
    assert (len(first), len(then)) == (5 * 3 + 3, 9)
    assert calls == sorted(calls, key=lambda call: call[0]), "everything is compiled before anything is timed"
    for words in first + then:
        assert words[1] == "--cases"
        bench = words[0].removeprefix("bench.ops.bench_")
        named = itertools.takewhile(lambda word: not word.startswith("--"), words[2:])
        assert set(named) <= set(CASES[bench])
    # A case is compiled by several processes, which together have all the implementations that are measured.
    for words in then[:-1]:
        parts = [w for w in first if w[2] == words[2]]
        assert {x for w in parts for x in w} == set(words[:-2]), "all but --out and its folder"
    found = measured(tmp_path / "out")
    assert sorted(itertools.chain.from_iterable(found.values())) == sorted(words[2] for words in then)
    assert found["muon_step"] == ["384x768x2048"]
    table = (tmp_path / "out" / "table.txt").read_text()
    assert table in done.stdout and table.count("ms_graph 0.25 +- 0.01") == 9
    assert "not measured" not in done.stdout


def test_the_passes_can_be_two_commands(tmp_path):
    done = script(tmp_path, "out", "100", PASS="compile")
    assert done.returncode == 0 and "compiled, within at most 100 s\n" in done.stdout, done.stderr
    assert not (tmp_path / "out" / "table.txt").exists()
    compiled = (tmp_path / "calls").read_text()
    (tmp_path / "out" / "cache" / "triton" / "kernel").touch()
    done = script(tmp_path, "out", "900", PASS="measure")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "cache" / "triton" / "kernel").exists()
    assert (tmp_path / "out" / "log.txt").read_text().startswith("[0 s] compiled")
    calls = (tmp_path / "calls").read_text()
    assert calls.startswith(compiled) and calls.count("\n") == compiled.count("\n") + 9


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


def process(turn: str, *words: str) -> subprocess.Popen[str]:
    """Start one process of the script; its bench runs on the CPU and compiles nothing."""
    arguments = ["bench.ops.bench_newton_schulz", "--device", "cpu", "--only", "baddbmm", *words]
    return subprocess.Popen(
        [sys.executable, "-m", "bench.peers_case", turn, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=SCRIPT.parents[1],
    )


def test_a_process_that_compiles_times_nothing_and_writes_nothing(tmp_path):
    made = process("compile", "--cases", "64x32x32", "--out", str(tmp_path / "out"))
    text, _ = made.communicate(timeout=120)
    assert made.returncode == 0, text
    assert "64x32x32 pgolf s_first_call " in text and " s\n" in text
    assert f"64x32x32 {torch_name('baddbmm')} s_first_call " in text
    assert "ms_launched" not in text and not (tmp_path / "out").exists()


def test_a_process_measures_in_its_turn_and_is_ended_after_its_seconds(tmp_path):
    turn = tmp_path / "turn"
    made = process(str(turn), "--cases", "64x32x32", "--repeats", "3", "--out", str(tmp_path / "out"))
    slow = process(str(turn), "--cases", "8x128x128", "--repeats", "1000000", "--out", str(tmp_path / "slow"))
    with pytest.raises(subprocess.TimeoutExpired):
        made.wait(timeout=4)
    assert not (tmp_path / "out").exists(), "it is not its turn"
    (tmp_path / "new").write_text("8\n")
    (tmp_path / "new").rename(turn)
    text, _ = made.communicate(timeout=60)
    assert made.returncode == 0, text
    (file,) = (tmp_path / "out").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {"s_first_call", "ms_launched"} <= {line["metric"] for line in lines}
    slow.communicate(timeout=60)
    assert slow.returncode == -signal.SIGALRM
