"""Matrices of which each rank of a device mesh holds a part (DTensor): from the parts to one rank and back.

FSDP2 (`fully_shard`) and tensor parallelism make each parameter a DTensor. `pgolf.optim.Muon` gathers each
matrix to the rank that iterates it, its owner, and sends every rank its part of the update. There are two
all-to-all exchanges per bucket (matrices of one shape), both asynchronous: first all buckets are gathered,
then each is iterated as soon as it is there, while the others are on their way.

The mean squares of NorMuon are kept whole on every rank: they are as long as one side of each matrix. The
owner updates them, and every rank of the mesh gets their bits behind its parts of the update.

A mesh dimension that replicates (HSDP) makes copies of each part. The owner takes the parts from its own
copy and sends the update to all, so copies that start equal stay equal bit for bit.

Legend: a parameter is seen as `(b, m, n)`, a stack of b matrices of m rows and n columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as td
from torch import Tensor

from pgolf.optim.owners import owners
from pgolf.optim.ranks import Fact, compare_facts, gather_rows, host_group

ADVICE = (
    "every rank of a device mesh must have gradients for the same parameters, and the same settings: run the "
    "same layers on every rank before the step"
)


class Box(NamedTuple):
    """A part of a parameter `(b, m, n)`: matrices b0 to b1 - 1, rows r0 to r1 - 1, columns c0 to c1 - 1."""

    b0: int
    b1: int
    r0: int
    r1: int
    c0: int
    c1: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return max(0, self.b1 - self.b0) * max(0, self.r1 - self.r0) * max(0, self.c1 - self.c0)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and columns."""
        return self.r1 - self.r0, self.c1 - self.c0

    def common(self, other: Box) -> Box | None:
        """Return the part that is in both, or None if there is none."""
        low, high = map(max, self[::2], other[::2]), map(min, self[1::2], other[1::2])
        box = Box(*itertools.chain.from_iterable(zip(low, high, strict=True)))
        return box if box.numel else None

    def contains(self, other: Box) -> bool:
        """Return whether the other part, which is not empty, is within this one."""
        rows = self.r0 <= other.r0 and other.r1 <= self.r1
        columns = self.c0 <= other.c0 and other.c1 <= self.c1
        return self.b0 <= other.b0 and other.b1 <= self.b1 and rows and columns

    def slices(self, origin: Box) -> tuple[slice, slice, slice]:
        """Return where this part is in a tensor that holds the part `origin`."""
        return (
            slice(self.b0 - origin.b0, self.b1 - origin.b0),
            slice(self.r0 - origin.r0, self.r1 - origin.r0),
            slice(self.c0 - origin.c0, self.c1 - origin.c0),
        )


class Layout:
    """Which part of one parameter each rank holds; two layouts are equal only if they are the same object."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        self.boxes = tuple(boxes)
        self._holders: dict[Box, list[int]] = {}
        for rank, box in enumerate(self.boxes):
            self._holders.setdefault(box, []).append(rank)

    @property
    def numel(self) -> int:
        """Number of elements of all parts, without copies."""
        return sum(box.numel for box in self._holders)

    def homes(self, matrix: Box) -> tuple[int, ...]:
        """Return the ranks that hold the whole matrix."""
        return tuple(r for box, ranks in self._holders.items() if box.contains(matrix) for r in ranks)

    def sources(self, owner: int) -> Iterator[int]:
        """Yield the ranks from which `owner` takes the parts: those of its own copy."""
        copy = self._holders[self.boxes[owner]].index(owner)
        for box, ranks in self._holders.items():
            if box.numel:
                yield ranks[copy % len(ranks)]


class Part(NamedTuple):
    """This rank's part of a matrix."""

    layout: Layout
    """What the ranks hold of the parameter."""
    box: Box
    """The matrix in the parameter."""
    target: Tensor
    """This rank's part of the whole parameter."""
    rest: Tensor | None
    """Its rest, with split weights (`pgolf.optim.split_weights`)."""
    direction: Tensor
    """The part of the direction, of the same shape."""
    square: Tensor | None = None
    """The live mean squares of the whole matrix, float32, with NorMuon."""


