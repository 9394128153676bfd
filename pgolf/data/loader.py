"""Batches for training and validation: packed documents with segment boundaries, on the right device.

`T` tokens of a micro-batch, `S` attention segments in it. A batch is one row of T tokens; `cu_seqlens` says
where segments begin, so attention never looks from one document into another. `cu_seqlens` is padded with T
to a multiple of 64 entries (as in PR #1855's run) so that a compiler sees few different shapes.

The order of documents differs from PR #1855's loader: it read in file order and skipped the tail of each
shard; here nothing is skipped, and the order is shuffled by seed unless `data.shuffle` is off.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgolf.config import DataConfig
from pgolf.data.shards import (
    MAKE_SHARDS,
    Tokens,
    find_shards,
    list_files,
    read_shard,
    shard_tokens,
    sidecar_path,
)
from pgolf.data.stream import DocumentStream, cut_segments, document_starts
from pgolf.data.tokenizer import Tokenizer, find_tokenizer
from pgolf.errors import UserError

IGNORED_TARGET = -100
_CU_MULTIPLE = 64


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    inputs: Tensor
    """`(T,)` int64 token ids."""
    targets: Tensor
    """`(T,)` int64: the token after each input, the next document's BOS included."""
    cu_seqlens: Tensor
    """int32: the S segment starts, then T repeated up to a multiple of 64 entries (once at least)."""
    max_seqlen: int
    """The constant max_context, which no segment exceeds."""
    epoch: float
    """Passes over the training tokens after this micro-batch (of all ranks, in stream order)."""


class TrainLoader:
    """Endless micro-batches for one rank, prepared ahead by a thread.

    Global micro-batch m is tokens [m * T, m * T + T] of the document stream (inputs the first T, targets
    shifted by one): a function of the files, seed, T and shuffle only. Rank r of W gets m = r, r + W, r + 2W,
    ..., so the same data make an optimizer step at any number of ranks.

    Args:
        config: folder, micro_tokens (T), shuffle, prefetch.
        vocab_size: ids must be below it. bos_id: starts a document. max_context: longest segment.
        seed: >= 0, of the order of shards and documents.
        rank, world_size: which micro-batches.
        device: where the tensors go; from pinned memory and without waiting on CUDA.
    Raises:
        ValueError: config.dir is not set, or an argument is out of range. FileNotFoundError: no shards there.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        vocab_size: int,
        bos_id: int,
        max_context: int,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        if config.dir is None:
            raise UserError(f"data.dir is not set; name a folder of shards, or make one with: {MAKE_SHARDS}")
        if not 0 <= rank < world_size:
            raise UserError(f"rank must be in [0, world_size={world_size}), got {rank}")
        if seed < 0:
            raise UserError(f"seed must be >= 0, got {seed}")
        if max_context < 1:
            raise UserError(f"max_context must be >= 1, got {max_context}")
        self._config = config
        self._paths = find_shards(config.dir, "train")
        self._total = sum(shard_tokens(path) for path in self._paths)
        self._vocab_size, self._bos_id, self._max_context = vocab_size, bos_id, max_context
        self._seed, self._rank, self._world_size = seed, rank, world_size
        # The thread has no current device of its own, so "cuda" must become this one's.
        indexed = device.type != "cuda" or device.index is not None
        self._device = device if indexed else torch.device("cuda", torch.cuda.current_device())
        self._closed = False
        self._error: Exception | None = None
        self._start(0)

    def next(self) -> Batch:
        """Return this rank's next micro-batch.

        Raises:
            RuntimeError: the loader is closed. ValueError, OSError: a bad shard, found by the thread.
        """
        if self._closed:
            raise RuntimeError("the loader is closed; make a new one")
        if self._error is None:
            item = self._queue.get()
            if not isinstance(item, Exception):
                return _move(item, self._device)
            self._error = item
        raise self._error

    def restart(self, *, at: int = 0) -> None:
        """Go back to this rank's first micro-batch, or to its micro-batch `at` (counting from 0)."""
        if at < 0:
            raise UserError(f"at must be >= 0, got {at}")
        self.close()
        self._closed, self._error = False, None
        self._start(at)

    def close(self) -> None:
        """Stop the thread; calling it twice is fine."""
        self._closed = True
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, at: int) -> None:
        self._queue = queue.Queue[Batch | Exception](maxsize=self._config.prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._fill, args=(self._queue, self._stop, at), name="pgolf-loader", daemon=True
        )
        self._thread.start()

    def _fill(self, ready: queue.Queue[Batch | Exception], stop: threading.Event, at: int) -> None:
        """The thread: put batch after batch, or the exception that ended it."""
        try:
            if self._device.type == "cuda":
                # Pinning would otherwise make a context on device 0 in every process.
                torch.cuda.set_device(self._device)
            stream = DocumentStream(
                self._paths,
                vocab_size=self._vocab_size,
                bos_id=self._bos_id,
                seed=self._seed,
                shuffle=self._config.shuffle,
            )
            index = self._rank + at * self._world_size
            while _put(ready, self._make(stream, index), stop):
                index += self._world_size
        except Exception as error:
            _put(ready, error, stop)

    def _make(self, stream: DocumentStream, index: int) -> Batch:
        """Make global micro-batch `index` in host memory."""
        count = self._config.micro_tokens
        tokens = stream.read(index * count, count + 1)
        starts = cut_segments(document_starts(tokens[:-1], self._bos_id), count, self._max_context)
        batch = Batch(
            inputs=torch.from_numpy(tokens[:-1]),
            targets=torch.from_numpy(tokens[1:]),
            cu_seqlens=padded_cu_seqlens(starts, count),
            max_seqlen=self._max_context,
            epoch=(index + 1) * count / self._total,
        )
        return _pin(batch) if self._device.type == "cuda" else batch


