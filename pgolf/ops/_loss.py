"""What the two cross-entropies share: reductions, the debugging switch, refusal of second derivatives."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from pgolf import env

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
    """Multiply a saved gradient by the upstream one, in place; nothing is read or written where that is 1."""
    with torch.no_grad():
        torch.ops.pgolf.softcap_ce_rescale_(grad, grad_loss)
        # A second backward would rescale twice: make its unpacking fail.
        torch.autograd.graph.increment_version(grad)
    return grad


def second_order_error(op: str) -> RuntimeError:
    """Return the error of differentiating a gradient of `op`."""
    return RuntimeError(
        f"{op}: second derivatives are not implemented; use {op}_ref where a gradient of a gradient is needed"
    )


def refuse_second_order(op: str, grad: Tensor) -> Tensor:
    """Return `grad` of `op`; where the backward pass is recorded, differentiating it is an error."""
    if not torch.is_grad_enabled():
        return grad
    return _Refuse.apply(op, grad, grad.new_empty(0).requires_grad_())  # type: ignore[no-any-return,no-untyped-call]


class _Refuse(torch.autograd.Function):
    """The identity, whose derivative is an error."""

    @staticmethod
    def forward(ctx: Any, op: str, grad: Tensor, _anchor: Tensor) -> Tensor:
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> Any:
        raise second_order_error(ctx.op)
