"""Queries and keys from the product of q, k and v: RMS norm of each head, gain of the query heads, RoPE.

On a CUDA GPU one kernel computes q and k, and one the gradient of the whole product, in which it also writes
the columns of v; elsewhere, and for what the kernels do not take, `qk_norm_rope_ref` does. For one head of
one token, with x its K columns, R the rotation (orthogonal, so its transpose rotates back) and g the
gradient of the output,

    r = (mean x^2 + eps)^(-1/2)        q = gain R(r x)        k = R(r x)
    h = R^T g        dx = gain r (h - r^2 / K (h . x) x)        dgain = sum_t r (h . x)

Nothing is saved but the inputs. The gradient of v is part of the backward kernel because qkv is one tensor:
otherwise another kernel would read and write the gradients of q, k and v once more to put them side by side,
or to add the two gradients that v gets from attention and from `head_mix`.

Legend: `T` tokens, `H` query heads, `G` kv heads, `K` head dim, `R` rotated dims, the first of K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pgolf.ops._extension  # noqa: F401  (registers the operators)
from pgolf.ops._checks import check_dtype, check_like
from pgolf.ops._derivatives import (
    refuse_constant,
    refuse_derivatives,
    refuse_second_order,
    refuse_transforms,
)
from pgolf.ops._hopper import has_kernels

EPS = torch.finfo(torch.float32).eps
"""Added to the mean square before the root, for every dtype, which is also torch's choice for float32."""
HEAD_DIMS, HEADS_PER_GROUP = (64, 128), (1, 2, 4)
"""K and H / G that the kernels take."""
MOST_VALUE_GRADS = 2
"""Gradients of v that the backward kernel adds."""


