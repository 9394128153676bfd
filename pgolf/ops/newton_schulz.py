"""Newton-Schulz polar iteration on batches of matrices, with one coefficient triple per iteration.

This is the Python interface of `torch.ops.pgolf.newton_schulz`. Coefficient tables and their generator are in
`pgolf.optim.polar`, kernels in csrc/kernels/newton_schulz.h. The iteration is that of Muon (Keller Jordan),
with a different polynomial in each iteration as in Polar Express.

Legend: `b` batch, `m` rows, `n` columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import pgolf.ops._extension  # noqa: F401  (registers the operators)
from pgolf.ops._algorithm import Algorithm, algorithm_number
from pgolf.ops._derivatives import refuse_derivatives, refuse_transforms


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

    In each iteration a singular value s of X becomes a s + b s^3 + c s^5, and the singular vectors do not
    change. Matrices with m > n are transposed first, so that A and B are square on the short side.
    Equals, for m <= n, `X = x / (x.norm() + eps)` followed by
    `for a, b, c in coefficients: A = X @ X.T; X = a * X + (b * A + c * A @ A) @ X`.

    The CPU computes in float32. CUDA computes the norm in float32 and the products on tensor cores, with
    float16 operands and float32 accumulation for every input dtype. The input is scaled by a power of two,
    and the first polynomial contains the remaining factor of 1 / (norm + eps). A, B and X are rounded to
    float16 after each product, the last product once, to the output. While the factors a of the later
    iterations multiply to more than 16, the term a X also contains what the rounding of X took away, because
    they would enlarge it where singular values are near 0. With five iterations of `polar_express_golf` and a
    short side of 64 or more, singular values differ from the exact map by at most 0.01 (0.02 if all of them
    are equal); if the short side is shorter, by up to 0.05 (emulated,
    bench/results/20261130_portable-emulation.txt). Singular values above 255 between iterations overflow; if
    the norm is far below eps, the small result has fewer digits. NaN or an infinity makes its whole matrix
    NaN. The result is deterministic.

    algorithm="gram" runs all products in one persistent kernel on Hopper GPUs, with operands and scaling as
    above; X keeps no remainder. If one side is at least twice the other, two iterations are computed at once
    on the short side (if their number is odd, the first one is computed alone), starting from X each time:

        R = X X^T,   Z = p(R),   R' = Z R Z,   X = p'(R') Z X       with p(R) = a I + b R + c R^2

    Other matrices take the iterations above. Two iterations at once stay within 0.01 of the exact map of
    singular values, if the table tolerates s a little above 1 (`safety` in `pgolf.optim.polar`). Three or
    more at once would change small singular values by up to 0.2 in float16 (emulated, on power-law and
    rank-deficient spectra of 512 x 2048).

    Args:
        x: `(m, n)` or `(b, m, n)` float32, bfloat16 or float16; each matrix is normalised by its own norm.
        coefficients: 1 to 10 triples (a, b, c), one per iteration.
        eps: added to the Frobenius norm, >= 0; a zero matrix stays zero.
        algorithm: "standard" is the form above; "gram" needs a Hopper GPU and sides that are multiples of 8;
            "auto" takes "gram" where it can run and "standard" elsewhere.

    Returns:
        The iterated matrices, with the shape and dtype of `x`. The operator is not differentiable: a backward
        pass, forward mode and torch.func raise RuntimeError.

    Raises:
        ValueError: x has the wrong number of dimensions, the table is empty, has more than 10 triples or a
            number that is not finite, a row of it is not a triple, eps < 0, or the algorithm is unknown.
        TypeError: the dtype is not supported.
        RuntimeError: the algorithm is "gram", which cannot run on this device or for this shape.

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
    """Iterate several banks of matrices, of any shapes, with one coefficient table.

    Equals `[newton_schulz(x, coefficients, eps=eps, algorithm=algorithm) for x in banks]`; algorithm="gram"
    runs all banks in the same three launches.

    Args:
        banks: each as `x` of `newton_schulz`, all on one device.
        coefficients, eps, algorithm: as in `newton_schulz`.

    Raises:
        ValueError: the banks are on several devices, or as in `newton_schulz`.
        TypeError, RuntimeError: as in `newton_schulz`.
    """
    if not banks:  # the dispatcher needs a tensor to choose the device
        return []
    devices = {x.device for x in banks}
    if len(devices) > 1:
        raise ValueError(
            f"newton_schulz_banks: banks must be on one device, got {sorted(map(str, devices))}; "
            "call it once per device"
        )
    refuse_transforms("newton_schulz_banks", *banks)
    out: list[Tensor] = torch.ops.pgolf.newton_schulz_banks(
        list(banks), _flat(coefficients), eps, algorithm_number("newton_schulz", algorithm)
    )
    return out


def newton_schulz_banks_ref(
    banks: Sequence[Tensor], coefficients: Sequence[tuple[float, float, float]], *, eps: float = 1e-7
) -> list[Tensor]:
    """Compute `newton_schulz_banks` with PyTorch operators, see `newton_schulz_ref`."""
    return [newton_schulz_ref(x, coefficients, eps=eps) for x in banks]


def _flat(coefficients: Sequence[tuple[float, float, float]]) -> list[float]:
    for row in coefficients:
        if len(row) != 3:
            raise ValueError(f"newton_schulz: coefficients must be triples (a, b, c), got {tuple(row)}")
    return [float(value) for row in coefficients for value in row]


def newton_schulz_ref(
    x: Tensor, coefficients: Sequence[tuple[float, float, float]], *, eps: float = 1e-7
) -> Tensor:
    """Compute `newton_schulz` with PyTorch operators in float32; float64 input is computed in float64."""
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


def _fake(x: Tensor, _coefficients: Sequence[float], _eps: float, _algorithm: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_banks(
    banks: Sequence[Tensor], coefficients: Sequence[float], eps: float, algorithm: int
) -> list[Tensor]:
    return [_fake(x, coefficients, eps, algorithm) for x in banks]


torch.library.register_fake("pgolf::newton_schulz", _fake)
torch.library.register_fake("pgolf::newton_schulz_banks", _fake_banks)
refuse_derivatives("newton_schulz", "newton_schulz", "newton_schulz_banks")
