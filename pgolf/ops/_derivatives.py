"""What operators do with derivatives that they do not have: an error, never a zero.

A compiled operator sees plain numbers. Tangents of forward mode and the levels of torch.func pass it by
without a trace, so the Python faces look for them (`refuse_transforms`); a second derivative is refused in
the backward pass, by a node that hangs on every tensor the gradient depends on (`refuse_second_order`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch: Any = torch._C._functorch


def no_derivative_error(op: str) -> RuntimeError:
    """Return the error of differentiating an operator that has no derivative."""
    return RuntimeError(
        f"{op}: not differentiable; call it under torch.no_grad() or on x.detach(), or use {op}_ref where a "
        "gradient is needed"
    )


def second_order_error(op: str) -> RuntimeError:
    """Return the error of differentiating a gradient of `op`."""
    return RuntimeError(
        f"{op}: second derivatives are not implemented; use {op}_ref where a gradient of a gradient is needed"
    )


def refuse_derivatives(op: str, *operators: str) -> None:
    """Make backward through the functional `operators` (of `torch.ops.pgolf`) an error that names `op`."""

    def backward(_ctx: Any, *_grads: Any) -> None:
        raise no_derivative_error(op)

    for operator in operators:
        torch.library.register_autograd(f"pgolf::{operator}", backward)


def refuse_second_order(op: str, grad: Tensor, *sources: Tensor) -> Tensor:
    """Return `grad` of `op`; where the backward pass is recorded, differentiating it is an error.

    Args:
        sources: what `grad` is a function of and autograd knows: the upstream gradient, and inputs or outputs
            of the node. Whoever differentiates with respect to something behind one of them meets the error.
    """
    if not torch.is_grad_enabled():
        return grad
    return _Refuse.apply(op, grad, *sources)  # type: ignore[no-any-return,no-untyped-call]


class _Refuse(torch.autograd.Function):
    """The identity in its first tensor, whose derivative is an error."""

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
    """Return whether `tensor` is many: vmap's, or that of a batched backward pass."""
    return bool(_functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor))


def refuse_transforms(op: str, *tensors: Tensor, reference: str | None = None) -> None:
    """Raise RuntimeError where a derivative of `op` by forward mode or torch.func was asked for.

    Tensors without tangent that torch.func does not differentiate pass, so do vmap's alone. Reads two Python
    values where nothing of the kind is under way. `reference` is what the error advises: `<op>_ref`.
    """
    forward = forward_ad._current_level >= 0
    if torch.compiler.is_compiling():
        # Traced, with a guard on the level, but without the tangents, so any level is one too many. What
        # differentiates backward reaches the operator, whose formula refuses it.
        found = forward
    else:
        stacked = _functorch.peek_interpreter_stack() is not None
        found = (forward or stacked) and any(_is_differentiated(t, forward) for t in tensors)
    if found:
        raise RuntimeError(
            f"{op}: forward-mode derivatives and those of torch.func (grad, vjp, jvp, jacrev, jacfwd, "
            f"hessian) are not implemented; use {reference or op + '_ref'}, which has them, or detach what "
            "needs none"
        )


def refuse_recording(op: str, tensors: Iterable[Tensor | None]) -> None:
    """Raise RuntimeError where an operator that writes in place would have to be differentiated."""
    found = [t for t in tensors if t is not None]
    refuse_transforms(op, *found)
    if torch.is_grad_enabled() and any(t.requires_grad for t in found):
        raise RuntimeError(
            f"{op}: works in place and is not differentiable, but a tensor requires grad; call it under "
            "torch.no_grad() or on detached tensors"
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _is_differentiated(tensor: Tensor, forward: bool) -> bool:
    """Return whether `tensor` carries a tangent, or is differentiated at some level of torch.func."""
    while True:
        # vmap cannot look for tangents; they are one level down then.
        visible = forward and not _functorch.is_batchedtensor(tensor)
        if visible and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            return True
        if not _functorch.is_functorch_wrapped_tensor(tensor):
            return False
        if torch.is_grad_enabled() and tensor.requires_grad:
            return True
        tensor = _functorch.get_unwrapped(tensor)
