"""What the two cross-entropies share: reductions, the debugging switch, the factor of a saved gradient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pgolf import env
from pgolf.ops._derivatives import is_batched

Reduction = Literal["none", "mean", "sum"]

CHECK_TARGETS = env.check_targets()
"""Whether CUDA targets are checked too, at the price of a synchronisation; read once, at import."""


def check_reduction(op: str, reduction: str) -> None:
    """Raise ValueError unless `reduction` is one of the three."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'{op}: reduction must be "none", "mean" or "sum", got {reduction!r}')


def row_weight(target: Tensor, ignore_index: int, reduction: Reduction) -> Tensor:
    """Return what the reduction multiplies every counted row's loss by: one float32, on the device."""
    if reduction == "sum":
        return torch.ones((), dtype=torch.float32, device=target.device)
    return (target != ignore_index).sum().clamp_(min=1).float().reciprocal_()


def reduce_rows(loss: Tensor, target: Tensor, ignore_index: int, reduction: Reduction) -> Tensor:
    """Reduce per-row losses, in which ignored rows are 0."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum().clamp(min=1)


def rescale_once(grad: Tensor, grad_loss: Tensor) -> Tensor:
    """Multiply a saved gradient by the upstream one, in place; nothing is read or written where that is 1.

    In a batched backward pass, which has many upstream gradients, the product is a new tensor.
    """
    with torch.no_grad():
        if is_batched(grad_loss):
            return (grad * grad_loss).to(grad.dtype)
        torch.ops.pgolf.softcap_ce_rescale_(grad, grad_loss)
        # A second backward would rescale twice: make its unpacking fail.
        torch.autograd.graph.increment_version(grad)
    return grad
