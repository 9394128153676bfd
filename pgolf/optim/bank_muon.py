"""Muon on banks of matrices, each rank iterating its share of every bank.

Per step (Muon: Keller Jordan, https://kellerjordan.github.io/posts/muon; banks: parameter-golf PR #399 and
#549; row normalization: MuonEq-R, arXiv 2603.28254): average the gradients and scatter them (`reduce`), let
the caller measure the shards, then momentum, row normalization, polar iteration, gather and apply (`step`, by
`pgolf.ops.muon_step`). Unlike the baseline script, clipping sees the averaged gradient and the sharded
momentum is part of the state.

Legend: `B` matrices in a bank, `S` matrices of it on one rank = ceil(B / world size), `m` rows, `n` columns.
A rank owns matrices rank * S to rank * S + S - 1; those past B are padding, zero in gradient, momentum and
update. One process has no padding and no collectives; its shard is the gradient itself. Several have one
buffer, the wire, in which the matrices of a rank, of all banks, lie together: one reduce-scatter and one
gather a step, whatever the number of banks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf.config import MuonConfig
from pgolf.dist import Dist, Pending
from pgolf.ops import MuonBank, MuonRule, muon_apply, muon_step
from pgolf.optim.flat import flat_views
from pgolf.optim.polar import coefficients


def lr_scale(rows: int, cols: int) -> float:
    """Return Muon's factor on the learning rate of a matrix: sqrt(max(1, rows / cols))."""
    return math.sqrt(max(1.0, rows / cols))


def row_normalize_(x: Tensor) -> Tensor:
    """Divide every row of `x` `(..., m, n)` by its L2 norm (float32, at least 1e-7), in place, and return it.

    Rows are output features as stored. Source: MuonEq-R, arXiv 2603.28254.
    """
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).clamp_(min=1e-7)
    return x.div_(norms)


class Shard(NamedTuple):
    """A tensor of which every rank holds other rows of dimension 0."""

    tensor: Tensor
    """This rank's rows, live."""
    spans: tuple[tuple[int, int], ...]
    """For every rank, its first row and the one after its last; they cover the tensor in order."""


@dataclass(frozen=True)
class _Bank:
    """One bank and this rank's views of it."""

    param: Tensor  # (B, m, n) float32, detached
    average: Tensor | None  # (B, m, n) float32 moving average of param
    shard: Tensor  # (S, m, n) averaged gradient of the owned matrices
    momentum: Tensor  # (S, m, n)
    update: Tensor  # (S, m, n) what the polar iteration gives
    scale: float


@dataclass(frozen=True)
class _Part:
    """The matrices of one bank that one rank owns, without padding: up to (S, m, n), not empty."""

    bank: str
    param: Tensor
    grad: Tensor  # local
    average: Tensor | None
    wire: Tensor  # the gradients to send, then the updates received
    scale: float


