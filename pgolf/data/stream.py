"""An endless, reproducible sequence of tokens from the documents of many shards.

The sequence is one epoch after another. With shuffling, the seed decides in each epoch the order of the
shards and the order of the documents within each shard. So a document stays in one piece, and a shard is read
only when the sequence reaches it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pgolf.data.shards import MAKE_SHARDS, Tokens, read_shard
from pgolf.errors import UserError


class _Block(NamedTuple):
    """One pass over one shard, in pieces; piece i is tokens[starts[i]:][: offsets[i + 1] - offsets[i]]."""

    tokens: Tokens
    starts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    begin: int  # position of the block in the sequence

    @property
    def end(self) -> int:
        return self.begin + int(self.offsets[-1])

    def pieces(self, start: int, stop: int) -> Iterator[Tokens]:
        """Yield the pieces of [start, stop) of the sequence that are in this block."""
        at, last = max(start, self.begin) - self.begin, min(stop, self.end) - self.begin
        index = int(np.searchsorted(self.offsets, at, side="right")) - 1
        while at < last:
            until = min(int(self.offsets[index + 1]), last)
            source = int(self.starts[index]) + at - int(self.offsets[index])
            yield self.tokens[source : source + until - at]
            at, index = until, index + 1


class DocumentStream:
    """The sequence of tokens, which is read forward.

    With `shuffle`, the tokens before the first BOS of a shard are left out, because the beginning of their
    document is in another shard. (Other tools cut documents at the ends of shards.)

    Args:
        paths: shards.
        vocab_size: every id must be below it.
        bos_id: the id that starts a document.
        seed: of the order, >= 0.
        shuffle: if false, the files are read in order, as they are.
        sizes: the tokens of each shard that are read, from its beginning; None: all.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        vocab_size: int,
        bos_id: int,
        seed: int,
        shuffle: bool,
        sizes: Sequence[int] | None = None,
    ) -> None:
        self._paths = list(paths)
        self._sizes = sizes
        self._vocab_size = vocab_size
        self._bos_id = bos_id
        self._seed = seed
        self._shuffle = shuffle
        self._plans = self._plan()
        self._blocks = deque[_Block]()
        self._end = 0

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Return the tokens [start, start + count) of the sequence, `(count,)`; `start` must not decrease.

        Raises:
            ValueError: a shard is damaged or has no BOS, or an id is not below the vocabulary size.
        """
        while self._end < start + count:
            tokens, starts, offsets = next(self._plans)
            self._blocks.append(_Block(tokens, starts, offsets, self._end))
            self._end = self._blocks[-1].end
            self._drop(start)
        self._drop(start)
        pieces = [p for block in self._blocks for p in block.pieces(start, start + count)]
        return np.concatenate(pieces).astype(np.int64)

    def _drop(self, start: int) -> None:
        while self._blocks and self._blocks[0].end <= start:
            self._blocks.popleft()

    def _plan(self) -> Iterator[tuple[Tokens, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield (tokens, starts of pieces, offsets of pieces) of one shard after another, endlessly."""
        epoch = 0
        while True:
            order = np.arange(len(self._paths))
            if self._shuffle:
                order = np.random.default_rng((self._seed, epoch)).permutation(order)
            for index in order:
                tokens, begins = self._load(int(index))
                if self._shuffle:
                    rng = np.random.default_rng((self._seed, epoch, int(index)))
                    mixed = rng.permutation(begins.size)
                    starts, lengths = begins[mixed], np.diff(begins, append=tokens.size)[mixed]
                else:
                    starts, lengths = np.zeros(1, dtype=np.int64), np.array([tokens.size])
                yield tokens, starts, np.concatenate(([0], np.cumsum(lengths)))
            epoch += 1

    def _load(self, index: int) -> tuple[Tokens, NDArray[np.int64]]:
        """Return the tokens of a shard, checked, and the positions where its documents begin."""
        path = self._paths[index]
        tokens = read_shard(path, vocab_size=self._vocab_size)
        if self._sizes is not None:
            tokens = tokens[: self._sizes[index]]
        begins = np.flatnonzero(tokens == self._bos_id)
        if begins.size == 0:
            raise UserError(
                f"{path}: no BOS (id {self._bos_id}) in {tokens.size} tokens, so it has no documents; make "
                f"the shards with BOS before each document: {MAKE_SHARDS}"
            )
        return tokens, begins


def cut_segments(starts: NDArray[np.int64], total: int, max_context: int) -> NDArray[np.int64]:
    """Return the starts of attention segments: the given starts, and every `max_context` tokens after each.

    Args:
        starts: `(n,)` increasing, the first is 0.
        total: where the last segment ends.
        max_context: length of the longest segment, tokens.

    Returns:
        `(m,)` increasing int64, m >= n; the segments have 1 to max_context tokens.
    """
    lengths = np.diff(starts, append=total)
    counts = -(-lengths // max_context)
    first = np.concatenate(([0], np.cumsum(counts)[:-1]))
    within = np.arange(int(counts.sum())) - np.repeat(first, counts)
    return np.asarray(np.repeat(starts, counts) + within * max_context, dtype=np.int64)


def document_starts(tokens: NDArray[np.integer], bos_id: int) -> NDArray[np.int64]:
    """Return the positions of BOS in `tokens`, with 0 added if no BOS is there."""
    found = np.flatnonzero(tokens == bos_id).astype(np.int64)
    return found if found.size and found[0] == 0 else np.concatenate((np.zeros(1, dtype=np.int64), found))