class MeshRanks:
    """The ranks of one device mesh, and what each of them holds of the parameters there."""

    def __init__(self, mesh: Any) -> None:
        """Take a `DeviceMesh`; every rank of the mesh must call this."""
        self.group = _group_of(mesh)
        self.rank, self.size = td.get_rank(self.group), td.get_world_size(self.group)
        self._host = host_group(self.group)
        self._layouts: dict[Tensor, Layout] = {}
        self._plans: dict[tuple[object, ...], list[_Plan]] = {}

    def compare(self, facts: Sequence[Fact], params: Sequence[Tensor]) -> None:
        """Raise RuntimeError on every rank if the ranks differ in `facts`, and learn about new parameters."""
        fresh = any(p not in self._layouts for p in params)
        if not compare_facts(facts, fresh, self._host, ADVICE):
            return
        mine = torch.tensor([_box_of(p) for p in params]).flatten()
        rows = gather_rows(mine, self._host).view(self.size, len(params), len(Box._fields)).tolist()
        for i, p in enumerate(params):
            layout = Layout([Box(*row[i]) for row in rows])
            if layout.numel != p.numel():
                raise RuntimeError(
                    f"Muon: the ranks hold {layout.numel} elements of a parameter of shape {tuple(p.shape)}; "
                    "its parts must be blocks that do not overlap"
                )
            self._layouts[p] = layout
        self._plans.clear()

    def layout(self, p: Tensor) -> Layout:
        """Return the layout of a parameter that was compared."""
        return self._layouts[p]

    def plans(self, buckets: Sequence[Sequence[Part]], costs: Sequence[int]) -> list[_Plan]:
        """Return what each bucket sends and receives; `costs` are those of a matrix of each bucket."""
        found = [(part.layout, part.box) for parts in buckets for part in parts]
        key = (*found, *costs)
        if key not in self._plans:
            each = tuple(cost for cost, parts in zip(costs, buckets, strict=True) for _ in parts)
            homes = tuple(layout.homes(box) for layout, box in found)
            remaining = iter(owners(each, self.size, homes))
            made = []
            for parts in buckets:
                matrices = [(part.layout, part.box, next(remaining)) for part in parts]
                made.append(_plan(matrices, self.rank, self.size))
            self._plans = {key: made}  # of the last step only: a model that changes would fill the memory
        return self._plans[key]


class Piece(NamedTuple):
    """A block of a matrix that one rank sends and another one receives."""

    matrix: int
    """Its number: the matrix: in the bucket for a sender's part, among the owner's matrices for the owner."""
    slices: tuple[slice, slice, slice]
    """Where the block is in the tensor of this rank."""
    numel: int
    """Number of elements."""


@dataclass(frozen=True)
class _Plan:
    """What one rank sends and receives for a bucket, by the other rank; the order is that of the bucket."""

    owned: list[list[int]]  # matrices that each rank iterates
    mine: list[int]  # those of this rank
    parts_out: list[list[Piece]]  # parts of directions, to their owners
    parts_in: list[list[Piece]]  # parts of the directions of `mine`
    updates_out: list[list[Piece]]  # parts of the updates of `mine`
    updates_in: list[list[Piece]]  # updates of this rank's parts


def _plan(matrices: Sequence[tuple[Layout, Box, int]], rank: int, size: int) -> _Plan:
    """Return the plan of `rank` for a bucket of matrices (layout, box, owner)."""
    owned: list[list[int]] = [[] for _ in range(size)]
    plan = _Plan(owned, owned[rank], *(_rows(size) for _ in range(4)))
    for j, (layout, matrix, owner) in enumerate(matrices):
        sources = set(layout.sources(owner)) if owner == rank or layout.boxes[rank].common(matrix) else set()
        k = len(plan.mine)
        for other in range(size) if owner == rank else (rank,):
            held = layout.boxes[other]
            common = held.common(matrix)
            if common is None:
                continue
            if other == rank:
                local = Piece(j, common.slices(held), common.numel)
                plan.updates_in[owner].append(local)
                if rank in sources:
                    plan.parts_out[owner].append(local)
            if owner == rank:
                whole = Piece(k, common.slices(matrix), common.numel)
                plan.updates_out[other].append(whole)
                if other in sources:
                    plan.parts_in[other].append(whole)
        owned[owner].append(j)
    return plan


def _rows(size: int) -> list[list[Piece]]:
    return [[] for _ in range(size)]


