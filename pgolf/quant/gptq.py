"""GPTQ on stacks of matrices: choose codes so that the layer's output moves least, not its weights.

The error of a matrix is tr((W - W') H (W - W')^T) with H = E[x x^T] of the matrix's inputs. Columns are
rounded one after the other and each column's error is pushed into the columns that are still to come.
Legend: `B` matrices of the stack, `R` rows (outputs), `C` columns (inputs), `Q` largest code.
Source: Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1, with act-order and SDClip scales (SPEC 6.3).
Differs: all matrices of the stack move through the column loop together (no Python loop over matrices, no
host sync inside), damping grows until the factorization works, dead columns get the mean of the live diagonal
instead of 1, and a row that would come out worse than round-to-nearest keeps round-to-nearest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pgolf.quant.grid import QuantizedTensor, dequantize, max_code, quantize, sdclip_scales

DAMP_GROWTH = 10.0
MAX_DAMP_ATTEMPTS = 12
"""Tenfold growth from 0.01 reaches 1e9 times the mean diagonal: any symmetric H is definite long before."""


def gptq(
    weight: Tensor, hessian: Tensor, *, bits: int, clip: float, damp: float = 0.01, block: int = 128
) -> QuantizedTensor:
    """Quantize a stack of matrices, never worse in the H norm than round-to-nearest on the same grid.

    For j in act-order: q_j = round(w_j / s), e = (w_j - s q_j) / U_jj, w_k -= e U_jk for k > j,
    with H^-1 = U^T U, U upper triangular.

    Args:
        weight: `(B, R, C)` floating point.
        hessian: `(B, C, C)` float32, symmetric positive semidefinite, same device.
        bits: width of the grid, 2 to 8.
        clip: standard deviations at the largest code (SDClip).
        damp: fraction of the mean diagonal added to the diagonal, > 0; tenfold per failed factorization.
        block: columns per block; within a block updates are columnwise, after it one matrix product.
    Returns:
        Codes `(B, R, C)` int8, scales `(B, R)` float16.
    Raises:
        ValueError: shapes disagree, NaN or infinity in weight or H, damp or block not positive.
    """
    _check(weight, hessian, damp, block)
    scales = sdclip_scales(weight, bits=bits, clip=clip)
    w, h = weight.float(), hessian.float()
    with _full_float32():
        diagonal = h.diagonal(dim1=-2, dim2=-1)
        dead = diagonal <= 0
        w = w.masked_fill(dead.unsqueeze(1), 0.0)
        order = diagonal.argsort(dim=-1, descending=True, stable=True)
        factor = _inverse_factor(_permute(h, order), damp)
        codes = _sweep(_take_columns(w, order), factor, scales, bits=bits, block=block)
        codes = _take_columns(codes, order.argsort(dim=-1))
    nearest = quantize(w, scales, bits=bits)
    worse = _row_errors(w, dequantize(codes, scales), h) > _row_errors(w, dequantize(nearest, scales), h)
    return QuantizedTensor(torch.where(worse.unsqueeze(-1), nearest, codes), scales, bits)


def hessian_error(weight: Tensor, approx: Tensor, hessian: Tensor) -> Tensor:
    """Return tr(E H E^T) with E = weight - approx, per matrix of the stack, summed in float64.

    Args:
        weight: `(B, R, C)`. approx: `(B, R, C)`. hessian: `(B, C, C)`.
    Returns:
        `(B,)` float64; with H = E[x x^T] it is the mean squared change of the output, summed over rows.
    """
    return _row_errors(weight, approx, hessian).sum(-1)


def _row_errors(weight: Tensor, approx: Tensor, hessian: Tensor) -> Tensor:
    """Return e_r H e_r^T `(B, R)` float64; one matrix at a time bounds the float64 copies."""
    errors = []
    for w, a, h in zip(weight, approx, hessian, strict=True):
        e = w.double() - a.double()
        errors.append(((e @ h.double()) * e).sum(-1))
    return torch.stack(errors)


def _check(weight: Tensor, hessian: Tensor, damp: float, block: int) -> None:
    if weight.dim() != 3 or hessian.shape != (weight.shape[0], weight.shape[2], weight.shape[2]):
        raise ValueError(
            "gptq: expected weight (B, R, C) and hessian (B, C, C), "
            f"got {tuple(weight.shape)} and {tuple(hessian.shape)}"
        )
    if not damp > 0 or block < 1:
        raise ValueError(f"gptq: damp must be > 0 and block >= 1, got damp={damp} and block={block}")
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("gptq: hessian holds NaN or infinity; the calibration activations overflowed")


def _permute(h: Tensor, order: Tensor) -> Tensor:
    """Return h[b][order[b]][:, order[b]] for each matrix of the stack."""
    rows = h.gather(1, order.unsqueeze(-1).expand_as(h))
    return _take_columns(rows, order)


def _take_columns(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(2, order.unsqueeze(1).expand_as(x))


def _inverse_factor(h: Tensor, damp: float) -> Tensor:
    """Return U `(B, C, C)` upper triangular with (H + damping)^-1 = U^T U.

    One factorization: if J reverses the order and J H J = L L^T, then U = (J L J)^-1.
    """
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    live = diagonal > 0
    mean = (diagonal * live).sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp(min=1)
    # Scale to a mean diagonal of 1: U keeps its ratios, and tiny or huge activations stay inside float32.
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    base = h / mean.unsqueeze(-1)
    # A dead input has no covariance; whatever stands off its diagonal is noise.
    base = base * (live.unsqueeze(1) & live.unsqueeze(2)) + torch.diag_embed((~live).float())
    reverse = base.flip(1, 2)
    amount = torch.full_like(mean[:, 0], damp)
    for _ in range(MAX_DAMP_ATTEMPTS):
        damping = torch.diag_embed(amount[:, None].expand_as(diagonal))
        lower, info = torch.linalg.cholesky_ex(reverse + damping)
        failed = (info != 0) | ~torch.isfinite(lower).all(-1).all(-1)
        if not bool(failed.any()):
            eye = torch.eye(h.shape[-1], device=h.device).expand_as(h)
            factor: Tensor = torch.linalg.solve_triangular(lower.flip(1, 2), eye, upper=True)
            return factor
        amount = torch.where(failed, amount * DAMP_GROWTH, amount)
    raise ValueError(
        f"gptq: hessian of matrices {failed.nonzero().flatten().tolist()} is not positive semidefinite even "
        f"with damping {amount.max().item():g} times its mean diagonal; expected a sum of x x^T"
    )


def _sweep(w: Tensor, factor: Tensor, scales: Tensor, *, bits: int, block: int) -> Tensor:
    """Round the columns from left to right and return the codes `(B, R, C)` int8.

    Works on the transpose `(B, C, R)`: a column of every matrix is then a contiguous row.
    """
    wt = w.transpose(1, 2).contiguous()
    codes = torch.empty_like(wt)
    step = scales.float()
    inverse_diagonal = factor.diagonal(dim1=-2, dim2=-1).reciprocal().unsqueeze(-1)  # (B, C, 1)
    q_max, cols = max_code(bits), wt.shape[1]
    for begin in range(0, cols, block):
        end = min(begin + block, cols)
        errors = torch.empty_like(wt[:, begin:end])
        for j in range(begin, end):
            column = wt[:, j]
            q = (column / step).round_().clamp_(-q_max, q_max)
            codes[:, j] = q
            error = errors[:, j - begin]
            torch.mul(torch.addcmul(column, q, step, value=-1.0), inverse_diagonal[:, j], out=error)
            if j + 1 < end:
                wt[:, j + 1 : end].addcmul_(factor[:, j, j + 1 : end, None], error[:, None], value=-1.0)
        if end < cols:
            wt[:, end:].baddbmm_(factor[:, begin:end, end:].transpose(1, 2), errors, alpha=-1.0)
    return codes.to(torch.int8).transpose(1, 2).contiguous()


@contextmanager
def _full_float32() -> Iterator[None]:
    """Hold float32 products at full precision: TF32 would cost the update three digits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
