"""`pgolf size` on a preset, a configuration and a trained run."""

import json
import re

import pytest

from pgolf.artifact.code import code_bytes
from pgolf.artifact.predict import TRAINED, predict_ledger
from pgolf.artifact.read import read_state
from pgolf.artifact.size import make_ledger
from pgolf.cli.main import main
from pgolf.cli.overrides import load_base
from pgolf.config import QuantConfig


def total(text):
    return int(re.search(r"total +([0-9,]+) bytes", text)[1].replace(",", ""))


SPREAD = [
    "--quant.row-scales=spread",
    "--quant.no-column-scales",
    "--quant.matrix-bits=6",
    "--quant.embed-bits=7",
    "--quant.rate=0",
    "--quant.calibration-batches=2",
]


def test_prediction_of_an_artifact_with_steps_by_spread_is_near(run, shards, tmp_path):
    """Six steps at width 32: the matrices are almost random, and have no similar rows as after long training.

    Steps by loss give such a model bits as its few gradients say; those of `pr1855` are in test_predict.
    """
    checkpoint, out = str(run / "ema.safetensors"), tmp_path / "spread.pgolf"
    where = ["--data", str(shards), "--out", str(out), "--artifact.no-fit"]
    assert main(["quantize", checkpoint, *where, *SPREAD]) == 0
    real = make_ledger(read_state(out)[0], file_bytes=out.stat().st_size)
    config = load_base(str(run / "config.json"))
    spread = QuantConfig(row_scales="spread", column_scales=False, matrix_bits=6, embed_bits=7, rate=0.0)
    parts = dict(predict_ledger(config.model, spread, limit=config.artifact.limit).parts)
    banks = {name for name in parts if name.endswith("bank")}
    assert len(banks) == 4
    for name in banks:
        gaussian = parts[name] / TRAINED.get(name, 1.0)
        assert abs(gaussian - dict(real.parts)[name]) < 0.02 * dict(real.parts)[name], name
    assert abs(sum(parts.values()) - real.model_bytes) < 0.1 * real.model_bytes


def test_a_run_has_the_bytes_that_it_wrote(run, capsys):
    said = json.loads((run / "summary.json").read_text())["bytes"]
    for name in (run, run / "model.pgolf"):
        assert main(["size", str(name)]) == 0
        text = capsys.readouterr().out
        assert "as it was written" in text
        assert total(text) == said["total"] == (run / "model.pgolf").stat().st_size + said["code"]


def test_one_command_says_what_every_coder_takes(run, capsys):
    assert main(["size", str(run), "--coders"]) == 0
    first, head, *rows = capsys.readouterr().out.splitlines()
    assert "written with range" in first and head.split() == ["coder", "codes", "file", "code", "total"]
    found = {row.split()[0]: [int(n.replace(",", "")) for n in row.split()[1:]] for row in rows}
    assert list(found) == ["range", "brotli", "lzma", "zlib"]
    sizes = dict(make_ledger(read_state(run / "model.pgolf")[0], file_bytes=0).parts)
    names = [name for name in sizes if name.endswith("bank") or name == "tok_emb"]
    assert found["range"][0] == sum(sizes[name] for name in names)
    assert found["range"][1] == (run / "model.pgolf").stat().st_size
    for coder, (codes, file, code, whole) in found.items():
        assert whole == file + code and code == code_bytes(coder)
        assert file - codes < found["range"][1] - found["range"][0] + 100


@pytest.mark.parametrize("words", [["tiny"], [], ["ema"], ["run", "--artifact.limit", "100"]])
def test_coders_are_compared_for_an_artifact_alone(run, words, capsys):
    paths = {"ema": run / "ema.safetensors", "run": run}
    assert main(["size", *(str(paths.get(word, word)) for word in words), "--coders"]) == 2
    said = capsys.readouterr().err
    assert "expected an artifact or the folder of a finished run and no setting, got" in said


def test_estimates_are_of_the_coder_that_is_set(run, capsys):
    for words in (["tiny"], [str(run / "ema.safetensors"), "--artifact.no-fit"]):
        totals = []
        for coder in ("range", "zlib"):
            assert main(["size", *words, "--artifact.coder", coder]) == 0
            totals.append(total(capsys.readouterr().out))
        assert totals[0] - code_bytes("range") < totals[1] - code_bytes("zlib")
    with pytest.raises(SystemExit) as ended:
        main(["size", "tiny", "--artifact.coder", "lrzip"])
    assert ended.value.code == 2 and "lrzip" in capsys.readouterr().err


def test_a_damaged_artifact_has_no_size(run, tmp_path, capsys):
    data = bytearray((run / "model.pgolf").read_bytes())
    data[-40] ^= 1
    (tmp_path / "a.pgolf").write_bytes(data)
    assert main(["size", str(tmp_path / "a.pgolf")]) == 2
    assert "checksum" in capsys.readouterr().err


def test_the_estimate_of_a_checkpoint_follows_the_fit(run, capsys):
    """The prediction used the configured scales, although the fit had changed them, and was wrong by 16 %."""
    said = json.loads((run / "summary.json").read_text())["bytes"]
    assert said["clip_scale"] == 0.5
    assert main(["size", str(run / "ema.safetensors")]) == 0
    text = capsys.readouterr().out
    assert "an estimate" in text and "multiplies the scales by 0.500" in text
    assert "too small to fill the limit" in text
    assert total(text) == pytest.approx(said["total"], rel=0.1)
    assert main(["size", str(run), "--quant.mean-bits", "2.5"]) == 0
    assert total(capsys.readouterr().out) < total(text)
    assert main(["size", str(run), "--artifact.no-fit"]) == 0
    assert total(capsys.readouterr().out) < total(text)


def test_what_fit_would_bring_below_the_limit_is_no_error(capsys):
    """With these settings the codes take more bits than fit, but the scales are changed until they fit."""
    assert main(["size", "pr1855", "--quant.mean-bits", "3.6"]) == 0
    text = capsys.readouterr().out
    says = r"16,\d{3},\d{3} bytes at these settings; artifact.fit multiplies the scales by 1.0\d+"
    assert re.search(says, text)
    assert 15_984_000 <= total(text) <= 16_000_000
    assert main(["size", "pr1855", "--quant.mean-bits", "3.6", "--artifact.no-fit"]) == 1
    assert "bytes too many" in capsys.readouterr().out


def test_limits_that_nothing_fits_in(run, capsys):
    config = str(run / "config.json")
    assert main(["size", config, "--artifact.limit", str(code_bytes() + 3000)]) == 1
    assert "bytes too many" in capsys.readouterr().out
    for words in (["size", config], ["config", "tiny"], ["train", "tiny", "--data", "nowhere"]):
        assert main([*words, "--artifact.limit", "20000"]) == 2
        assert "which the counted code alone takes, got 20,000" in capsys.readouterr().err


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


def test_the_code_of_an_older_run_is_counted_by_its_own_rule(run, tmp_path, capsys):
    (tmp_path / "model.pgolf").write_bytes((run / "model.pgolf").read_bytes())
    for name, words in (
        ("code.br", "extension (which this code needs)"),
        ("train_gpt.py", "the whole of one"),
    ):
        (tmp_path / name).write_bytes(bytes(12_345))
        assert main(["size", str(tmp_path / "model.pgolf")]) == 0
        text = capsys.readouterr().out
        assert "12,345 bytes" in text and words in text
