"""The commands of bench/headline.sh at any number of GPUs; a stand-in for Python only notes them."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "headline.sh"
STAND_IN = """#!/bin/sh
if [ "$1" = -c ]; then echo "$GPUS"; exit; fi
echo "$*" >> "$OUT/calls"
case "$*" in *train*--seconds*) mkdir -p "$OUT/runs/one";; esac
"""


def calls(tmp_path: Path, gpus: int) -> list[str]:
    """Run the script and return the commands it gave to Python."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    tools = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "OUT": str(tmp_path), "GPUS": str(gpus)}
    words = [str(SCRIPT), str(tmp_path), "600", "val.jsonl", "a.jsonl", "b.jsonl"]
    done = subprocess.run(
        ["bash", *words], capture_output=True, text=True, check=False, env=os.environ | tools
    )
    assert done.returncode == 0, done.stderr
    return (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_the_run_uses_the_gpus_that_torch_sees(tmp_path, gpus):
    tokenizer, shards, train, lines = calls(tmp_path, gpus)
    assert tokenizer.startswith("-m pgolf data tokenizer --inputs a.jsonl b.jsonl")
    # A manifest is written last: shards without one were not finished, and must not stop the next attempt.
    assert "--train a.jsonl b.jsonl --val val.jsonl" in shards and shards.endswith("--overwrite")
    launch = "-m torch.distributed.run --standalone --nproc_per_node=8 " if gpus == 8 else ""
    assert train.startswith(f"{launch}-m pgolf train record --data {tmp_path}/shards --seconds 600")
    assert lines.endswith(f"--case record_600s_{gpus}gpu")


def test_a_finished_folder_is_used_again(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "manifest.json").touch()
    (tmp_path / "tokenizer.model").touch()
    assert [line.split()[2] for line in calls(tmp_path, 1)[:1]] == ["train"]
