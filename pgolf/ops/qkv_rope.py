"""The product of q, k and v, with queries and keys made from it in the same pass over memory.

On a Hopper GPU one kernel reads the input and the matrix and writes the product, which the backward pass
needs, and q and k with their norm, rotation and gain: `qk_norm_rope` need not read the product again. They
have the bits that `qk_norm_rope` makes of the product that was written. Elsewhere, and for what the kernel
does not take, torch's product and `qk_norm_rope` compute. The gradients are those of the two: with g, dq and
dk those of the outputs and B the backward pass of `qk_norm_rope`,

    d = g + B(dq, dk)        dn = d weight        dweight = d^T n

Legend: `T` tokens, `D` width, `H` query heads, `G` kv heads, `K` head dim, `R` rotated dims, the first of K.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pgolf.ops._extension  # noqa: F401  (registers the operators)
from pgolf.ops._checks import check_dtype, check_like
from pgolf.ops._derivatives import refuse_constant, refuse_second_order, refuse_transforms
from pgolf.ops._hopper import has_kernels
from pgolf.ops.qk_norm_rope import HEADS_PER_GROUP, qk_norm_rope, qk_norm_rope_ref

HEAD_DIM, ROTATED = 64, (0, 16)
"""K and R that the kernel takes."""
MOST_TOKENS, MOST_WIDTH, LEAST_HEADS, MOST_HEADS = 1 << 24, 512, 8, 1 << 10
"""Sizes that the kernel takes: the least of H + 2G, the most of H and of G."""


def qkv_rope(
    n: Tensor, weight: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return qkv = n weight^T, and q and k of attention, which are `qk_norm_rope` of it.

    q_h = R(rms_norm(x_h) * gain_h) and k_g = R(rms_norm(x_g)) with x a head of qkv and R the rotation of its
    first dims, as in `qk_norm_rope`. v is the last G K columns of qkv.

    Equals `qkv_rope_ref`. The Hopper kernel takes bfloat16 with D a multiple of 8 up to 512, K = 64, R = 0 or
    16, even H and G with H + 2G >= 8, and H / G = 1, 2 or 4. It adds in float32 and rounds each output once,
    q and k from the rounded qkv; it is deterministic, bitwise the same from run to run, and can be
    differentiated once, by torch.autograd. Everything else, and all of it under autocast, is computed by
    `F.linear` and `qk_norm_rope`. Both work under torch.compile and in CUDA graphs.

    Args:
        n: `(T, D)`, floating point.
        weight: `((H + 2G) K, D)`, dtype of `n`: the rows of the H heads of q, then of the G of k, then of the
            G of v. The number of query heads is that of `gain`.
        gain: `(H,)`, float32 or the dtype of `n`.
        cos, sin: `(T, 1, R/2)` or `(T, R/2)` float32 (or float64 if `n` is), without gradient.
        head_dim: K.

    Returns:
        qkv `(T, (H + 2G) K)`, q `(T, H, K)` and k `(T, G, K)`, dtype of `n`, contiguous.

    Raises:
        ValueError: shapes or devices disagree.
        TypeError: a dtype is none of those above.
        RuntimeError: cos or sin require a gradient, or the kernel was asked for a second derivative, or one
            of forward mode or torch.func.

    Source: as `qk_norm_rope`. Kernel: csrc/kernels/qkv_rope.h.
    """
    _check(n, weight, gain, cos, sin, head_dim)
    if not _takes(n, weight, gain, cos, sin, head_dim):
        qkv = F.linear(n, weight)
        return qkv, *qk_norm_rope(qkv, gain, cos, sin, head_dim)
    refuse_transforms("qkv_rope", n, weight, gain)
    for name, table in (("cos", cos), ("sin", sin)):
        refuse_constant("qkv_rope", name, table)
    qkv, q, k = torch.ops.pgolf.qkv_rope(n, weight, gain, cos, sin, head_dim)
    return qkv, q, k


