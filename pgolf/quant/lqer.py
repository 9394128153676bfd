"""Low-rank correction of the quantization error of a matrix: W ~ codes * scales + A B, all in few bits.

This module owns the choice of the matrices, the two factors and their grids.
Legend: `R` rows, `C` columns, `r` rank.
Source: LQER (arXiv 2402.02446) as in parameter-golf PR #1855, which corrects the matrices whose errors have
the largest Frobenius norms. Differs: errors are weighed by the power of the inputs (L2QER of the paper),
because an error on an input that is always small does no harm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pgolf.quant.grid import MIN_SCALE

Kind = Literal["asym", "sym"]


@dataclass(frozen=True)
class Correction:
    """The product A B that is added to one matrix."""

    left: Tensor
    """A `(R, r)` int8."""
    left_scales: Tensor
    """float16: `(1,)` in the asymmetric form; `(R,)`, one per row, in the symmetric form."""
    right: Tensor
    """B `(r, C)` int8."""
    right_scales: Tensor
    """float16: one for each group of elements of B, row-major."""
    group: int
    """Elements of B that share a scale; the last group may be shorter."""

    def dequantize(self) -> Tensor:
        """Return A B `(R, C)`, float32."""
        left = self.left.float() * self.left_scales.float().unsqueeze(-1)
        scales = self.right_scales.float().repeat_interleave(self.group)[: self.right.numel()]
        return left @ (self.right.float() * scales.view(self.right.shape))

    def to(self, device: torch.device | str) -> Correction:
        """Return the same on `device`."""
        left, left_scales = self.left.to(device), self.left_scales.to(device)
        return Correction(left, left_scales, self.right.to(device), self.right_scales.to(device), self.group)


def correct(error: Tensor, input_power: Tensor, *, rank: int, kind: Kind, group: int = 64) -> Correction:
    """Return the best rank-r approximation of E = W - W', each column weighed by its input's power, in codes.

    E diag(p)^(1/2) = U S V^T;  A = U_r S_r^(1/2), B = S_r^(1/2) V_r^T diag(p)^(-1/2).
    asym: A on {-2..1} with one scale max|A| / 1.5, B on {-8..7} in groups with the scale max / 7.5.
    sym: A and B on {-7..7}, with one scale per row.

    Args:
        error: `(R, C)` float32. input_power: `(C,)`, the diagonal of the Hessian.
        rank: r, at most min(R, C). group: elements per scale, asymmetric form only.
    Raises:
        ValueError: rank or group out of range.
    """
    if not 1 <= rank <= min(error.shape) or group < 1:
        raise ValueError(
            f"lqer: rank must be in [1, {min(error.shape)}] and group >= 1, got rank={rank} and group={group}"
        )
    # An input that is always 0 has no power; a floor keeps the division below finite.
    power = input_power.float().clamp(min=float(input_power.mean()) * 1e-4 + 1e-30).sqrt()
    u, s, v = torch.linalg.svd(error.float() * power, full_matrices=False)
    root = s[:rank].sqrt()
    left, right = u[:, :rank] * root, root[:, None] * v[:rank] / power
    if kind == "sym":
        left_codes, left_scales = _codes(left, 7.0, low=-7, high=7)
        right_codes, right_scales = _codes(right, 7.0, low=-7, high=7)
        return Correction(left_codes, left_scales, right_codes, right_scales, error.shape[1])
    left_codes, left_scales = _codes(left.reshape(1, -1), 1.5, low=-2, high=1)
    padded = torch.nn.functional.pad(right.flatten(), (0, -right.numel() % group)).view(-1, group)
    right_codes, right_scales = _codes(padded, 7.5, low=-8, high=7)
    return Correction(
        left_codes.view(left.shape),
        left_scales,
        right_codes.flatten()[: right.numel()].view(right.shape),
        right_scales,
        group,
    )


def largest_errors(errors: dict[str, float], count: int) -> list[str]:
    """Return the `count` names with the largest errors, largest first."""
    return sorted(errors, key=lambda name: -errors[name])[:count]


def _codes(x: Tensor, largest: float, *, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Return the codes int8 of each row of x and its scale max / largest, float16."""
    scales = (x.abs().amax(-1) / largest).clamp(min=MIN_SCALE).half()
    codes = (x / scales.float().unsqueeze(-1)).round().clamp(low, high)
    return codes.to(torch.int8), scales
