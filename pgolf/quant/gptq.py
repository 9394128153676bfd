"""GPTQ on stacks of matrices: choose codes so that the output of a layer moves least, not its weights.

The error of a matrix is tr((W - W') H (W - W')^T) with H = E[x x^T] of the inputs of the matrix. Columns are
rounded one after the other, and the error of each column is compensated in the columns that come after it.
Legend: `B` matrices of the stack, `R` rows (outputs), `C` columns (inputs), `Q` largest code.
Source: Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1, with act-order, as in parameter-golf PR #1855.
Differs: all matrices of the stack go through the column loop together (no Python loop over matrices, no
synchronization with the host inside); the damping grows until the factorization works; columns without input
get the mean of the other diagonal elements instead of 1; a row that would come out worse than with plain
rounding keeps plain rounding; columns may have scales of their own; rounding may weigh the bits of a code
against its error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf.ops import trellis_round
from pgolf.quant.grid import QuantizedTensor, dequantize, max_code

DAMP_GROWTH = 10.0
MAX_DAMP_ATTEMPTS = 12
"""From 0.01 the damping then reaches 1e9 times the mean diagonal; any symmetric H is definite long before."""


@dataclass(frozen=True)
class Factored:
    """A stack of Hessians, ready for the column loop; it depends on no weight and on no scale."""

    hessian: Tensor
    """`(B, C, C)` float32, as given."""
    order: Tensor
    """`(B, C)` int64: the column that is rounded first, second, and so on."""
    factor: Tensor
    """`(B, C, C)` upper triangular U in that order, (H / mean + damping)^-1 = U^T U."""
    mean: Tensor
    """`(B, 1)` mean of the diagonal elements of H above 0, by which H was divided."""
    dead: Tensor
    """`(B, C)` bool, inputs that are always 0."""

    def conditional(self) -> Tensor:
        """Return `(B, C)` float32: the variance of each input given those rounded after it, in units of H.

        An error e left in column j, after the later columns have moved to their new optimum, costs
        e^2 * conditional[j]; the product over the columns of a matrix is det(H + damping) in any order.
        """
        in_order = self.factor.diagonal(dim1=-2, dim2=-1).square().reciprocal() * self.mean
        return in_order.gather(1, self.order.argsort(dim=-1))


def factorize(hessian: Tensor, *, damp: float = 0.01) -> Factored:
    """Order the columns by falling diagonal and factor the damped inverse Hessians.

    Args:
        hessian: `(B, C, C)` float32, symmetric positive semidefinite.
        damp: fraction of the mean diagonal that is added to the diagonal, > 0; tenfold after each failure.
    Raises:
        ValueError: NaN or infinity in H, damp not positive, a matrix that is far from semidefinite.
    """
    if not damp > 0:
        raise ValueError(f"gptq: damp must be > 0, got {damp}")
    if hessian.dim() != 3 or hessian.shape[1] != hessian.shape[2]:
        raise ValueError(f"gptq: expected hessian (B, C, C), got {tuple(hessian.shape)}")
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("gptq: hessian holds NaN or infinity; the calibration activations overflowed")
    with _full_float32():
        h = hessian.float()
        diagonal = h.diagonal(dim1=-2, dim2=-1)
        order = diagonal.argsort(dim=-1, descending=True, stable=True)
        factor, mean = _inverse_factor(_permute(h, order), damp)
    return Factored(h, order, factor, mean, diagonal <= 0)


def gptq_on_grid(
    weight: Tensor,
    factored: Factored,
    scales: Tensor,
    *,
    bits: int,
    columns: Tensor | None = None,
    rate: float = 0.0,
    trellis: bool = False,
    block: int = 128,
) -> QuantizedTensor:
    """Quantize a stack of matrices on given scales, never worse than rounding each weight by itself.

    For j in order: q_j = round(w_j / s), e = (w_j - s q_j) / U_jj, w_k -= e U_jk for the columns k after j,
    with H^-1 = U^T U, U upper triangular. "Worse" is, for each row, its error in the H norm; with a trellis,
    which ties rows together, for each matrix. With column factors c the loop runs on w / c and C H C, whose
    factor is U with column k divided by c_k. A column's weights have no part in each other's errors, so a
    trellis may run along them.

    Rounding takes the code with the least (x - q)^2 + rate q^2 / v, where x = w / (s c) and v is the mean of
    x^2 over the column: q^2 / (2 v ln 2) are the bits of a code, up to a constant, under a Gaussian for each
    column, which is what the coder fits. So rate is lambda / (2 ln 2) with lambda in squared scales per bit,
    and the minimum is q = round(x / (1 + rate / v)). At many bits a scale s costs s^2 / 12 and one bit less
    multiplies that by 4: the same exchange rate is rate = 1 / 12.

    Args:
        weight: `(B, R, C)` floating point.
        factored: of the Hessians `(B, C, C)`, same device.
        scales: `(B, R)` float16, of the rows.
        bits: width of the grid, 2 to 8.
        columns: `(B, C)` float16 column factors; None means 1.
        rate: weight of a code's bits against its squared error; 0 rounds to the nearest code.
        trellis: round the weights of a column together, see `pgolf.ops.trellis_round`.
        block: columns per block; within a block updates are columnwise, after it one matrix product.
    Raises:
        ValueError: shapes disagree, NaN or infinity in weight, block not positive.
    """
    _check(weight, factored.hessian)
    if block < 1:
        raise ValueError(f"gptq: expected block >= 1, got {block}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("gptq: weight holds NaN or infinity; training diverged before quantization")
    w = weight.float().masked_fill(factored.dead.unsqueeze(1), 0.0)
    unit = w if columns is None else w / columns.float().unsqueeze(1)
    keep = _keep(unit, scales, rate)
    with _full_float32():
        order, factor = factored.order, factored.factor
        if columns is not None:
            factor = factor / columns.float().gather(1, order).unsqueeze(1)
        swept = _sweep(
            _take_columns(unit, order),
            factor,
            scales,
            keep.gather(1, order),
            bits=bits,
            trellis=trellis,
            block=block,
        )
        codes = _take_columns(swept, order.argsort(dim=-1))
    nearest = _round(unit, scales, keep, bits=bits, trellis=trellis)
    mine, theirs = (
        row_errors(w, dequantize(q, scales, columns, trellis=trellis), factored.hessian)
        for q in (codes, nearest)
    )
    if trellis:
        mine, theirs = (rows.sum(-1, keepdim=True) for rows in (mine, theirs))
    codes = torch.where((mine > theirs).unsqueeze(-1), nearest, codes)
    return QuantizedTensor(codes, scales, bits, columns, trellis)


def drift_corrected(weight: Tensor, factored: Factored, shift: Tensor) -> Tensor:
    """Return the weights that give, on the inputs of the quantized model, most nearly the outputs W x.

    With x the inputs in the unquantized model and x' those in the quantized one, E |W x - V x'|^2 is
    tr((W* - V) H (W* - V)^T) plus what does not depend on V, where
        W* = W E[x x'^T] H^-1 = W + W E[(x - x') x'^T] H^-1,   H = E[x' x'^T].
    So GPTQ with this H needs no change to quantize W*. The damping of H makes the correction smaller.

    Args:
        weight: W `(B, R, C)` float32.
        factored: of H.
        shift: E[(x - x') x'^T] `(B, C, C)`; where it is 0, W is returned.
    Source: Qronos (arXiv 2505.11695).
    """
    with _full_float32():
        moved = _take_columns(weight @ (shift / factored.mean.unsqueeze(-1)), factored.order)
        solved = (moved @ factored.factor.mT) @ factored.factor
        return weight + _take_columns(solved, factored.order.argsort(dim=-1))


def row_errors(weight: Tensor, approx: Tensor, hessian: Tensor) -> Tensor:
    """Return e_r H e_r^T `(B, R)` float64; one matrix at a time bounds the memory of the float64 copies."""
    errors = []
    for w, a, h in zip(weight, approx, hessian, strict=True):
        e = w.double() - a.double()
        errors.append(((e @ h.double()) * e).sum(-1))
    return torch.stack(errors)


def _check(weight: Tensor, hessian: Tensor) -> None:
    if weight.dim() != 3 or hessian.shape != (weight.shape[0], weight.shape[2], weight.shape[2]):
        raise ValueError(
            "gptq: expected weight (B, R, C) and hessian (B, C, C), "
            f"got {tuple(weight.shape)} and {tuple(hessian.shape)}"
        )


def _keep(unit: Tensor, scales: Tensor, rate: float) -> Tensor:
    """Return 1 / (1 + rate / v) `(B, C)`, by which weights are multiplied before they are rounded."""
    variance = (unit / scales.float().unsqueeze(-1)).square().mean(1)
    return variance / (variance + rate).clamp(min=1e-30) if rate else torch.ones_like(variance)


def _round(unit: Tensor, scales: Tensor, keep: Tensor, *, bits: int, trellis: bool) -> Tensor:
    """Return the codes, int8, of weights `(B, R, C)` that are divided by their column factors."""
    x = unit / scales.float().unsqueeze(-1) * keep.unsqueeze(1)
    values = _values(x.transpose(1, 2), max_code(bits), trellis)
    return values.round_().to(torch.int8).transpose(1, 2).contiguous()


def _values(x: Tensor, largest: int, trellis: bool) -> Tensor:
    """Return what x `(..., R)` is rounded to: codes, or, on a trellis, codes plus or minus a quarter."""
    if not trellis:
        return x.round().clamp_(-largest, largest)
    # A value of the trellis is less than 1 from its number.
    return trellis_round(x.clamp(1 - largest, largest - 1).contiguous())


def _permute(h: Tensor, order: Tensor) -> Tensor:
    """Return h[b][order[b]][:, order[b]] for each matrix of the stack."""
    rows = h.gather(1, order.unsqueeze(-1).expand_as(h))
    return _take_columns(rows, order)


def _take_columns(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(2, order.unsqueeze(1).expand_as(x))


def _inverse_factor(h: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Return U `(B, C, C)` upper triangular with (H / m + damping)^-1 = U^T U, and m `(B, 1)`.

    One factorization: if J reverses the order and J H J = L L^T, then U = (J L J)^-1.
    """
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    live = diagonal > 0
    mean = (diagonal * live).sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp(min=1)
    # Scale to a mean diagonal of 1: U keeps its ratios, and tiny or huge activations stay inside float32.
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    base = h / mean.unsqueeze(-1)
    # An input that is always 0 has no covariance; whatever stands off its diagonal is noise.
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
            return factor, mean
        amount = torch.where(failed, amount * DAMP_GROWTH, amount)
    raise ValueError(
        f"gptq: hessian of matrices {failed.nonzero().flatten().tolist()} is not positive semidefinite even "
        f"with damping {amount.max().item():g} times its mean diagonal; expected a sum of x x^T"
    )


def _sweep(
    w: Tensor, factor: Tensor, scales: Tensor, keep: Tensor, *, bits: int, trellis: bool, block: int
) -> Tensor:
    """Round the columns from left to right and return the codes `(B, R, C)` int8.

    Works on the transpose `(B, C, R)`: a column of every matrix is then a contiguous row.
    """
    wt = w.transpose(1, 2).contiguous()
    codes = torch.empty_like(wt)
    scale = scales.float()
    reach = keep.unsqueeze(-1)  # (B, C, 1)
    inverse_diagonal = factor.diagonal(dim1=-2, dim2=-1).reciprocal().unsqueeze(-1)  # (B, C, 1)
    q_max, cols = max_code(bits), wt.shape[1]
    for begin in range(0, cols, block):
        end = min(begin + block, cols)
        errors = torch.empty_like(wt[:, begin:end])
        for j in range(begin, end):
            column = wt[:, j]
            q = _values((column / scale).mul_(reach[:, j]), q_max, trellis)
            codes[:, j] = q
            error = errors[:, j - begin]
            torch.mul(torch.addcmul(column, q, scale, value=-1.0), inverse_diagonal[:, j], out=error)
            if j + 1 < end:
                wt[:, j + 1 : end].addcmul_(factor[:, j, j + 1 : end, None], error[:, None], value=-1.0)
        if end < cols:
            wt[:, end:].baddbmm_(factor[:, begin:end, end:].transpose(1, 2), errors, alpha=-1.0)
    return codes.round_().to(torch.int8).transpose(1, 2).contiguous()


@contextmanager
def _full_float32() -> Iterator[None]:
    """Compute float32 products at full precision: TF32 would cost the update three digits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
