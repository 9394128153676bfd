"""`pgolf size` on a preset, a configuration and a trained run."""

import json
import re

from pgolf.artifact.predict import predict_ledger
from pgolf.cli.main import main
from pgolf.cli.overrides import load_base


def total(text):
    return int(re.search(r"total +([0-9,]+) bytes", text)[1].replace(",", ""))


def test_prediction_of_a_trained_run_is_near_its_artifact(run):
    """Six steps on a width of 32: hardly the record, but its matrices are as random as any."""
    real = json.loads((run / "summary.json").read_text())["bytes"]
    config = load_base(str(run / "config.json"))
    scale, limit = real["clip_scale"], config.artifact.limit
    parts = dict(predict_ledger(config.model, config.quant, limit=limit, clip_scale=scale).parts)
    banks = {name for name in parts if name.endswith("bank")}
    assert len(banks) == 4
    for name in banks:
        assert abs(parts[name] - real["parts"][name]) < 0.02 * real["parts"][name], name
    assert abs(sum(parts.values()) - real["model"]) < 0.1 * real["model"]


def test_checkpoint_is_coded_for_real(run, capsys):
    assert main(["size", str(run)]) == 0
    folder = capsys.readouterr().out
    assert main(["size", str(run / "ema.safetensors"), "--quant.mlp-clip", "23"]) == 0
    wider = capsys.readouterr().out
    assert "rounded to nearest and coded" in folder
    assert total(wider) < total(folder)
    assert main(["size", str(run / "config.json"), "--artifact.limit", "50000"]) == 1
    assert "predicted" in capsys.readouterr().out


def test_bad_words_are_named(tmp_path, capsys):
    assert main(["size", "recrod"]) == 2
    assert "'recrod' is neither a preset" in capsys.readouterr().err
    assert main(["size", str(tmp_path)]) == 2
    assert "no checkpoint at" in capsys.readouterr().err