def qkv_rope_ref(
    n: Tensor, weight: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `qkv_rope` with PyTorch operators; float64 input is computed in float64."""
    qkv = F.linear(n, weight)
    return qkv, *qk_norm_rope_ref(qkv, gain, cos, sin, head_dim)


def _groups(weight: Tensor, gain: Tensor, head_dim: int) -> int:
    """Return G."""
    return (weight.shape[0] // head_dim - gain.shape[0]) // 2


def _check(n: Tensor, weight: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> None:
    """Raise an error that names what does not fit to `n`."""
    op = "qkv_rope"
    if n.dim() != 2 or weight.dim() != 2 or gain.dim() != 1 or head_dim <= 0:
        raise ValueError(
            f"{op}: n must be (T, D), weight ((H + 2G) K, D), gain (H,) and head_dim positive, got "
            f"{tuple(n.shape)}, {tuple(weight.shape)}, {tuple(gain.shape)} and {head_dim}"
        )
    if not n.is_floating_point():
        raise TypeError(f"{op}: n must have a floating-point dtype, got {n.dtype}")
    (tokens, width), (columns, _) = n.shape, weight.shape
    heads, groups = gain.shape[0], _groups(weight, gain, head_dim)
    if groups <= 0 or heads == 0 or (heads + 2 * groups) * head_dim != columns:
        raise ValueError(
            f"{op}: weight must have (H + 2G) K rows for H = {heads} (of gain), K = {head_dim} and some G, "
            f"got {columns}"
        )
    check_like(op, "weight", weight, (columns, width), n, n.dtype, of="n")
    check_like(op, "gain", gain, (heads,), n, n.dtype, torch.float32, of="n")
    half = cos.shape[-1] if cos.dim() else 0
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) not in ((tokens, half), (tokens, 1, half)) or 2 * half > head_dim:
            raise ValueError(
                f"{op}: {name} must be ({tokens}, R/2) or ({tokens}, 1, R/2) with R <= {head_dim}, the same "
                f"R for both, got {tuple(table.shape)}"
            )
        check_dtype(op, name, table, torch.promote_types(n.dtype, torch.float32), torch.float32)
        if table.device != n.device:
            raise ValueError(f"{op}: {name} must be on {n.device} as n is, got {table.device}")


def _takes(n: Tensor, weight: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> bool:
    """Return whether the kernel takes this problem."""
    heads, groups, width = gain.shape[0], _groups(weight, gain, head_dim), n.shape[1]
    device = n.device
    return (
        n.dtype == weight.dtype == torch.bfloat16
        and cos.dtype == sin.dtype == torch.float32
        and n.shape[0] <= MOST_TOKENS
        and (width % 8 == 0 and 0 < width <= MOST_WIDTH)
        and (head_dim == HEAD_DIM and 2 * cos.shape[-1] in ROTATED)
        and (heads % 2 == 0 and groups % 2 == 0 and heads <= MOST_HEADS)
        and (heads in [groups * ratio for ratio in HEADS_PER_GROUP] and heads + 2 * groups >= LEAST_HEADS)
        and has_kernels("qkv_rope", device.type, device.index)
        and not torch.is_autocast_enabled(device.type)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.head_dim = inputs
    ctx.save_for_backward(*tensors, output[0])


def _backward(ctx: Any, grad: Tensor, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
    n, weight, gain, cos, sin, qkv = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    with torch.no_grad():
        dqkv, dgain = torch.ops.pgolf.qk_norm_rope_backward(dq, dk, [], qkv, gain, cos, sin, ctx.head_dim)
        dqkv = dqkv + grad
        dn = dqkv @ weight if needs[0] else None
        dweight = dqkv.t() @ n if needs[1] else None
        found = dn, dweight, dgain.to(gain.dtype) if needs[2] else None
    sources = grad, dq, dk, n, weight, gain
    grads = (None if g is None else refuse_second_order("qkv_rope", g, *sources) for g in found)
    return *grads, None, None, None


def _fake(
    n: Tensor, weight: Tensor, gain: Tensor, _cos: Tensor, _sin: Tensor, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, groups = n.shape[0], gain.shape[0], _groups(weight, gain, head_dim)
    return (
        n.new_empty(tokens, weight.shape[0]),
        n.new_empty(tokens, heads, head_dim),
        n.new_empty(tokens, groups, head_dim),
    )


torch.library.register_fake("pgolf::qkv_rope", _fake)
torch.library.impl("pgolf::qkv_rope", "CPU", qkv_rope_ref)
torch.library.register_autograd("pgolf::qkv_rope", _backward, setup_context=_setup)
