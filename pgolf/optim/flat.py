"""Many tensors in one buffer: one launch zeroes, scales, reduces or measures them all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Elements; 128 bytes of float32, 64 of bfloat16: vector loads and TMA need 16.
ALIGN = 32


def flat_views(
    shapes: Mapping[str, tuple[int, ...]], *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return one zeroed 1-D buffer and contiguous views into it with the given shapes, in order.

    Each view starts at a multiple of `ALIGN` elements. The gaps are zero and stay zero under scaling and
    averaging, so the norm of the buffer is the norm of the views.
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
