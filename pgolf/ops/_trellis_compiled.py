"""The best path through the trellis by the kernel for the CPU, for programs without a compiled pgolf.

It is compiled together with the range coder, and stands in the place of `_trellis_path.py` there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf.env import usable_cores
from pgolf.ops import _coder


def best_values(x: Tensor) -> Tensor:
    """Return the values, float32, of chains along the rows of x `(N, n)`, on the device of x."""
    rows = x.detach().float().cpu().contiguous()
    values = torch.empty_like(rows)
    _coder.library().trellis(rows.data_ptr(), values.data_ptr(), *rows.shape, usable_cores())
    return values.to(x.device)
