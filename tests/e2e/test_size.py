"""`pgolf size` on a preset, a configuration and a trained run."""

import re

from pgolf.artifact.predict import TRAINED, predict_ledger
from pgolf.artifact.read import read_state
from pgolf.artifact.size import make_ledger
from pgolf.cli.main import main
from pgolf.cli.overrides import load_base
from pgolf.config import QuantConfig


def total(text):
    return int(re.search(r"total +([0-9,]+) bytes", text)[1].replace(",", ""))


SPREAD = [
    "--quant.row-steps=spread",
    "--quant.no-column-steps",
    "--quant.matrix-bits=6",
    "--quant.embed-bits=7",
    "--quant.rate=0",
    "--quant.calibration-batches=2",
]


def test_prediction_of_an_artifact_with_steps_by_spread_is_near(run, shards, tmp_path):
    """Six steps on a width of 32: matrices as random as any, without what long training makes alike.

    Steps by loss give such a model bits as its few gradients say; those of `record` are in test_predict.
    """
    checkpoint, out = str(run / "ema.safetensors"), tmp_path / "spread.pgolf"
    where = ["--data", str(shards), "--out", str(out), "--artifact.no-fit"]
    assert main(["quantize", checkpoint, *where, *SPREAD]) == 0
    real = make_ledger(read_state(out)[0], file_bytes=out.stat().st_size)
    config = load_base(str(run / "config.json"))
    spread = QuantConfig(row_steps="spread", column_steps=False, matrix_bits=6, embed_bits=7, rate=0.0)
    parts = dict(predict_ledger(config.model, spread, limit=config.artifact.limit).parts)
    banks = {name for name in parts if name.endswith("bank")}
    assert len(banks) == 4
    for name in banks:
        gaussian = parts[name] / TRAINED.get(name, 1.0)
        assert abs(gaussian - dict(real.parts)[name]) < 0.02 * dict(real.parts)[name], name
    assert abs(sum(parts.values()) - real.model_bytes) < 0.1 * real.model_bytes


def test_checkpoint_is_coded_for_real(run, capsys):
    assert main(["size", str(run)]) == 0
    folder = capsys.readouterr().out
    assert main(["size", str(run / "ema.safetensors"), "--quant.mean-bits", "2.5"]) == 0
    coarser = capsys.readouterr().out
    assert "rounded to nearest and coded" in folder
    assert total(coarser) < total(folder)
    assert main(["size", str(run / "config.json"), "--artifact.limit", "40000"]) == 1
    assert "predicted" in capsys.readouterr().out


def test_a_folder_does_not_hide_the_preset_of_its_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["size", "tiny"]) == 0
    assert "predicted" in capsys.readouterr().out


def test_bad_words_are_named(tmp_path, capsys):
    assert main(["size", "recrod"]) == 2
    assert "'recrod' is neither a preset" in capsys.readouterr().err
    assert main(["size", str(tmp_path)]) == 2
    assert "no checkpoint at" in capsys.readouterr().err
