"""Processes, devices and the collectives between them: one `Dist` object per process.

Two planes. Host decisions (clock, stop flag, errors) travel as CPU tensors through a gloo group, so they
never wait for the GPU. Tensors travel through NCCL on CUDA and gloo on CPU. Without torchrun, or with one
process, nothing of torch.distributed is touched and every method is the identity.

gloo: averages are taken as sum and then scaled, and reduce-scatter is all-reduce and then a slice, because
gloo gained ReduceOp.AVG and reduce-scatter only in some versions; it is the path for tests and small
machines. No object is pickled: strings travel as UTF-8 bytes.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as td
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from pgolf import env
from pgolf.errors import RanksFailed, RunError, UserError, brief
from pgolf.watch import MEET_S, Watch

DeviceChoice = Literal["auto", "cuda", "cpu"]

# torch 2.13 renamed the flat collectives and warns about the old names; 2.11 has only the old ones.
# Removal: when the oldest supported torch has *_single.
_reduce_scatter: Callable[..., Any] = getattr(td, "reduce_scatter_single", None) or td.reduce_scatter_tensor
_all_gather: Callable[..., Any] = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor


class Pending:
    """A collective under way; its tensors must not be touched until `wait()` has returned.

    On CUDA `wait()` makes the current stream wait and returns at once; on CPU it blocks.
    """

    def __init__(self, work: Any = None, finish: Callable[[], object] | None = None) -> None:
        self._work = work
        self._finish = finish

    def wait(self) -> None:
        """Order everything that follows after the collective; a second call does nothing."""
        work, self._work = self._work, None
        finish, self._finish = self._finish, None
        if work is not None:
            work.wait()
        if finish is not None:
            finish()


class Dist:
    """This process's place among the ranks, its device, and the collectives.

    Attributes:
        rank: global rank, 0 is the main one. world_size: number of ranks. local_rank: rank on this machine.
        device: where this rank computes. is_main: rank == 0. watch: notices ranks that are lost.
    """

    def __init__(self, launch: env.Launch, device: torch.device) -> None:
        self.rank = launch.rank
        self.world_size = launch.world_size
        self.local_rank = launch.local_rank
        self.device = device
        self.is_main = launch.rank == 0
        self.watch = Watch(self.rank, 1, None, timeout_s=0.0)
        self._host: td.ProcessGroup | None = None

    @classmethod
    def start(cls, device: DeviceChoice, *, timeout_s: float = 600.0, rank_timeout_s: float = 30.0) -> Dist:
        """Join the ranks that the launcher started (one process without torchrun) and pick the device.

        Args:
            device: `"auto"` takes CUDA when it is there. With CUDA, rank i of a machine gets GPU i.
            timeout_s: seconds a collective may wait for the slowest rank before every rank fails. The default
                outlasts rank 0 compressing the artifact (about 100 s) and ranks that compile at different
                speeds.
            rank_timeout_s: seconds of silence after which a rank counts as lost, see `pgolf.watch`; one that
                is killed is noticed at once.

        Raises:
            ValueError: unknown device name. RuntimeError: no such GPU, or the ranks cannot meet.
        """
        launch = env.launch()
        if not 0 <= launch.rank < launch.world_size:
            raise RunError(f"launch: rank must be in [0, {launch.world_size}), got {launch.rank}")
        dist = cls(launch, pick_device(device, launch.local_rank))
        if dist.device.type == "cuda":
            torch.cuda.set_device(dist.device)
        if dist.world_size > 1:
            dist._join(timedelta(seconds=timeout_s), rank_timeout_s)
        return dist

    def _join(self, timeout: timedelta, rank_timeout_s: float) -> None:
        cuda = self.device.type == "cuda"
        try:
            # The watch first: it sees ranks that are lost while the groups are made, too.
            # Its clock starts before the store is reached, so that all waits together last `MEET_S`.
            meet_by = time.monotonic() + MEET_S
            store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=MEET_S)))
            self.watch = Watch(self.rank, self.world_size, store, timeout_s=rank_timeout_s, meet_by=meet_by)
            td.init_process_group(
                "nccl" if cuda else "gloo",
                timeout=timeout,
                store=store,
                rank=self.rank,
                world_size=self.world_size,
                device_id=self.device if cuda else None,
            )
            self._host = td.new_group(backend="gloo", timeout=timeout)
        except (ValueError, RuntimeError) as e:
            raise RunError(
                f"rank {self.rank} of {self.world_size} could not join the others on {self.device}: {e}; "
                "start all ranks with one torchrun command"
            ) from e

    def close(self) -> None:
        """Leave the process group; a second call does nothing."""
        self.watch.leave()
        if self._host is not None:
            self._host = None
            td.destroy_process_group()

    # Host plane: plain values, no GPU involved.

    def share(self, values: list[float]) -> list[float]:
        """Return rank 0's `values` on every rank, bit for bit (float64), so that all ranks decide alike.

        Every rank calls it with a list of the same length. Never synchronizes the GPU.
        """
        if self._host is None:
            return list(values)
        box = torch.tensor(values, dtype=torch.float64)
        td.broadcast(box, src=0, group=self._host)
        return [float(v) for v in box.tolist()]

    def gather(self, values: list[float]) -> list[list[float]]:
        """Return every rank's `values` (float64) on every rank, by rank; never waits for the GPU."""
        return self._rows(torch.tensor(values, dtype=torch.float64))

    def gather_ints(self, values: list[int]) -> list[list[int]]:
        """Return every rank's `values` (64-bit integers) on every rank, by rank."""
        return self._rows(torch.tensor(values, dtype=torch.int64))

    def _rows(self, box: Tensor) -> list[list[Any]]:
        """Return every rank's box as a list of its numbers, by rank."""
        if self._host is None:
            return [box.tolist()]
        boxes = [torch.empty_like(box) for _ in range(self.world_size)]
        td.all_gather(boxes, box, group=self._host)
        return [b.tolist() for b in boxes]

    def check(self, error: Exception | str | None) -> None:
        """Let every rank fail together: raise everywhere if any rank passes an error or a message.

        Every rank calls it after work that can fail on one rank only, so that no rank is left in a
        collective.

        Raises:
            RanksFailed: names each failed rank and its message; the same text on every rank, and from the
            error on the rank that passed it. The error itself where there is one process only.
        """
        cause = error if isinstance(error, Exception) else None
        if self._host is None:
            if cause is not None:
                raise cause
            if error is not None:
                raise RanksFailed(str(error))
            return
        message = brief(cause) if cause is not None else error
        text = b"" if message is None else (str(message) or "no message").encode()
        sizes = [row[0] for row in self.gather_ints([len(text)])]
        if max(sizes) == 0:
            return
        box = torch.zeros(max(sizes), dtype=torch.uint8)
        box[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        boxes = [torch.empty_like(box) for _ in sizes]
        td.all_gather(boxes, box, group=self._host)
        texts = [bytes(b[:n].tolist()).decode() for b, n in zip(boxes, sizes, strict=True)]
        raise RanksFailed("; ".join(f"rank {r} failed: {t}" for r, t in enumerate(texts) if t)) from cause

    # Tensor plane: device tensors, stream order, no host synchronization on CUDA.

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over the ranks, in place, and return it."""
        if self._host is not None:
            td.all_reduce(tensor)
        return tensor

    def all_reduce_avg(self, tensor: Tensor) -> Pending:
        """Start replacing `tensor` (contiguous, floating) by its mean over the ranks, in place."""
        if self._host is None:
            return Pending()
        if self.device.type == "cuda":
            return Pending(td.all_reduce(tensor, op=td.ReduceOp.AVG, async_op=True))
        return Pending(td.all_reduce(tensor, async_op=True), lambda: tensor.div_(self.world_size))

    def reduce_scatter_avg(self, output: Tensor, input: Tensor) -> Pending:
        """Start `output = mean over ranks of the rank-th of world_size equal parts of input`.

        Args:
            output: contiguous, numel(input) / world_size elements, the dtype of `input`.
            input: contiguous; scratch after the call (gloo reduces it in place).
        Raises:
            ValueError: the sizes disagree.
        """
        self._check_parts(output, input, "reduce_scatter_avg")
        if self._host is None:
            output.view(-1).copy_(input.view(-1))
            return Pending()
        whole, part = input.view(-1), output.view(-1)
        if self.device.type == "cuda":
            return Pending(_reduce_scatter(part, whole, op=td.ReduceOp.AVG, async_op=True))
        mine = whole[self.rank * part.numel() :][: part.numel()]
        work = td.all_reduce(whole, async_op=True)
        return Pending(work, lambda: torch.div(mine, self.world_size, out=part))

    def all_gather(self, output: Tensor, input: Tensor) -> Pending:
        """Start `output = concatenation of every rank's input`, in rank order.

        Args:
            output: contiguous, numel(input) * world_size elements, the dtype of `input`.
            input: contiguous.
        Raises:
            ValueError: the sizes disagree.
        """
        self._check_parts(input, output, "all_gather")
        if self._host is None:
            output.view(-1).copy_(input.view(-1))
            return Pending()
        return Pending(_all_gather(output.view(-1), input.view(-1), async_op=True))

    def _check_parts(self, part: Tensor, whole: Tensor, name: str) -> None:
        if part.numel() * self.world_size != whole.numel():
            raise UserError(
                f"{name}: the whole must hold world_size={self.world_size} parts of {part.numel()} elements, "
                f"got {whole.numel()}; pad it to a multiple of the world size"
            )

    def assert_replicas_equal(self, tensors: Mapping[str, Tensor]) -> None:
        """Check that every rank holds the same bits in every tensor; every rank calls it.

        Compares 64-bit checksums of the bits (NaN equals the same NaN, 0 differs from -0), names, shapes and
        dtypes. Any single differing element is found; synchronizes the device.

        Raises:
            RuntimeError: names the tensors that differ and the ranks that disagree with rank 0, on every
            rank.
        """
        if self._host is None:
            return
        names = sorted(tensors)
        if len({row[0] for row in self.gather_ints([len(names)])}) > 1:
            raise RunError(f"replicas hold different numbers of tensors; rank {self.rank}: {len(names)}")
        rows = self.gather_ints([_checksum(name, tensors[name]) for name in names])
        wrong = []
        for i, name in enumerate(names):
            ranks = [r for r, row in enumerate(rows) if row[i] != rows[0][i]]
            if ranks:
                wrong.append(f"{name} (ranks {ranks})")
        if wrong:
            shown = ", ".join(wrong[:8]) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
            raise RanksFailed(f"replicas differ from rank 0 in {len(wrong)} of {len(names)} tensors: {shown}")


def pick_device(choice: str, local_rank: int = 0) -> torch.device:
    """Return the device that "auto" (CUDA when it is there), "cuda" or "cpu" means for a rank of a machine.

    Raises:
        ValueError: another word. RuntimeError: no such GPU.
    """
    if choice not in ("auto", "cuda", "cpu"):
        raise UserError(f"device must be one of ('auto', 'cuda', 'cpu'), got {choice!r}")
    available = torch.cuda.is_available()
    if choice == "cpu" or (choice == "auto" and not available):
        return torch.device("cpu")
    if not available:
        why = "this torch is a CPU build" if torch.version.cuda is None else "no usable GPU or driver"
        raise RunError(f"device 'cuda' was asked for, but {why}; use device cpu or auto")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise RunError(
            f"local rank {local_rank} has no GPU: {count} visible; "
            f"start at most {count} ranks on this machine"
        )
    return torch.device("cuda", local_rank)


def _checksum(name: str, tensor: Tensor) -> int:
    """Sum of bits * odd position weights modulo 2^64, plus a hash of name, shape and dtype."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().reshape(-1).contiguous().view(words[tensor.element_size()]).to(torch.int64)
    weights = torch.arange(1, 2 * bits.numel() + 1, 2, device=bits.device)
    label = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    return int((bits * weights).sum().item()) ^ label
