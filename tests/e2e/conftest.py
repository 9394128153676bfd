"""Fixtures of the end-to-end tests: a small data folder and a small run."""

import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgolf.ablate import page
from pgolf.cli.main import main
from pgolf.data.text import iterate_documents, sample_paths
from pgolf.report import plots, watched_page
from pgolf.report.plots import why_no_plots
from pgolf.train.budget import Tick
from pgolf.train.position import Position
from pgolf.train.saver import Saver

DRAWING = (plots, watched_page, page)
"""Modules that ask `why_no_plots` before they draw."""

VAL_DOCUMENTS, VAL_TOKENS, VAL_BYTES = 10, 4_352, 8_125
"""Documents of `short_validation`, its tokens that are scored, and its bytes."""


def short_validation(folder: Path) -> Path:
    """Write a validation text: the beginnings of ten documents, because every run scores it three times."""
    path = folder / "val.jsonl"
    documents = itertools.islice(iterate_documents(sample_paths().val), VAL_DOCUMENTS)
    path.write_text("".join(json.dumps({"text": d.text[:1000]}) + "\n" for d in documents))
    return path


def make_shards(folder: Path) -> Path:
    """Return shards of the sample text with a tokenizer of 512 tokens, in a folder below `folder`."""
    sample = sample_paths()
    model, val = str(folder / "tokenizer.model"), short_validation(folder)
    assert (
        main(["data", "tokenizer", "--inputs", str(sample.val), "--vocab-size", "512", "--out", model]) == 0
    )
    split = ["--train", str(sample.train), "--val", str(val), "--tokenizer", model]
    assert main(["data", "shards", *split, "--out", str(folder / "shards")]) == 0
    return folder / "shards"


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("corpus"))


COMPILER = """#!{python} -IS
import hashlib, os, pathlib, shutil, subprocess, sys
if sys.argv[-3:-2] != ["-o"]:  # not the counted program, but torch.compile in the same process
    os.execvp({compiler!r}[0], [*{compiler!r}, *sys.argv[1:]])
*flags, _, out, source = sys.argv[1:]
known = hashlib.sha256(repr(flags).encode() + pathlib.Path(source).read_bytes()).hexdigest()
kept = pathlib.Path(__file__).with_name(known)
if not kept.exists():
    made = subprocess.run([*{compiler!r}, *flags, "-o", out, source])
    if made.returncode:
        sys.exit(made.returncode)
    shutil.copyfile(out, f"{{kept}}-{{os.getpid()}}")
    os.replace(f"{{kept}}-{{os.getpid()}}", kept)
shutil.copyfile(kept, out)
"""
"""A compiler that keeps what it made: every process of the counted program compiles the same coder."""


@pytest.fixture(scope="session", autouse=True)
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let CXX name a compiler that compiles each source once."""
    before, program = os.environ.get("CXX"), tmp_path_factory.mktemp("compiler") / "c++"
    program.write_text(COMPILER.format(python=sys.executable, compiler=(before or "g++").split()))
    program.chmod(0o755)
    os.environ["CXX"] = str(program)
    yield
    os.environ.pop("CXX")
    if before is not None:
        os.environ["CXX"] = before


@pytest.fixture(scope="session")
def without_matplotlib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that hides matplotlib when it is the first of Python's path."""
    folder = tmp_path_factory.mktemp("without_matplotlib")
    (folder / "matplotlib.py").write_text("raise ImportError('left out of this test')\n")
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_plots(without_matplotlib: Path) -> Iterator[None]:
    """Let all runs but `run` draw nothing, here and in other processes: drawing takes a third of one."""
    with pytest.MonkeyPatch.context() as patch:
        for module in DRAWING:
            patch.setattr(module, "why_no_plots", lambda: "left out of this test")
        patch.setenv("PYTHONPATH", f"{without_matplotlib}{os.pathsep}{os.environ['PYTHONPATH']}")
        yield


@pytest.fixture
def saved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each checkpoint of a run in this process be whole before its next step, however slow the disk."""
    attend = Saver.attend

    def at_once(self: Saver, tick: Tick, place: Position) -> None:
        attend(self, tick, place)
        self.finish()

    monkeypatch.setattr(Saver, "attend", at_once)


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
    "--quant.gradient-batches=2",
    "--seconds=0",
    "--steps=6",
]
"""Changes to the preset `tiny` for a run of a few seconds."""


@pytest.fixture(scope="session")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished small run, with its plots."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for module in DRAWING:
            patch.setattr(module, "why_no_plots", why_no_plots)
        assert main(["train", "tiny", "--data", str(shards), "--out", str(out), *SMALL]) == 0
    (folder,) = out.iterdir()
    return folder
