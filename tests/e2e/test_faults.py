"""Faults of the program inside a run: who prints the traceback, and what is left in the log.

And mistakes of the user that only a run, or what it wrote, can show: one line each.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from pgolf.cli.main import main
from pgolf.train.trainer import Trainer
from pgolf.train.weights import load_weights, save_weights
from tests.e2e.conftest import SMALL
from tests.forks import Forked
from tests.ranks import meeting_place

PROGRAM = """
import os, sys
from pgolf import watch
from pgolf.evaluate import predictor
from pgolf.train import setup, trainer
from pgolf.cli.main import main

def fail(*arguments, **settings):
    raise TypeError("a fault that was put here")

watch.GRACE_S = 200.0  # the main thread ends each rank, however long the other one takes on a busy machine
if os.environ["RANK"] == sys.argv[1]:
    places = {"setup": setup, "trainer": trainer.Trainer, "predictor": predictor}
    setattr(places[sys.argv[2]], sys.argv[3], fail)
sys.exit(main(sys.argv[4:]))
"""


def two_ranks(victim: int, where: str, name: str, words: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """Run `pgolf` on two gloo ranks, of which one has a function that fails; return how each ended."""
    place = meeting_place(2) | {"OMP_NUM_THREADS": "1"}
    ranks = [
        Forked(
            ["-c", PROGRAM, str(victim), where, name, *words],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    ended = [rank.communicate(timeout=240) for rank in ranks]
    return [
        subprocess.CompletedProcess(rank.args, rank.returncode, *said)
        for rank, said in zip(ranks, ended, strict=True)
    ]


def words(shards: Path, out: Path) -> list[str]:
    return ["train", "tiny", "--data", str(shards), "--out", str(out), *SMALL, "--train.device=cpu"]


def pgolf_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("pgolf train: ")]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_fault_of_one_rank_is_traced_there_and_told_in_a_line_by_the_other(shards, tmp_path, victim):
    ranks = two_ranks(victim, "trainer", "_accumulate", words(shards, tmp_path))
    assert [rank.returncode for rank in ranks] == [2, 2]
    guilty, other = ranks[victim].stderr, ranks[1 - victim].stderr
    assert "Traceback (most recent call last)" in guilty and "in fail" in guilty
    assert "TypeError: a fault that was put here" in guilty and "This is a fault of pgolf" in guilty
    assert "Traceback" not in other
    # Rank 0 speaks for those who only know of the failure.
    if victim == 1:
        (line,) = pgolf_lines(other)
        assert "rank 1 failed: TypeError: a fault that was put here (<string>:" in line
    else:
        assert pgolf_lines(other) == []
    (folder,) = tmp_path.iterdir()
    log = (folder / "log.txt").read_text()
    assert re.search(r"failed during warm_up: .*TypeError: a fault that was put here \(<string>:\d+\)", log)
    assert ("Traceback" in log) == (victim == 0), "the rank that writes the log has the whole of it"


def test_a_fault_while_a_rank_is_set_up_ends_both_and_leaves_no_folder(shards, tmp_path):
    ranks = two_ranks(1, "setup", "find_shards", words(shards, tmp_path / "runs"))
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "in fail" in ranks[1].stderr and "TypeError: a fault that was put here" in ranks[1].stderr
    assert "Traceback" not in ranks[0].stderr
    (line,) = pgolf_lines(ranks[0].stderr)
    assert line.startswith("pgolf train: rank 1 failed: TypeError: a fault that was put here (<string>:")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_fault_of_one_rank_in_scoring_is_told_in_a_line_by_the_other(run, shards, victim):
    words = ["evaluate", str(run / "model.pgolf"), "--data", str(shards), "--tokens=640", "--device=cpu"]
    ranks = two_ranks(victim, "predictor", "_teach", words)
    assert [rank.returncode for rank in ranks] == [2, 2]
    guilty, other = ranks[victim].stderr, ranks[1 - victim].stderr
    assert "TypeError: a fault that was put here" in guilty and "This is a fault of pgolf" in guilty
    assert f"rank {victim} failed: TypeError: a fault that was put here" in other
    assert "Traceback" not in other and "This is a fault of pgolf" not in other


def test_want_of_memory_in_a_run_names_the_flag_in_one_line(shards, tmp_path, monkeypatch, capsys):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of")

    monkeypatch.setattr(Trainer, "_accumulate", full)
    assert main(words(shards, tmp_path)) == 2
    advice = "(CUDA out of memory. Tried to allocate 2.00 GiB); pass a smaller --data.micro-tokens"
    said = capsys.readouterr().err
    assert said.endswith(f"pgolf train: there is not enough memory for it {advice}\n") and "Trace" not in said
    (folder,) = tmp_path.iterdir()
    log = (folder / "log.txt").read_text()
    assert f"failed during warm_up: there is not enough memory for it {advice}\n" in log
    assert "Traceback" not in log


def test_an_algorithm_that_the_device_lacks_is_refused_before_the_run(capsys, shards, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a Hopper GPU")
    words = ["--data", str(shards), "--out", str(tmp_path / "runs"), "--model.vocab-size=512"]
    assert main(["train", "tiny", *words, "--optim.muon.algorithm=gram"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("pgolf train: optim.muon.algorithm=gram needs a Hopper GPU")
    assert said.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_weights_that_are_not_finite_are_refused_by_size(capsys, run, tmp_path):
    tensors, config, facts = load_weights(run / "ema.safetensors")
    tensors["qo_bank"][0, 0, 0] = float("nan")
    save_weights(tmp_path / "nan.safetensors", tensors, config, **facts)
    assert main(["size", str(tmp_path / "nan.safetensors")]) == 2
    said = capsys.readouterr().err
    assert "holds NaN or infinity; training diverged" in said and said.count("\n") == 1
