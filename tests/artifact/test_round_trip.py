import hashlib
import json
import struct
import subprocess
import sys
from dataclasses import replace

import brotli
import numpy as np
import pytest
import torch
from artifact_helpers import CONFIG, FACTS, make_state

from pgolf.artifact.codec import CodecError, compress, decompress, join_bytes, split_bytes
from pgolf.artifact.header import ArtifactError
from pgolf.artifact.read import load_model, read_artifact, read_state
from pgolf.artifact.write import write_artifact
from pgolf.config import ModelConfig
from pgolf.model.gpt import GPT
from pgolf.ops import decode_codes_ref
from pgolf.quant.quantized import QuantizedState, dequantize_state

LIMIT = 16_000_000


def write(path, state, config=CONFIG, **kwargs):
    return write_artifact(path, state, config, **{**FACTS, "limit": LIMIT, "quality": 1, **kwargs})


def test_round_trip_is_bit_exact(tmp_path, state):
    ledger = write(tmp_path / "model.pgolf", state)
    header, back = read_state(tmp_path / "model.pgolf")
    assert header.model == CONFIG and header.limit == LIMIT
    assert (header.tokenizer_sha256, header.config_hash) == tuple(FACTS.values())
    assert ledger.model_bytes == (tmp_path / "model.pgolf").stat().st_size
    for group in ("quantized", "gates"):
        ours, theirs = getattr(state, group), getattr(back, group)
        assert list(ours) == list(theirs)
        for name in ours:
            assert ours[name].bits == theirs[name].bits
            assert torch.equal(ours[name].codes, theirs[name].codes)
            assert torch.equal(ours[name].scales, theirs[name].scales)
    assert list(back.small) == list(state.small)
    assert all(torch.equal(back.small[n], state.small[n]) for n in state.small)
    artifact = read_artifact(tmp_path / "model.pgolf")
    expected = dequantize_state(state)
    assert artifact.model_config == CONFIG
    assert all(torch.equal(artifact.state[n], expected[n]) for n in expected)


@pytest.mark.parametrize("quality", [0, 11])
def test_quality_changes_the_bytes_but_not_the_contents(tmp_path, state, quality):
    write(tmp_path / "a", state, quality=quality)
    assert torch.equal(
        read_state(tmp_path / "a")[1].quantized["qo_bank"].codes, state.quantized["qo_bank"].codes
    )


def test_states_without_gates_or_without_matrices_round_trip(tmp_path, state):
    for part in (
        QuantizedState(state.quantized, {}, {}),
        QuantizedState({}, state.gates, state.small),
        QuantizedState({}, {}, {}),
    ):
        write(tmp_path / "part", part)
        back = read_state(tmp_path / "part")[1]
        assert [list(g) for g in (back.quantized, back.gates, back.small)] == [
            list(g) for g in (part.quantized, part.gates, part.small)
        ]


def test_bytes_are_laid_out_as_documented(tmp_path, state):
    """Reads the file with the module docstring of pgolf.artifact.format and without compiled code."""
    write(tmp_path / "model.pgolf", state)
    data = (tmp_path / "model.pgolf").read_bytes()
    magic, version, zero, stored, raw = struct.unpack_from("<4sHHII", data)
    assert (magic, version, zero) == (b"PGLF", 4, 0)
    text = brotli.decompress(data[16 : 16 + stored])
    header = json.loads(text)
    assert len(text) == raw
    assert data[-32:] == hashlib.sha256(data[:-32]).digest()
    sections, streams = {}, {}
    for row in header["sections"]:
        begin = 16 + stored + row["offset"]
        stream = data[begin : begin + row["length"]]
        streams[row["name"]] = stream, row
    # A pool may stand later in the file than what is coded with it.
    for name, (stream, row) in sorted(streams.items(), key=lambda item: item[1][1]["pool"] is not None):
        if row["kind"] == "codes":
            shape = row["shape"][::-1] if row["transposed"] else row["shape"]
            pool = sections[row["pool"]] if row["pool"] else None
            codes = decode_codes_ref(stream, shape, pool=pool)
            sections[name] = codes.T if row["transposed"] else codes
            assert sections[name].nbytes == row["raw"]
        else:
            sections[name] = brotli.decompress(stream)
            assert len(sections[name]) == row["raw"]
    up = state.quantized["mlp_up_bank"]
    down, outputs = state.quantized["mlp_down_bank"], state.quantized["qo_bank"]
    assert np.array_equal(sections["mlp_up_bank.1"], up.codes[1].numpy())
    assert np.array_equal(sections["mlp_down_bank.2"], down.codes[2].numpy())
    assert np.array_equal(sections["qo_bank.0"], outputs.codes[0].numpy())
    assert np.array_equal(sections["qo_bank.4"], outputs.codes[4].numpy())
    assert streams["qo_bank.4"][1]["pool"] == "kv_bank.4" and streams["qo_bank.4"][1]["transposed"]
    assert streams["mlp_down_bank.2"][1]["pool"] == "mlp_up_bank.2"
    planes = np.frombuffer(sections["scales"], np.uint8)
    half = len(planes) // 2
    first = planes[:half].astype(np.uint16) | planes[half:].astype(np.uint16) << 8
    name = next(iter(state.quantized))
    count = state.quantized[name].scales.numel()
    expected = state.quantized[name].scales.numpy().reshape(-1)
    assert np.array_equal(first[:count].view(np.float16), expected)


