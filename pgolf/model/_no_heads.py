"""`pgolf.model.heads` in the counted programs, which have no compiled operators."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.model.attention import attention_branch


def select_branch(*_: Any) -> Any:
    """Return `attention_branch` with its name."""
    return "composed", attention_branch, ""


def unrounded_logits(hidden: Tensor, table: Tensor, extra: Tensor | None = None) -> Tensor:
    """Return hidden table^T, and `extra` added, in float32 or in float64."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden.to(dtype), table.to(dtype))
    return logits if extra is None else logits + extra
