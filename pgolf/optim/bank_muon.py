"""Muon on banks of matrices, of which each rank iterates a share.

A step has three phases. `reduce` averages the gradients over the ranks and scatters them, so that each rank
holds the averaged gradients of its own matrices. The caller then measures their norm. `step` updates the
momentum, normalizes rows and runs the polar iteration on the rank's own matrices (`pgolf.ops.muon_step`),
gathers the updates of all ranks and applies them. In contrast to the baseline script, the clip sees the
averaged gradient, and the sharded momentum is part of the saved state.

Sources: Muon, Keller Jordan, https://kellerjordan.github.io/posts/muon; banks, parameter-golf PR #399 and
#549; row normalization, MuonEq-R, arXiv 2603.28254.

Legend: `B` matrices in a bank, `S` matrices of it on one rank = ceil(B / world size), `m` rows, `n` columns.
A rank owns matrices rank * S to rank * S + S - 1. Those past B are padding, whose gradient, momentum and
update are zero. A single process has no padding and no collectives; its shard is the gradient itself. With
several processes there is one communication buffer, the wire, in which the matrices of a rank, of all banks,
lie together. So a step needs one reduce-scatter and one gather, whatever the number of banks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf.config import MuonConfig
from pgolf.dist import Dist, Pending
from pgolf.ops import MuonBank, MuonRule, muon_apply, muon_step
from pgolf.ops.muon_step import GRAD_SCALE
from pgolf.optim.ema_nesterov import EmaNesterov
from pgolf.optim.flat import flat_views
from pgolf.optim.groups import Blocks
from pgolf.optim.polar import coefficients
from pgolf.optim.update_rules import lr_scale, normalize_update_, square_size


class Shard(NamedTuple):
    """A tensor that is split along dimension 0, with a different part on each rank."""

    tensor: Tensor
    """The rows of this rank; the live tensor, not a copy."""
    spans: tuple[tuple[int, int], ...]
    """For each rank, its first row and the row after its last; together they cover the tensor in order."""


@dataclass(frozen=True)
class _Bank:
    """One bank and the views of it that this rank works on."""

    param: Tensor  # (B, m, n) float32, detached
    average: Tensor | None  # (B, m, n) float32 moving average of param
    base: Tensor | None  # (B, m, n) float32 weights that param is ahead of, with EMA-Nesterov
    velocity: Tensor | None  # (B, m, n) float32, with EMA-Nesterov
    shard: Tensor  # (S, m, n) averaged gradient of this rank's matrices
    momentum: Tensor  # (S, m, n)
    update: Tensor  # (S, m, n) output of the polar iteration
    square: Tensor | None  # (S, max(m, n)) float32 mean squares of the updates, with NorMuon
    slow: Tensor | None  # (S, m, n) float32 slow average of the gradients, with slow_age
    scale: float


@dataclass(frozen=True)
class _Part:
    """The matrices of one bank that one rank owns, without padding: 1 to S matrices `(m, n)`."""

    param: Tensor
    grad: Tensor  # of this process, not averaged
    average: Tensor | None
    base: Tensor | None
    velocity: Tensor | None
    wire: Tensor  # holds the gradients to send, later the updates received; with one process the updates
    scale: float


class BankMuon:
    """Muon on banks `(B, m, n)`, sharded over the ranks by matrix.

    g = grad_scale * averaged gradient;   buf <- mu buf + g;   u = g + mu buf (nesterov) or buf
    u <- row_normalize(u);   O = polar(u);   O <- normalize_update(O) (config.normalize, NorMuon)
    p <- p (1 - lr wd) - lr sqrt(max(1, m / n)) O
    average <- average + average_weight (p - average)
    With config.slow_age the momentum takes in (1 - w) g + w s instead of g, where s <- b s + (1 - b) g is a
    slow average and w is config.slow_weight: a momentum with two time scales. It differs from that of
    modded-nanogpt in that s passes through the momentum, which adds the momentum's mean age to that of s.
    With `ahead`, EMA-Nesterov keeps p ahead of the weights in the pass that updates it.
    With config.cautious the factor 1 - lr wd is 1 where O and p have different signs. NorMuon takes two more
    passes over the updates of this rank; with one process it makes the update a launch of its own.
    Momentum and updates are bfloat16 on CUDA and float32 on the CPU, and so are the averaged gradients with
    several processes; everything between is computed in float32.

    Attributes:
        shard: 1-D; this rank's averaged gradients of all banks, with zeros in the gaps; valid after `reduce`.
            No gradient is in the shards of two ranks, so the squared norms of the shards add up.
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
        ahead: EmaNesterov | None = None,
        blocks: Mapping[str, Blocks] | None = None,
    ) -> None:
        """Take the banks and their gradients, which have the same names in the same order.

        Args:
            banks: float32 parameters by name; `step` updates them in place.
            flat_grad, grads: the gradients of the banks, from `flat_views`, which each step reads.
            averages: float32 moving averages by name, which each step moves; None if there are none.
            ahead: what EMA-Nesterov keeps of the banks; None without it.
            blocks: banks whose first matrices are iterated in blocks of rows. All else about them, such as
                momentum and NorMuon, stays that of whole matrices.
        """
        self._dist, self._config, self._alone = dist, config, dist.world_size == 1
        self._rule = MuonRule(
            coefficients(config.coefficients, config.ns_steps),
            nesterov=config.nesterov,
            row_normalize=config.row_normalize,
            cautious=config.cautious,
            algorithm=config.algorithm,
        )
        dtype = torch.bfloat16 if dist.device.type == "cuda" else torch.float32
        world, device = dist.world_size, dist.device
        shapes = {name: (-(-p.shape[0] // world), p.shape[1], p.shape[2]) for name, p in banks.items()}
        if world == 1:
            self.shard, shards = flat_grad, dict(grads)
        else:
            self.shard, shards = flat_views(shapes, dtype=dtype, device=device)
        _, momenta = flat_views(shapes, dtype=dtype, device=device)
        self._updates, updates = flat_views(shapes, dtype=dtype, device=device)
        slow: dict[str, Tensor] = {}
        if config.slow_age:
            self._slow, slow = flat_views(shapes, dtype=torch.float32, device=device)
        self._banks: dict[str, _Bank] = {}
        for name, p in banks.items():
            count, rows, cols = shapes[name]
            square = torch.zeros(count, square_size(rows, cols), device=device) if config.normalize else None
            self._banks[name] = _Bank(
                param=p.detach(),
                average=None if averages is None else averages[name],
                base=None if ahead is None else ahead.base[name],
                velocity=None if ahead is None else ahead.velocity[name],
                shard=shards[name],
                momentum=momenta[name],
                update=updates[name],
                square=square,
                slow=slow.get(name),
                scale=lr_scale(rows, cols),
            )
        # A single process can update the weights in the pass in which the iteration ends.
        self._fused = self._alone and not config.normalize
        self._iterated = [
            piece
            for name, bank in self._banks.items()
            for piece in _pieces(bank, self._fused, (blocks or {}).get(name), dist.rank)
        ]
        self._wire = self._updates
        if world > 1:
            self._wire = torch.zeros(world * self.shard.numel(), dtype=dtype, device=device)
        self._parts = [
            part
            for owner, piece in enumerate(self._wire.chunk(world))
            for part in self._parts_of(owner, piece, grads)
        ]

    def _parts_of(self, owner: int, piece: Tensor, grads: Mapping[str, Tensor]) -> list[_Part]:
        """Return the parts of all banks that rank `owner` owns; `piece` is that rank's piece of the wire."""
        parts = []
        for name, bank in self._banks.items():
            size, start = bank.shard.shape[0], bank.shard.storage_offset()
            mine = slice(owner * size, min((owner + 1) * size, bank.param.shape[0]))
            param = bank.param[mine]
            if param.numel() == 0:
                continue
            average, base, velocity = (
                None if t is None else t[mine] for t in (bank.average, bank.base, bank.velocity)
            )
            wire = piece[start : start + param.numel()].view_as(param)
            parts.append(_Part(param, grads[name][mine], average, base, velocity, wire, bank.scale))
        return parts

    def reduce(self) -> list[Pending]:
        """Start to average the local gradients into `shard`; the caller must wait for what it returns."""
        if self._alone:
            return []
        torch._foreach_copy_([part.wire for part in self._parts], [part.grad for part in self._parts])
        return [self._dist.reduce_scatter_avg(self.shard, self._wire)]

    @torch.no_grad()
    def step(
        self,
        hyper: Tensor,
        slow_decay: Tensor | None = None,
        *,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        """Update momentum, all banks and their averages from `shard`, without synchronizing the host.

        Args:
            hyper: `(7,)` float32 on the device, see `pgolf.ops.muon_step`. If its grad_scale is not finite,
                the step is skipped.
            slow_decay: `()` float32 on the device, b of slow_age; None = 1, which leaves the slow average.
            meanwhile: called when the gradients have been read; the work that it queues overlaps the gather.
        """
        parts = self._parts
        if self._config.slow_age:
            hyper = self._mix_with_slow(hyper, slow_decay)
        # One call for all banks. One call per bank would overlap each gather with the next bank's iteration,
        # but takes 0.73 ms on one of eight ranks instead of 0.29 ms, which is more than the gathers take.
        muon_step(self._iterated, hyper, self._rule)
        if self._fused:
            meanwhile()
            return
        if self._config.normalize:
            taken = hyper[GRAD_SCALE].isfinite()
            for bank in self._banks.values():
                if bank.square is not None:
                    normalize_update_(bank.update, bank.square, self._config.normalize, taken)
        gather = Pending() if self._alone else self._dist.all_gather(self._wire, self._updates)
        meanwhile()
        gather.wait()
        # The polar iteration maps zero matrices to zero, so the gaps and the padding of the wire are still
        # zero, and the next gradients can be written without clearing it.
        muon_apply(
            [part.param for part in parts],
            [part.wire for part in parts],
            hyper,
            lr_scales=[part.scale for part in parts],
            averages=[part.average for part in parts if part.average is not None],
            bases=[part.base for part in parts if part.base is not None],
            velocities=[part.velocity for part in parts if part.velocity is not None],
            cautious=self._config.cautious,
        )

    def _mix_with_slow(self, hyper: Tensor, decay: Tensor | None) -> Tensor:
        """Mix the clipped gradients with their slow average; return hyperparameters that clip no more."""
        scale, rest = hyper[GRAD_SCALE], hyper.clone()
        taken = scale.isfinite()
        grad = (self.shard.float() * scale).masked_fill_(~taken, 0.0)
        if decay is not None:
            self._slow.lerp_(grad, (1 - decay) * taken)
        self.shard.copy_(grad.lerp_(self._slow, self._config.slow_weight))
        # A factor that is not finite stays, so that the step is skipped.
        rest[GRAD_SCALE].copy_(torch.where(taken, torch.ones_like(scale), scale))
        return rest

    def reset(self) -> None:
        """Zero the state, in place."""
        for _, _, tensor in self._state():
            tensor.zero_()

    def state(self) -> dict[str, Tensor]:
        """Return copies of the state of all ranks, the same at any world size.

        They are the momentum, `momentum.<bank>` `(B, m, n)`; with NorMuon the mean squares of the updates,
        `square.<bank>` `(B, max(m, n))` float32; with slow_age the slow average, `slow.<bank>` `(B, m, n)`
        float32. This is a collective: every rank must call it.
        """
        found = {}
        for name, total, tensor in self._state():
            whole = tensor.new_empty(self._dist.world_size * tensor.shape[0], *tensor.shape[1:])
            self._dist.all_gather(whole, tensor).wait()
            found[name] = whole[:total]
        return found

    def shards(self) -> dict[str, Shard]:
        """Return the live state of this rank's matrices, without padding, under the names of `state`."""
        found = {}
        for name, total, tensor in self._state():
            size = tensor.shape[0]
            starts = [min(rank * size, total) for rank in range(self._dist.world_size + 1)]
            spans = tuple(itertools.pairwise(starts))
            first, stop = spans[self._dist.rank]
            found[name] = Shard(tensor[: stop - first], spans)
        return found

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of the tensors of `state` by name."""
        return {name: torch.Size((total, *tensor.shape[1:])) for name, total, tensor in self._state()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load this rank's part of what `state` returned, at any world size."""
        for name, _, tensor in self._state():
            first = self._dist.rank * tensor.shape[0]
            mine = state[name][first : first + tensor.shape[0]]
            tensor.zero_()
            tensor[: mine.shape[0]].copy_(mine)

    def _state(self) -> Iterator[tuple[str, int, Tensor]]:
        """Yield name, number of matrices on all ranks, and this rank's live tensor with its padding."""
        for name, bank in self._banks.items():
            yield f"momentum.{name}", bank.param.shape[0], bank.momentum
            if bank.square is not None:
                yield f"square.{name}", bank.param.shape[0], bank.square
            if bank.slow is not None:
                yield f"slow.{name}", bank.param.shape[0], bank.slow


def _pieces(bank: _Bank, fused: bool, blocks: Blocks | None, rank: int) -> list[MuonBank]:
    """Return views of this rank's matrices for `muon_step`; with the weights, if it is to update them."""
    found = MuonBank(bank.shard, bank.momentum, bank.update, lr_scale=bank.scale)
    if fused:
        found = found._replace(param=bank.param, average=bank.average, base=bank.base, velocity=bank.velocity)
    if blocks is None:
        return [found]
    size, rows, cols = bank.shard.shape
    count = min(max(blocks.matrices - rank * size, 0), size)

    def views(cut: Callable[[Tensor], Tensor]) -> MuonBank:
        return MuonBank(*(cut(t) if isinstance(t, Tensor) else t for t in found))  # type: ignore[arg-type]

    cut = views(lambda t: t[:count].view(count * rows // blocks.rows, blocks.rows, cols))
    return [piece for piece in (cut, views(lambda t: t[count:])) if piece.grad.numel()]
