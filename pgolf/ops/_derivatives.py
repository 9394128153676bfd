"""Errors for derivatives that an operator does not implement, in place of a silent zero.

A compiled operator receives plain values. The tangents of forward mode and the levels of torch.func do not
reach it, so the Python function of each operator looks for them before the call (`refuse_transforms`). A
second derivative is refused in the backward pass: `refuse_second_order` connects the gradient to every tensor
that it depends on by an autograd node that raises.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pgolf.ops._compiler import not_compiled

_functorch: Any = torch._C._functorch


def no_derivative_error(op: str) -> RuntimeError:
    """Return the error for differentiating an operator that has no derivative."""
    return RuntimeError(
        f"{op}: not differentiable; call it under torch.no_grad() or on x.detach(), or use {op}_ref where a "
        "gradient is needed"
    )


def second_order_error(op: str) -> RuntimeError:
    """Return the error for differentiating a gradient of `op` a second time."""
    return RuntimeError(
        f"{op}: second derivatives are not implemented; use {op}_ref where a gradient of a gradient is needed"
    )


def refuse_derivatives(op: str, *operators: str) -> None:
    """Make a backward pass through `operators` (of `torch.ops.pgolf`) raise an error that names `op`."""

    def backward(_ctx: Any, *_grads: Any) -> None:
        raise no_derivative_error(op)

    for operator in operators:
        torch.library.register_autograd(f"pgolf::{operator}", backward)


def refuse_second_order(op: str, grad: Tensor, *sources: Tensor) -> Tensor:
    """Return `grad`, the gradient of `op`, so that differentiating it again raises RuntimeError.

    Nothing is added where the backward pass is not recorded (no `create_graph`).

    Args:
        sources: the tensors that `grad` depends on and that autograd knows: the upstream gradient, and inputs
            or outputs of the operator. A derivative with respect to any of them, or to a tensor from which
            they were computed, raises the error.
    """
    if not torch.is_grad_enabled():
        return grad
    return _Refuse.apply(op, grad, *sources)  # type: ignore[no-any-return,no-untyped-call]


class _Refuse(torch.autograd.Function):
    """Autograd function that returns its first tensor unchanged and raises when it is differentiated."""

    @staticmethod
    def forward(ctx: Any, op: str, grad: Tensor, *_sources: Tensor) -> Tensor:
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> Any:
        raise second_order_error(ctx.op)

    @staticmethod
    def jvp(ctx: Any, *_tangents: Any) -> Any:
        raise second_order_error(ctx.op)


def is_batched(tensor: Tensor) -> bool:
    """Return whether `tensor` carries a hidden batch dimension, of vmap or of a batched backward pass."""
    return bool(_functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor))


def refuse_transforms(op: str, *tensors: Tensor, reference: str | None = None) -> None:
    """Raise RuntimeError if forward mode or torch.func is differentiating one of `tensors`.

    A tensor that only vmap has wrapped is accepted. The check costs two reads of Python values when neither
    forward mode nor torch.func is active.

    Args:
        reference: name of the function that the error message recommends; `<op>_ref` if None.
    """
    forward = forward_ad._current_level >= 0
    if torch.compiler.is_compiling():
        # The compiler traces the level of forward mode, with a guard, but not the tangents; so any active
        # level is refused. A backward pass is refused later, by the operator's own autograd formula.
        found = forward
    else:
        stacked = _functorch.peek_interpreter_stack() is not None
        found = (forward or stacked) and any(_is_differentiated(t, forward) for t in tensors)
    if found:
        raise RuntimeError(
            f"{op}: forward-mode derivatives and those of torch.func are not implemented; use "
            f"{reference or op + '_ref'}, which has them, or detach the tensors that need no derivative"
        )


def refuse_constant(op: str, name: str, tensor: Tensor) -> None:
    """Raise RuntimeError if the argument `name`, which has no gradient, would have to be differentiated."""
    refuse_transforms(op, tensor)
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise RuntimeError(f"{op}: {name} has no derivative; pass {name}.detach()")


def refuse_recording(op: str, tensors: Iterable[Tensor | None]) -> None:
    """Raise RuntimeError if an operator that works in place would have to be differentiated."""
    found = [t for t in tensors if t is not None]
    refuse_transforms(op, *found)
    if torch.is_grad_enabled() and any(t.requires_grad for t in found):
        raise RuntimeError(
            f"{op}: this operator works in place and is not differentiable, but a tensor requires grad; call "
            "it under torch.no_grad() or on detached tensors"
        )


@not_compiled
def _is_differentiated(tensor: Tensor, forward: bool) -> bool:
    """Return whether `tensor` carries a tangent or is differentiated at some level of torch.func."""
    while True:
        # A tensor of vmap cannot be unpacked; its tangent, if there is one, is one level below.
        visible = forward and not _functorch.is_batchedtensor(tensor)
        if visible and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            return True
        if not _functorch.is_functorch_wrapped_tensor(tensor):
            return False
        if torch.is_grad_enabled() and tensor.requires_grad:
            return True
        tensor = _functorch.get_unwrapped(tensor)