def _sizes(pieces: Sequence[Sequence[Piece]]) -> list[list[int]]:
    return [[piece.numel for piece in row] for row in pieces]


@dataclass
class Exchange:
    """One bucket of matrices `(m, n)` on the way to their owners and back."""

    ranks: MeshRanks
    plan: _Plan
    parts: Sequence[Part]
    shape: tuple[int, int]
    dtype: torch.dtype
    """In which the directions and the updates are sent."""
    _work: Any = field(default=None, init=False)
    _sent: Tensor | None = field(default=None, init=False)  # must live until the exchange is done
    _received: Tensor = field(init=False)

    def gather(self) -> None:
        """Start to send this rank's parts of the directions to the owners."""
        found = [
            [_stack(self.parts[p.matrix].direction)[p.slices].to(self.dtype) for p in pieces]
            for pieces in self.plan.parts_out
        ]
        self._start(found, _sizes(self.plan.parts_in))

    def directions(self) -> Tensor:
        """Wait for the parts; return the matrices that this rank iterates, `(count, m, n)`."""
        self._wait()
        whole = self._received.new_empty(len(self.plan.mine), 1, *self.shape)
        pieces = itertools.chain.from_iterable(self.plan.parts_in)
        for piece, part in zip(pieces, self._arrived(_sizes(self.plan.parts_in)), strict=True):
            block = whole[piece.matrix][piece.slices]
            block.copy_(part.view(block.shape))
        return whole.squeeze(1)

    def squares(self) -> list[Tensor]:
        """Return the live mean squares of the matrices that this rank iterates; none without NorMuon."""
        return self._squares_of(self.plan.mine)

    def scatter(self, updates: Tensor) -> None:
        """Start to send the updates `(count, m, n)` of this rank's matrices to all that hold parts.

        With NorMuon, the mean squares of these matrices are sent to all ranks, after their pieces.
        """
        found = [[updates[p.matrix][p.slices[1:]] for p in pieces] for pieces in self.plan.updates_out]
        bits = [square.view(self.dtype) for square in self.squares()]
        self._start([row + bits for row in found], self._update_sizes())

    def updates(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Wait for the updates; return this rank's parts of parameters and rests, and their updates, flat."""
        self._wait()
        arrived = self._arrived(self._update_sizes())
        targets, rests, updates = [], [], []
        for pieces, owned in zip(self.plan.updates_in, self.plan.owned, strict=True):
            for piece in pieces:
                part = self.parts[piece.matrix]
                targets.append(_block(part.target, piece.slices))
                if part.rest is not None:
                    rests.append(_block(part.rest, piece.slices))
                updates.append(next(arrived))
            for square in self._squares_of(owned):
                square.view(self.dtype).copy_(next(arrived))
        return targets, rests, updates

    def _squares_of(self, matrices: Sequence[int]) -> list[Tensor]:
        return [square for j in matrices if (square := self.parts[j].square) is not None]

    def _update_sizes(self) -> list[list[int]]:
        """Return what arrives from each rank with the updates: its pieces, then the mean squares."""
        return [
            sizes + [square.view(self.dtype).numel() for square in self._squares_of(owned)]
            for sizes, owned in zip(_sizes(self.plan.updates_in), self.plan.owned, strict=True)
        ]

    def _start(self, blocks: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[int]]) -> None:
        flat = [block.reshape(-1) for row in blocks for block in row]
        example = self.parts[0].direction
        self._sent = torch.cat(flat) if flat else example.new_empty(0, dtype=self.dtype)
        sizes = [[sum(block.numel() for block in row) for row in blocks]]
        sizes += [[sum(row) for row in expected]]
        self._received = self._sent.new_empty(sum(sizes[1]))
        self._work = td.all_to_all_single(
            self._received, self._sent, sizes[1], sizes[0], group=self.ranks.group, async_op=True
        )

    def _wait(self) -> None:
        self._work.wait()
        self._work = self._sent = None

    def _arrived(self, expected: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Return an iterator over what arrived, in the order of the ranks."""
        return iter(torch.split(self._received, list(itertools.chain.from_iterable(expected))))


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, which shares its memory, and any other tensor as it is."""
    found: Tensor = tensor.to_local() if mesh_of(tensor) is not None else tensor  # type: ignore[attr-defined]
    return found


def local_gradient(p: Tensor) -> Tensor:
    """Return this rank's part of the gradient of `p`, placed like `p`; that may need a collective."""
    grad = p.grad
    assert grad is not None
    mesh = mesh_of(p)
    if mesh is None:
        return grad
    if mesh_of(grad) is None:
        raise RuntimeError(
            f"Muon: the gradient of a DTensor of shape {tuple(p.shape)} is a plain tensor; assign a DTensor"
        )
    if (grad.device_mesh, grad.placements) != (mesh, p.placements):  # type: ignore[attr-defined]
        grad = grad.redistribute(mesh, p.placements)  # type: ignore[attr-defined]
    return local(grad)


def mesh_of(tensor: Tensor) -> Any:
    """Return the device mesh of a DTensor, or None."""
    return getattr(tensor, "device_mesh", None)


def check_placed(what: str, p: Tensor) -> None:
    """Raise ValueError if the parts of a DTensor are not blocks of matrices."""
    mesh, placements = mesh_of(p), p.placements  # type: ignore[attr-defined]
    for i, placement in enumerate(placements):
        if placement.is_partial():
            raise ValueError(
                f"{what} has the placement {placement}; a parameter must be sharded or replicated"
            )
        dim = getattr(placement, "dim", None)
        if dim is not None and dim >= 2 and p.dim() > 3:
            raise ValueError(
                f"{what} is sharded along dimension {dim}, so that its parts are no blocks of the matrix; "
                "shard a convolution along dimension 0 or 1"
            )
        # FSDP2 over tensor parallelism: the later mesh dimension cut first, so that the parts are blocks.
        later = math.prod(mesh.size(j) for j in range(i + 1, mesh.ndim) if placements[j].is_shard(dim))
        if dim is not None and getattr(placement, "split_factor", later) != later:
            raise ValueError(
                f"{what} has the placement {placement}, whose parts are not blocks of the matrix"
            )


def place_like(value: Tensor, p: Tensor) -> Tensor:
    """Return a whole tensor as a DTensor that is placed like `p`; one that is a DTensor stays as it is."""
    if mesh_of(p) is None or mesh_of(value) is not None:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, mesh_of(p), p.placements, src_data_rank=None)  # type: ignore[attr-defined]


