"""Checkpoints of a run under way: a folder of safetensors shards with a JSON index, one shard per rank.

    RUN/checkpoints/step-00001200/shard-00-of-02.safetensors
                                  shard-01-of-02.safetensors
                                  index.json

Each rank writes its own part in a thread while training goes on. The tensors are copied to host memory in
the order of the device's queue, on CUDA without waiting for the device, and are then hashed and written. The
index comes last, when every rank has said that its shard is on disk. It holds the length and the SHA-256 of
each shard, and its own SHA-256. So a folder without a valid index is not a checkpoint, at whatever moment a
process was killed. Tensors that all ranks hold are dealt out among the shards. The momentum, of which each
rank holds some rows, is put together from all shards, so any number of ranks can read what any other wrote.
Nothing is pickled (torch.distributed.checkpoint unpickles its metadata).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pgolf.dist import Dist
from pgolf.errors import UserError
from pgolf.files import atomic_file, file_sha256
from pgolf.optim.bank_muon import Shard

FOLDER = "checkpoints"
SNAPSHOTS = "snapshots"
"""Folder of the checkpoints that stay, see `pgolf.train.snapshot`."""
INDEX = "index.json"
FORMAT = "pgolf checkpoint 1"
KEEP = 2
"""Checkpoints that stay; older ones are removed when a new one is complete. The last but one is there in case
the last one turns out to be damaged."""
IDLE, WRITING, WRITTEN, FAILED = range(4)
"""States of a rank's writer."""

_STEP = re.compile(r"step-(\d{8,12})")
_SHARD = re.compile(r"shard-(\d{2,6})-of-(\d{2,6})\.safetensors")
_INDEX_BYTES = 64 << 20  # a file that claims to be an index and is larger is not read at all
_CHUNK = 8 << 20  # of a shard: hashed and written at once, without the interpreter's lock
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Parts:
    """What a checkpoint is made of, as one rank holds it: the live tensors, which are read in place."""

    whole: Mapping[str, Tensor]
    """Tensors of which every rank holds the same copy."""
    sharded: Mapping[str, Shard]
    """Tensors of which this rank holds some rows."""


class Written(NamedTuple):
    """A shard on disk."""

    size: int
    """Bytes."""
    digest: bytes
    """SHA-256."""


def shard_name(rank: int, world_size: int) -> str:
    """Return the file name of a rank's shard."""
    return f"shard-{rank:02d}-of-{world_size:02d}.safetensors"


