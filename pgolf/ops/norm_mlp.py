"""The feed-forward branch of a block: RMS norm, up projection, squared leaky ReLU, down projection, residual.

On a Hopper GPU own kernels do it, and torch's products for the gradients of the matrices; elsewhere, and for
what the kernels do not take, `norm_mlp_ref` does. For the backward pass the kernels save the input, the
activation and one bit for each of its elements, but neither the normed input nor the output of the up
projection: the norm's factor `rho` is one number a token and part of every epilogue. With g the gradient of
the output:

    p = x up^T, h = rho p, a = act(h)      q = g down      e = rho q act'(h)      S = 2 sum_m q a
    grad_down = g^T a      grad_up = e^T x      grad_x = e up - (rho^2 S / D) x

(a is homogeneous of degree 2 in h, so h act'(h) = 2 a, and S is known before grad_x is computed.)
Legend: `T` tokens, `D` width, `M` hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pgolf.ops._extension  # noqa: F401  (registers the operators)
from pgolf.ops._derivatives import refuse_derivatives, refuse_second_order, refuse_transforms
from pgolf.ops._hopper import has_kernels

EPS = torch.finfo(torch.float32).eps
"""Added to the mean square before the root, for every dtype, which is also torch's choice for float32."""
MOST_TOKENS, MOST_WIDTH = 1 << 24, 512
TILE, LEAST_HIDDEN, MOST_HIDDEN = 128, 512, 1 << 16
"""Sizes that the kernels take; M is a multiple of TILE."""


def norm_mlp(x: Tensor, up: Tensor, down: Tensor, residual: Tensor | None = None, *, slope: float) -> Tensor:
    """Compute residual + act(rms_norm(x) up^T) down^T with act(h) = leaky_relu(h, slope)^2.

    Equals `norm_mlp_ref`. The Hopper kernels take bfloat16 with D a multiple of 8 up to 512, M a multiple of
    128 from 512 on, and a slope from 0 to 1. They round the output once, are deterministic, bitwise the same
    from run to run, and can be differentiated once, by torch.autograd. Everything else, and all of it under
    autocast, is computed by the reference. Both work under torch.compile and in CUDA graphs.

    Args:
        x: `(T, D)`.
        up: `(M, D)`, dtype of `x`.
        down: `(D, M)`, dtype of `x`.
        residual: `(T, D)`, dtype of `x`, or None for 0. It is cheapest if it is `x` itself: the kernel then
            adds its gradient to that of `x`.
        slope: of act below 0, before it is squared; 0 is relu(h)^2.

    Returns:
        `(T, D)`, dtype of `x`.

    Raises:
        ValueError: shapes or devices disagree.
        TypeError: dtypes disagree, or are no floating-point numbers.
        RuntimeError: the kernels were asked for a second derivative, or one of forward mode or torch.func.

    Source: squared leaky ReLU of parameter-golf #549. Kernels: csrc/kernels/norm_mlp.h.
    """
    _check(x, up, down, residual)
    if not _takes(x, up, slope):
        return norm_mlp_ref(x, up, down, residual, slope=slope)
    refuse_transforms("norm_mlp", x, up, down, *(() if residual is None else (residual,)))
    add_x = residual is x
    y: Tensor = torch.ops.pgolf._norm_mlp(x, up, down, None if add_x else residual, add_x, slope)[0]
    return y


def norm_mlp_ref(
    x: Tensor, up: Tensor, down: Tensor, residual: Tensor | None = None, *, slope: float
) -> Tensor:
    """Compute `norm_mlp` with PyTorch operators; float64 input is computed in float64."""
    n = F.rms_norm(x, x.shape[-1:], eps=EPS)
    y = F.linear(F.leaky_relu(F.linear(n, up), slope).square(), down)
    return y if residual is None else residual + y


def _check(x: Tensor, up: Tensor, down: Tensor, residual: Tensor | None) -> None:
    """Raise an error that names what does not fit to `x`."""
    if x.dim() != 2 or up.dim() != 2:
        raise ValueError(
            f"norm_mlp: x must be (T, D) and up (M, D), got {tuple(x.shape)} and {tuple(up.shape)}"
        )
    width, hidden = x.shape[1], up.shape[0]
    wanted = {"up": (up, (hidden, width)), "down": (down, (width, hidden))}
    if residual is not None:
        wanted["residual"] = (residual, (x.shape[0], width))
    if not x.is_floating_point():
        raise TypeError(f"norm_mlp: x must have a floating-point dtype, got {x.dtype}")
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(f"norm_mlp: {name} must be {shape}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"norm_mlp: {name} must be on {x.device} as x is, got {tensor.device}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"norm_mlp: {name} must be {x.dtype} as x is, got {tensor.dtype}")


