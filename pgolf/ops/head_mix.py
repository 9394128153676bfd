"""What a block does to each head's output of attention: exclusive self-attention and the head gate.

On a CUDA GPU one kernel computes the output, and one all gradients; elsewhere, and for what the kernels do
not take, `head_mix_ref` does. For one head of one token, with y its output of attention, v the value of its
group, m = max(v . v, 1e-24), and p the gradient of the result,

    a = (y . v) / m        e = y - a v        result = gate e
    dgate = p . e        w = gate (p . v) / m        dy = gate p - w v
    dv = sum over the heads of the group of  -a gate p - w y + 2 a w v
    dz = dgate * derivative of the gate        delta = dy . y

(without the last term of dv where v . v is below 1e-24, because m is constant there).
Nothing is saved but the inputs. Each tensor is read once and each gradient written once; the heads of a group
are summed in registers. `delta` is for the backward pass of attention, which otherwise reads dy and y once
more to compute it.

Legend: `T` tokens, `H` query heads, `G` kv heads, `K` head dim.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

import pgolf.ops._extension  # noqa: F401  (registers the operators)
from pgolf.ops._checks import check_like
from pgolf.ops._derivatives import refuse_derivatives, refuse_second_order, refuse_transforms
from pgolf.ops._hopper import has_kernels

SMALLEST_SQUARE = 1e-24
"""Smallest |v|^2 by which is divided (as in F.normalize): a value of zeros removes nothing."""
HEAD_DIMS, HEADS_PER_GROUP = (64, 128), (1, 2, 4)
"""K and H / G that the kernels take."""
NO_GATE, SIGMOID, TWICE_SIGMOID = 0, 1, 2
Kind = Literal[0, 1, 2]
"""Gate: none, sigmoid(scale * z), or 2 sigmoid(z)."""


def head_mix(y: Tensor, v: Tensor, z: Tensor | None, scale: float, kind: Kind) -> Tensor:
    """Remove from each head's output its part along the token's own value, and multiply by the head gate.

    Returns gate_h (y_h - (y_h . u) u) with u = v / |v| of the head's kv group (0 if v is 0).

    Equals `head_mix_ref`. The CUDA kernels take bfloat16 with K = 64 or 128 and H / G = 1, 2 or 4. They
    compute in float32 and round each output once, are deterministic, bitwise the same from run to run, and
    can be differentiated once, by torch.autograd. Everything else, and all of it under autocast, is computed
    by the reference. Both work under torch.compile and in CUDA graphs.

    Args:
        y: `(T, H, K)` floating point, output of attention.
        v: `(T, G, K)` values, dtype of `y`; group g has the query heads g * H/G to (g + 1) * H/G - 1. A part
            of the columns of a wider matrix is read where it is.
        z: `(T, H)` logits of the gate, float32 or the dtype of `y`; None with kind 0.
        scale: multiplier inside the sigmoid of kind 1; others do not use it.
        kind: 0: the gate is 1; 1: it is sigmoid(scale * z); 2: it is 2 sigmoid(z).

    Returns:
        `(T, H, K)`, dtype of `y`, contiguous.

    Raises:
        ValueError: shapes or devices disagree, `kind` is none of the three, or `z` is missing or superfluous.
        TypeError: dtypes disagree, or are no floating-point numbers.
        RuntimeError: the kernels were asked for a second derivative, or one of forward mode or torch.func.

    Source: exclusive self-attention of parameter-golf #478; gates of #1787 (sparse), #1736 (dense) and #1667
    (twice the sigmoid). Kernels: csrc/kernels/head_mix.h.
    """
    _check(y, v, z, kind)
    if not _takes(y, v):
        return head_mix_ref(y, v, z, scale, kind)
    refuse_transforms("head_mix", y, v, *(() if z is None else (z,)))
    mixed: Tensor = torch.ops.pgolf.head_mix(y, v, z, scale, kind)
    return mixed


def head_mix_ref(y: Tensor, v: Tensor, z: Tensor | None, scale: float, kind: Kind) -> Tensor:
    """Compute `head_mix` with PyTorch operators; float64 input is computed in float64."""
    grouped, values = _grouped(y, v)
    square = values.square().sum(-1, keepdim=True).clamp_min(SMALLEST_SQUARE)
    along = (grouped * values).sum(-1, keepdim=True) / square
    mixed = (grouped - along * values).view(y.shape).to(y.dtype)
    if z is None:
        return mixed
    gate = torch.sigmoid(scale * z) if kind == SIGMOID else 2 * torch.sigmoid(z)
    return (mixed * gate[..., None]).to(y.dtype)


def head_mix_backward(
    grad: Tensor, y: Tensor, v: Tensor, z: Tensor | None, scale: float, kind: Kind
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `y`, `v` and `z` of `head_mix`, given that of its result, and dy . y.

    The last result, delta_h,t = sum over K of dy y, is what the backward pass of attention subtracts from the
    gradient of its probabilities P: with dP = dy v^T, that of the scores is P (dP - delta). The rows of
    P (dP - delta) add up to 0 only if dP and delta are of the same dy, so delta is the sum over dy as it is
    returned, rounded to its dtype, and is itself not rounded.

    Equals `head_mix_backward_ref`, and is not differentiable. The kernels are used where `head_mix` uses
    them.

    Args:
        grad: `(T, H, K)`, dtype of `y`.
        y, v, z, scale, kind: as in `head_mix`.

    Returns:
        dy `(T, H, K)`, dv `(T, G, K)` and dz `(T, H)`, each in the dtype of its tensor and contiguous; dz is
        an empty tensor `(0,)` without `z`. Then delta `(H, T)`, float32 (float64 if `y` is), contiguous.

    Raises:
        ValueError: shapes or devices disagree, `kind` is none of the three, or `z` is missing or superfluous.
        TypeError: dtypes disagree, or are no floating-point numbers.
        RuntimeError: a derivative was asked for.
    """
    _check(y, v, z, kind)
    check_like("head_mix_backward", "grad", grad, tuple(y.shape), y, y.dtype, of="y")
    if not _takes(y, v):
        return head_mix_backward_ref(grad, y, v, z, scale, kind)
    refuse_transforms("head_mix_backward", grad, y, v, *(() if z is None else (z,)))
    dy, dv, dz, delta = torch.ops.pgolf.head_mix_backward(grad, y, v, z, scale, kind)
    return dy, dv, dz, delta


