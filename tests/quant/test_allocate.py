"""Scales by what an error costs: equal costs everywhere, the entropy table, the gain."""

import math
from dataclasses import replace

import pytest
import torch

from pgolf.config import QuantConfig
from pgolf.quant.allocate import balanced_grid, gaussian_bits, histogram_of, mean_bits, widening_for
from pgolf.quant.bank import common_scale, prepare
from pgolf.quant.gptq import factorize, gptq_on_grid, row_errors
from pgolf.quant.grid import from_exponents, log_scales, scale_exponents, sdclip_scales
from pgolf.quant.sensitivity import Curvature
from tests.quant.quant_helpers import hessian_error, round_to_grid

SPREAD = QuantConfig(row_scales="spread", column_scales=False, matrix_bits=6, mlp_clip=11.5, rate=0.0)
LOSS = QuantConfig(row_scales="loss", column_scales=True, matrix_bits=8, embed_bits=8, row_floor=0.0)


def problem(b, r, c, *, seed=0, spread=1.0):
    """Weights, Hessians whose inputs differ by e^spread, and row curvatures that differ by e^(2 spread)."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(b, r, c, generator=g) * 0.02
    mix = torch.randn(b, c, c, generator=g) / c**0.5 + torch.eye(c)
    x = torch.randn(b, 6 * c, c, generator=g) @ mix * torch.exp(spread * torch.randn(b, 1, c, generator=g))
    h = x.mT @ x / x.shape[1]
    rows = torch.exp(2 * spread * torch.randn(b, r, generator=g))
    return w, h, Curvature(rows, h.clone())


def test_log_scales_are_their_exponents():
    n = torch.arange(-160, 128)
    scales = from_exponents(n)
    assert torch.equal(scale_exponents(scales).long(), n)
    assert torch.equal(log_scales(scales.float()), scales)
    assert torch.unique(scales).numel() == n.numel() and torch.isfinite(scales).all()


def test_log_scales_are_within_a_sixteenth_of_an_octave():
    values = torch.exp(torch.linspace(-8, 8, 999))
    ratio = (log_scales(values).double() / values.double()).log2().abs()
    assert ratio.max() <= 1 / 16 + 1e-3
    assert log_scales(torch.tensor([0.0, -1.0])).tolist() == [2.0**-20] * 2


def test_a_scale_off_the_grid_has_no_exponent():
    with pytest.raises(ValueError, match=r"not float16\(2\^\(n/8\)\)"):
        scale_exponents(torch.tensor([0.3]).half())


@pytest.mark.parametrize("deviation", [0.05, 0.3, 1.0, 2.5, 40.0])
def test_gaussian_bits_are_the_entropy_of_rounded_samples(deviation):
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * deviation
    p = torch.unique(x.round(), return_counts=True)[1].double() / x.numel()
    expected = float(-(p * p.log2()).sum())
    got = float(gaussian_bits(torch.tensor([math.log2(deviation)])))
    assert abs(got - expected) < 0.005


def test_widening_reaches_the_wanted_bits():
    histogram = histogram_of(torch.randn(5000, generator=torch.Generator().manual_seed(0)) + 1.0)
    for target in (0.7, 2.0, 3.5):
        assert abs(mean_bits(histogram, widening_for(histogram, target)) - target) < 1e-6


def test_every_weight_costs_the_same():
    g, d = torch.rand(2, 5) + 0.01, torch.rand(2, 7) * 100 + 0.1
    grid = balanced_grid(g, d, 1e-2)
    assert grid.columns is not None
    scale = grid.scales.double().unsqueeze(-1) * grid.columns.double().unsqueeze(-2)
    cost = scale.square() * g.double().unsqueeze(-1) * d.double().unsqueeze(-2)
    # Two roundings to the grid of scales, each by at most 2^(1/16), squared.
    assert (cost / 1e-4).log2().abs().max() <= 4 / 16 + 1e-2


def test_conditional_variances_multiply_to_the_determinant():
    _, h, _ = problem(2, 3, 20)
    mean = h.diagonal(dim1=1, dim2=2).mean(-1, True)
    expected = torch.logdet(h.double() + 1e-6 * torch.diag_embed(mean.expand(2, 20)))
    d = factorize(h, damp=1e-6).conditional()
    assert torch.allclose(d.double().log().sum(-1), expected, rtol=1e-3, atol=1e-2)


def test_balanced_scales_beat_sdclip_at_equal_entropy():
    w, h, curvature = problem(2, 60, 48)
    weight = curvature.rows.double()

    def cost_and_bits(config):
        bank = prepare(w, h, "mlp_in", config, curvature)
        scale = common_scale([bank], config) if config.row_scales == "loss" else 1.0
        q = bank.quantize(scale, config)
        p = torch.unique(q.codes.reshape(2, -1), return_counts=True)[1].double()
        cost = float((row_errors(w, q.dequantize(), h) * weight).sum())
        # Bits a coder needs that knows the deviation of each row and column.
        x = q.codes.double().square()
        spread = x.mean(-1, True) * x.mean(-2, True) / x.mean((-1, -2), True)
        return cost, float(gaussian_bits(0.5 * spread.clamp(min=1e-9).log2()).mean()), p

    ours, bits, _ = cost_and_bits(replace(LOSS, mean_bits=3.4))
    theirs, their_bits, _ = cost_and_bits(SPREAD)
    at_equal_bits = ours * 4 ** (bits - their_bits)
    assert at_equal_bits < 0.5 * theirs


@pytest.mark.parametrize(("bits", "trellis"), [(3.5, True), (0.5, False)])
def test_a_bank_of_few_bits_is_rounded_without_a_trellis(bits, trellis):
    w, h, curvature = problem(2, 64, 48)
    config = replace(LOSS, mean_bits=bits, trellis=True, rate=0.0)
    bank = prepare(w, h, "mlp_in", config, curvature)
    scale = common_scale([bank], config)
    got = bank.quantize(scale, config)
    assert got.trellis == trellis
    assert not bank.quantize(scale, replace(config, trellis=False)).trellis
    forced = gptq_on_grid(
        bank.weight, bank.factored, got.scales, bits=bank.bits, columns=got.columns, trellis=not trellis
    )
    assert bank.errors(got).sum() < bank.errors(forced).sum()


def test_no_row_or_column_is_too_quiet_for_a_trellis():
    # What hardly matters to the calibration has wide scales, and a code of 0 is a quarter of one.
    w, h, curvature = problem(2, 64, 48)
    w[0, :20] *= 1e-4
    w[0, 20] = 0
    w[1, :, :9] *= 1e-4
    curvature.rows[0, 30:40] = 1e-9
    bank = prepare(w, h, "mlp_in", LOSS, curvature)
    scale = common_scale([bank], LOSS)
    got, wide = bank.quantize(scale, LOSS), bank.grid(scale, LOSS)
    assert got.trellis and got.columns is not None
    deviations = w / got.scales.float().unsqueeze(-1) / got.columns.float().unsqueeze(1)
    rows, columns = (deviations.square().mean(axis).sqrt() for axis in (-1, 1))
    assert rows[0, 20] == 0 and columns.min() > 0.45
    rows[0, 20] = 1
    assert rows.min() > 0.45
    loud = gptq_on_grid(bank.weight, bank.factored, wide.scales, bits=8, columns=wide.columns, trellis=True)
    noise, before = ((q.dequantize() - w).square().mean(-1)[0, :21] for q in (got, loud))
    assert noise[20] < 1e-10
    assert noise.max() < 0.01 * before.min()


def test_no_code_is_clipped_however_much_a_row_matters():
    w, h, curvature = problem(1, 12, 30)
    curvature.rows[0, 3] = 1e9
    bank = prepare(w, h, "mlp_in", LOSS, curvature)
    grid = bank.grid(common_scale([bank], LOSS), LOSS)
    assert grid.columns is not None
    x = w / grid.scales.float().unsqueeze(-1) / grid.columns.float().unsqueeze(1)
    assert x.abs().max() <= 127.5


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_no_row_is_worse_than_rounding_on_the_same_grid(columns, rate):
    for seed in range(8):
        w, h, _ = problem(2, 6, 24, seed=seed)
        scales = sdclip_scales(w, bits=4, clip=1.5)
        factors = log_scales(torch.rand(2, 24) + 0.5) if columns else None
        ours = gptq_on_grid(w, factorize(h), scales, bits=4, columns=factors, rate=rate, block=7)
        plain = round_to_grid(w, scales, bits=4, columns=factors, rate=rate)
        assert (
            row_errors(w, ours.dequantize(), h) <= row_errors(w, plain.dequantize(), h) * (1 + 1e-9)
        ).all()


def test_columns_of_one_change_nothing():
    w, h, _ = problem(2, 9, 33)
    scales = sdclip_scales(w, bits=6, clip=12.0)
    ones = torch.ones(2, 33).half()
    plain = gptq_on_grid(w, factorize(h), scales, bits=6)
    assert torch.equal(gptq_on_grid(w, factorize(h), scales, bits=6, columns=ones).codes, plain.codes)


def test_rate_trades_bits_for_error():
    w, h, _ = problem(1, 200, 64, spread=0.3)
    scales = sdclip_scales(w, bits=6, clip=40.0)  # about one bit a code
    errors, bits = [], []
    for rate in (0.0, 0.05, 0.2):
        q = gptq_on_grid(w, factorize(h), scales, bits=6, rate=rate)
        p = torch.unique(q.codes, return_counts=True)[1].double() / q.codes.numel()
        errors.append(float(hessian_error(w, q.dequantize(), h)))
        bits.append(float(-(p * p.log2()).sum()))
    assert errors == sorted(errors) and bits == sorted(bits, reverse=True)


def test_gptq_of_one_column_rounds_to_the_cheaper_of_two_codes():
    # Column variance 1: x = 0.6 goes to 0 where 0.6^2 < 0.4^2 + rate, that is from rate 0.2 on.
    w = torch.tensor([[[0.6], [-1.28]]])
    scales, alone = torch.ones(1, 2).half(), factorize(torch.ones(1, 1, 1))
    variance = float(w.square().mean())
    for share, expected in ((0.0, [1, -1]), (0.19, [1, -1]), (0.21, [0, -1])):
        got = gptq_on_grid(w, alone, scales, bits=4, rate=share * variance)
        assert got.codes.flatten().tolist() == expected
        assert round_to_grid(w, scales, bits=4, rate=share * variance).codes.flatten().tolist() == expected


def test_missing_curvature_is_explained():
    w, h, _ = problem(1, 3, 4)
    with pytest.raises(
        ValueError, match=r"row_scales=loss needs the curvature of collect_curvature, got none"
    ):
        prepare(w, h, "mlp_in", LOSS, None)