def test_loaded_model_computes_with_the_stored_weights(tmp_path, state):
    write(tmp_path / "model.pgolf", state)
    model = load_model(tmp_path / "model.pgolf", "cpu")
    assert not model.training
    twin = GPT(CONFIG)
    twin.load_state_dict(dequantize_state(state))
    ids = torch.randint(0, 61, (17,), generator=torch.Generator().manual_seed(0))
    call = {"max_seqlen": 16, "loop": True}
    cu = torch.tensor([0, 7, 16], dtype=torch.int32)
    with torch.no_grad():
        assert torch.equal(model(ids[:-1], ids[1:], cu, **call), twin(ids[:-1], ids[1:], cu, **call))


def test_gates_by_channel_round_trip(tmp_path):
    config = replace(CONFIG, smear_kind="channel", smear_over_bos=True)
    state = make_state(config)
    write(tmp_path / "model.pgolf", state, config)
    model = load_model(tmp_path / "model.pgolf", "cpu")
    assert model.config == config
    assert torch.equal(model.smear_logit, state.small["smear_logit"].float()) and model.smear_logit.any()


def test_parameters_of_another_network_are_refused(tmp_path, state):
    other = ModelConfig(**{**vars(CONFIG), "layers": 4, "xsa_layers": 4})
    write(tmp_path / "a", state, other)
    with pytest.raises(
        ArtifactError, match=r"'qo_bank': the model needs shape \(8, 24, 24\), the file has \(6,"
    ):
        load_model(tmp_path / "a", "cpu")
    less = make_state()
    del less.small["q_gain"]
    write(tmp_path / "b", less)
    with pytest.raises(ArtifactError, match=r'parameters do not fit.*"q_gain"'):
        load_model(tmp_path / "b", "cpu")
    with pytest.raises(ValueError, match=r"model\.recurrence_repeats must be at most 64, got 1000000000"):
        ModelConfig(**{**vars(CONFIG), "recurrence_repeats": 10**9})


def test_reading_and_scoring_never_import_the_trainer():
    program = (
        "import sys, pgolf.artifact.read, pgolf.evaluate.bpb;"
        "bad = [m for m in sys.modules if m.startswith(('pgolf.train', 'pgolf.optim', 'pgolf.report',"
        " 'pgolf.cli', 'pgolf.artifact.write', 'pgolf.quant.gptq', 'pgolf.quant.calibrate'))];"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_float16_planes_round_trip_every_bit_pattern():
    values = np.arange(65536, dtype=np.uint16).view(np.float16)
    raw = split_bytes(values)
    assert raw[:65536] == bytes(range(256)) * 256
    assert np.array_equal(join_bytes(raw).view(np.uint16), values.view(np.uint16))
    assert len(join_bytes(split_bytes(values[:0]))) == 0


def test_decompress_is_bounded_and_exact():
    bomb = brotli.compress(bytes(1 << 26), quality=5)
    assert len(bomb) < 1000
    with pytest.raises(CodecError, match="expected 1000 bytes, the stream holds more"):
        decompress(bomb, raw_length=1000)
    for raw in (b"", b"x", bytes(range(256)) * 999):
        stream = compress(raw, quality=3)
        assert decompress(stream, raw_length=len(raw)) == raw
        with pytest.raises(CodecError):
            decompress(stream, raw_length=len(raw) + 1)
        with pytest.raises(CodecError):
            decompress(stream[:-1], raw_length=len(raw))
        with pytest.raises(CodecError):
            decompress(stream + b"\0", raw_length=len(raw))
