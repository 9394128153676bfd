"""`pgolf evaluate --sums`: real evaluations that are killed go on and give the same score."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pgolf.cli.main import main

WAYS = {
    "sliding": ["--stride=4", "--tokens=256"],
    "sgd": ["--stride=8", "--tokens=256", "--sgd.chunk-tokens=256", "--sgd.epochs=1"],
    "ttt": ["--ttt.rank=4", "--ttt.chunk=16", "--ttt.batch-tokens=64"],
}
"""Settings with which a short text takes seconds and many sums."""
AT_ONCE = (
    "import sys, pgolf.evaluate.sums as sums; sums.EVERY_S = 0.0; "
    "from pgolf.cli.main import main; sys.exit(main())"
)
"""The program, with every sum on disk as soon as it is known."""


def start(words: list[str], **place: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", AT_ONCE, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in place.items()}},
    )


def two_ranks(words: list[str]) -> "list[subprocess.Popen[str]]":
    """Start two ranks without torchrun, which would end one rank when the other ends."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": probe.getsockname()[1], "WORLD_SIZE": 2}
    return [start(words, **place, RANK=rank, LOCAL_RANK=rank) for rank in range(2)]


@pytest.fixture
def words(run: Path, shards: Path, tmp_path: Path) -> list[str]:
    """The command without a mode; it writes the score to score.json."""
    paths = {"data": shards, "sums": tmp_path / "sums", "json": tmp_path / "score.json"}
    options = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    return ["evaluate", str(run / "model.pgolf"), "--device=cpu", *options]


def score(tmp_path: Path, mode: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((tmp_path / "score.json").read_text())["scores"][mode]
    return found


def records(tmp_path: Path) -> int:
    """Return the number of sums on disk, without the lines that say what they are of."""
    return sum(max(f.read_bytes().count(b"\n") - 1, 0) for f in (tmp_path / "sums").glob("*.sums"))


def wait_for_records(process: "subprocess.Popen[str]", tmp_path: Path, count: int) -> None:
    until = time.monotonic() + 120
    while records(tmp_path) < count:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < until, "no sums in two minutes"
        time.sleep(0.02)


def without_sums(command: list[str]) -> list[str]:
    at = command.index("--sums")
    return command[:at] + command[at + 2 :]


def end(process: "subprocess.Popen[str]") -> tuple[str, str]:
    out, err = process.communicate(timeout=240)
    return out, err


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(WAYS))
def test_a_killed_evaluation_goes_on_and_gives_the_same_score(words, mode, tmp_path):
    command = [*words, f"--mode={mode}", *WAYS[mode]]
    for _ in range(2):
        process = start(command)
        wait_for_records(process, tmp_path, records(tmp_path) + 1)
        process.kill()
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


@pytest.mark.slow
def test_one_rank_goes_on_where_two_were_killed(words, tmp_path):
    command = [*words, "--mode=sliding", *WAYS["sliding"]]
    ranks = two_ranks(command)
    files = [tmp_path / "sums" / name for name in ("sliding.sums", "sliding.1.sums")]
    until = time.monotonic() + 120
    while not all(f.exists() and f.read_bytes().count(b"\n") > 1 for f in files):
        assert all(r.poll() is None for r in ranks) and time.monotonic() < until
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        end(rank)
    process = start(command)
    _, err = end(process)
    assert process.returncode == 0, err
    found = score(tmp_path, "sliding")
    end(start(without_sums(command)))
    assert found["kept"] > 0 and found["nats"] == score(tmp_path, "sliding")["nats"]


@pytest.mark.parametrize("kept", [True, False])
def test_a_signal_says_how_to_go_on(words, kept, tmp_path):
    command = [*words, "--mode=sliding", "--stride=1", "--tokens=128"]
    process = start(command if kept else without_sums(command))
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("sliding, stride 1:"):
            break
    process.send_signal(signal.SIGTERM)
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