def _deal(whole: Mapping[str, Tensor], world_size: int) -> list[list[str]]:
    """Deal the replicated tensors out: the largest first, each to the rank with the fewest bytes so far."""
    # All ranks write at the same time, so the checkpoint is ready when the rank with the most bytes is. Every
    # rank deals by itself and must get the same hands: equal sizes are ordered by name.
    hands: list[list[str]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for name in sorted(whole, key=lambda n: (-whole[n].nbytes, n)):
        rank = loads.index(min(loads))
        hands[rank].append(name)
        loads[rank] += whole[name].nbytes
    return hands


class Checkpointer:
    """Writes checkpoints of `parts` below a run's folder, one at a time, in a thread of each rank.

    `start` copies and returns; `state` says how far this rank is; when no rank is still writing, every rank
    calls `settle`, and the main rank completes the checkpoint with its index.
    """

    def __init__(self, run: Path, dist: Dist, parts: Parts, *, identity: str = "") -> None:
        """Write below `run`; `identity` marks the checkpoints as this run's."""
        self._run, self._folder, self._dist, self._identity = run, run / FOLDER, dist, identity
        name = shard_name(dist.rank, dist.world_size)
        mine = _deal(parts.whole, dist.world_size)[dist.rank]
        self._live = {name: parts.whole[name] for name in mine}
        self._live |= {name: s.tensor for name, s in parts.sharded.items() if s.tensor.numel()}
        self._shard = name
        self._rows = {
            name: {shard_name(r, dist.world_size): list(span) for r, span in enumerate(s.spans)}
            for name, s in parts.sharded.items()
        }
        self._host: dict[str, Tensor] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pgolf-checkpoint")
        self._writing: Future[Written] | None = None
        self._publishing: Future[None] | None = None
        self._target, self._facts = Path(), dict[str, Any]()
        self.problem: str | None = None
        """Why the last index could not be written; None: it was, or the saver has told it already."""

    def prepare(self) -> None:
        """Allocate the host's copies, which takes a while; a second call does nothing."""
        # Pinned where the tensors are on a GPU: a copy to other memory makes the host wait for the device.
        for name, tensor in self._live.items():
            if name not in self._host:
                self._host[name] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda"
                )

    @property
    def state(self) -> int:
        """IDLE, WRITING, WRITTEN or FAILED: of this rank."""
        if self._publishing is not None and self._publishing.done():
            error = self._publishing.exception()
            if error is not None:
                self.problem = f"no checkpoint at step {self._facts['step']}: {error}"
            self._publishing = None
        if self._writing is None:
            return IDLE if self._publishing is None else WRITING
        if not self._writing.done():
            return WRITING
        return FAILED if self._writing.exception() else WRITTEN

    def start(self, step: int, facts: dict[str, Any], *, keep: str = "") -> None:
        """Begin a checkpoint of the state after `step` steps; every rank calls it, in state IDLE.

        Args:
            step: names the checkpoint. facts: plain JSON data of the main rank, for the index.
            keep: name of a folder below `SNAPSHOTS` instead, which is never removed for newer ones.
        """
        assert self.state == IDLE
        self.prepare()
        # Queued before the next step, so the copies see the state after `step` steps, while the host goes on.
        for name, tensor in self._live.items():
            self._host[name].copy_(tensor, non_blocking=True)
        copied = None
        if self._dist.device.type == "cuda":
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            copied.record()
        self._target = self._run / SNAPSHOTS / keep if keep else self._folder / f"step-{step:08d}"
        self._facts = {**facts, "step": step, "run": self._identity}
        self._writing = self._pool.submit(self._write, self._target, copied)

    def _write(self, target: Path, copied: Any) -> Written:
        if copied is not None:
            copied.synchronize()
        target.mkdir(parents=True, exist_ok=True)
        return write_shard_file(target / self._shard, self._host)

    def settle(self) -> str | None:
        """Complete the checkpoint that every rank has finished or failed to write; every rank calls it.

        Returns:
            None, or on every rank why there is no checkpoint (a full disk, say).
        """
        assert self._writing is not None
        error = self._writing.exception()
        # The length and the four 64-bit words of the SHA-256; a length of 0 says that this rank failed.
        numbers = [0] * 5
        if error is None:
            written = self._writing.result()
            words = np.frombuffer(written.digest, dtype=np.int64)
            numbers = [written.size, *map(int, words)]
        self._writing = None
        rows = self._dist.gather_ints(numbers)
        failed = [rank for rank, row in enumerate(rows) if row[0] == 0]
        if failed:
            why = f"{error}" if error is not None else f"see rank {failed[0]}"
            # With an index it is the whole checkpoint that an earlier process wrote after the same step.
            if self._dist.is_main and not (self._target / INDEX).is_file():
                _discard(self._target)
            return f"no checkpoint at step {self._facts['step']}, rank {failed[0]} could not write: {why}"
        if self._dist.is_main:
            files = {
                shard_name(rank, self._dist.world_size): {
                    "bytes": row[0],
                    "sha256": np.array(row[1:], dtype=np.int64).tobytes().hex(),
                }
                for rank, row in enumerate(rows)
            }
            index = {"format": FORMAT, "files": files, "rows": self._rows, "facts": self._facts}
            self._publishing = self._pool.submit(self._publish, self._target, index)
        return None

    def _publish(self, target: Path, index: dict[str, Any]) -> None:
        """Write the index, which makes the folder a checkpoint, and remove the oldest ones."""
        with atomic_file(target / INDEX) as file:
            file.write(json.dumps({**index, "sha256": _digest(index)}, indent=1).encode() + b"\n")
        # Only now: until the index is on disk, the newest checkpoint is one of the old ones.
        for _, old in _folders(self._folder)[KEEP:]:
            _discard(old)

    def wait(self) -> None:
        """Wait until this rank's thread has nothing left to do; errors are for `settle` to tell."""
        for work in (self._writing, self._publishing):
            if work is not None:
                work.exception()

    def close(self) -> None:
        """Wait for the thread and end it."""
        self._pool.shutdown(wait=True)


