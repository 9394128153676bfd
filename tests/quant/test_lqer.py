"""Low-rank corrections: a low-rank error is recovered, both forms keep to their grids, errors are named."""

from dataclasses import replace

import pytest
import torch

from pgolf.quant.calibrate import collect_hessians
from pgolf.quant.lqer import correct, largest_errors
from pgolf.quant.pipeline import Quantizer
from pgolf.quant.quantized import dequantize_state
from tests.quant.quant_helpers import hessian_error
from tests.quant.test_calibrate import CONFIG, SPREAD, FakeDist, trained_like_model
from tests.quant.test_sensitivity import batches


def low_rank(r, c, rank, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(r, rank, generator=g) @ torch.randn(rank, c, generator=g) * 0.01


@pytest.mark.parametrize(("kind", "left"), [("asym", 0.5), ("sym", 0.05)])
def test_most_of_a_low_rank_error_is_recovered(kind, left):
    # PR #1855's two-bit form clips the largest of A at two thirds: it recovers less.
    error = low_rank(60, 100, 3)
    fixed = error - correct(error, torch.ones(100), rank=3, kind=kind).dequantize()
    assert fixed.square().sum() < left * error.square().sum()


def test_codes_keep_to_their_grids():
    error, power = low_rank(30, 50, 9), torch.rand(50)
    asym, sym = correct(error, power, rank=4, kind="asym"), correct(error, power, rank=4, kind="sym")
    assert asym.left.min() >= -2 and asym.left.max() <= 1 and asym.left_scales.shape == (1,)
    assert asym.right.min() >= -8 and asym.right.max() <= 7 and asym.right_scales.shape == (4,)
    assert sym.left.abs().max() == 7 and sym.left_scales.shape == (30,)
    assert sym.right.abs().max() == 7 and sym.right_scales.shape == (4,)
    assert asym.dequantize().shape == sym.dequantize().shape == (30, 50)


def test_inputs_with_power_are_corrected_first():
    error = low_rank(40, 64, 20)
    power = torch.cat([torch.full((32,), 100.0), torch.full((32,), 0.01)])
    h = torch.diag(power)[None]

    def left(weights):
        approx = correct(error, weights, rank=4, kind="sym").dequantize()
        return float(hessian_error(error[None], approx[None], h))

    assert left(power) < left(torch.ones(64))


@pytest.mark.parametrize("kind", ["asym", "sym"])
def test_a_zero_error_stays_zero(kind):
    assert (correct(torch.zeros(5, 6), torch.zeros(6), rank=2, kind=kind).dequantize() == 0).all()


@pytest.mark.parametrize(("rank", "group"), [(0, 64), (6, 64), (2, 0)])
def test_bad_rank_is_explained(rank, group):
    with pytest.raises(ValueError, match=rf"rank must be in \[1, 5\].*got rank={rank} and group={group}"):
        correct(torch.ones(5, 9), torch.ones(9), rank=rank, kind="asym", group=group)


def test_largest_errors_come_first():
    assert largest_errors({"a": 1.0, "b": 3.0, "c": 2.0}, 2) == ["b", "c"]


def test_a_model_gets_its_worst_matrices_corrected():
    model = trained_like_model()
    hessians = collect_hessians(model, batches(2), FakeDist())
    state = {name: p.detach() for name, p in model.named_parameters()}
    config = replace(SPREAD, matrix_bits=4, embed_bits=4, mlp_clip=4.0, attn_clip=4.0, embed_clip=4.0)
    inputs = model.quant_inputs()
    quantizer = Quantizer(state, inputs, hessians, config)
    corrected = replace(config, lqer="sym", lqer_top=2, lqer_rank=8)
    plain, better = (replace(quantizer, config=c).quantize() for c in (config, corrected))
    assert len(better.corrections) == 2 and not plain.corrections
    before, after = dequantize_state(plain), dequantize_state(better)
    for key in better.corrections:
        name, _, index = key.rpartition(".")
        h = hessians[inputs[name][int(index)]][None]
        matrices = (
            s[name].reshape(-1, *s[name].shape[-2:])[int(index)][None] for s in (state, before, after)
        )
        weight, rough, fine = matrices
        assert hessian_error(weight, fine, h) < 0.9 * hessian_error(weight, rough, h)
    assert CONFIG.width == 24  # the shapes above are of this model
