"""Batches for training and validation: packed documents with segment boundaries, on the device of the run.

A batch is one row of T tokens. `cu_seqlens` holds the starts of its segments, so that attention never looks
from one document into another. It is padded with T to a multiple of 64 entries, as in PR #1855's run, so that
a compiler sees few different shapes.

The order of documents is not that of PR #1855's loader, which read in file order and skipped the end of each
shard. Here nothing is skipped, and the seed shuffles the order, except with `data.shuffle=false`.

The other values of `data.order` are those of earlier published stacks, which did not separate documents: the
segments are then rows of max_context tokens, whatever is in them. sequences and coprime (`windows.py`) take
rows from random places; stream, the challenge's baseline, reads the files from beginning to end, over and
over. (That one never asked for the first token of a micro-batch as a target; here every token is one.)

Legend: `T` tokens of a micro-batch, `S` attention segments in it.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgolf.config import DataConfig
from pgolf.data.left_out import cut_documents
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
from pgolf.data.windows import (
    WindowStream,
    coprime_windows,
    require_windows,
    row_starts,
    shuffled_windows,
)
from pgolf.errors import UserError

IGNORED_TARGET = -100
CU_MULTIPLE = 64
"""Entries of cu_seqlens are a multiple of this."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    inputs: Tensor
    """`(T,)` int64 token ids."""
    targets: Tensor
    """`(T,)` int64, the token after each input; after the end of a document that is the BOS of the next,
    after the end of a row the token that follows it in its shard."""
    cu_seqlens: Tensor
    """int32: the S segment starts, then T, repeated (at least once) up to a multiple of 64 entries."""
    max_seqlen: int
    """The constant max_context; no segment is longer."""
    epoch: float
    """Passes over the training tokens up to the end of this micro-batch, counting those of all ranks."""
    shorter: dict[int, Tensor] = field(default_factory=dict)
    """In the queue only: cu_seqlens for shorter contexts, by their tokens."""


