"""`pgolf artifact`: what is said about a file is true, and the exported weights are the stored ones."""

import hashlib
import json

import pytest
import torch
from artifact_helpers import CONFIG, FACTS
from safetensors import safe_open

from pgolf.artifact.export import describe, export_artifact
from pgolf.artifact.header import ArtifactError
from pgolf.artifact.write import write_artifact
from pgolf.cli.main import main
from pgolf.quant.quantized import dequantize_state


@pytest.fixture
def path(tmp_path, state):
    write_artifact(tmp_path / "model.pgolf", state, CONFIG, **FACTS, limit=16_000_000, quality=1)
    return tmp_path / "model.pgolf"


def test_inspect_counts_and_hashes_every_byte(path, capsys):
    data = path.read_bytes()
    assert main(["artifact", "inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == json.loads(json.dumps(describe(path)))
    assert facts["bytes"] == len(data) and facts["sha256"] == data[-32:].hex()
    payload = data[len(data) - 32 - sum(s["length"] for s in facts["sections"]) : -32]
    for s in facts["sections"]:
        stream = payload[s["offset"] : s["offset"] + s["length"]]
        assert s["sha256"] == hashlib.sha256(stream).hexdigest()
    bank = next(t for t in facts["tensors"] if t["name"] == "qo_bank")
    stored = sum(s["length"] for s in facts["sections"] if s["name"].startswith("qo_bank."))
    assert bank["bytes"] == stored and bank["bits_per_weight"] == pytest.approx(
        8 * stored / bank["numel"], abs=1e-4
    )
    assert facts["model"]["width"] == CONFIG.width and facts["ledger"]["model"] == len(data)


def test_inspect_prints_parameters_and_sections(path, capsys):
    assert main(["artifact", "inspect", str(path)]) == 0
    text = capsys.readouterr().out
    for word in (
        "3 layers x 24",
        "mlp_up_bank.2",
        "q_gain",
        FACTS["config_hash"],
        path.read_bytes()[-32:].hex(),
    ):
        assert word in text


def test_export_holds_the_dequantized_parameters(path, state, tmp_path, capsys):
    out = tmp_path / "weights.safetensors"
    assert main(["artifact", "export", str(path), str(out)]) == 0
    assert f"{out.stat().st_size:,} bytes" in capsys.readouterr().out
    expected = dequantize_state(state)
    with safe_open(out, framework="pt") as file:
        assert set(file.keys()) == set(expected)
        assert all(torch.equal(file.get_tensor(name), expected[name]) for name in expected)
        metadata = file.metadata()
    assert json.loads(metadata["model"])["width"] == CONFIG.width
    assert metadata["tokenizer_sha256"] == FACTS["tokenizer_sha256"]


def test_bad_files_are_one_clear_line(path, tmp_path, capsys):
    assert main(["artifact", "inspect", str(tmp_path / "nothing")]) == 2
    assert "no artifact at" in capsys.readouterr().err
    for words in (
        ["inspect", str(path.parent)],
        ["export", str(path.parent), str(tmp_path / "w.safetensors")],
    ):
        assert main(["artifact", *words]) == 2
        assert f"{path.parent} is a folder, expected an artifact; pass {path}" in capsys.readouterr().err
    damaged = bytearray(path.read_bytes())
    damaged[-40] ^= 1
    path.write_bytes(damaged)
    for words in (["inspect", str(path)], ["export", str(path), str(tmp_path / "w.safetensors")]):
        assert main(["artifact", *words]) == 2
        error = capsys.readouterr().err
        assert f"{path}: artifact checksum does not match" in error and error.count("\n") == 1
    assert main(["artifact", "export", str(path), str(tmp_path / "w.bin")]) == 2
    assert "ends in .safetensors, got" in capsys.readouterr().err
    with pytest.raises(ArtifactError):
        export_artifact(path, tmp_path / "w.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pgolf"]
