"""The matrices that `pgolf.optim.Muon` iterates in one call, and how their updates are applied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pgolf.optim.mesh import MeshRanks, Part
from pgolf.optim.polar import Coefficients
from pgolf.optim.split_weights import join_all, split_all
from pgolf.optim.update_rules import cautious_decay_, floor_update_, lr_scale, normalize_update_


@dataclass(frozen=True)
class Bucket:
    """The matrices of one group that have the same shape, dtype and device, whole or on the same mesh."""

    group: dict[str, Any]
    table: tuple[Coefficients, ...]
    shape: tuple[int, int]
    ranks: MeshRanks | None = None  # that hold the parts of the matrices
    parts: list[Part] = field(default_factory=list)  # instead of the lists below
    targets: list[Tensor] = field(default_factory=list)  # views of parameters, m * n elements each
    rests: list[Tensor] = field(default_factory=list)  # of the targets, with split weights
    directions: list[Tensor] = field(default_factory=list)  # (m, n), input of the polar iteration
    squares: list[Tensor] = field(default_factory=list)  # (max(m, n),) of each, with NorMuon

    @property
    def cost(self) -> int:
        """Multiply-adds to iterate one matrix; each iteration computes X X^T, A^2 and a product with X."""
        short, long = sorted(self.shape)
        return len(self.table) * short * short * (2 * long + short)


def apply_updates(
    bucket: Bucket, targets: list[Tensor], rests: list[Tensor], updates: Sequence[Tensor]
) -> None:
    """Decay the targets and subtract the updates.

    Args:
        bucket: says with which learning rate and factor.
        targets: matrices or parts of them; changed.
        rests: of the targets, with split weights; changed. Otherwise empty.
        updates: of each target, of as many elements.
    """
    if not targets:
        return
    weights = join_all(targets, rests) if rests else targets
    group, (rows, cols) = bucket.group, bucket.shape
    live = isinstance(group["lr"], Tensor) and group.get("capturable")
    lr = group["lr"].view(()) if live else float(group["lr"])
    match = group["adjust_lr_fn"] == "match_rms_adamw"
    ratio = 0.2 * math.sqrt(max(rows, cols)) if match else lr_scale(rows, cols)
    decay = lr * group["weight_decay"]
    if bucket.squares:
        whole = torch.stack([u.view(bucket.shape) for u in updates])
        updates = normalized(bucket, whole, bucket.squares).unbind()
    shaped = [u.view(t.shape) for u, t in zip(updates, weights, strict=True)]
    if group["update_floor"]:
        # Of a stack, what a rank has of a matrix of a DTensor is (1, m, n); 4-D and 5-D are convolutions.
        for pair in zip(shaped, weights, strict=True):
            update, weight = (t.flatten(1) if t.dim() > 3 else t for t in pair)
            floor_update_(update, weight, group["update_floor"] / ratio)
    if group["cautious"]:
        for target, update in zip(weights, shaped, strict=True):
            cautious_decay_(target, update, decay)
    else:
        torch._foreach_mul_(weights, 1 - decay)
    if live:
        wide = [u.to(t.dtype) for u, t in zip(shaped, weights, strict=True)]
        torch._foreach_sub_(weights, torch._foreach_mul(wide, lr * ratio))
    else:
        torch._foreach_add_(weights, shaped, alpha=-lr * ratio)
    if rests:
        split_all(weights, targets, rests)


def normalized(bucket: Bucket, updates: Tensor, squares: list[Tensor]) -> Tensor:
    """Divide updates by the roots of their mean squares, in place, with NorMuon; return the updates.

    Args:
        bucket: says with which decay.
        updates: of whole matrices, `(count, m, n)`; changed.
        squares: the live mean squares of each of them; changed. None without NorMuon.
    """
    if squares:
        live = torch.stack(squares)
        normalize_update_(updates, live, bucket.group["normalize"])
        torch._foreach_copy_(squares, live.unbind())
    return updates
