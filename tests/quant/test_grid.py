import pytest
import torch

from pgolf.quant.grid import MIN_SCALE, dequantize, max_code, quantize, quantize_gate_rows, sdclip_scales
from pgolf.quant.quantized import QuantizedState, dequantize_state


def weights(*shape, std=0.02, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


@pytest.mark.parametrize(("bits", "clip"), [(4, 7.5), (6, 11.5), (7, 14.0), (8, 20.0)])
def test_sdclip_scales_follow_the_formula(bits, clip):
    w = weights(3, 7, 129)
    expected = (clip * w.double().std(dim=-1) / (2 ** (bits - 1) - 1)).half()
    assert torch.equal(sdclip_scales(w, bits=bits, clip=clip), expected)


@pytest.mark.parametrize("std", [0.0, 1e-12, 1e-8, 1e6])
def test_sdclip_scales_stay_positive_and_finite(std):
    # 1e-10, the floor of the record code, is 0 in float16: 0 / 0 would then be a NaN code.
    scales = sdclip_scales(weights(2, 5, 33, std=std), bits=6, clip=12.0)
    assert scales.dtype == torch.float16
    assert (scales > 0).all() and torch.isfinite(scales).all()
    assert scales.float().min() >= MIN_SCALE


def test_zero_rows_come_back_as_zero():
    w = torch.zeros(1, 3, 8)
    scales = sdclip_scales(w, bits=6, clip=12.0)
    assert torch.equal(dequantize(quantize(w, scales, bits=6), scales), w)


def test_quantize_is_nearest_inside_and_clamped_outside():
    w = weights(4, 257)
    w[1, 3], w[2, 5] = 9.0, -9.0
    scales = sdclip_scales(w, bits=6, clip=8.0)
    codes = quantize(w, scales, bits=6)
    error = (dequantize(codes, scales) - w).abs()
    inside = w.abs() <= 31 * scales.float()[:, None]
    half_scale = (0.5 * scales.float()[:, None] * (1 + 1e-6)).expand_as(w)
    assert (error <= half_scale)[inside].all()
    assert codes[1, 3] == 31 and codes[2, 5] == -31
    assert codes.abs().max() <= max_code(6)


def test_gate_rows_keep_their_maximum_at_code_127():
    w = weights(11, 8, 12, std=0.7)
    q = quantize_gate_rows(w)
    assert (q.codes.abs().amax(-1) == 127).all()
    assert (q.dequantize() - w).abs().max() <= 0.51 * q.scales.float().max()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sdclip_scales(torch.ones(3, 1), bits=6, clip=1.0), r"C >= 2.*got \(3, 1\)"),
        (lambda: sdclip_scales(torch.ones(3, 4), bits=6, clip=0.0), "clip must be > 0.*got 0.0"),
        (lambda: sdclip_scales(torch.ones(3, 4), bits=9, clip=1.0), r"bits must be in \[2, 8\].*got 9"),
        (lambda: sdclip_scales(torch.full((2, 2), float("nan")), bits=6, clip=1.0), "NaN or infinity"),
        (lambda: quantize_gate_rows(torch.full((2, 2), float("inf"))), "NaN or infinity"),
        (lambda: quantize(torch.ones(3, 4), torch.ones(4).half(), bits=6), r"\(3,\), got \(4,\)"),
    ],
)
def test_bad_input_is_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_integer_weights_are_a_type_error():
    with pytest.raises(TypeError, match=r"floating point, got torch\.int64"):
        sdclip_scales(torch.ones(3, 4, dtype=torch.int64), bits=6, clip=1.0)


def test_dequantize_state_refuses_a_name_in_two_groups():
    q = quantize_gate_rows(weights(2, 3))
    with pytest.raises(ValueError, match="'w' is stored twice"):
        dequantize_state(QuantizedState({"w": q}, {}, {"w": torch.ones(3).half()}))
