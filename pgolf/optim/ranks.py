"""Checks that the ranks which share an optimizer step hold the same values; if not, every rank raises.

There are two checks per step. The first one compares on the host what the host knows: which parameters have
gradients, their shapes, and the settings. Ranks that differ there would wait for each other forever. It costs
one exchange of 24 bytes per rank and does not wait for the device.

The second one compares on the device four numbers per gradient, and in the first step and after loading also
of each parameter and state tensor: the norm, the largest element, and two sums with fixed random weights,
which also change with a permutation, a sign or a small element. That takes six multi-tensor passes and one
gather of 32 bytes per tensor, queued before the iterations. On CUDA the host waits for the result at the end
of the step, while the device is still busy with the iterations; so the host can be ahead of the device by one
step's iterations at most.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as td
from torch import Tensor

ADVICE = (
    "with sharded=True every rank must hold the same gradients, parameters, state and settings: wrap the "
    "model in DistributedDataParallel, or average the gradients over the ranks before the step"
)
_AT_ONCE = 1 << 26  # elements
TOLERANCE = 1e-12  # relative, of float64 norms; their order of summation may depend on the memory's alignment


class Fact(NamedTuple):
    """One value that must be the same on every rank, and what it is called in an error message."""

    what: str
    value: object


def host_group(process_group: td.ProcessGroup | None) -> td.ProcessGroup | None:
    """Return a group of the same ranks that can exchange CPU tensors: the given one, or a new one over gloo.

    This is a collective: every rank of the group must call it.
    """
    if "cpu:" in td.get_backend_config(process_group):
        return process_group
    ranks = td.get_process_group_ranks(process_group or td.group.WORLD)
    group: td.ProcessGroup = td.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return group


def compare_facts(
    facts: Sequence[Fact], fresh: bool, group: td.ProcessGroup | None, advice: str = ADVICE
) -> bool:
    """Raise RuntimeError on every rank if `facts` differ between ranks.

    Args:
        facts: what this rank holds.
        fresh: whether this rank has not compared its parameters and state yet.
        group: ranks that can exchange CPU tensors.
        advice: the end of the message: what must be the same, and how to achieve it.

    Returns:
        Whether `fresh` is true on any rank.
    """
    rows = gather_rows(torch.tensor([zlib.crc32(repr(facts).encode()), len(facts), int(fresh)]), group)
    if not bool((rows[:, :2] == rows[0, :2]).all()):
        _raise_facts(facts, rows[:, 1], group, advice)
    return bool(rows[:, 2].any())


def _raise_facts(facts: Sequence[Fact], lengths: Tensor, group: td.ProcessGroup | None, advice: str) -> None:
    codes = [zlib.crc32(repr(fact).encode()) for fact in facts]
    padded = torch.zeros(int(lengths.max()), dtype=torch.int64)
    padded[: len(codes)] = torch.tensor(codes)
    table = gather_rows(padded, group)
    differing = (table != table[0]).any(0).nonzero().flatten().tolist()
    own = td.get_rank(group)
    lines = []
    for i in differing[:3]:
        ranks = _differing_ranks(table[:, i] != table[0, i], group)
        mine = (
            f"{facts[i].what} (here, rank {_global(own, group)}: {facts[i].value})" if i < len(facts) else ""
        )
        lines.append(f"{mine or 'the number of parameters'}: {ranks}")
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise RuntimeError(f"Muon: the ranks differ in {'; '.join(lines)}{more}; {advice}")


class Comparison:
    """A comparison of tensors that runs on the device; `finish` raises on every rank if they differ."""

    def __init__(
        self, names: Sequence[str], tensors: Sequence[Tensor], group: td.ProcessGroup | None
    ) -> None:
        """Queue the comparison of non-empty tensors; this is a collective on the device of the first one."""
        self._names, self._group = names, group
        mine = fingerprint(tensors)
        rows = [torch.empty_like(mine) for _ in range(td.get_world_size(group))]
        td.all_gather(rows, mine, group=group)
        table = torch.stack(rows)
        same = (table == table[0]) | ((table - table[0]).abs() <= TOLERANCE * table[0].abs())
        differing = ~same.all(1)
        self._event: torch.cuda.Event | None = None
        if differing.is_cuda:
            host = torch.empty(differing.shape, dtype=torch.bool, pin_memory=True)
            self._differing = host.copy_(differing, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._differing = differing

    def finish(self) -> None:
        """Wait until the device has compared (not for later work), and raise RuntimeError if ranks differ."""
        if self._event is not None:
            self._event.synchronize()
        columns = self._differing.any(0).nonzero().flatten().tolist()
        if not columns:
            return
        lines = [
            f"{self._names[i]}: {_differing_ranks(self._differing[:, i], self._group)}" for i in columns[:3]
        ]
        more = f" and {len(columns) - 3} more" if len(columns) > 3 else ""
        raise RuntimeError(f"Muon: the ranks differ in the values of {'; '.join(lines)}{more}; {ADVICE}")


def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """Return four numbers per tensor, `(4, n)` float64 on the device of the first tensor; NaN becomes -1.

    They are the norm, the largest element, sum w |x| and sum w max(x, 0), with fixed random weights w in
    [1, 2), so that the sums depend on the position and the sign of every element.
    """
    real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    real = [t if t.is_floating_point() else t.float() for t in real]  # codes; torch has no norm of integers
    devices = list(dict.fromkeys(t.device for t in real))
    places = [[i for i, t in enumerate(real) if t.device == device] for device in devices]
    parts = [_measure([real[i] for i in indices]).to(devices[0], non_blocking=True) for indices in places]
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([i for indices in places for i in indices]).argsort().to(devices[0])
    return torch.cat(parts, 1)[:, order]


def _measure(tensors: list[Tensor]) -> Tensor:
    """Return the `fingerprint` of tensors that are all on one device."""
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float64)
    rows = [norms, torch._foreach_max(tensors), *_weighted_sums(tensors)]
    return torch.stack([torch.stack(list(row)).double() for row in rows]).nan_to_num_(nan=-1.0)


def _weighted_sums(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return sum w |x| and sum w max(x, 0) of each tensor, a few tensors at a time to limit the memory."""
    random = torch.Generator().manual_seed(0)
    weights = 1 + torch.rand(max(t.numel() for t in tensors), generator=random)
    weights = weights.to(tensors[0].device, non_blocking=True)
    absolute, positive = list[Tensor](), list[Tensor]()
    first = 0
    while first < len(tensors):
        last, size = first, 0
        while last < len(tensors) and (size == 0 or size + tensors[last].numel() <= _AT_ONCE):
            size += tensors[last].numel()
            last += 1
        group = [t.detach() for t in tensors[first:last]]
        products = torch._foreach_mul(group, [weights[: t.numel()].view(t.shape).to(t.dtype) for t in group])
        absolute += torch._foreach_norm(products, 1, dtype=torch.float64)
        positive += torch._foreach_norm(torch._foreach_clamp_min(products, 0.0), 1, dtype=torch.float64)
        first = last
    return absolute, positive


def gather_rows(mine: Tensor, group: td.ProcessGroup | None) -> Tensor:
    """Return the int64 vectors of all ranks, one per row."""
    rows = [torch.empty_like(mine) for _ in range(td.get_world_size(group))]
    td.all_gather(rows, mine, group=group)
    return torch.stack(rows)


def _global(rank: int, group: td.ProcessGroup | None) -> int:
    return rank if group is None else td.get_global_rank(group, rank)


def _differing_ranks(differs: Tensor, group: td.ProcessGroup | None) -> str:
    ranks = [_global(r, group) for r in differs.nonzero().flatten().tolist()]
    return (
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} against rank {_global(0, group)}"
    )
