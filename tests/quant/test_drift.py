"""Inputs of the quantized model: their moments, the weights corrected for them, and the gains of rows."""

from dataclasses import replace

import pytest
import torch

from pgolf.config import QuantConfig
from pgolf.quant.calibrate import CORRECTED, Drift, collect_drift, collect_hessians
from pgolf.quant.gptq import drift_corrected, factorize
from pgolf.quant.pipeline import OUTPUT_SCALES, Quantizer
from pgolf.quant.quantized import dequantize_state
from tests.quant.test_calibrate import FakeDist, batches, trained_like_model

COARSE = QuantConfig(mean_bits=2.5, calibration_batches=8, gradient_batches=8)


def calibrated(**changes):
    """Return a model and its quantizer; with the same text for equal settings of the batches."""
    model = trained_like_model()
    text = batches(COARSE.calibration_batches + COARSE.gradient_batches)
    return model, Quantizer.calibrated(model, text, replace(COARSE, **changes), FakeDist())


def inputs_of(model, text):
    """Return by (kind, layer) the inputs of all batches and passes, float64."""
    found = {}
    for b in text:
        model(
            b.inputs,
            b.targets,
            b.cu_seqlens,
            max_seqlen=16,
            loop=True,
            observe=lambda kind, layer, x: found.setdefault((kind, layer), []).append(x.detach().double()),
        )
    return {key: torch.cat(parts) for key, parts in found.items() if key[0] in CORRECTED}


def test_moments_are_those_of_the_pairs_and_the_model_keeps_its_weights():
    model = trained_like_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    g = torch.Generator().manual_seed(3)
    other = {name: p + 0.05 * torch.randn(p.shape, generator=g) for name, p in before.items()}
    drift = collect_drift(model, other, batches(3), FakeDist())
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    own = inputs_of(model, batches(3))
    model.load_state_dict(other)
    theirs = inputs_of(model, batches(3))
    assert set(drift.hessians) == set(drift.shifts) == set(own)
    for key, x in own.items():
        y, tokens = theirs[key], 3 * 32
        for found, wanted in ((drift.hessians, y.T @ y), (drift.shifts, (x - y).T @ y)):
            torch.testing.assert_close(found[key].double(), wanted / tokens, rtol=1e-3, atol=1e-5)


