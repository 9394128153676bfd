"""An endless, reproducible sequence of tokens made of the documents of many shards.

Epoch after epoch; with shuffling, each epoch has a seeded order of the shards and each shard a seeded order
of its documents, so documents stay whole and a shard is looked at only when the sequence reaches it.
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
    """One pass over one shard: piece i is tokens[starts[i]:][: offsets[i + 1] - offsets[i]]."""

    tokens: Tokens
    starts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    begin: int  # position of the block in the sequence

    @property
    def end(self) -> int:
        return self.begin + int(self.offsets[-1])

    def pieces(self, start: int, stop: int) -> Iterator[Tokens]:
        """Yield the pieces of the sequence's [start, stop) that lie in this block."""
        at, last = max(start, self.begin) - self.begin, min(stop, self.end) - self.begin
        index = int(np.searchsorted(self.offsets, at, side="right")) - 1
        while at < last:
            until = min(int(self.offsets[index + 1]), last)
            source = int(self.starts[index]) + at - int(self.offsets[index])
            yield self.tokens[source : source + until - at]
            at, index = until, index + 1


class DocumentStream:
    """The sequence, read forward.

    Args:
        paths: shards.
        vocab_size: every id must be below it. bos_id: the id that starts a document.
        seed: >= 0, of the order. shuffle: off reads the files as they are.

    With `shuffle`, tokens before a shard's first BOS (other tools cut documents at shard ends) are left out:
    their document's beginning would be elsewhere.
    """

    def __init__(
        self, paths: Sequence[Path], *, vocab_size: int, bos_id: int, seed: int, shuffle: bool
    ) -> None:
        self._paths = list(paths)
        self._vocab_size = vocab_size
        self._bos_id = bos_id
        self._seed = seed
        self._shuffle = shuffle
        self._plans = self._plan()
        self._blocks = deque[_Block]()
        self._end = 0

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Return tokens [start, start + count) of the sequence, `(count,)`; `start` must never decrease.

        Raises:
            ValueError: a bad shard, one without BOS, or an id that is not below the vocabulary size.
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
        """Yield (tokens, piece starts, piece offsets) of shard after shard, without end."""
        epoch = 0
        while True:
            order = np.arange(len(self._paths))
            if self._shuffle:
                order = np.random.default_rng((self._seed, epoch)).permutation(order)
            for index in order:
                tokens, begins = self._load(self._paths[index])
                if self._shuffle:
                    rng = np.random.default_rng((self._seed, epoch, int(index)))
                    mixed = rng.permutation(begins.size)
                    starts, lengths = begins[mixed], np.diff(begins, append=tokens.size)[mixed]
                else:
                    starts, lengths = np.zeros(1, dtype=np.int64), np.array([tokens.size])
                yield tokens, starts, np.concatenate(([0], np.cumsum(lengths)))
            epoch += 1

    def _load(self, path: Path) -> tuple[Tokens, NDArray[np.int64]]:
        """Return the checked tokens of a shard and where its documents begin."""
        tokens = read_shard(path, vocab_size=self._vocab_size)
        begins = np.flatnonzero(tokens == self._bos_id)
        if begins.size == 0:
            raise UserError(
                f"{path}: no BOS (id {self._bos_id}) in {tokens.size} tokens, so it has no documents; make "
                f"the shards with BOS before each document: {MAKE_SHARDS}"
            )
        return tokens, begins


def cut_segments(starts: NDArray[np.int64], total: int, max_context: int) -> NDArray[np.int64]:
    """Return the starts of attention segments: the given ones, and every `max_context` tokens after each.

    Args:
        starts: `(n,)` increasing, the first is 0. total: where the last one ends.
    Returns:
        `(m,)` increasing int64, m >= n; consecutive ones (and total) differ by 1 to max_context.
    """
    lengths = np.diff(starts, append=total)
    counts = -(-lengths // max_context)
    first = np.concatenate(([0], np.cumsum(counts)[:-1]))
    within = np.arange(int(counts.sum())) - np.repeat(first, counts)
    return np.asarray(np.repeat(starts, counts) + within * max_context, dtype=np.int64)


def document_starts(tokens: NDArray[np.integer], bos_id: int) -> NDArray[np.int64]:
    """Return the positions of BOS in `tokens`, and 0 if it is not one of them."""
    found = np.flatnonzero(tokens == bos_id).astype(np.int64)
    return found if found.size and found[0] == 0 else np.concatenate((np.zeros(1, dtype=np.int64), found))
