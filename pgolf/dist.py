"""Processes, devices and the collectives between them; one `Dist` object per process.

There are two ways of communication. Decisions of the host (clock, stop flag, errors) are sent as CPU tensors
through a gloo group, so they never wait for the GPU. Tensors are sent through NCCL on CUDA and through gloo
on the CPU. Without torchrun, or with a single process, torch.distributed is not used, and the collectives
return their input.

With gloo, which serves tests and small machines, an average is a sum that is scaled afterwards, and a
reduce-scatter is an all-reduce and a slice, because only some versions of gloo have ReduceOp.AVG and
reduce-scatter. Nothing is pickled; strings are sent as UTF-8 bytes.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as td
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from pgolf import env
from pgolf.errors import RanksFailed, RunError, UserError, brief, is_checked
from pgolf.watch import MEET_S, Watch, before

DeviceChoice = Literal["auto", "cuda", "cpu"]

# torch 2.13 renamed these collectives and warns about the old names; torch 2.11 has only the old names.
# Remove this when the oldest supported torch has *_single.
_reduce_scatter: Callable[..., Any] = getattr(td, "reduce_scatter_single", None) or td.reduce_scatter_tensor
_all_gather: Callable[..., Any] = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor


class Pending:
    """A collective that is running; its tensors must not be used until `wait()` has returned.

    On CUDA `wait()` makes the current stream wait and returns at once; on the CPU it blocks.
    """

    def __init__(self, work: Any = None, finish: Callable[[], object] | None = None) -> None:
        self._work = work
        self._finish = finish

    def wait(self) -> None:
        """Let everything that follows run after the collective; a second call does nothing."""
        work, self._work = self._work, None
        finish, self._finish = self._finish, None
        if work is not None:
            work.wait()
        if finish is not None:
            finish()


class Dist:
    """This process's place among the ranks, its device, and the collectives.

    Attributes:
        rank: global rank; 0 is the main rank.
        world_size: number of ranks.
        local_rank: rank on this machine.
        device: where this rank computes.
        is_main: whether rank is 0.
        shares_gpu: whether ranks share a GPU, which NCCL refuses: sums over ranks then go through the host.
        devices: number of GPUs of all ranks; on CPUs, and where no rank shares a GPU, that of ranks.
        watch: notices ranks that are lost.
    """

    def __init__(self, launch: env.Launch, device: torch.device, *, shares_gpu: bool = False) -> None:
        self.rank = launch.rank
        self.world_size = launch.world_size
        self.local_rank = launch.local_rank
        self.device = device
        self.is_main = launch.rank == 0
        self.shares_gpu = shares_gpu
        self.devices = launch.world_size
        if shares_gpu:
            hosts = launch.world_size / env.ranks_on_this_host()
            self.devices = round(hosts * torch.cuda.device_count())
        self.watch = Watch(self.rank, 1, None, timeout_s=0.0)
        self._host: td.ProcessGroup | None = None

    @classmethod
    def start(
        cls,
        device: DeviceChoice,
        *,
        share_gpus: bool = False,
        timeout_s: float = 600.0,
        rank_timeout_s: float = 30.0,
    ) -> Dist:
        """Join the ranks that torchrun started (a single process without it) and choose the device.

        Args:
            device: "auto" is CUDA if there is a GPU. With CUDA, rank i of a machine gets GPU i.
            share_gpus: allow more ranks than GPUs; rank i of a machine with n of them gets GPU i modulo n.
                This is for work that waits for the host and needs no collective but `all_reduce`.
            timeout_s: seconds that a collective may wait for the slowest rank before every rank fails. The
                default is longer than rank 0 needs to compress the artifact (about 100 s), and allows ranks
                to compile at different speeds.
            rank_timeout_s: seconds of silence after which a rank counts as lost, see `pgolf.watch`; a rank
                that is killed is noticed at once.

        Raises:
            ValueError: the name of the device is unknown.
            RuntimeError: there is no such GPU, or the ranks cannot connect.
        """
        launch = env.launch()
        if not 0 <= launch.rank < launch.world_size:
            raise RunError(f"launch: rank must be in [0, {launch.world_size}), got {launch.rank}")
        chosen = pick_device(device, launch.local_rank, share_gpus=share_gpus)
        shares_gpu = chosen.type == "cuda" and env.ranks_on_this_host() > torch.cuda.device_count()
        dist = cls(launch, chosen, shares_gpu=shares_gpu)
        if dist.device.type == "cuda":
            torch.cuda.set_device(dist.device)
        if dist.world_size > 1:
            dist._join(timedelta(seconds=timeout_s), rank_timeout_s)
        return dist

    def _join(self, timeout: timedelta, rank_timeout_s: float) -> None:
        cuda = self.device.type == "cuda" and not self.shares_gpu
        try:
            # The watch first: it sees ranks that are lost while the groups are made, too.
            meet_by = time.monotonic() + MEET_S
            late = f"rank 0 did not answer within {MEET_S:g} s (stopped, or its host cannot be reached)"
            store, self.watch = before(meet_by + 1.0, lambda: self._meet(meet_by, rank_timeout_s), late)
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

    def _meet(self, meet_by: float, rank_timeout_s: float) -> tuple[Any, Watch]:
        """Reach the launcher's store and every rank, before the clock says `meet_by`."""
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=MEET_S)))
        watch = Watch(self.rank, self.world_size, store, timeout_s=rank_timeout_s, meet_by=meet_by)
        return store, watch

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close at the end of the block. If it fails, tell the other ranks why.

        Raises:
            RanksFailed: instead of an error that comes from the failure of another rank, which it names.
        """
        try:
            yield
        except BaseException as e:
            known = None
            if self.world_size > 1 and isinstance(e, Exception) and not is_checked(e):
                # It may be a collective that another rank broke. The watch learns that in a moment.
                known = self.watch.reason(wait_s=1.5)
            why = brief(e) if isinstance(e, Exception) else str(e) or "interrupted"
            self.watch.leave("" if known or isinstance(e, RanksFailed) else why)
            if known:
                raise RanksFailed(known) from None
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Leave the process group; a second call does nothing."""
        self.watch.leave()
        if self._host is not None:
            self._host = None
            td.destroy_process_group()

    # Communication between hosts: plain numbers, without the GPU.

    def share(self, values: list[float]) -> list[float]:
        """Return rank 0's `values` (float64) on every rank, so that all ranks make the same decision.

        Every rank must call it with a list of the same length. The GPU is not synchronized.
        """
        if self._host is None:
            return list(values)
        box = torch.tensor(values, dtype=torch.float64)
        td.broadcast(box, src=0, group=self._host)
        return [float(v) for v in box.tolist()]

    def gather(self, values: list[float]) -> list[list[float]]:
        """Return the `values` (float64) of all ranks on every rank, by rank, without waiting for the GPU."""
        return self._rows(torch.tensor(values, dtype=torch.float64))

    def gather_ints(self, values: list[int]) -> list[list[int]]:
        """Return the `values` (64-bit integers) of all ranks on every rank, by rank."""
        return self._rows(torch.tensor(values, dtype=torch.int64))

    def gather_texts(self, text: str) -> list[str]:
        """Return the texts of all ranks on every rank, by rank."""
        own = text.encode()
        sizes = [row[0] for row in self.gather_ints([len(own)])]
        box = torch.zeros(max(sizes), dtype=torch.uint8)
        box[: len(own)] = torch.tensor(list(own), dtype=torch.uint8)
        rows = self._rows(box) if max(sizes) else [[] for _ in sizes]
        return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]

    def _rows(self, box: Tensor) -> list[list[Any]]:
        """Return the numbers of all ranks' tensors, as one list per rank."""
        if self._host is None:
            return [box.tolist()]
        boxes = [torch.empty_like(box) for _ in range(self.world_size)]
        td.all_gather(boxes, box, group=self._host)
        return [b.tolist() for b in boxes]

    def check(self, error: Exception | str | None) -> None:
        """Raise an error on every rank if any rank passes an error or a message.

        Every rank must call it after work that may fail on one rank only, so that no rank waits in a
        collective for a rank that has failed.

        Raises:
            RanksFailed: the text, the same on every rank, names each failed rank and its message; on a rank
                that passed an error, that error is its cause. A single process raises the error itself.
        """
        cause = error if isinstance(error, Exception) else None
        if self._host is None:
            if cause is not None:
                raise cause
            if error is not None:
                raise RanksFailed(str(error))
            return
        message = brief(cause) if cause is not None else error
        texts = self.gather_texts("" if message is None else str(message) or "no message")
        if any(texts):
            raise RanksFailed("; ".join(f"rank {r} failed: {t}" for r, t in enumerate(texts) if t)) from cause

    # Communication between devices: tensors, in the order of the stream, without waiting on the host (CUDA).

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over the ranks, in place, and return it."""
        if self._host is None:
            return tensor
        if self.shares_gpu:
            box = tensor.cpu()
            td.all_reduce(box, group=self._host)
            return tensor.copy_(box)
        td.all_reduce(tensor)
        return tensor

    def all_reduce_avg(self, tensor: Tensor) -> Pending:
        """Start to replace `tensor` (contiguous, floating point) by its mean over the ranks, in place."""
        if self._host is None:
            return Pending()
        if self.device.type == "cuda":
            return Pending(td.all_reduce(tensor, op=td.ReduceOp.AVG, async_op=True))
        return Pending(td.all_reduce(tensor, async_op=True), lambda: tensor.div_(self.world_size))

    def reduce_scatter_avg(self, output: Tensor, input: Tensor) -> Pending:
        """Start to write this rank's part of `input`, averaged over the ranks, into `output`.

        `input` has world_size equal parts, of which part r belongs to rank r.

        Args:
            output: contiguous, numel(input) / world_size elements, the dtype of `input`.
            input: contiguous; its values are undefined afterwards (gloo reduces it in place).

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
        """Start to write the inputs of all ranks, in the order of the ranks, into `output`.

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
        """Check that every rank holds the same bits in every tensor.

        This is a collective: every rank must call it. It compares 64-bit checksums of the bits (so NaN equals
        the same NaN, and 0 differs from -0), of names, shapes and dtypes. A single element that differs is
        always found. The device is synchronized.

        Raises:
            RuntimeError: ranks differ; the message, on every rank, names the tensors that differ and the
                ranks that disagree with rank 0.
        """
        if self._host is None:
            return
        names = sorted(tensors)
        if len({row[0] for row in self.gather_ints([len(names)])}) > 1:
            raise RunError(f"the ranks hold different numbers of tensors; rank {self.rank}: {len(names)}")
        rows = self.gather_ints([_checksum(name, tensors[name]) for name in names])
        wrong = []
        for i, name in enumerate(names):
            ranks = [r for r, row in enumerate(rows) if row[i] != rows[0][i]]
            if ranks:
                wrong.append(f"{name} (ranks {ranks})")
        if wrong:
            shown = ", ".join(wrong[:8]) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
            raise RanksFailed(f"ranks differ from rank 0 in {len(wrong)} of {len(names)} tensors: {shown}")


def pick_device(choice: str, local_rank: int = 0, *, share_gpus: bool = False) -> torch.device:
    """Return the device for "auto" (CUDA if there is a GPU), "cuda" or "cpu" on a rank of this machine.

    With `share_gpus`, ranks beyond the number of GPUs get those again, in turn.

    Raises:
        ValueError: the choice is another word.
        RuntimeError: there is no such GPU.
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
    if share_gpus:
        local_rank %= count
    if local_rank >= count:
        raise RunError(
            f"there is no GPU for local rank {local_rank}: {count} visible; "
            f"start at most {count} ranks on this machine"
        )
    return torch.device("cuda", local_rank)


def _checksum(name: str, tensor: Tensor) -> int:
    """Return the sum of bits * odd position weights modulo 2^64, xor a hash of name, shape and dtype."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().reshape(-1).contiguous().view(words[tensor.element_size()]).to(torch.int64)
    weights = torch.arange(1, 2 * bits.numel() + 1, 2, device=bits.device)
    label = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    return int((bits * weights).sum().item()) ^ label
