"""Many tensors in one buffer, so that one launch can zero, scale, reduce or measure all of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# In elements: 128 bytes of float32 or 64 bytes of bfloat16. Vector loads and TMA need a multiple of 16 bytes.
ALIGN = 32


def flat_views(
    shapes: Mapping[str, tuple[int, ...]], *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return one zeroed 1-D buffer and contiguous views into it of the given shapes, in order.

    Each view starts at a multiple of `ALIGN` elements. The gaps between views are zero, and scaling and
    averaging the buffer keeps them zero, so the norm of the buffer is the norm of all views together.
    """
    starts: dict[str, int] = {}
    total = 0
    for name, shape in shapes.items():
        starts[name] = total
        total += -(-torch.Size(shape).numel() // ALIGN) * ALIGN
    flat = torch.zeros(total, dtype=dtype, device=device)
    views = {
        name: flat[start : start + torch.Size(shapes[name]).numel()].view(shapes[name])
        for name, start in starts.items()
    }
    return flat, views
