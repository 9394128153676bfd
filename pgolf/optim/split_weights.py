"""Exact float32 weights in a bfloat16 parameter and 16 more bits, for `pgolf.optim.Muon`.

    bits(w) = 65536 bits(p) + r,    r in [-32768, 32767]

w is the float32 weight, bits are those of a number as a signed integer, p is the bfloat16 parameter with
which the model computes, and the int16 rest r is state of the optimizer. p is w rounded to nearest; half-way
cases are rounded away from zero, where `w.bfloat16()` rounds them to the even neighbour, because ties on both
sides of an even number would need 65,537 rests. All float32 numbers are exact but the payload of a NaN. So a
weight takes 4 bytes instead of the 6 of a bfloat16 parameter and its float32 copy. If a program changes p,
the rest of the old weight stays, which is at most half a unit in the last place of p.

The state has a rest as two int8 numbers, because the collectives of NCCL and gloo, with which a whole state
is gathered, have no int16.

Source: modded-nanogpt keeps the 16 low bits of w, so that its p is rounded towards zero.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pgolf.optim.mesh import local, place_part

REST = "weight_rest"
"""Name of the state, `(*shape of the parameter, 2)` int8."""


def is_split(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Return whether the weights of a parameter are split: those in bfloat16, if the group asks for it."""
    return group["master_weights"] == "split" and p.dtype == torch.bfloat16


def split_float32(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the parameter (bfloat16) and the rest (int16) of float32 weights, of any shape."""
    # One bit pattern for all NaN: others would overflow to 0, or round to an infinity.
    bits = weights.masked_fill(weights.isnan(), torch.nan).view(torch.int32)
    high = (bits + 32768) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - high * 65536).to(torch.int16)


def join_float32(param: Tensor, rest: Tensor) -> Tensor:
    """Return the float32 weights of a bfloat16 parameter and its int16 rest, of the same shape."""
    return (param.view(torch.int16).to(torch.int32) * 65536 + rest).view(torch.float32)


def rest_of(state: MutableMapping[str, Any], p: Tensor) -> Tensor:
    """Return the int16 rest in the state, or this rank's part of it; if there is none, begin at 0."""
    if REST not in state:
        zeros = torch.zeros((*local(p).shape, 2), dtype=torch.int8, device=p.device)
        state[REST] = place_part(zeros, p, torch.Size([*p.shape, 2]))
    return local(state[REST]).view(torch.int16).squeeze(-1)


def float32_weights(p: Tensor, state: MutableMapping[str, Any]) -> Tensor:
    """Return the weights of a parameter in float32, exact if they are split.

    Args:
        p: the parameter; the weights are placed like it if it is a DTensor.
        state: of the parameter, `optimizer.state[p]`.
    """
    if REST not in state:
        return p.detach().float()
    return place_part(join_float32(local(p).detach(), rest_of(state, p)), p, p.shape)


def join_all(params: Sequence[Tensor], rests: Sequence[Tensor]) -> list[Tensor]:
    """Return the float32 weights of each parameter, as views of one tensor."""
    flat = join_float32(*(torch.cat([t.reshape(-1) for t in tensors]) for tensors in (params, rests)))
    sizes = [p.numel() for p in params]
    return [w.view(p.shape) for w, p in zip(torch.split(flat, sizes), params, strict=True)]


def split_all(weights: Sequence[Tensor], params: Sequence[Tensor], rests: Sequence[Tensor]) -> None:
    """Put float32 weights into parameters and rests."""
    sizes = [w.numel() for w in weights]
    found = split_float32(torch.cat([w.reshape(-1) for w in weights]))
    for targets, flat in zip((params, rests), found, strict=True):
        values = [t.view(w.shape) for t, w in zip(torch.split(flat, sizes), weights, strict=True)]
        torch._foreach_copy_(list(targets), values)
