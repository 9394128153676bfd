"""The momentum of `pgolf.optim.Muon`: a buffer in the dtype of the gradient, or 8-bit codes with scales.

    c = round(127 sign(x) sqrt(|x| / s));    x = s |c| c / 127^2    with s = max |x| over the block

A row of n elements has ceil(n / 256) blocks of equal width, so a block never has elements of two rows. The
codes are denser near 0, where most elements of a momentum are: with codes at equal distances, everything
below s / 254 would become 0. The largest element of a block is exact, and so is 0. A block with an element
that is not finite becomes NaN as a whole when it is read, because its scale is not finite.

The new momentum is computed in float32; the direction that is iterated has not been rounded to codes yet.
Every operation is element by element or a maximum, so the result is deterministic.

Legend: a parameter is seen as rows of `n` elements: the rows of a matrix `(m, n)` or of a stack `(b, m, n)`,
or the output channels of a convolution; `k` blocks in a row.

Sources: 8-bit optimizers by blocks, arXiv 2110.02861; 8-bit Muon, bitsandbytes #1973.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.optim.mesh import local, mesh_of, place_part
from pgolf.optim.split_weights import is_split

BUFFER, CODES, SCALES = "momentum_buffer", "momentum_codes", "momentum_scales"
"""Names of the state: of a buffer, or of codes and scales."""
BLOCK = 256
"""Largest number of elements that share a scale."""
LEVELS = 127
AT_ONCE = 1 << 26
"""Elements of a temporary float32 tensor; several of these are needed at a time."""


def blocks_in(n: int) -> int:
    """Return the number of blocks of a row of n elements."""
    return -(-n // BLOCK)


def scales_shape(shape: Sequence[int]) -> torch.Size:
    """Return the shape of the scales of a parameter of this shape: `(b, m, k)` of a stack, or `(m, k)`."""
    if len(shape) == 3:
        return torch.Size([*shape[:2], blocks_in(shape[2])])
    return torch.Size([shape[0], blocks_in(math.prod(shape[1:]))])


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes `(..., n)` int8 and the scales `(..., k)` float32 of `x` `(..., n)` float32."""
    blocks = _blocks(x)
    scales = blocks.abs().amax(-1)
    # 0 / 0 and what is divided by a scale that is not finite get the code 0; the scale says the rest.
    ratio = (blocks / scales.unsqueeze(-1)).nan_to_num_(0.0, 0.0, 0.0)
    codes = ratio.abs().sqrt_().mul_(LEVELS).round_().copysign_(ratio)
    return codes.flatten(-2)[..., : x.shape[-1]].to(torch.int8), scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the values `(..., n)` float32 of codes and scales as `encode` returns them."""
    root = _blocks(codes).float().div_(LEVELS)
    return (root * root.abs()).mul_(scales.unsqueeze(-1)).flatten(-2)[..., : codes.shape[-1]]


def _blocks(x: Tensor) -> Tensor:
    """Return `(..., n)` as `(..., k, width)`, with zeros after the end of a row."""
    n = x.shape[-1]
    k = blocks_in(n)
    width = -(-n // k)
    return (F.pad(x, (0, k * width - n)) if k * width > n else x).reshape(*x.shape[:-1], k, width)


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x.flatten(1)


def fit_momentum(state: MutableMapping[str, Any], p: Tensor, group: Mapping[str, Any], like: Tensor) -> None:
    """Give a parameter the momentum that its group asks for: convert the one that there is, or begin at 0.

    Args:
        state: of the parameter; changed.
        p: the parameter.
        group: its group.
        like: has the dtype and the memory layout of a new buffer; its gradient, or `p`.
    """
    if group["momentum_bits"] == 8:
        if CODES not in state:
            buffer = local(state.pop(BUFFER)) if BUFFER in state else torch.zeros_like(local(p))
            codes, scales = encode(_rows(buffer).float())
            state[CODES] = place_part(codes.reshape(buffer.shape), p, p.shape)
            state[SCALES] = place_part(scales, p, scales_shape(p.shape))
        return
    dtype = torch.float32 if is_split(p, group) else like.dtype
    if CODES in state:
        values = decode(_rows(local(state.pop(CODES))), local(state.pop(SCALES)))
        state[BUFFER] = place_part(values.reshape(local(p).shape).to(dtype), p, p.shape)
    elif BUFFER not in state:
        state[BUFFER] = torch.zeros_like(like if mesh_of(p) is None else p, dtype=dtype)
    elif is_split(p, group) and state[BUFFER].dtype != dtype:  # the group asked for something else before
        state[BUFFER] = state[BUFFER].to(dtype)


def update_momentum(
    group: Mapping[str, Any],
    params: Sequence[Tensor],
    states: Sequence[MutableMapping[str, Any]],
    grads: Sequence[Tensor],
) -> list[Tensor]:
    """Update the momentum of the parameters of a group; return the directions to iterate.

        buf <- mu buf + (1 - mu) g;    u = mu buf + (1 - mu) g (nesterov) or buf

    Args:
        group: the group of all parameters.
        params: parameters that have gradients.
        states: of each parameter; the momentum is changed.
        grads: of each parameter, or this rank's part of it.

    Returns:
        u of each gradient, of the same shape; float32 of split weights, otherwise in the gradient's dtype. It
        may be the momentum itself.
    """
    for p, state, grad in zip(params, states, grads, strict=True):
        fit_momentum(state, p, group, grad)
    if group["momentum_bits"] == 8:
        return _update_codes(group, params, states, grads)
    buffers = [local(state[BUFFER]) for state in states]
    grads = [g.to(buf.dtype) for g, buf in zip(grads, buffers, strict=True)]
    torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
    return list(torch._foreach_lerp(grads, buffers, group["momentum"])) if group["nesterov"] else buffers


def _update_codes(
    group: Mapping[str, Any],
    params: Sequence[Tensor],
    states: Sequence[MutableMapping[str, Any]],
    grads: Sequence[Tensor],
) -> list[Tensor]:
    """Do it for codes and scales, with one batch of operations per shape, or several of a limited size."""
    batches: dict[tuple[object, ...], list[list[int]]] = {}
    for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
        same = batches.setdefault((grad.shape, grad.dtype, grad.device, is_split(p, group)), [[]])
        if len(same[-1]) * grad.numel() >= AT_ONCE:
            same.append([])
        same[-1].append(i)
    directions = list(grads)
    for indices in (batch for same in batches.values() for batch in same):
        codes, scales = ([local(states[i][name]) for i in indices] for name in (CODES, SCALES))
        new = torch.stack([_rows(grads[i]).float() for i in indices])
        momentum = decode(torch.stack([_rows(c) for c in codes]), torch.stack(scales))
        momentum = momentum.lerp_(new, 1 - group["momentum"])
        direction = new.lerp_(momentum, group["momentum"]) if group["nesterov"] else momentum
        new_codes, new_scales = encode(momentum)
        first = indices[0]
        shape = grads[first].shape
        torch._foreach_copy_(codes, [c.view(shape) for c in new_codes.unbind()])
        torch._foreach_copy_(scales, list(new_scales.unbind()))
        if not is_split(params[first], group):
            direction = direction.to(grads[first].dtype)
        for i, each in zip(indices, direction.unbind(), strict=True):
            directions[i] = each.view(shape)
    return directions
