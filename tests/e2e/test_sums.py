"""`pgolf evaluate --sums`: real evaluations that are killed go on and give the same score."""

import json
import signal
import subprocess
from pathlib import Path

import pytest

from pgolf.cli.main import main
from tests.e2e.test_resume import start
from tests.e2e.test_run import start_ranks

WAYS = {
    "sliding": ["--stride=8", "--tokens=640"],
    "local": ["--context=8", "--tokens=640"],
    "sgd": ["--stride=16", "--tokens=640", "--sgd.chunk-tokens=512", "--sgd.epochs=1"],
    "ttt": ["--ttt.rank=4", "--ttt.chunk=32", "--ttt.batch-tokens=128"],
}


HIT = """
import os, sys
from pgolf import watch
from pgolf.cli.main import main
from pgolf.evaluate import predictor, sums

original, calls = {place}, []

def counted(*arguments):
    found = original(*arguments)
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), {number})
    return found

{place}, sums.EVERY_S = counted, 0.0
watch.GRACE_S = 200.0  # a rank that is behind comes to its own signal, and is not ended for the other's
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def words(run: Path, shards: Path, tmp_path: Path) -> list[str]:
    """The command without a mode; it writes the score to score.json."""
    paths = {"data": shards, "sums": tmp_path / "sums", "json": tmp_path / "score.json"}
    options = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    return ["evaluate", str(run / "model.pgolf"), "--device=cpu", *options]


def score(tmp_path: Path, mode: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((tmp_path / "score.json").read_text())["scores"][mode]
    return found


def hit(number: int, place: str = "sums.Sums.add") -> tuple[str, ...]:
    """Return the program that gets a signal when a function was called twice: with two sums on disk."""
    return ("-c", HIT.format(number=int(number), place=place))


def without_sums(command: list[str]) -> list[str]:
    at = command.index("--sums")
    return command[:at] + command[at + 2 :]


def end(process: "subprocess.Popen[str]") -> tuple[str, str]:
    out, err = process.communicate(timeout=240)
    return out, err


@pytest.mark.parametrize("mode", list(WAYS))
def test_a_killed_evaluation_goes_on_and_gives_the_same_score(words, mode, tmp_path):
    command = [*words, f"--mode={mode}", *WAYS[mode]]
    for _ in range(2):
        process = start(command, hit(signal.SIGKILL))
        end(process)
        assert process.returncode == -signal.SIGKILL
    process = start(command)
    out, err = end(process)
    assert process.returncode == 0, err
    assert f"note: {mode} goes on: " in err and "of them scored before)" in out
    found = score(tmp_path, mode)
    process = start(without_sums(command))  # a process of the same kind, as the threads round differently
    end(process)
    whole = score(tmp_path, mode)
    assert 0 < found["kept"] < found["tokens"] and whole["kept"] == 0
    for key in ("nats", "bpb", "tokens", "bytes"):
        assert found[key] == whole[key], key


def test_one_rank_goes_on_where_two_were_killed(words, tmp_path):
    command = [*words, "--mode=sliding", *WAYS["sliding"]]
    ranks = start_ranks(2, command, hit(signal.SIGKILL))
    for rank in ranks:
        end(rank)
    assert [rank.returncode for rank in ranks] == [-signal.SIGKILL] * 2
    files = [tmp_path / "sums" / name for name in ("sliding.sums", "sliding.1.sums")]
    assert all(f.read_bytes().count(b"\n") > 1 for f in files)
    process = start(command)
    _, err = end(process)
    assert process.returncode == 0, err
    found = score(tmp_path, "sliding")
    end(start(without_sums(command)))
    assert found["kept"] > 0 and found["nats"] == score(tmp_path, "sliding")["nats"]


@pytest.mark.parametrize("kept", [True, False])
def test_a_signal_says_how_to_go_on(words, kept, tmp_path):
    command = [*words, "--mode=sliding", *WAYS["sliding"]]
    process = start(
        command if kept else without_sums(command), hit(signal.SIGTERM, "predictor.Question.tensors")
    )
    _, err = end(process)
    assert process.returncode == 128 + signal.SIGTERM
    advice = f"the same command goes on with the sums in {tmp_path / 'sums'}"
    advice = advice if kept else "nothing is kept; with --sums DIR, the same command would go on"
    assert err.splitlines()[-1] == f"stopped by SIGTERM; {advice}"


def test_sums_of_another_setting_are_refused(words, capsys, tmp_path):
    short = [*words, "--documents=1"]
    assert main([*short, "--mode=plain"]) == 0
    assert main([*short, "--mode=plain", "--tokens=128"]) == 2
    what = "plain.sums has the sums of another evaluation: tokens is 128 now and was 98304"
    assert what in capsys.readouterr().err
    assert main([*words, "--mode=plain", "--documents=2"]) == 2
    assert "text is " in capsys.readouterr().err
    assert main([*short, "--mode=phased", "--phases.adapters.rank=2"]) == 0
    assert "note: phased begins anew: what it has learned" in capsys.readouterr().err


def test_a_file_in_place_of_the_folder_is_an_error(words, capsys, tmp_path):
    (tmp_path / "sums").write_text("")
    assert main([*words, "--documents=1"]) == 2
    assert "sums: File exists" in capsys.readouterr().err