class TrainLoader:
    """Endless micro-batches for one rank, which a thread prepares ahead of time.

    The global micro-batch m consists of the tokens m * T to m * T + T of the document stream (the inputs are
    the first T, the targets the last T), or of the inputs and targets m * T to m * T + T of a sequence of
    rows. It depends only on the files, the seed, T, shuffle and order, in rows also on max_context, and in
    the order coprime on batch_tokens. Rank r of W gets the micro-batches r, r + W, r + 2W, ..., so an
    optimizer step has the same data at any number of ranks, and no two ranks read the same row in a pass.

    Args:
        config: folder, batch_tokens, micro_tokens (T), shuffle, order, prefetch.
        vocab_size: every id must be below it.
        bos_id: the id that starts a document.
        max_context: tokens of the longest segment.
        seed: of the order of shards and documents, >= 0.
        rank, world_size: select this rank's micro-batches.
        device: where the tensors go; to CUDA they are copied from pinned memory without waiting.
        shorter: shorter contexts, in tokens, into which `next` can cut the documents instead.
        leave_out: number of documents at the end of the text that are in no batch.

    Attributes:
        left_out: these documents, tokens of each.

    Raises:
        ValueError: config.dir is not set, an argument is out of range, no shard has a window, or the text has
            no more documents than are to be left out.
        FileNotFoundError: the folder has no training shards.
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
        shorter: tuple[int, ...] = (),
        leave_out: int = 0,
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
        cut = cut_documents(find_shards(config.dir, "train"), bos_id=bos_id, count=leave_out)
        self._paths, self._sizes, self.left_out = cut
        self._total = sum(self._sizes)
        if config.order in ("sequences", "coprime"):
            require_windows(config.dir, self._sizes, max_context, config.order)
        self._vocab_size, self._bos_id, self._max_context = vocab_size, bos_id, max_context
        self._shorter = shorter
        self._seed, self._rank, self._world_size = seed, rank, world_size
        # The thread has its own current device, so "cuda" must be replaced by the device of this process.
        indexed = device.type != "cuda" or device.index is not None
        self._device = device if indexed else torch.device("cuda", torch.cuda.current_device())
        self._closed = False
        self._error: Exception | None = None
        self._start(0)

    def next(self, context: int | None = None) -> Batch:
        """Return this rank's next micro-batch.

        Args:
            context: tokens of its longest segment, one of `shorter`; None: max_context. Which documents there
                are, and which of their tokens, does not depend on it.

        Raises:
            RuntimeError: the loader is closed.
            ValueError, OSError: the thread could not read a shard.
        """
        if self._closed:
            raise RuntimeError("the loader is closed; call restart(), or make a new loader")
        if self._error is None:
            item = self._queue.get()
            if not isinstance(item, Exception):
                cu_seqlens = item.cu_seqlens if context is None else item.shorter[context]
                return _move(replace(item, cu_seqlens=cu_seqlens, shorter={}), self._device)
            self._error = item
        raise self._error

    def restart(self, *, at: int = 0) -> None:
        """Start again at this rank's micro-batch number `at`, counting from 0."""
        if at < 0:
            raise UserError(f"at must be >= 0, got {at}")
        self.close()
        self._closed, self._error = False, None
        self._start(at)

    def close(self) -> None:
        """Stop the thread; a second call does nothing."""
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
        """Put one batch after another into `ready`, or the exception that ends it; the thread runs this."""
        try:
            if self._device.type == "cuda":
                # Otherwise, pinning memory would create a context on device 0 in every process.
                torch.cuda.set_device(self._device)
            text = self._open()
            index = self._rank + at * self._world_size
            while _put(ready, self._make(text, index), stop):
                index += self._world_size
        except Exception as error:
            _put(ready, error, stop)

    def _open(self) -> DocumentStream | WindowStream:
        """Return the training text from its beginning, in the order that the settings ask for."""
        order, context = self._config.order, self._max_context
        if order in ("documents", "stream"):
            return DocumentStream(
                self._paths,
                vocab_size=self._vocab_size,
                bos_id=self._bos_id,
                seed=self._seed,
                shuffle=self._config.shuffle and order == "documents",
                sizes=self._sizes,
            )
        if order == "sequences":
            windows = shuffled_windows(self._sizes, context, self._seed)
        else:
            batch = max(1, self._config.batch_tokens // context)
            windows = coprime_windows(self._sizes, context, self._seed, batch)
        return WindowStream(self._paths, vocab_size=self._vocab_size, context=context, order=windows)

    def _make(self, text: DocumentStream | WindowStream, index: int) -> Batch:
        """Make global micro-batch `index` in host memory."""
        count = self._config.micro_tokens
        if isinstance(text, WindowStream):
            inputs, targets = text.read(index * count, count)
        else:
            tokens = text.read(index * count, count + 1)
            inputs, targets = tokens[:-1], tokens[1:]
        if self._config.order == "documents":
            starts = document_starts(inputs, self._bos_id)
        else:
            starts = row_starts(index * count, count, self._max_context)

        def cut(context: int) -> Tensor:
            return padded_cu_seqlens(cut_segments(starts, count, context), count)

        batch = Batch(
            inputs=torch.from_numpy(inputs),
            targets=torch.from_numpy(targets),
            cu_seqlens=cut(self._max_context),
            max_seqlen=self._max_context,
            epoch=(index + 1) * count / self._total,
            shorter={context: cut(context) for context in self._shorter},
        )
        return _pin(batch) if self._device.type == "cuda" else batch


def _put(ready: queue.Queue[Batch | Exception], item: Batch | Exception, stop: threading.Event) -> bool:
    """Put `item` into the queue when there is room; return False if the loader was closed meanwhile."""
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
        shorter={context: cu.pin_memory() for context, cu in batch.shorter.items()},
    )


def _move(batch: Batch, device: torch.device) -> Batch:
    return replace(
        batch,
        inputs=batch.inputs.to(device, non_blocking=True),
        targets=batch.targets.to(device, non_blocking=True),
        cu_seqlens=batch.cu_seqlens.to(device, non_blocking=True),
    )


