"""A run on CaseOps shards: trained, scored in the original bytes, and generating text with upper case."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pgolf import _C
from pgolf.cli.main import main
from pgolf.data.shards import list_files
from pgolf.data.text import sample_paths
from pgolf.report.summary import Summary
from tests.e2e.conftest import SMALL, VAL_BYTES, short_validation


@pytest.fixture(scope="module")
def cased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards in the form of CaseOps, with marker pairs, in a folder as other tools make it."""
    folder = tmp_path_factory.mktemp("corpus")
    train, val = (str(p) for p in sample_paths())
    model, out = str(folder / "tokenizer.model"), folder / "shards"
    words = ["--inputs", val, "--vocab-size", "512", "--out", model, "--caseops", "--marker-pairs"]
    assert main(["data", "tokenizer", *words]) == 0
    words = [
        "--train",
        train,
        "--val",
        str(short_validation(folder)),
        "--tokenizer",
        model,
        "--out",
        str(out),
        "--shard-tokens",
        "99999",
    ]
    assert main(["data", "shards", *words]) == 0
    (out / "manifest.json").unlink()
    (out / "tokenizer.model").rename(out / "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model")
    return out


@pytest.fixture(scope="module")
def cased_run(cased: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    assert main(["train", "tiny", "--data", str(cased), "--out", str(out), *SMALL]) == 0
    (folder,) = out.iterdir()
    return folder


def test_every_score_counts_the_bytes_of_the_original_text(
    cased: Path, cased_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = Summary.load(cased_run / "summary.json").scores
    assert {score.bytes for score in scores.values()} == {VAL_BYTES}
    found = tmp_path / "found.json"
    words = [str(cased_run / "model.pgolf"), "--data", str(cased), "--json", str(found)]
    assert main(["evaluate", *words]) == 0
    (score,) = json.loads(found.read_text())["scores"].values()
    assert score["bytes"] == VAL_BYTES
    assert score["bpb"] == pytest.approx(scores["quantized"].bpb, rel=1e-6)
    assert score["bpb"] == pytest.approx(score["nats"] / math.log(2) / VAL_BYTES)
    assert main(["data", "inspect", str(cased)]) == 0
    assert f"{VAL_BYTES:,} bytes" in capsys.readouterr().out


def test_the_counted_code_scores_caseops_shards(cased: Path, tmp_path: Path) -> None:
    folder = tmp_path / "code"
    assert main(["artifact", "code", str(folder)]) == 0
    extension = Path(_C.__file__)
    (folder / "pgolf" / extension.name).symlink_to(extension)
    program = """if True:
        import sys
        from pathlib import Path
        from pgolf.evaluate.validation import DataFolder
        data = DataFolder.open(Path(sys.argv[1]), vocab_size=512)
        print(data.tokenizer.caseops, data.tokenizer.lossless, data.validation().bytes.sum())
    """
    done = subprocess.run(
        [sys.executable, "-c", program, str(cased)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["True", "True", str(VAL_BYTES)], done.stderr[-2000:]


def test_generated_text_has_no_operators(cased_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(cased_run), "--prompt", "The NASA iPhone", "--tokens", "200", "--device", "cpu"]
    assert main([*words, "--temperature", "2", "--top-p", "1"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("The NASA iPhone")
    assert not set("\ue001\ue002\ue003\ue004") & set(text)
    assert any(c.isupper() for c in text[len("The NASA iPhone") :]), "operators were drawn and applied"


@pytest.mark.parametrize("verb", ["train", "evaluate", "quantize", "inspect"])
def test_every_verb_refuses_a_sidecar_of_other_data(
    cased: Path, cased_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    folder = Path(shutil.copytree(cased, tmp_path / "shards"))
    (shard,) = list_files(folder, "val")
    (side,) = list_files(folder, "val_bytes")
    shutil.copyfile(shard, side)
    out = str(tmp_path / "out")
    words = {
        "train": ["train", "tiny", "--data", str(folder), "--out", out, *SMALL],
        "evaluate": ["evaluate", str(cased_run / "model.pgolf"), "--data", str(folder)],
        "quantize": ["quantize", str(cased_run / "raw.safetensors"), "--data", str(folder), "--out", out],
        "inspect": ["data", "inspect", str(folder)],
    }[verb]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"{side.name}: 1 bytes at position 0 for BOS, which stands for no text" in said
    assert said.count("\n") == 1