def _put(ready: queue.Queue[Batch | Exception], item: Batch | Exception, stop: threading.Event) -> bool:
    """Put `item`, waiting for room; False if the loader was closed meanwhile."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.05)
            return True
        except queue.Full:
            continue
    return False


def _pin(batch: Batch) -> Batch:
    return replace(
        batch,
        inputs=batch.inputs.pin_memory(),
        targets=batch.targets.pin_memory(),
        cu_seqlens=batch.cu_seqlens.pin_memory(),
    )


def _move(batch: Batch, device: torch.device) -> Batch:
    return replace(
        batch,
        inputs=batch.inputs.to(device, non_blocking=True),
        targets=batch.targets.to(device, non_blocking=True),
        cu_seqlens=batch.cu_seqlens.to(device, non_blocking=True),
    )


def padded_cu_seqlens(starts: NDArray[np.int64], total: int) -> Tensor:
    """Return starts, then `total` up to a multiple of 64 entries (once at least), as int32."""
    size = -(-(starts.size + 1) // _CU_MULTIPLE) * _CU_MULTIPLE
    out = torch.full((size,), total, dtype=torch.int32)
    out[: starts.size] = torch.from_numpy(starts)
    return out


def buffer_size(count: int, full: int, *, first: bool, last: bool, device: torch.device) -> int:
    """Return how long a validation buffer of `count` tokens is padded: as little as costs nothing else.

    Without a compiler (CPU) the last buffer of a text ends with it, rounded up to 64. On a GPU each new
    length compiles new graphs, so only a text of one buffer has a shorter one, a power of two.

    Args:
        count: real tokens, at most `full`. full: tokens of all other buffers. first, last: of the whole text.
        device: where the model runs.
    """
    if not last or (device.type != "cpu" and not first):
        return full
    size = -(-count // 64) * 64 if device.type == "cpu" else 1 << max(6, (count - 1).bit_length())
    return min(size, full)


@dataclass(frozen=True)
class ValBatch:
    """One buffer of whole validation segments."""

    inputs: Tensor
    """`(T,)` int64 token ids, padded with 0 at the end."""
    targets: Tensor
    """`(T,)` int64: the token after each input, -100 (ignored) in the padding."""
    target_bytes: Tensor
    """`(T,)` int64: original UTF-8 bytes of each target, 0 in the padding."""
    cu_seqlens: Tensor
    """int32 segment starts, then T up to a multiple of 64 entries; the padding is cut into segments too."""
    max_seqlen: int
    """The constant max_context."""
    tokens: int
    """Number of real targets."""


class ValidationText(NamedTuple):
    """The whole validation stream in memory."""

    tokens: Tokens
    """`(n,)` ids of all shards, one after another."""
    bytes: NDArray[np.int64]
    """`(n,)` original UTF-8 bytes of each token; that of the first is 0, as it is never a target."""


def load_validation(
    folder: Path, *, tokenizer: Tokenizer | None = None, vocab_size: int | None = None
) -> ValidationText:
    """Read the validation tokens and the bytes that each stands for.

    Bytes come from the sidecars (`*_val_bytes_*.bin`) where they are present, otherwise from the challenge's
    byte table of `tokenizer` (or of the one in the folder).

    Args:
        folder: with `*_val_*.bin`.
        tokenizer: for the byte table, if there is no sidecar.
        vocab_size: when given, every id must be below it.
    Raises:
        FileNotFoundError: no shards, or neither sidecars nor a tokenizer. ValueError: bad shards, a sidecar
            whose length differs, that some shards lack or whose shard is missing, fewer than two tokens, or
            no byte.
    """
    text = _read_validation(folder, tokenizer, vocab_size)
    if not text.bytes.any():
        raise UserError(
            f"{folder}: the validation text has no bytes (only empty documents), so there are no bits per "
            f"byte; make the shards with a --val that holds text: {MAKE_SHARDS}"
        )
    return text


def _read_validation(folder: Path, tokenizer: Tokenizer | None, vocab_size: int | None) -> ValidationText:
    paths = find_shards(folder, "val")
    tokens = np.concatenate([read_shard(path, vocab_size=vocab_size) for path in paths])
    if tokens.size < 2:
        raise UserError(f"{folder}: validation needs at least 2 tokens, got {tokens.size}")
    sides = [sidecar_path(path) for path in paths]
    missing = [side for side in sides if not side.is_file()]
    alone = [side for side in list_files(folder, "val_bytes") if side not in sides]
    if alone:
        raise UserError(
            f"{alone[0]} has no shard beside it: a validation shard is missing, or the sidecar is another's; "
            "copy the folder again, or move the sidecar away"
        )
    if not missing:
        counts = np.concatenate([_read_sidecar(p, s) for p, s in zip(paths, sides, strict=True)])
        counts[0] = 0
        return ValidationText(tokens, counts)
    if len(missing) < len(sides):
        raise UserError(f"{missing[0]} is missing while other shards have their sidecar; copy it again")
    tokenizer = tokenizer or find_tokenizer(folder)
    if int(tokens.max()) >= tokenizer.vocab_size:
        raise UserError(
            f"{folder}: token {int(tokens.max())} is not below {tokenizer.vocab_size}, the vocabulary size "
            f"of {tokenizer.path}; the shards were made with another tokenizer"
        )
    counts = np.concatenate(([0], tokenizer.byte_table().target_bytes(tokens[:-1], tokens[1:])))
    return ValidationText(tokens, counts)


def _read_sidecar(shard: Path, side: Path) -> NDArray[np.int64]:
    counts = read_shard(side).astype(np.int64)
    if counts.size != shard_tokens(shard):
        raise UserError(
            f"{side}: {counts.size} entries for the {shard_tokens(shard)} tokens of {shard.name}; "
            f"they belong to different data: {MAKE_SHARDS}"
        )
    return counts


def validation_totals(
    folder: Path, *, tokenizer: Tokenizer | None = None, vocab_size: int | None = None
) -> tuple[int, int]:
    """Return (targets, bytes of all targets): what a complete validation pass must add up to.

    Raises:
        FileNotFoundError, ValueError: as `load_validation`.
    """
    text = load_validation(folder, tokenizer=tokenizer, vocab_size=vocab_size)
    return text.tokens.size - 1, int(text.bytes.sum())


def validation_segments(
    tokens: NDArray[np.integer], *, bos_id: int, max_context: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the starts and lengths `(S,)` of the validation segments, in order.

    Segment i has inputs tokens[start:][:length] and targets one further, so every token but the first is a
    target exactly once. Segments start at each BOS and every max_context tokens within a document.

    Args:
        tokens: `(n,)` the stream, n >= 2. bos_id: starts a document. max_context: longest segment, >= 1.
    Raises:
        ValueError: no BOS in the stream, or fewer than 2 tokens.
    """
    if tokens.size < 2:
        raise UserError(f"validation needs at least 2 tokens, got {tokens.size}")
    if not bool((tokens == bos_id).any()):
        raise UserError(
            f"no BOS (id {bos_id}) in {tokens.size} validation tokens, so there are no documents; make the "
            f"shards with BOS before each document: {MAKE_SHARDS}"
        )
    inputs = tokens[:-1]
    starts = cut_segments(document_starts(inputs, bos_id), inputs.size, max_context)
    return starts, np.diff(starts, append=inputs.size)