def test_moments_of_all_ranks_are_averaged():
    model, first, second = trained_like_model(), FakeDist(), FakeDist()
    other = {name: 1.1 * p.detach() for name, p in model.named_parameters()}
    collect_drift(model, other, batches(2, seed=5), first)
    collect_drift(model, other, batches(1, seed=6), second)
    joint = collect_drift(model, other, batches(2, seed=5), FakeDist(others=second.seen))
    both = collect_drift(model, other, [*batches(2, seed=5), *batches(1, seed=6)], FakeDist())
    for key in both.shifts:
        torch.testing.assert_close(joint.hessians[key], both.hessians[key], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(joint.shifts[key], both.shifts[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("amount", [0.3, 1.0])
def test_without_drift_the_codes_are_those_without_the_correction(amount):
    model, plain = calibrated()
    text = list(batches(COARSE.calibration_batches))
    drift = collect_drift(model, plain.weights, text, FakeDist())
    hessians = collect_hessians(model, text, FakeDist())
    assert all(torch.equal(hessians[key], h) for key, h in drift.hessians.items())
    assert not any(shift.any() for shift in drift.shifts.values())
    corrected = replace(plain, config=replace(COARSE, drift=amount), drift=drift).quantize()
    for name, wanted in plain.quantize().quantized.items():
        assert torch.equal(corrected.quantized[name].codes, wanted.codes), name


@pytest.mark.parametrize("size", [1, 7, 33])
def test_a_linear_drift_is_undone(size):
    """With x' = A x the corrected weights are W A^-1."""
    g = torch.Generator().manual_seed(size)
    x = torch.randn(2, 50 * size, size, generator=g, dtype=torch.float64)
    a = torch.eye(size) + 0.3 * torch.randn(2, size, size, generator=g, dtype=torch.float64) / size**0.5
    weight = torch.randn(2, 5, size, generator=g)
    y = x @ a.mT
    hessian, shift = (p.mT @ y / len(x) for p in (y, x - y))
    found = drift_corrected(weight, factorize(hessian.float(), damp=1e-6), shift.float())
    torch.testing.assert_close(found.double(), weight.double() @ a.inverse(), rtol=1e-3, atol=1e-3)


def test_damping_makes_the_correction_smaller():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 60, 9, generator=g)
    hessian, shift = x.mT @ x / 60, torch.randn(1, 9, 9, generator=g)
    weight = torch.randn(1, 4, 9, generator=g)
    mean = hessian.diagonal(dim1=1, dim2=2).mean()
    sizes = []
    for damp in (0.01, 1.0, 100.0):
        found = drift_corrected(weight, factorize(hessian, damp=damp), shift)
        wanted = weight + weight @ shift @ (hessian + damp * mean * torch.eye(9)).inverse()
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
        sizes.append(float((found - weight).norm()))
    assert sizes[0] > sizes[1] > sizes[2]


def test_outputs_are_nearer_to_those_of_the_unquantized_model():
    """E |W x - V x'|^2 of the output matrices, on the drift that was measured, is below the first codes'.

    With a rate, fewer bits may cost more error.
    """
    _, plain = calibrated(rate=0.0)
    _, quantizer = calibrated(rate=0.0, drift=1.0)
    first, second = plain.quantize(), quantizer.quantize()
    for name, keys in plain.inputs.items():
        old, new = first.quantized[name], second.quantized[name]
        assert torch.equal(old.scales, new.scales) and torch.equal(old.columns, new.columns)
        for i, key in enumerate(keys):
            if key[0] not in CORRECTED:
                rows = old.codes.view(len(keys), -1)[i], new.codes.view(len(keys), -1)[i]
                assert torch.equal(*rows), (name, key)
                continue
            h, shift = (part[key].double() for part in (quantizer.drift.hessians, quantizer.drift.shifts))
            target = plain.weights[name][i].double() @ (h + shift)
            v, w = (q.dequantize()[i].double() for q in (old, new))
            before, after = (((p @ h - 2 * target) * p).sum() for p in (v, w))
            assert after < before, (name, key)


@pytest.mark.parametrize("lqer", ["off", "asym"])
def test_gains_are_the_best_factor_of_every_row(lqer):
    """With LQER of the codes and their corrections together."""
    config = replace(COARSE, lqer=lqer, lqer_top=4)
    plain = replace(calibrated()[1], config=config)
    codes, with_gains = plain.quantize(), replace(plain, config=replace(config, gains=True)).quantize()
    weights, stored = dequantize_state(codes), dequantize_state(with_gains)
    changed = {name for name in weights if not torch.equal(weights[name], stored[name])}
    assert changed == set(OUTPUT_SCALES.values())
    for name, kind in (("mlp_down_bank", "mlp_out"), ("qo_bank", "attn_out")):
        scales = OUTPUT_SCALES[kind]
        for i, key in enumerate(plain.inputs[name]):
            if key[0] != kind:
                continue
            h, layer = plain.hessians[key].double(), key[1]
            goal, mine = plain.weights[name][i].double(), weights[name][i].double()
            wanted = ((goal @ h) * mine).sum(-1) / ((mine @ h) * mine).sum(-1)
            found = stored[scales][layer].double() / plain.weights[scales][layer].double()
            torch.testing.assert_close(found, wanted.clamp(0.5, 1.5), rtol=2e-3, atol=0)
            assert not torch.allclose(found, torch.ones_like(found), atol=1e-3)


def test_a_row_of_zeros_keeps_its_scale():
    weights = {"w": torch.zeros(1, 3, 4), "mlp_scale": torch.full((1, 3), 2.0)}
    settings = QuantConfig(row_scales="spread", column_scales=False, trellis=False, gains=True)
    key = ("mlp_out", 0)
    found = Quantizer(weights, {"w": [key]}, {key: torch.eye(4)}, settings).quantize()
    assert torch.equal(found.small["mlp_scale"], torch.full((1, 3), 2.0, dtype=torch.float16))


def test_drift_of_another_quantizer_is_left_out_where_it_is_off():
    _, plain = calibrated()
    nonsense = {key: torch.full_like(h, float("nan")) for key, h in plain.hessians.items()}
    found = replace(plain, drift=Drift(nonsense, nonsense)).quantize()
    assert torch.equal(found.quantized["qo_bank"].codes, plain.quantize().quantized["qo_bank"].codes)
