"""bench/headline.sh: its commands for several numbers of GPUs, recorded by a fake Python; and a tiny run."""

import itertools
import json
import os
import subprocess
from pathlib import Path

import pytest

from pgolf.data.text import iterate_documents, sample_paths
from tests import forks
from tests.e2e.conftest import SMALL

SCRIPT = Path(__file__).parents[2] / "bench" / "headline.sh"
STAND_IN = """#!/bin/sh
if [ "$1" = -c ]; then echo "$GPUS" 8192; exit; fi
echo "$*" >> "$OUT/calls"
case "$*" in *train*--seconds*)
  mkdir -p "$OUT/runs/one"
  [ -z "$FAILS" ] && touch "$OUT/runs/one/summary.json"
  exit "${STATUS:-0}";;
esac
case "$*" in *"data shards"*) mkdir -p "$OUT/shards";; esac
"""


def script(words: list[str], folder: Path, status: int = 0, **tools: str) -> str:
    """Run the script in a folder and return what it wrote to stderr."""
    done = subprocess.run(
        ["bash", str(SCRIPT), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | tools,
    )
    assert done.returncode == status, done.stderr[-2000:]
    return done.stderr


def calls(tmp_path: Path, gpus: int, **settings: str) -> list[str]:
    """Run the script and return the commands that it gave to Python."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    tools = {"PATH": "/usr/bin:/bin", "PYTHON": "./python", "OUT": str(tmp_path), "GPUS": str(gpus)}
    script([".", "600", "val.jsonl", "a.jsonl", "b.jsonl"], tmp_path, **tools, **settings)
    return (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize("gpus", [0, 1, 2, 4, 8])
def test_the_run_uses_the_gpus_that_torch_sees(tmp_path, gpus):
    tokenizer, shards, train, lines, record = calls(tmp_path, gpus)
    # Relative paths are meant from where the script is called, and it works in the repository.
    train_text = f"{tmp_path}/a.jsonl {tmp_path}/b.jsonl"
    assert tokenizer.startswith(f"-m pgolf data tokenizer --inputs {train_text} --vocab-size 8192")
    # A manifest is written last: shards without one were not finished, and must not stop the next attempt.
    assert f"--train {train_text} --val {tmp_path}/val.jsonl" in shards and shards.endswith("--overwrite")
    launch = f"-m torch.distributed.run --standalone --nproc_per_node={gpus} " if gpus > 1 else ""
    command = f"{launch}-m pgolf train pr1855 --data {tmp_path}/shards --seconds 600 --out {tmp_path}/runs"
    assert train == command
    assert f"--case record_600s_{gpus}gpu --out {SCRIPT.parent}/results" in lines
    assert record.startswith(f"-m pgolf submit {tmp_path}/runs/one/ --out {tmp_path}/submission --overwrite")
    assert "--prepare-seconds" in record


def test_a_finished_folder_is_used_again(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "manifest.json").touch()
    found = calls(tmp_path, 1)
    assert [line.split()[2] for line in found[:1]] == ["train"]
    assert "--prepare-seconds" not in found[-1], "nothing was prepared, or nobody knows how long it took"


def test_a_run_that_overran_its_clock_is_complete_and_one_that_failed_ends_the_script(tmp_path):
    found = calls(tmp_path, 1, SEEDS="42 43", STATUS="3")
    assert sum("bench.run" in line for line in found) == 2 and " submit " in found[-1]
    (tmp_path / "runs" / "one" / "summary.json").unlink()
    tools = {"PATH": "/usr/bin:/bin", "PYTHON": "./python", "OUT": str(tmp_path), "GPUS": "1"}
    told = script(
        [".", "600", "val.jsonl", "a.jsonl"], tmp_path, 2, SEEDS="42 43", STATUS="2", FAILS="1", **tools
    )
    assert "the run of seed 42 ended with status 2; go on with pgolf train --resume" in told


def test_an_interpreter_without_the_package_is_named(tmp_path):
    told = script([".", "600", "val.jsonl", "a.jsonl"], tmp_path, 2, PYTHON="/usr/bin/python3")
    assert "/usr/bin/python3 has no pgolf: name the interpreter of its environment" in told


def test_settings_reach_the_runs_and_the_record(tmp_path):
    found = calls(tmp_path, 1, SEEDS="42 43", TTT="1", EXTRA="--train.compile off", SUBMIT="--author me")
    trained = [line for line in found if " train " in line]
    assert [line.split("--evaluate.ttt")[1] for line in trained] == [
        f" --seed {seed} --train.compile off" for seed in (42, 43)
    ]
    assert [line.split("--case ")[1].split()[0] for line in found if "bench.run" in line] == [
        f"record_600s_1gpu_seed{seed}" for seed in (42, 43)
    ]
    assert found[-1].count("runs/one/") == 2 and found[-1].endswith("--author me")


@pytest.mark.slow
def test_from_text_to_a_record_on_this_machine(tmp_path):
    train, val = sample_paths().train, tmp_path / "val.jsonl"
    documents = itertools.islice(iterate_documents(sample_paths().val), 3)
    val.write_text("".join(json.dumps({"text": d.text[:2000]}) + "\n" for d in documents))
    small = [word for word in SMALL if not word.startswith(("--seconds", "--model.vocab-size"))]
    adapters = [f"--evaluate.adapters.{word}" for word in ("rank=2", "chunk=64", "batch-tokens=8192")]
    script(
        [str(tmp_path), "120", str(val), str(train)],
        tmp_path,
        PRESET="tiny",
        SEEDS="7 8",
        TTT="1",
        EXTRA=" ".join([*small, *adapters, "--train.device=cpu", "--steps=2"]),
        RESULTS=str(tmp_path / "results"),
        SUBMIT="--author Somebody --date 2026-01-02",
        PYTHON=str(forks.interpreter(tmp_path)),
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",
    )
    data = json.loads((tmp_path / "submission" / "submission.json").read_text())
    assert data["seeds"] == [7, 8] and data["headline_score"] == "ttt" and data["author"] == "Somebody"
    assert "Making tokenizer and shards, before, took" in (tmp_path / "submission" / "README.md").read_text()
    assert len(list((tmp_path / "results").iterdir())) == 2
