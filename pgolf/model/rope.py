"""Partial rotary position embedding.

Legend: `T` tokens, `H` heads, `K` head dim, `R` rotated dims (even; they are the first R of K).
Source: Su et al. 2021 (RoPE), half-split form, restricted to the leading dims as in PR #1855.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(tokens: int, dims: int, *, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each `(tokens, 1, dims / 2)` float32, of position * base^(-2j / dims).

    Angles are computed in float64; in float32 the angle at position 98,303 would be wrong by 0.008 rad.
    """
    frequency = base ** (-torch.arange(0, dims, 2, dtype=torch.float64) / max(dims, 1))
    angle = torch.outer(torch.arange(tokens, dtype=torch.float64), frequency)[:, None, :]
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] head dims of `x` `(T, H, K)`; the others do not change.

    (x1, x2) -> (x1 cos + x2 sin, -x1 sin + x2 cos), x1 and x2 being the two halves of the rotated dims.
    """
    half = cos.shape[-1]
    if half == 0:
        return x
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat(((x1 * cos + x2 * sin).to(x.dtype), (x2 * cos - x1 * sin).to(x.dtype), rest), dim=-1)
