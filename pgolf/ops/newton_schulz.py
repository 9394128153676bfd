"""Batched Newton-Schulz polar iteration with a coefficient triple per step.

Owns the Python face of `torch.ops.pgolf.newton_schulz`. Coefficient tables and their generator are not here:
they live in `pgolf.optim.polar`. Kernels: csrc/kernels/newton_schulz.h. Follows the iteration of Muon (Keller
Jordan) with the per-step polynomials of Polar Express; `b` batch, `m` rows, `n` columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

import pgolf.ops._extension  # noqa: F401  (registers the operators)
from pgolf.ops._derivatives import refuse_derivatives, refuse_transforms

Algorithm = Literal["auto", "standard", "gram"]

ALGORITHMS: tuple[Algorithm, ...] = ("auto", "standard", "gram")
"""In the order of `NsAlgorithm` (csrc/kernels/newton_schulz.h): the operators take the place in this tuple.
The stable ABI of torch 2.11 to 2.13 leaks a string's memory at every call, so they take a number."""


def newton_schulz(
    x: Tensor,
    coefficients: Sequence[tuple[float, float, float]],
    *,
    eps: float = 1e-7,
    algorithm: Algorithm = "auto",
) -> Tensor:
    """Move the singular values of each matrix towards 1 by a composition of odd quintic polynomials.

        X = x / (||x||_F + eps)
        for each (a, b, c):   A = X X^T,   B = b A + c A^2,   X <- a X + B X

    A singular value s of X becomes a s + b s^3 + c s^5 in each step; the singular vectors stay. Matrices with
    m > n are iterated as their transposes, so all products run on the short side.
    Equals, for m <= n, `X = x / (x.norm() + eps)` followed by
    `for a, b, c in coefficients: A = X @ X.T; X = a * X + (b * A + c * A @ A) @ X`.

    CPU computes in float32. CUDA computes the norm in float32 and the products on tensor cores: bfloat16
    operands (float16 for float16 input; float32 input too becomes bfloat16, as in torch.optim.Muon)
    with float32 accumulation, A, B and X rounded after each product. Deterministic.

    algorithm="gram" runs all products in one persistent kernel on Hopper, with float16 operands whatever the
    input: the input is scaled by a power of two, the rest of 1 / (norm + eps) goes into the first polynomial.
    Nearly square matrices take the steps above; those with a side at least twice the other take two steps at
    once on the short side (the first alone where their number is odd), then start from X again:

        R = X X^T,   Z = p(R),   R' = Z R Z,   X = p'(R') Z X       with p(R) = a I + b R + c R^2

    Longer chains lose small singular values in float16, by up to 0.2 (emulated: power-law and rank-deficient
    spectra of 512 x 2048); pairs stay within 0.01 of the exact map, with tables that tolerate s a little
    above 1 (`safety`).

    Args:
        x: `(m, n)` or `(b, m, n)` float32, bfloat16 or float16; each matrix is normalised by itself.
        coefficients: 1 to 10 triples (a, b, c), one per step.
        eps: added to the Frobenius norm, >= 0; a zero matrix stays zero.
        algorithm: "standard" as above; "gram" needs a Hopper GPU and sides that are multiples of 8; "auto"
            takes "gram" where it can run, else "standard".

    Returns:
        The iterated matrices, shape and dtype of `x`. Not differentiable: backward through it, a tangent
        or a derivative of torch.func raises RuntimeError.

    Raises:
        ValueError: wrong number of dimensions, an empty, overlong or non-finite table, a row that is no
            triple, eps < 0, an unknown algorithm.
        TypeError: unsupported dtype.
        RuntimeError: "gram" where it cannot run.

    Source: Muon, https://kellerjordan.github.io/posts/muon; Polar Express, arXiv 2505.16932.
    """
    refuse_transforms("newton_schulz", x)
    out: Tensor = torch.ops.pgolf.newton_schulz(
        x, _flat(coefficients), eps, algorithm_number("newton_schulz", algorithm)
    )
    return out


def newton_schulz_banks(
    banks: Sequence[Tensor],
    coefficients: Sequence[tuple[float, float, float]],
    *,
    eps: float = 1e-7,
    algorithm: Algorithm = "auto",
) -> list[Tensor]:
    """Iterate several banks of matrices, of any shapes, with one table.

    Equals `[newton_schulz(x, coefficients, eps=eps, algorithm=algorithm) for x in banks]`; algorithm="gram"
    runs all of them in the same three launches.

    Args:
        banks: as `x` of `newton_schulz`, on one device.
        coefficients, eps, algorithm: as of `newton_schulz`, which also says what is raised.

    Raises:
        ValueError: banks on several devices; and see `newton_schulz`.
    """
    if not banks:  # nothing that tells the dispatcher a device
        return []
    devices = {x.device for x in banks}
    if len(devices) > 1:
        raise ValueError(
            f"newton_schulz_banks: banks must be on one device, got {sorted(map(str, devices))}; "
            "call it once for each device"
        )
    refuse_transforms("newton_schulz_banks", *banks)
    out: list[Tensor] = torch.ops.pgolf.newton_schulz_banks(
        list(banks), _flat(coefficients), eps, algorithm_number("newton_schulz", algorithm)
    )
    return out


def newton_schulz_banks_ref(
    banks: Sequence[Tensor], coefficients: Sequence[tuple[float, float, float]], *, eps: float = 1e-7
) -> list[Tensor]:
    """Compute what `newton_schulz_banks` computes, as `newton_schulz_ref` does."""
    return [newton_schulz_ref(x, coefficients, eps=eps) for x in banks]


def algorithm_number(op: str, algorithm: str) -> int:
    """Return the number by which the operators know an algorithm.

    Raises:
        ValueError: an unknown name.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"{op}: algorithm must be 'auto', 'standard' or 'gram', got {algorithm!r}")
    return ALGORITHMS.index(algorithm)


def _flat(coefficients: Sequence[tuple[float, float, float]]) -> list[float]:
    for row in coefficients:
        if len(row) != 3:
            raise ValueError(f"newton_schulz: coefficients must be triples (a, b, c), got {tuple(row)}")
    return [float(value) for row in coefficients for value in row]


def newton_schulz_ref(
    x: Tensor, coefficients: Sequence[tuple[float, float, float]], *, eps: float = 1e-7
) -> Tensor:
    """Compute what `newton_schulz` computes, in float32; float64 input is computed in float64."""
    X = x if x.dtype == torch.float64 else x.float()
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + eps).clamp(min=torch.finfo(X.dtype).tiny)
    for a, b, c in coefficients:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    out: Tensor = X.mT if tall else X
    return out.to(x.dtype)


def _fake(x: Tensor, _coefficients: Sequence[float], _eps: float, _algorithm: int = 0) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_banks(
    banks: Sequence[Tensor], coefficients: Sequence[float], eps: float, algorithm: int = 0
) -> list[Tensor]:
    return [_fake(x, coefficients, eps, algorithm) for x in banks]


torch.library.register_fake("pgolf::newton_schulz", _fake)
torch.library.register_fake("pgolf::newton_schulz_banks", _fake_banks)
refuse_derivatives("newton_schulz", "newton_schulz", "newton_schulz_banks")