def padded_cu_seqlens(starts: NDArray[np.int64], total: int) -> Tensor:
    """Return `starts`, then `total`, repeated (at least once) up to a multiple of 64 entries, as int32."""
    size = -(-(starts.size + 1) // CU_MULTIPLE) * CU_MULTIPLE
    out = torch.full((size,), total, dtype=torch.int32)
    out[: starts.size] = torch.from_numpy(starts)
    return out


def buffer_size(count: int, full: int, *, first: bool, last: bool, device: torch.device) -> int:
    """Return the padded length of a validation buffer of `count` tokens.

    Buffers have `full` tokens, except for the last one. On the CPU, which does not compile, its length is
    `count` rounded up to a multiple of 64. On a GPU each new length would compile new graphs, so there only a
    text that fits into one buffer gets a shorter one, whose length is a power of two.

    Args:
        count: tokens in this buffer, at most `full`.
        full: length of a full buffer, tokens.
        first, last: whether this is the first and the last buffer of the whole text.
        device: where the model runs.
    """
    if not last or (device.type != "cpu" and not first):
        return full
    size = -(-count // 64) * 64 if device.type == "cpu" else 1 << max(6, (count - 1).bit_length())
    return min(size, full)


class ValidationText(NamedTuple):
    """The whole validation text in memory."""

    tokens: Tokens
    """`(n,)` ids of all shards, one after another."""
    bytes: NDArray[np.int64]
    """`(n,)` UTF-8 bytes of the original text that each token stands for; 0 for the first token, which is
    never a target."""


def load_validation(
    folder: Path, *, tokenizer: Tokenizer | None = None, vocab_size: int | None = None
) -> ValidationText:
    """Read the validation tokens and the number of bytes that each of them stands for.

    The bytes come from the sidecars (`*_val_bytes_*.bin`) if there are any, otherwise from the challenge's
    byte table of the tokenizer.

    Args:
        folder: holds `*_val_*.bin`.
        tokenizer: for the byte table, if there are no sidecars; the tokenizer of the folder if None.
        vocab_size: every id must be below it; None does not check that.

    Raises:
        FileNotFoundError: there are no shards, or neither sidecars nor a tokenizer.
        ValueError: a shard is damaged, a sidecar has another length than its shard, only some shards have
            sidecars, a sidecar has no shard, or the text has fewer than two tokens or no bytes.
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
            f"{alone[0]} has no shard next to it: either a validation shard is missing, or the sidecar "
            "belongs to other data; copy the folder again, or move the sidecar away"
        )
    if not missing:
        counts = np.concatenate([_read_sidecar(p, s) for p, s in zip(paths, sides, strict=True)])
        counts[0] = 0
        return ValidationText(tokens, counts)
    if len(missing) < len(sides):
        raise UserError(f"{missing[0]} is missing, but other shards have sidecars; copy it again")
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
            f"{side}: {counts.size} entries for the {shard_tokens(shard)} tokens of {shard.name}; shard and "
            f"sidecar belong to different data. Make both again: {MAKE_SHARDS}"
        )
    return counts


def validation_totals(
    folder: Path, *, tokenizer: Tokenizer | None = None, vocab_size: int | None = None
) -> tuple[int, int]:
    """Return the numbers of targets and of their bytes in the whole validation text.

    Raises:
        FileNotFoundError, ValueError: as in `load_validation`.
    """
    text = load_validation(folder, tokenizer=tokenizer, vocab_size=vocab_size)
    return text.tokens.size - 1, int(text.bytes.sum())


def validation_segments(
    tokens: NDArray[np.integer], *, bos_id: int, max_context: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the starts and lengths `(S,)` of the validation segments, in order.

    The inputs of a segment are tokens[start:][:length], its targets the tokens one position later. So every
    token except for the first one is a target exactly once. A segment starts at each BOS and every
    max_context tokens within a document.

    Args:
        tokens: `(n,)` ids of the text, n >= 2.
        bos_id: the id that starts a document.
        max_context: tokens of the longest segment, >= 1.

    Raises:
        ValueError: the text has no BOS, or fewer than 2 tokens.
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