def write_shard_file(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Write host tensors as a safetensors file, atomically, hashing on the way.

    It does not call safetensors' own `save`, which copies everything into one bytes object while it holds the
    interpreter's lock: training would stand still meanwhile.

    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    # Spaces at the end of the header let the data begin at a multiple of 8 bytes, as safetensors writes it.
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with atomic_file(path) as file:
        for block in (len(text).to_bytes(8, "little"), text):
            digest.update(block)
            file.write(block)
        for tensor in tensors.values():
            # A view of the bytes, whatever the type: numpy has no bfloat16.
            data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
            for at in range(0, len(data), _CHUNK):
                digest.update(data[at : at + _CHUNK])
                file.write(data[at : at + _CHUNK])
    return Written(8 + len(text) + end, digest.digest())


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint whose files have the lengths and hashes of its index."""

    folder: Path
    facts: dict[str, Any]
    """What the main rank knew: step, seconds on the clock, and more, see `Position`."""
    files: tuple[str, ...]
    rows: dict[str, dict[str, list[int]]]
    """For every sharded tensor, the first row and the one after the last, by file."""

    @property
    def step(self) -> int:
        """Steps that were done."""
        return int(self.facts["step"])

    def load(self) -> dict[str, Tensor]:
        """Return all tensors, whole, on the CPU.

        Raises:
            ValueError: a file is not safetensors, or rows of a tensor are missing.
        """
        tensors: dict[str, Tensor] = {}
        pieces: dict[str, list[tuple[int, int, Tensor]]] = {name: [] for name in self.rows}
        for name in self.files:
            path = self.folder / name
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 - not a dict
                        if key in pieces:
                            pieces[key].append((*self.rows[key][name], file.get_tensor(key)))
                        else:
                            tensors[key] = file.get_tensor(key)
            except (SafetensorError, OSError, KeyError, TypeError) as e:
                raise UserError(f"{path} is not a readable shard of a checkpoint: {e}") from e
        # Each tensor from its rows, which may come from another number of files than there are ranks now.
        for key, found in pieces.items():
            found.sort(key=lambda piece: piece[0])
            at = 0
            for first, stop, tensor in found:
                if first != at or tensor.dim() == 0 or tensor.shape[0] != stop - first:
                    raise UserError(f"{self.folder}: rows {at} to {first} of {key} are missing or doubled")
                at = stop
            if at != max(stop for _, stop in self.rows[key].values()):
                raise UserError(f"{self.folder}: {key} ends at row {at}; a shard lacks its part")
            tensors[key] = torch.cat([tensor for _, _, tensor in found])
        return tensors


def read_checkpoint(folder: Path) -> Checkpoint:
    """Return the checkpoint in `folder`, every file checked against the index; executes nothing.

    Raises:
        FileNotFoundError: no index: the checkpoint was never completed.
        ValueError: the index or a shard is damaged, foreign or missing; the text names it.
    """
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {INDEX}: it was not completed")
    if path.stat().st_size > _INDEX_BYTES:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, an index has at most {_INDEX_BYTES:,}")
    try:
        # Everything is checked here, before a byte of a tensor is read: lengths, hashes and the index itself.
        data = json.loads(path.read_bytes())
        digest = data.pop("sha256")
        if data["format"] != FORMAT:
            raise UserError(f"{path} has format {data['format']!r}, this reader knows {FORMAT!r}")
        if digest != _digest(data):
            raise UserError(f"{path} does not have the SHA-256 that it states; it is damaged")
        files = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in data["files"].items()}
        rows = {
            str(k): {str(n): [int(a), int(b)] for n, (a, b) in v.items()} for k, v in data["rows"].items()
        }
        facts = dict(data["facts"])
        int(facts["step"])
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError, UnicodeError) as e:
        raise UserError(f"{path} is not an index of a checkpoint: {type(e).__name__} {e}") from e
    _check_files(folder, files)
    return Checkpoint(folder, facts, tuple(sorted(files)), rows)


def _check_files(folder: Path, files: dict[str, tuple[int, str]]) -> None:
    # All shards of one number of ranks: a mix of two checkpoints has files that are whole each for itself.
    worlds = {match[2] for name in files if (match := _SHARD.fullmatch(name))}
    if len(worlds) != 1 or set(files) != {shard_name(r, int(w)) for w in worlds for r in range(int(w))}:
        raise UserError(f"{folder}: the index must list shard-00-of-NN to the last, got {sorted(files)[:4]}")
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing; copy it again")
        if path.stat().st_size != size or file_sha256(path) != digest:
            raise UserError(f"{path} does not have the length and SHA-256 of the index; it is damaged")


def newest_checkpoint(run: Path, *, identity: str = "") -> tuple[Checkpoint | None, list[str]]:
    """Return the newest valid checkpoint of a run (None: there is none), and why newer ones are not valid.

    One that another run wrote, whose identity differs, is not valid: somebody copied it into the folder.
    """
    complaints: list[str] = []
    for _, folder in _folders(run / FOLDER):
        try:
            found = read_checkpoint(folder)
            if found.facts.get("run") != identity:
                raise UserError(f"{folder} is a checkpoint of another run")
            return found, complaints
        except (OSError, ValueError) as e:
            complaints.append(str(e))
    return None, complaints


def remove_after(run: Path, step: int) -> None:
    """Put checkpoint folders of later steps than `step`, which are not valid, out of the way: `*.bad`.

    They may be readable again one day (a disk that failed, a copy under way), but would count as newer.
    """
    for number, folder in _folders(run / FOLDER):
        if number > step:
            bad = folder.with_suffix(".bad")
            _discard(bad)
            folder.rename(bad)


def _discard(folder: Path) -> None:
    """Remove a checkpoint. Its index first: a process that is killed in between leaves no checkpoint then."""
    with contextlib.suppress(OSError):
        (folder / INDEX).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _folders(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of the checkpoint folders, the newest first."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if p.is_dir() and (m := _STEP.fullmatch(p.name))]
    return sorted(found, reverse=True)


def _digest(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
