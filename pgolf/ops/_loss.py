"""Parts that the two cross-entropies share: reductions, the target check, scaling of a saved gradient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pgolf import env
from pgolf.ops._derivatives import is_batched

Reduction = Literal["none", "mean", "sum"]

CHECK_TARGETS = env.check_targets()
"""Whether targets on CUDA are checked too, which costs one synchronization per call; read once, at import."""


def check_reduction(op: str, reduction: str) -> None:
    """Raise ValueError unless `reduction` is "none", "mean" or "sum"."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'{op}: reduction must be "none", "mean" or "sum", got {reduction!r}')


def row_weight(target: Tensor, ignore_index: int, reduction: Reduction) -> Tensor:
    """Return the factor of each counted row's loss in the reduced loss: `()` float32 on the target's device.

    1 for "sum"; 1 / (number of rows that are not ignored, at least 1) for "mean".
    """
    if reduction == "sum":
        return torch.ones((), dtype=torch.float32, device=target.device)
    return (target != ignore_index).sum().clamp_(min=1).float().reciprocal_()


def reduce_rows(loss: Tensor, target: Tensor, ignore_index: int, reduction: Reduction) -> Tensor:
    """Reduce the losses of rows, `(rows,)`, in which ignored rows are 0."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum().clamp(min=1)


def rescale_once(grad: Tensor, grad_loss: Tensor) -> Tensor:
    """Multiply a saved gradient by the upstream gradient, in place, and return it.

    If the upstream gradient is exactly 1, the saved gradient is neither read nor written. In a batched
    backward pass, which has several upstream gradients, the product is a new tensor.
    """
    with torch.no_grad():
        if is_batched(grad_loss):
            return (grad * grad_loss).to(grad.dtype)
        torch.ops.pgolf.softcap_ce_rescale_(grad, grad_loss)
        # A second backward pass would scale the same tensor again. A higher version makes autograd refuse it.
        torch.autograd.graph.increment_version(grad)
    return grad