def qk_norm_rope(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return q and k of attention: q_h = R(rms_norm(x_h) * gain_h) and k_g = R(rms_norm(x_g)).

    R is rotary position embedding in its half-split form: with R/2 = cos.shape[-1], (x1, x2), the first and
    the second R/2 dims, become (x1 cos + x2 sin, -x1 sin + x2 cos). The other dims do not change.

    Equals `qk_norm_rope_ref`. The CUDA kernels take bfloat16 with K = 64 or 128, H / G = 1, 2 or 4, and any
    even R up to K. They compute in float32 and round each output once, are deterministic, bitwise the same
    from run to run, and can be differentiated once, by torch.autograd. Everything else, and all of it under
    autocast, is computed by the reference. Both work under torch.compile and in CUDA graphs.

    Args:
        qkv: `(T, (H + 2G) K)`, floating point: the H heads of q, then the G of k, then the G of v, which are
            not read. The number of query heads is that of `gain`.
        gain: `(H,)`, float32 or the dtype of `qkv`.
        cos, sin: `(T, 1, R/2)` or `(T, R/2)` float32 (or float64 if `qkv` is), without gradient.
        head_dim: K.

    Returns:
        q `(T, H, K)` and k `(T, G, K)`, dtype of `qkv`, contiguous.

    Raises:
        ValueError: shapes or devices disagree.
        TypeError: a dtype is none of those above.
        RuntimeError: cos or sin require a gradient, or the kernels were asked for a second derivative, or one
            of forward mode or torch.func.

    Source: QK-norm, Henry et al. 2020 (arXiv 2010.04245), with a gain per head; RoPE, Su et al. 2021 (arXiv
    2104.09864), restricted to the leading dims; both as in parameter-golf #1855. Kernels:
    csrc/kernels/qk_norm_rope.h.
    """
    _check(qkv, gain, cos, sin, head_dim)
    if not _takes(qkv, gain, cos, sin, head_dim):
        return qk_norm_rope_ref(qkv, gain, cos, sin, head_dim)
    refuse_transforms("qk_norm_rope", qkv, gain)
    for name, table in (("cos", cos), ("sin", sin)):
        refuse_constant("qk_norm_rope", name, table)
    q, k = torch.ops.pgolf.qk_norm_rope(qkv, gain, cos, sin, head_dim)
    return q, k


def qk_norm_rope_ref(
    qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, head_dim: int
) -> tuple[Tensor, Tensor]:
    """Compute `qk_norm_rope` with PyTorch operators; float64 input is computed in float64."""
    heads, groups = _counts(qkv, gain, head_dim)
    # No -1: with no tokens it could be anything.
    q, k, _ = torch.split(
        qkv.view(qkv.shape[0], heads + 2 * groups, head_dim), [heads, groups, groups], dim=1
    )
    q = _rotate(F.rms_norm(q, (head_dim,), eps=EPS) * gain[:, None], cos, sin)
    return q.to(qkv.dtype), _rotate(F.rms_norm(k, (head_dim,), eps=EPS), cos, sin)


def qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Sequence[Tensor],
    qkv: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `qkv` and `gain` of `qk_norm_rope`, given those of q, k and v.

    The first H + G heads of dqkv are the gradient through `qk_norm_rope`. The last G are the sum of `dv`,
    added in float32. Equals `qk_norm_rope_backward_ref`, and is not differentiable. The kernels are used
    where `qk_norm_rope` uses them.

    Args:
        dq: gradient of q `(T, H, K)`, dtype of `qkv`, or float32, which is not rounded before it is used: an
            attention that adds up the gradient of q in memory has it in float32.
        dk: gradient of k `(T, G, K)`, dtype of `qkv`.
        dv: up to two gradients `(T, G, K)` of v, dtype of `qkv`; with none the columns of v are 0.
        qkv, gain, cos, sin, head_dim: as in `qk_norm_rope`.

    Returns:
        dqkv `(T, (H + 2G) K)` in the dtype of `qkv`, contiguous, and dgain `(H,)` in float32 (float64 if
        `qkv` is).

    Raises:
        ValueError: shapes or devices disagree, or there are more than two `dv`.
        TypeError: a dtype is none of those above.
        RuntimeError: a derivative was asked for.
    """
    _check(qkv, gain, cos, sin, head_dim)
    heads, groups = _counts(qkv, gain, head_dim)
    if len(dv) > MOST_VALUE_GRADS:
        raise ValueError(
            f"qk_norm_rope_backward: dv must be at most {MOST_VALUE_GRADS} tensors, got {len(dv)}"
        )
    op, of_k = "qk_norm_rope_backward", (qkv.shape[0], groups, head_dim)
    check_like(op, "dq", dq, (qkv.shape[0], heads, head_dim), qkv, qkv.dtype, torch.float32)
    for name, grad in (("dk", dk), *(("dv", t) for t in dv)):
        check_like(op, name, grad, of_k, qkv, qkv.dtype)
    arguments = dq, dk, list(dv), qkv, gain, cos, sin, head_dim
    if not _takes(qkv, gain, cos, sin, head_dim):
        return qk_norm_rope_backward_ref(*arguments)
    refuse_transforms("qk_norm_rope_backward", dq, dk, *dv, qkv, gain)
    dqkv, dgain = torch.ops.pgolf.qk_norm_rope_backward(*arguments)
    return dqkv, dgain


def qk_norm_rope_backward_ref(
    dq: Tensor,
    dk: Tensor,
    dv: Sequence[Tensor],
    qkv: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
) -> tuple[Tensor, Tensor]:
    """Compute `qk_norm_rope_backward` with PyTorch operators, in float32, or in float64 for such input."""
    heads, groups = _counts(qkv, gain, head_dim)
    tokens, wide = qkv.shape[0], torch.promote_types(qkv.dtype, torch.float32)
    x = qkv.view(tokens, heads + 2 * groups, head_dim)[:, : heads + groups].to(wide)
    h = _rotate(torch.cat((dq, dk), dim=1).to(wide), cos, -sin)
    r = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    along = (h * x).sum(-1, keepdim=True)
    factor = torch.cat((gain.to(wide), gain.new_ones(groups, dtype=wide)))[:, None]
    dx = (factor * r * (h - r.square() / head_dim * along * x)).to(qkv.dtype)
    of_values = torch.zeros_like(dk, dtype=wide)
    for grad in dv:
        of_values = of_values + grad
    dqkv = torch.cat((dx, of_values.to(qkv.dtype)), dim=1).flatten(1)
    return dqkv, (r * along)[:, :heads, 0].sum(0)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] dims of `x` `(T, H, K)`; the others do not change."""
    half = cos.shape[-1]
    if half == 0:
        return x
    cos, sin = (t.view(t.shape[0], 1, half) for t in (cos, sin))
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat(((x1 * cos + x2 * sin).to(x.dtype), (x2 * cos - x1 * sin).to(x.dtype), rest), dim=-1)


def _counts(qkv: Tensor, gain: Tensor, head_dim: int) -> tuple[int, int]:
    """Return H and G."""
    heads = gain.shape[0]
    return heads, (qkv.shape[1] // head_dim - heads) // 2


def _check(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> None:
    """Raise an error that names what does not fit to `qkv`."""
    op = "qk_norm_rope"
    if qkv.dim() != 2 or gain.dim() != 1 or head_dim <= 0:
        raise ValueError(
            f"{op}: qkv must be (T, (H + 2G) K), gain (H,) and head_dim positive, got {tuple(qkv.shape)}, "
            f"{tuple(gain.shape)} and {head_dim}"
        )
    tokens, width = qkv.shape
    heads, groups = _counts(qkv, gain, head_dim)
    if groups <= 0 or heads == 0 or (heads + 2 * groups) * head_dim != width:
        raise ValueError(
            f"{op}: qkv must have (H + 2G) K columns for H = {heads} (of gain), K = {head_dim} and some G, "
            f"got {width}"
        )
    if not qkv.is_floating_point():
        raise TypeError(f"{op}: qkv must have a floating-point dtype, got {qkv.dtype}")
    half = cos.shape[-1] if cos.dim() else 0
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) not in ((tokens, half), (tokens, 1, half)) or 2 * half > head_dim:
            raise ValueError(
                f"{op}: {name} must be ({tokens}, R/2) or ({tokens}, 1, R/2) with R <= {head_dim}, the same "
                f"R for both, got {tuple(table.shape)}"
            )
        check_dtype(op, name, table, torch.promote_types(qkv.dtype, torch.float32), torch.float32)
    check_dtype(op, "gain", gain, qkv.dtype, torch.float32)
    for name, tensor in (("gain", gain), ("cos", cos), ("sin", sin)):
        if tensor.device != qkv.device:
            raise ValueError(f"{op}: {name} must be on {qkv.device} as qkv is, got {tensor.device}")


def _takes(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> bool:
    """Return whether the kernels take this problem."""
    heads, groups = _counts(qkv, gain, head_dim)
    device = qkv.device
    return (
        qkv.dtype == torch.bfloat16
        and cos.dtype == sin.dtype == torch.float32
        and head_dim in HEAD_DIMS
        and heads in [groups * n for n in HEADS_PER_GROUP]
        and has_kernels("qk_norm_rope", device.type, device.index, hopper=False)
        and not torch.is_autocast_enabled(device.type)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:  # noqa: ARG001
    *tensors, ctx.head_dim = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
    qkv, gain, cos, sin = ctx.saved_tensors
    with torch.no_grad():
        dqkv, dgain = torch.ops.pgolf.qk_norm_rope_backward(dq, dk, [], qkv, gain, cos, sin, ctx.head_dim)
        found = dqkv, dgain.to(gain.dtype)
    sources = dq, dk, qkv, gain
    grads = (
        refuse_second_order("qk_norm_rope", grad, *sources) if need else None
        for grad, need in zip(found, ctx.needs_input_grad[:2], strict=True)
    )
    return *grads, None, None, None


def _forward_fake(
    qkv: Tensor, gain: Tensor, _cos: Tensor, _sin: Tensor, head_dim: int
) -> tuple[Tensor, Tensor]:
    heads, groups = _counts(qkv, gain, head_dim)
    tokens = qkv.shape[0]
    return qkv.new_empty(tokens, heads, head_dim), qkv.new_empty(tokens, groups, head_dim)


def _backward_fake(
    _dq: Tensor,
    _dk: Tensor,
    _dv: list[Tensor],
    qkv: Tensor,
    gain: Tensor,
    _cos: Tensor,
    _sin: Tensor,
    _head_dim: int,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(qkv.shape), gain.new_empty(gain.shape, dtype=wide)


torch.library.register_fake("pgolf::qk_norm_rope", _forward_fake)
torch.library.register_fake("pgolf::qk_norm_rope_backward", _backward_fake)
torch.library.impl("pgolf::qk_norm_rope", "CPU", qk_norm_rope_ref)
torch.library.impl("pgolf::qk_norm_rope_backward", "CPU", qk_norm_rope_backward_ref)
torch.library.register_autograd("pgolf::qk_norm_rope", _backward, setup_context=_setup)
refuse_derivatives("qk_norm_rope", "qk_norm_rope_backward")