def validation_batches(
    folder: Path,
    *,
    tokenizer: Tokenizer | None,
    bos_id: int,
    max_context: int,
    batch_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device,
    vocab_size: int | None = None,
) -> Iterator[ValBatch]:
    """Yield this rank's share of the validation text, in order.

    Whole segments are packed into buffers of `batch_tokens` (the last one shorter, see `buffer_size`), so the
    score does not depend on the buffer's size; buffer b goes to rank b mod world_size, so ranks may get
    different numbers of them.

    Args:
        folder, tokenizer, vocab_size: as `load_validation`.
        bos_id, max_context: as `validation_segments`.
        batch_tokens: T, at least max_context.
        rank, world_size: which buffers. device: where the tensors go.
    Raises:
        ValueError: batch_tokens < max_context, or bad data. FileNotFoundError: no data.
    """
    if not 1 <= max_context <= batch_tokens:
        raise UserError(
            f"max_context must be in [1, batch_tokens={batch_tokens}] for segments to fit, got {max_context}"
        )
    text = load_validation(folder, tokenizer=tokenizer, vocab_size=vocab_size)
    starts, _ = validation_segments(text.tokens, bos_id=bos_id, max_context=max_context)
    ends = np.append(starts[1:], text.tokens.size - 1)
    index, first = 0, 0
    while first < starts.size:
        last = int(np.searchsorted(ends, starts[first] + batch_tokens, side="right"))
        if index % world_size == rank:
            end = int(ends[last - 1])
            size = buffer_size(
                end - int(starts[first]),
                batch_tokens,
                first=first == 0,
                last=last == starts.size,
                device=device,
            )
            yield _pack(text, starts[first:last], end, size, max_context, device)
        index, first = index + 1, last


def _pack(
    text: ValidationText,
    starts: NDArray[np.int64],
    end: int,
    size: int,
    max_context: int,
    device: torch.device,
) -> ValBatch:
    """Put the segments from starts[0] to `end`, which are consecutive, into one padded buffer."""
    begin = int(starts[0])
    count = end - begin
    inputs = torch.zeros(size, dtype=torch.int64)
    targets = torch.full((size,), IGNORED_TARGET, dtype=torch.int64)
    target_bytes = torch.zeros(size, dtype=torch.int64)
    tokens = torch.from_numpy(text.tokens[begin : end + 1].astype(np.int64))
    inputs[:count], targets[:count] = tokens[:-1], tokens[1:]
    target_bytes[:count] = torch.from_numpy(text.bytes[begin + 1 : end + 1])
    local = starts - begin if count == size else np.append(starts - begin, count)
    return ValBatch(
        inputs=inputs.to(device),
        targets=targets.to(device),
        target_bytes=target_bytes.to(device),
        cu_seqlens=padded_cu_seqlens(cut_segments(local, size, max_context), size).to(device),
        max_seqlen=max_context,
        tokens=count,
    )
