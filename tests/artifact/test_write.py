import os
from pathlib import Path

import pytest
import torch
from artifact_helpers import CONFIG, FACTS, make_state

from pgolf.artifact.code import code_bytes
from pgolf.artifact.header import ArtifactError
from pgolf.artifact.read import read_artifact
from pgolf.artifact.size import Ledger, check, make_ledger
from pgolf.artifact.write import write_artifact
from pgolf.quant.grid import QuantizedTensor
from pgolf.quant.quantized import QuantizedState

OTHERS = {"scales", "centers", "exponents", "gates", "small", "corrections", "correction_scales", "header"}


def write(path, state, *, limit=16_000_000):
    return write_artifact(path, state, CONFIG, **FACTS, limit=limit, quality=1)


def test_over_the_limit_is_refused_with_the_ledger_and_touches_nothing(tmp_path, state):
    path = tmp_path / "model.pgolf"
    path.write_bytes(b"old")
    with pytest.raises(ArtifactError) as e:
        write(path, state, limit=20_000)
    text = str(e.value)
    total = code_bytes()
    assert text.startswith("artifact is ") and "limit 20_000" in text
    assert "largest sections: tok_emb" in text or "largest sections: " in text
    # The default scales follow the loss, where clips and bits change nothing.
    assert "lower quant.mean_bits; with quant.row_scales=spread raise quant.mlp_clip)" in text
    assert f"{total:,} bytes" in text
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["model.pgolf"]


def test_limit_counts_every_byte(tmp_path, state):
    """The limit is in the compressed header and moves the size a little, so a range of limits is tried."""
    path = tmp_path / "a"
    total = write(path, state).total
    written = []
    for limit in range(total - 15, total + 15, 3):
        path.unlink(missing_ok=True)
        try:
            ledger = write(path, state, limit=limit)
        except ArtifactError as e:
            assert "too many" in str(e) and not path.exists()
        else:
            assert path.stat().st_size + ledger.code <= limit
        written.append(path.exists())
    assert written[-1] and not written[0]


@pytest.mark.parametrize("step", ["fsync", "replace", "interrupt"])
def test_failure_while_writing_leaves_the_old_file(tmp_path, state, monkeypatch, step):
    path = tmp_path / "model.pgolf"
    write(path, state)
    before = path.read_bytes()

    def fail(*_):
        raise KeyboardInterrupt if step == "interrupt" else OSError(28, "No space left on device")

    monkeypatch.setattr(Path if step == "replace" else os, "replace" if step == "replace" else "fsync", fail)
    with pytest.raises(KeyboardInterrupt if step == "interrupt" else OSError):
        write(path, make_state(seed=9))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.pgolf"]
    read_artifact(path)


def test_states_that_the_format_cannot_hold_are_refused(tmp_path, state):
    q = state.quantized["qo_bank"]
    bad = QuantizedState({"w": QuantizedTensor(q.codes.int(), q.scales, 6)}, {}, {})
    with pytest.raises(TypeError, match=r"w must have int8 codes and float16 scales, got torch\.int32"):
        write(tmp_path / "a", bad)
    bad = QuantizedState({"w": QuantizedTensor(q.codes, q.scales[:1], 6)}, {}, {})
    with pytest.raises(ArtifactError, match="w needs one scale per row"):
        write(tmp_path / "a", bad)
    with pytest.raises(TypeError, match=r"w must be float16, got torch\.float32"):
        write(tmp_path / "a", QuantizedState({}, {}, {"w": torch.ones(3)}))
    with pytest.raises(ArtifactError, match="tokenizer_sha256 must match"):
        write_artifact(
            tmp_path / "a", state, CONFIG, tokenizer_sha256="x", config_hash="0" * 16, limit=10**6, quality=1
        )
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "no" / "such" / "folder", state)
    assert list(tmp_path.iterdir()) == []


def test_ledger_adds_up_and_names_parameters(tmp_path, state):
    ledger = write(tmp_path / "a", state)
    names = dict(ledger.parts)
    assert set(names) == {*state.quantized, *OTHERS}
    assert sum(names.values()) == (tmp_path / "a").stat().st_size == ledger.model_bytes
    assert ledger.total == ledger.model_bytes + code_bytes()
    assert [size for _, size in ledger.parts] == sorted(names.values(), reverse=True)
    assert f"{ledger.total:,} bytes" in ledger.text() and "left" in ledger.text()
    assert "the whole of one program" in ledger.text() and "do not count" in ledger.text()
    assert ledger.to_dict()["parts"] == names
    header = read_artifact(tmp_path / "a").header
    assert make_ledger(header, file_bytes=ledger.model_bytes) == ledger


def test_check_passes_at_the_limit_and_fails_one_byte_above():
    check(Ledger((("a", 60),), 40, 100), 100)
    with pytest.raises(ArtifactError, match="artifact is 101 bytes, limit 100, 1 too many"):
        check(Ledger((("a", 61),), 40, 100), 100)