def place_part(part: Tensor, p: Tensor, shape: torch.Size) -> Tensor:
    """Return a part as a DTensor of this shape that is placed like `p`; as it is if `p` is no DTensor."""
    if mesh_of(p) is None:
        return part
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    placements = p.placements  # type: ignore[attr-defined]
    found: Tensor = DTensor.from_local(
        part, mesh_of(p), placements, run_check=False, shape=shape, stride=stride
    )
    return found


def _group_of(mesh: Any) -> td.ProcessGroup | None:
    """Return a group of all ranks of the mesh."""
    group: td.ProcessGroup | None
    if mesh.ndim == 1:
        group = mesh.get_group()
        return group
    if mesh.size() == td.get_world_size():
        return td.group.WORLD
    group = td.new_group(sorted(mesh.mesh.flatten().tolist()), use_local_synchronization=True)
    return group


def _box_of(p: Tensor) -> Box:
    """Return which part of `p` this rank holds."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placements = p.placements  # type: ignore[attr-defined]
    sizes, starts = compute_local_shape_and_global_offset(p.shape, mesh_of(p), placements)
    if math.prod(sizes) == 0 or tuple(sizes) != tuple(local(p).shape):
        return Box(0, 0, 0, 0, 0, 0)  # not an error yet: all ranks raise together if a part is missing
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    if p.dim() == 3:
        return Box(starts[0], ends[0], starts[1], ends[1], starts[2], ends[2])
    inner = math.prod(p.shape[2:])
    return Box(0, 1, starts[0], ends[0], starts[1] * inner, ends[1] * inner)


def _stack(part: Tensor) -> Tensor:
    """Return a part of a parameter as `(b, m, n)`."""
    return part if part.dim() == 3 else part.flatten(1).unsqueeze(0)


def _block(part: Tensor, slices: tuple[slice, slice, slice]) -> Tensor:
    """Return the view of a block of a part; those of a convolution have all columns and keep their sizes."""
    if part.dim() > 3:
        return part[slices[1]]
    return part[slices] if part.dim() == 3 else part[slices[1:]]