def head_mix_backward_ref(
    grad: Tensor, y: Tensor, v: Tensor, z: Tensor | None, scale: float, kind: Kind
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `head_mix_backward` with PyTorch operators, in float32, or in float64 for such input."""
    grouped, values = _grouped(y, v)  # (T, G, H/G, K)
    p = grad.view(grouped.shape).to(grouped.dtype)
    square = values.square().sum(-1, keepdim=True)
    inverse = square.clamp_min(SMALLEST_SQUARE).reciprocal()
    a = (grouped * values).sum(-1, keepdim=True) * inverse
    through = (p * values).sum(-1, keepdim=True)
    gate, slope = _gate_and_slope(z, scale, kind, grouped)
    w = gate * through * inverse
    dy = (gate * p - w * values).to(y.dtype)
    delta = (dy * grouped).sum(-1).flatten(1).t().contiguous()
    curved = torch.where(square >= SMALLEST_SQUARE, 2 * a * w, torch.zeros_like(w))
    dv = (curved * values - a * gate * p - w * grouped).sum(2)
    if z is None:
        dz = y.new_empty(0)
    else:
        dz = (slope * ((p * grouped).sum(-1, keepdim=True) - a * through)).view(z.shape).to(z.dtype)
    return dy.view(y.shape), dv.to(v.dtype), dz, delta


def _grouped(y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return y and v as `(T, G, H/G, K)` in float32, or in float64 for such input."""
    tokens, groups = v.shape[:2]
    wide = torch.promote_types(y.dtype, torch.float32)
    # No -1: with no tokens it could be anything.
    grouped = y.view(tokens, groups, y.shape[1] // groups, y.shape[2]).to(wide)
    # Expanded to the query heads before both products, so that the compiler makes one kernel of them and
    # does not store v in float32.
    return grouped, v.unsqueeze(2).expand(grouped.shape).to(wide)


def _gate_and_slope(z: Tensor | None, scale: float, kind: Kind, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gate and its derivative with respect to z, `(T, G, H/G, 1)` in the dtype of `like`."""
    if z is None:
        one = like.new_ones(())
        return one, torch.zeros_like(one)
    inner, outer = (scale, 1.0) if kind == SIGMOID else (1.0, 2.0)
    s = torch.sigmoid(inner * z.to(like.dtype)).view(*like.shape[:3], 1)
    return outer * s, outer * inner * s * (1 - s)


def _check(y: Tensor, v: Tensor, z: Tensor | None, kind: int) -> None:
    """Raise an error that names what does not fit to `y`."""
    op = "head_mix"
    if kind not in (NO_GATE, SIGMOID, TWICE_SIGMOID):
        raise ValueError(f"{op}: kind must be 0, 1 or 2, got {kind}")
    if kind == NO_GATE and z is not None:
        raise ValueError(f"{op}: z must be None with kind 0")
    if kind != NO_GATE and z is None:
        raise ValueError(f"{op}: z must be a tensor with kind {kind}")
    if y.dim() != 3 or v.dim() != 3:
        raise ValueError(
            f"{op}: y must be (T, H, K) and v (T, G, K), got {tuple(y.shape)} and {tuple(v.shape)}"
        )
    (tokens, heads, width), groups = y.shape, v.shape[1]
    if groups == 0 or heads == 0 or heads % groups != 0:
        raise ValueError(f"{op}: H must be a multiple of G, got {heads} and {groups}")
    if not y.is_floating_point():
        raise TypeError(f"{op}: y must have a floating-point dtype, got {y.dtype}")
    check_like(op, "v", v, (tokens, groups, width), y, y.dtype, of="y")
    if z is not None:
        check_like(op, "z", z, (tokens, heads), y, y.dtype, torch.float32, of="y")


def _takes(y: Tensor, v: Tensor) -> bool:
    """Return whether the kernels take this problem."""
    device = y.device
    return (
        y.dtype == torch.bfloat16
        and y.shape[2] in HEAD_DIMS
        and y.shape[1] in [v.shape[1] * n for n in HEADS_PER_GROUP]
        and has_kernels("head_mix", device.type, device.index, hopper=False)
        and not torch.is_autocast_enabled(device.type)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:  # noqa: ARG001
    y, v, z, ctx.scale, ctx.kind = inputs
    ctx.save_for_backward(y, v, z)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    y, v, z = ctx.saved_tensors
    with torch.no_grad():
        found = torch.ops.pgolf.head_mix_backward(grad, y, v, z, ctx.scale, ctx.kind)
    sources = grad, y, v, *(() if z is None else (z,))
    grads = (
        refuse_second_order("head_mix", of, *sources) if need else None
        for of, need in zip(found[:3], ctx.needs_input_grad[:3], strict=True)
    )
    return *grads, None, None


def _forward_fake(y: Tensor, _v: Tensor, _z: Tensor | None, _scale: float, _kind: int) -> Tensor:
    return y.new_empty(y.shape)


def _backward_fake(
    _grad: Tensor, y: Tensor, v: Tensor, z: Tensor | None, _scale: float, _kind: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dz = y.new_empty(0) if z is None else z.new_empty(z.shape)
    delta = y.new_empty(y.shape[1], y.shape[0], dtype=torch.promote_types(y.dtype, torch.float32))
    return y.new_empty(y.shape), v.new_empty(v.shape), dz, delta


torch.library.register_fake("pgolf::head_mix", _forward_fake)
torch.library.register_fake("pgolf::head_mix_backward", _backward_fake)
torch.library.impl("pgolf::head_mix", "CPU", head_mix_ref)
torch.library.impl("pgolf::head_mix_backward", "CPU", head_mix_backward_ref)
torch.library.register_autograd("pgolf::head_mix", _backward, setup_context=_setup)
refuse_derivatives("head_mix", "head_mix_backward")
