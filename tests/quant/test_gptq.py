import pytest
import torch

from pgolf.quant.gptq import factorize, gptq_on_grid
from pgolf.quant.grid import dequantize, log_scales, quantize, sdclip_scales
from tests.quant.quant_helpers import gptq, hessian_error, round_to_grid


def problem(b, r, c, *, samples=None, seed=0):
    """Weights and the Hessian of inputs whose features are correlated and differ in scale by about e^3."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(b, r, c, generator=g) * 0.02
    mix = torch.randn(b, c, c, generator=g) / c**0.5 + torch.eye(c)
    spread = torch.exp(torch.randn(b, 1, c, generator=g))
    x = torch.randn(b, samples or 4 * c, c, generator=g) @ mix * spread
    return w, x.transpose(1, 2) @ x / x.shape[1]


def nearest(w, *, bits, clip):
    scales = sdclip_scales(w, bits=bits, clip=clip)
    return dequantize(quantize(w, scales, bits=bits), scales)


def row_errors(w, approx, h):
    e = (w - approx).double()
    return torch.einsum("brc,bcd,brd->br", e, h.double(), e)


def dull_gptq(w, h, scales, q_max, damp):
    """One matrix in float64 by the definition: round a column, move the rest to their new optimum, drop it.

    Uses the growing inverse of optimal brain surgery instead of a Cholesky factor, so it shares no algebra.
    """
    w, h = w.double().clone(), h.double()
    h = h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    order = h.diagonal().argsort(descending=True, stable=True).tolist()
    inverse = torch.linalg.inv(h)
    scale = scales.double()
    codes = torch.zeros_like(w)
    for j in order:
        codes[:, j] = (w[:, j] / scale).round().clamp(-q_max, q_max)
        error = (w[:, j] - codes[:, j] * scale) / inverse[j, j]
        w -= error[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize(
    ("r", "c"), [(1, 2), (7, 33), (20, 129), (9, 260)]
)  # 129, 260: past one and two blocks
def test_codes_match_the_dull_reference(r, c):
    w, h = problem(2, r, c)
    got = gptq(w, h, bits=6, clip=12.0, damp=0.01)
    for i in range(2):
        expected = dull_gptq(w[i], h[i], got.scales[i], 31, 0.01)
        # A float32 tie that falls the other way changes its row only; the rest must agree to the code.
        rows = (got.codes[i].double() == expected).all(dim=1)
        assert rows.float().mean() >= 0.85
        ours = hessian_error(w[i : i + 1], got.dequantize()[i : i + 1], h[i : i + 1])
        theirs = hessian_error(w[i : i + 1], (expected * got.scales[i].double()[:, None])[None], h[i : i + 1])
        assert ours.item() <= theirs.item() * 1.02


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_error_is_well_below_nearest_on_correlated_inputs(bits):
    w, h = problem(3, 40, 96)
    clip = 2.5 * 2 ** (bits - 4)
    got = gptq(w, h, bits=bits, clip=clip)
    ratio = hessian_error(w, got.dequantize(), h) / hessian_error(w, nearest(w, bits=bits, clip=clip), h)
    assert ratio.max() < 0.7


@pytest.mark.parametrize("seed", range(20))
def test_no_row_is_worse_than_nearest(seed):
    # Few samples and a tight clip (heavy clamping) are where compensation can make things worse.
    g = torch.Generator().manual_seed(seed)
    w, h = problem(4, 5, 24, samples=int(torch.randint(1, 30, (), generator=g)), seed=seed)
    w[0, :, 0] *= 50
    clip = float(torch.rand((), generator=g)) * 3 + 0.5
    got = gptq(w, h, bits=4, clip=clip, block=7)
    worst = row_errors(w, nearest(w, bits=4, clip=clip), h)
    assert (row_errors(w, got.dequantize(), h) <= worst * (1 + 1e-9)).all()


def test_identity_hessian_gives_nearest():
    w, _ = problem(2, 30, 150)
    got = gptq(w, torch.eye(150).expand(2, 150, 150), bits=6, clip=12.0)
    assert torch.equal(got.dequantize(), nearest(w, bits=6, clip=12.0))


def test_scale_of_the_hessian_does_not_matter():
    w, h = problem(1, 16, 40)
    codes = [gptq(w, h * factor, bits=6, clip=12.0).codes for factor in (2.0**-60, 1.0, 2.0**60)]
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[1], codes[2])


def test_block_size_changes_nothing_but_rounding():
    w, h = problem(1, 64, 70)
    one, many = (gptq(w, h, bits=6, clip=12.0, block=block).codes for block in (1, 128))
    assert (one == many).float().mean() > 0.97


def test_matrices_of_a_stack_do_not_touch_each_other():
    w, h = problem(3, 8, 20)
    together = gptq(w, h, bits=6, clip=12.0)
    for i in range(3):
        alone = gptq(w[i : i + 1], h[i : i + 1], bits=6, clip=12.0)
        assert torch.equal(alone.codes[0], together.codes[i])


def test_dead_columns_get_code_zero():
    w, h = problem(2, 6, 30)
    h[0, 4, :] = 0
    h[0, :, 4] = 0
    h[1].zero_()
    got = gptq(w, h, bits=6, clip=12.0)
    assert (got.codes[0, :, 4] == 0).all() and (got.codes[1] == 0).all()
    assert (got.codes[0, :, 3] != 0).any()


def test_singular_hessians_are_damped_until_they_factor():
    w, h = problem(3, 6, 50, samples=3)
    h[1] = torch.ones(50, 50) * 1e4
    # Far from semidefinite on purpose: only tenfold growth of the damping gets this one through.
    h[2] -= 20 * torch.eye(50) * h[2].diagonal().mean()
    h[2].diagonal().clamp_(min=1e-3)
    got = gptq(w, h, bits=6, clip=12.0, damp=1e-9)
    assert torch.isfinite(got.dequantize()).all()
    semidefinite = hessian_error(w, got.dequantize(), h)[:2]
    assert (semidefinite <= hessian_error(w, nearest(w, bits=6, clip=12.0), h)[:2] * (1 + 1e-9)).all()


def test_a_trellis_loses_a_quarter_less_at_the_same_scales():
    w, h = problem(2, 300, 48)
    scales = sdclip_scales(w, bits=8, clip=45.0)  # about 3.5 bits per code
    columns = log_scales(torch.rand(2, 48) + 0.5)
    factored = factorize(h)
    plain = gptq_on_grid(w, factored, scales, bits=8, columns=columns)
    ours = gptq_on_grid(w, factored, scales, bits=8, columns=columns, trellis=True)
    assert ours.trellis and not plain.trellis
    assert (hessian_error(w, ours.dequantize(), h) < 0.8 * hessian_error(w, plain.dequantize(), h)).all()
    p, q = (t.codes.unique(return_counts=True)[1].double() / t.codes.numel() for t in (plain, ours))
    assert -(q * q.log2()).sum() < -(p * p.log2()).sum() + 0.02


@pytest.mark.parametrize("seed", range(8))
def test_no_matrix_is_worse_than_its_trellis_without_feedback(seed):
    w, h = problem(4, 9, 24, samples=1 + 3 * seed, seed=seed)
    w[0, :, 0] *= 50
    scales = sdclip_scales(w, bits=4, clip=1.5)
    ours = gptq_on_grid(w, factorize(h), scales, bits=4, trellis=True, block=7)
    plain = round_to_grid(w, scales, bits=4, trellis=True)
    assert ours.codes.abs().max() <= 7 and plain.codes.abs().max() <= 7
    worst = hessian_error(w, plain.dequantize(), h)
    assert (hessian_error(w, ours.dequantize(), h) <= worst * (1 + 1e-9)).all()


def test_global_matmul_precision_is_restored():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        gptq(*problem(1, 3, 5), bits=6, clip=12.0)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, h: {"hessian": h[:1]}, r"weight \(B, R, C\).*got \(2, 3, 5\) and \(1, 5, 5\)"),
        (lambda w, h: {"hessian": h * float("nan")}, "hessian holds NaN"),
        (lambda w, h: {"weight": w * float("inf")}, "weight holds NaN"),
        (lambda w, h: {"damp": 0.0}, "damp must be > 0"),
        (lambda w, h: {"block": 0}, "block >= 1"),
    ],
)
def test_bad_input_is_explained(change, message):
    w, h = problem(2, 3, 5)
    with pytest.raises(ValueError, match=message):
        gptq(**{"weight": w, "hessian": h, "bits": 6, "clip": 12.0, **change(w, h)})
