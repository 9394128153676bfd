"""`train_gpt.py` in an empty folder: one file trains, quantizes, writes and scores, without pgolf."""

import json
from pathlib import Path

import pytest
import torch

from pgolf.artifact.code import TRAIN, code_program, code_text, unpack_code
from pgolf.artifact.read import load_model, read_state
from pgolf.cli.main import main
from pgolf.dist import Dist
from pgolf.evaluate.validation import DataFolder, score_model
from tests.e2e.conftest import SMALL
from tests.e2e.test_code import bare


@pytest.fixture(scope="module")
def trained(run: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of train_gpt.py with the settings of the package's run."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / TRAIN.name).write_bytes(code_program(TRAIN))
    words = ["--data", str(shards), "--config", str(run / "config.json"), "--out", "runs"]
    done = bare(TRAIN.name, *words, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p.name for p in folder.iterdir()} == {TRAIN.name, "runs"}
    (made,) = (folder / "runs").iterdir()
    return made


def assert_alike(run: Path, trained: Path) -> None:
    """Six steps of the program and of the package have the same losses and gradients."""
    ours, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, trained)
    )
    assert len(ours) == len(theirs) == 6
    for a, b in zip(ours, theirs, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-3), a["step"]
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=0.02), a["step"]


def test_it_trains_as_the_package_does(trained, run):
    assert_alike(run, trained)


def test_it_makes_steps_ahead_of_the_weights_as_best_1gpu_does(run, shards, tmp_path):
    ahead = ["--optim.ema-nesterov=0.6", "--optim.ema-nesterov-from=0", "--optim.ema-nesterov-horizon=0.3"]
    words = ["--data", str(shards), *SMALL, *ahead, "--train.no-quantize"]
    assert main(["train", "tiny", *words, "--out", str(tmp_path / "package")]) == 0
    (package,) = (tmp_path / "package").iterdir()
    (tmp_path / TRAIN.name).write_bytes(code_program(TRAIN))
    words = ["--data", str(shards), "--config", str(package / "config.json"), "--out", "program"]
    done = bare(TRAIN.name, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (program,) = (tmp_path / "program").iterdir()
    assert_alike(package, program)
    last, plain = (json.loads((f / "metrics.jsonl").read_text().splitlines()[-1]) for f in (package, run))
    assert abs(last["loss"] - plain["loss"]) > 0.01


def test_its_file_counts_and_is_kept_with_the_run(trained):
    program = code_program(TRAIN)
    assert (trained / TRAIN.name).read_bytes() == program
    counted = json.loads((trained / "summary.json").read_text())["bytes"]
    assert counted["code"] == len(program)
    assert counted["total"] == len(program) + (trained / "model.pgolf").stat().st_size


def test_the_package_scores_its_artifact_alike(trained, shards, one_thread):
    model = load_model(trained / "model.pgolf", "cpu")
    folder = DataFolder.open(shards, vocab_size=model.config.vocab_size)
    found = score_model(model, folder, 512, Dist.start("cpu")).bpb
    scores = json.loads((trained / "summary.json").read_text())["scores"]
    assert scores["quantized"]["bpb"] == pytest.approx(found, abs=1e-6)


def test_it_scores_what_it_wrote_and_is_submitted(trained, shards, tmp_path):
    assert main(["submit", str(trained), "--out", str(tmp_path / "out"), "--data", str(shards)]) == 0
    out = tmp_path / "out"
    assert (out / TRAIN.name).read_bytes() == code_program(TRAIN)
    assert f"python {TRAIN.name} --evaluate model_seed" in (out / "README.md").read_text()
    (model,) = out.glob("model_seed*.pgolf")
    done = bare(TRAIN.name, "--evaluate", model.name, "--data", str(shards), cwd=out)
    assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads((trained / "summary.json").read_text())["scores"]
    assert float(done.stdout.split()[0]) == pytest.approx(scores["quantized"]["bpb"], abs=1e-6)


WRITE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from pgolf.artifact.read import read_state
from pgolf.artifact.write import write_artifact
header, state = read_state(Path(sys.argv[2]))
facts = {"tokenizer_sha256": header.tokenizer_sha256, "config_hash": header.config_hash}
write_artifact(Path(sys.argv[3]), state, header.model, **facts, limit=header.limit, coder="zlib")
"""


def test_it_writes_and_reads_a_general_compressor_as_the_package_does(run, tmp_path):
    unpack_code(code_text(TRAIN), tmp_path / "code")
    (tmp_path / TRAIN.name).write_text(WRITE)  # the main module's file is what it counts
    arguments = [str(tmp_path / "code"), str(run / "model.pgolf"), str(tmp_path / "a")]
    done = bare(TRAIN.name, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    header, state = read_state(tmp_path / "a")
    assert header.coder == "zlib"
    for name, t in read_state(run / "model.pgolf")[1].quantized.items():
        assert torch.equal(state.quantized[name].codes, t.codes)


def test_what_a_user_can_cause_is_one_sentence(run, tmp_path):
    (tmp_path / TRAIN.name).write_bytes(code_program(TRAIN))
    done = bare(TRAIN.name, "--data", "absent", "--config", str(run / "config.json"), cwd=tmp_path)
    assert done.returncode == 2 and "no data folder at absent" in done.stderr
    assert "Traceback" not in done.stderr