class BankMuon:
    """Momentum, MuonEq-R and polar iteration on `(B, m, n)` banks, sharded over the ranks by matrix.

    g = grad_scale * averaged gradient;   buf <- mu buf + g;   u = g + mu buf (nesterov) or buf
    u <- row_normalize(u);   O = polar(u);   p <- p (1 - lr wd) - lr sqrt(max(1, m / n)) O
    average <- average + average_weight (p - average)
    Momentum and updates, and with several processes the averaged gradients, are bfloat16 on CUDA and float32
    on CPU; everything between two roundings is computed in float32.

    Attributes:
        shard: 1-D; this rank's averaged gradients of all banks (and zero gaps), valid after `reduce`.
            Disjoint between ranks, so squared norms add up.
    """

    def __init__(
        self,
        banks: Mapping[str, Tensor],
        flat_grad: Tensor,
        grads: Mapping[str, Tensor],
        config: MuonConfig,
        dist: Dist,
        *,
        averages: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take banks and gradients, of the same names in the same order; both are read in place at each step.

        Args:
            banks: float32 parameters by name. flat_grad, grads: their gradients, from `flat_views`.
            averages: float32 moving averages by name, moved at each step; None has none.
        """
        self._dist = dist
        self._rule = MuonRule(
            coefficients(config.coefficients, config.ns_steps),
            nesterov=config.nesterov,
            row_normalize=config.row_normalize,
            algorithm=config.algorithm,
        )
        dtype = torch.bfloat16 if dist.device.type == "cuda" else torch.float32
        world, device = dist.world_size, dist.device
        shapes = {name: (-(-p.shape[0] // world), p.shape[1], p.shape[2]) for name, p in banks.items()}
        if world == 1:
            self.shard, shards = flat_grad, dict(grads)
        else:
            self.shard, shards = flat_views(shapes, dtype=dtype, device=device)
        self._momentum, momenta = flat_views(shapes, dtype=dtype, device=device)
        self._updates, updates = flat_views(shapes, dtype=dtype, device=device)
        self._banks: dict[str, _Bank] = {}
        for name, p in banks.items():
            self._banks[name] = _Bank(
                param=p.detach(),
                average=None if averages is None else averages[name],
                shard=shards[name],
                momentum=momenta[name],
                update=updates[name],
                scale=lr_scale(*p.shape[1:]),
            )
        self._parts: list[_Part] = []
        if world > 1:
            self._wire = torch.zeros(world * self.shard.numel(), dtype=dtype, device=device)
            self._parts = [
                part
                for owner, piece in enumerate(self._wire.chunk(world))
                for part in self._parts_of(owner, piece, grads)
            ]

    def _parts_of(self, owner: int, piece: Tensor, grads: Mapping[str, Tensor]) -> list[_Part]:
        """Return what rank `owner` owns of each bank, given its piece of the wire."""
        parts = []
        for name, bank in self._banks.items():
            size, start = bank.shard.shape[0], bank.shard.storage_offset()
            mine = slice(owner * size, min((owner + 1) * size, bank.param.shape[0]))
            param = bank.param[mine]
            if param.numel() == 0:
                continue
            average = None if bank.average is None else bank.average[mine]
            wire = piece[start : start + param.numel()].view_as(param)
            parts.append(_Part(name, param, grads[name][mine], average, wire, bank.scale))
        return parts

    def reduce(self) -> list[Pending]:
        """Start averaging the local gradients into `shard`; wait for what it returns."""
        if not self._parts:
            return []
        torch._foreach_copy_([part.wire for part in self._parts], [part.grad for part in self._parts])
        return [self._dist.reduce_scatter_avg(self.shard, self._wire)]

    @torch.no_grad()
    def step(self, hyper: Tensor, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Update momentum, all banks and their averages from `shard`; does not synchronize the host.

        Args:
            hyper: `(5,)` float32 on the device, see `pgolf.ops.muon_step`. Where its grad_scale is not
                finite nothing changes.
            meanwhile: called once the gradients are read; what it queues runs while the updates travel.
        """
        banks, parts = list(self._banks.values()), self._parts
        if not parts:
            muon_step([_whole(bank) for bank in banks], hyper, self._rule)
            meanwhile()
            return
        # One call for all banks: a call a bank would let each gather run beside the next iteration, but takes
        # 0.73 ms for a rank of eight instead of 0.29, more than the gathers.
        muon_step([MuonBank(b.shard, b.momentum, b.update) for b in banks], hyper, self._rule)
        gather = self._dist.all_gather(self._wire, self._updates)
        meanwhile()
        gather.wait()
        # The gaps and the padding of the wire are zero again, as the polar iteration keeps zero matrices: it
        # can carry the next gradients as it is.
        muon_apply(
            [part.param for part in parts],
            [part.wire for part in parts],
            hyper,
            lr_scales=[part.scale for part in parts],
            averages=[part.average for part in parts if part.average is not None],
        )

    def reset(self) -> None:
        """Zero the momentum, in place."""
        self._momentum.zero_()

    def state(self) -> dict[str, Tensor]:
        """Return copies of the whole momentum, `momentum.<bank>` `(B, m, n)`, at any world size.

        A collective: every rank calls it.
        """
        state = {f"momentum.{name}": bank.momentum.clone() for name, bank in self._banks.items()}
        if not self._parts:
            return state
        self._dist.all_gather(self._wire, self._momentum).wait()
        for name in self._banks:
            pieces = [part.wire for part in self._parts if part.bank == name]
            if pieces:
                state[f"momentum.{name}"] = torch.cat(pieces)
        return state

    def shards(self) -> dict[str, Shard]:
        """Return the live momentum of this rank's matrices by the names of `state`, without padding."""
        found = {}
        for name, bank in self._banks.items():
            size, total = bank.momentum.shape[0], bank.param.shape[0]
            starts = [min(rank * size, total) for rank in range(self._dist.world_size + 1)]
            spans = tuple(itertools.pairwise(starts))
            first, stop = spans[self._dist.rank]
            found[f"momentum.{name}"] = Shard(bank.momentum[: stop - first], spans)
        return found

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of each bank by name."""
        return {name: bank.param.shape for name, bank in self._banks.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's share of a momentum that `state` gave, at any world size."""
        for name, bank in self._banks.items():
            first = self._dist.rank * bank.momentum.shape[0]
            mine = state[f"momentum.{name}"][first : first + bank.momentum.shape[0]]
            bank.momentum.zero_()
            bank.momentum[: mine.shape[0]].copy_(mine)


def _whole(bank: _Bank) -> MuonBank:
    """Return all of a bank, which one process owns, for a step in one call."""
    return MuonBank(bank.shard, bank.momentum, bank.update, bank.param, bank.average, bank.scale)
