"""A small corpus and a small run, made once for the end-to-end tests."""

from pathlib import Path

import pytest

from pgolf.cli.main import main
from pgolf.data.text import sample_paths


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the bundled sample with a 512-piece tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    train, val = (str(p) for p in sample_paths())
    model = str(folder / "tokenizer.model")
    assert main(["data", "tokenizer", "--inputs", val, "--vocab-size", "512", "--out", model]) == 0
    # The small validation text serves as training text too: two files, no shared document, quick to encode.
    split = ["--train", train, "--val", val, "--tokenizer", model, "--out", str(folder / "shards")]
    assert main(["data", "shards", *split]) == 0
    return folder / "shards"


SMALL = [
    "--model.vocab-size=512",
    "--model.width=32",
    "--model.layers=3",
    "--model.heads=2",
    "--model.kv-heads=1",
    "--model.rope-dims=4",
    "--model.xsa-layers=3",
    "--model.parallel-from=2",
    "--model.recurrence-start=1",
    "--model.recurrence-end=1",
    "--model.max-context=64",
    "--data.batch-tokens=2048",
    "--data.micro-tokens=512",
    "--quant.calibration-batches=2",
    "--seconds=0",
    "--steps=6",
]
"""Overrides of `tiny` that make a run of a few seconds."""


@pytest.fixture(scope="session")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished small run."""
    out = tmp_path_factory.mktemp("runs")
    assert main(["train", "tiny", "--data", str(shards), "--out", str(out), *SMALL]) == 0
    (folder,) = out.iterdir()
    return folder
