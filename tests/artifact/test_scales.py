"""Logarithmic scales, factors of columns, low-rank corrections: exact through the file, refused when off."""

from dataclasses import replace

import pytest
import torch
from artifact_helpers import CONFIG, FACTS, MATRICES, make_state

from pgolf.artifact.header import ArtifactError
from pgolf.artifact.read import read_state
from pgolf.artifact.write import write_artifact
from pgolf.config import QuantConfig
from pgolf.model.gpt import GPT
from pgolf.quant.grid import from_exponents, log_scales
from pgolf.quant.lqer import correct
from pgolf.quant.pipeline import Quantizer
from pgolf.quant.quantized import QuantizedState, dequantize_state


def write(path, state):
    return write_artifact(path, state, CONFIG, **FACTS, limit=16_000_000, quality=1)


def with_columns():
    """A state whose banks have factors of columns, whose embedding has logarithmic rows only."""
    g = torch.Generator().manual_seed(5)
    plain = make_state()
    quantized = {}
    for name, t in plain.quantized.items():
        shape = (*t.codes.shape[:-2], t.codes.shape[-1])
        columns = None if name == "tok_emb" else log_scales(torch.rand(shape, generator=g) + 0.5)
        quantized[name] = replace(t, scales=log_scales(t.scales.float()), columns=columns)
    error = torch.randn(24, 24, generator=g)
    corrections = {
        "qo_bank.4": correct(error, torch.ones(24), rank=2, kind="asym", group=7),
        "tok_emb.0": correct(torch.randn(61, 24, generator=g), torch.ones(24), rank=3, kind="sym"),
    }
    return QuantizedState(quantized, plain.gates, plain.small, corrections)


def test_columns_and_corrections_round_trip_exactly(tmp_path):
    state = with_columns()
    ledger = write(tmp_path / "a", state)
    header, back = read_state(tmp_path / "a")
    assert {t.name: (t.steps, t.columns) for t in header.tensors if t.kind == "matrix"} == {
        n: ("log", n != "tok_emb") for n in state.quantized
    }
    for name, t in state.quantized.items():
        other = back.quantized[name]
        assert torch.equal(t.codes, other.codes) and torch.equal(t.scales, other.scales)
        assert (t.columns is None) == (other.columns is None)
        assert t.columns is None or torch.equal(t.columns, other.columns)
    assert list(back.corrections) == list(state.corrections)
    expected, got = dequantize_state(state), dequantize_state(back)
    assert all(torch.equal(expected[n], got[n]) for n in expected)
    assert dict(ledger.parts)["exponents"] > 0 and dict(ledger.parts)["corrections"] > 0


def test_codes_of_a_trellis_are_read_as_its_values(tmp_path):
    state = with_columns()
    mixed = {n: replace(t, trellis=n != "kv_bank") for n, t in state.quantized.items()}
    write(tmp_path / "a", replace(state, quantized=mixed))
    header, back = read_state(tmp_path / "a")
    assert {t.name for t in header.tensors if t.trellis} == {n for n in mixed if n != "kv_bank"}
    plain = dequantize_state(replace(state, corrections={}))
    got = dequantize_state(replace(back, corrections={}))
    assert torch.equal(got["kv_bank"], plain["kv_bank"])
    for name in ("tok_emb", "mlp_down_bank"):
        t = state.quantized[name]
        scale = replace(t, codes=torch.ones_like(t.codes)).dequantize()
        quarters = ((got[name] - plain[name]) / scale).abs()
        assert torch.allclose(quarters, torch.full_like(quarters, 0.25), atol=1e-3)


def test_a_model_on_the_trellis_comes_back_from_its_file_nearer_to_its_weights(tmp_path):
    """From weights through GPTQ, the coder, the file and the reader."""
    model = GPT(CONFIG)
    g = torch.Generator().manual_seed(6)
    weights = {n: p.detach() + torch.randn(p.shape, generator=g) / 50 for n, p in model.named_parameters()}
    keys = {key: weights[n].shape[-1] for n, found in model.quant_inputs().items() for key in found}
    hessians = {key: torch.eye(size) for key, size in keys.items()}
    errors = {}
    for trellis in (False, True):
        quant = QuantConfig(row_scales="spread", trellis=trellis)
        state = Quantizer(weights, model.quant_inputs(), hessians, quant).quantize(3.0)
        write(tmp_path / "a", state)
        header, back = read_state(tmp_path / "a")
        assert [t.trellis for t in header.tensors if t.kind == "matrix"] == [trellis] * len(MATRICES)
        expected, got = dequantize_state(state), dequantize_state(back)
        assert all(torch.equal(expected[n], got[n]) for n in weights)
        errors[trellis] = {n: float((got[n] - weights[n]).square().sum()) for n in MATRICES}
    # Chains of 12 rows gain least: the first codes of a chain have no choice of sides.
    assert all(errors[True][n] < 0.95 * errors[False][n] for n in MATRICES)


def test_scales_at_the_ends_of_the_grid_survive(tmp_path):
    state = make_state()
    t = state.quantized["tok_emb"]
    for n in (
        torch.linspace(-160, 90, 61).round(),
        torch.linspace(-120, 127, 61).round(),
        torch.full((61,), 127),
    ):
        scales = from_exponents(n)
        write(tmp_path / "a", replace(state, quantized={"tok_emb": replace(t, scales=scales)}))
        header, back = read_state(tmp_path / "a")
        assert header.tensors[0].steps == "log"
        assert torch.equal(back.quantized["tok_emb"].scales, scales)
    scales = from_exponents(torch.linspace(-160, 127, 61).round())  # more than an int8 spans
    write(tmp_path / "a", replace(state, quantized={"tok_emb": replace(t, scales=scales)}))
    header, back = read_state(tmp_path / "a")
    assert header.tensors[0].steps == "float16" and torch.equal(back.quantized["tok_emb"].scales, scales)


def test_corrections_of_another_shape_are_refused(tmp_path):
    state = make_state()
    other = correct(torch.randn(8, 24), torch.ones(24), rank=2, kind="sym")
    for key in ("qo_bank.0", "nothing.0"):
        with pytest.raises(ArtifactError, match=rf"correction of {key} is \(8, 2\) times \(2, 24\)"):
            write(tmp_path / "a", replace(state, corrections={key: other}))


def test_columns_that_the_format_cannot_hold_are_refused(tmp_path):
    state = make_state()
    t = state.quantized["qo_bank"]
    ones = torch.ones(6, 24, dtype=torch.float16)
    off = replace(t, columns=ones)  # the scales of the rows are not on the grid
    with pytest.raises(ArtifactError, match=r"qo_bank has factors of columns, but its scales: .*not float16"):
        write(tmp_path / "a", replace(state, quantized={"qo_bank": off}))
    short = replace(t, scales=log_scales(t.scales.float()), columns=ones[:3])
    with pytest.raises(ArtifactError, match=r"qo_bank needs one factor per column, got \(3, 24\)"):
        write(tmp_path / "a", replace(state, quantized={"qo_bank": short}))