def _takes(x: Tensor, up: Tensor, slope: float) -> bool:
    """Return whether the kernels take this problem."""
    (hidden, width), device = up.shape, x.device
    return (
        x.dtype == torch.bfloat16
        and x.shape[0] <= MOST_TOKENS
        and (width % 8 == 0 and 0 < width <= MOST_WIDTH)
        and (hidden % TILE == 0 and LEAST_HIDDEN <= hidden <= MOST_HIDDEN)
        and 0.0 <= slope <= 1.0
        and has_kernels("norm_mlp_up", device.type, device.index)
        and not torch.is_autocast_enabled(device.type)
    )


def _forward(
    x: Tensor, up: Tensor, down: Tensor, residual: Tensor | None, add_x: bool, slope: float
) -> tuple[Tensor, ...]:
    ops = torch.ops.pgolf
    act, signs, rho = ops.norm_mlp_up(x, up, slope)
    # Both ways need it, and it is small.
    down_t = down.t().clone(memory_format=torch.contiguous_format)
    y = ops.norm_mlp_sum(act, down_t, x if add_x else residual, None, None, None)
    return y, act, signs, rho, down_t


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, up, down, _residual, ctx.add_x, ctx.slope = inputs
    saved = output[1:]
    ctx.mark_non_differentiable(*saved)
    # Otherwise backward begins by filling a gradient of the activation, (T, M), with zeros.
    ctx.set_materialize_grads(False)
    # `down` only for the error of a second derivative; the compiler removes it.
    ctx.save_for_backward(x, up, down, *saved)


def _backward(ctx: Any, grad: Tensor | None, *_others: object) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    x, up, down, act, signs, rho, down_t = ctx.saved_tensors
    need_x, need_up, need_down, need_residual = ctx.needs_input_grad[:4]
    ops = torch.ops.pgolf
    dx = dup = ddown = None
    with torch.no_grad():
        if need_x or need_up:
            e, partials = ops.norm_mlp_dact(grad, down_t, act, signs, rho, ctx.slope)
        if need_x:
            dx = ops.norm_mlp_sum(e, up, grad if ctx.add_x else None, x, rho, partials)
        if need_up:
            dup = e.t() @ x
        if need_down:
            ddown = grad.t() @ act
    grads = (
        None if g is None else refuse_second_order("norm_mlp", g, grad, x, up, down) for g in (dx, dup, ddown)
    )
    return *grads, grad if need_residual else None, None, None


def _forward_fake(
    x: Tensor, up: Tensor, down: Tensor, _residual: Tensor | None, _add_x: bool, slope: float
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *_up_fake(x, up, slope), down.new_empty(up.shape)


def _up_fake(x: Tensor, up: Tensor, _slope: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, hidden = x.shape[0], up.shape[0]
    words = (rows + TILE - 1) // TILE * (hidden // TILE) * 512
    return (
        x.new_empty(rows, hidden),
        x.new_empty(words, dtype=torch.int32),
        x.new_empty(rows, dtype=torch.float32),
    )


def _dact_fake(grad: Tensor, _down_t: Tensor, act: Tensor, *_others: Any) -> tuple[Tensor, Tensor]:
    rows, hidden = act.shape
    return grad.new_empty(rows, hidden), grad.new_empty(hidden // TILE, rows, dtype=torch.float32)


def _sum_fake(a: Tensor, b: Tensor, *_others: Any) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


# In Python, because the steps are operators of their own: the compiler sees those of the backward pass.
torch.library.define(
    "pgolf::_norm_mlp",
    "(Tensor x, Tensor up, Tensor down, Tensor? residual, bool add_x, float slope) -> (Tensor y, Tensor act, "
    "Tensor signs, Tensor rho, Tensor down_t)",
)
torch.library.impl("pgolf::_norm_mlp", "default", _forward)
torch.library.register_fake("pgolf::_norm_mlp", _forward_fake)
torch.library.register_autograd("pgolf::_norm_mlp", _backward, setup_context=_setup)
torch.library.register_fake("pgolf::norm_mlp_up", _up_fake)
torch.library.register_fake("pgolf::norm_mlp_dact", _dact_fake)
torch.library.register_fake("pgolf::norm_mlp_sum", _sum_fake)
refuse_derivatives("norm_mlp", "norm_mlp_up", "norm_mlp_dact", "norm_mlp_sum")
