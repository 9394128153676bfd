"""Training text as windows of one length, in the orders of published stacks that ignore documents.

A window is `context` + 1 tokens at one place of a shard: a row of inputs, and the same tokens one position
later as its targets. A shard of n tokens has a phase p, uniform over [0, min(C - 1, n - C - 1)], and the
N = floor((n - 1 - p) / C) windows that start at p, p + C, p + 2 C, ...; each begins with the last target of
the one before it. Shards of fewer than C + 1 tokens have none and are left out.

Windows begin and end anywhere in a document, and attention within a row looks from one document into the
next. One takes these orders only to repeat a published result; `DocumentStream` wastes no context on that.

Legend: `C` context, `N` windows of a shard, `R` windows of one piece of an order.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pgolf.data.shards import Tokens, read_shard
from pgolf.errors import UserError

_PIECE = 4096
GROWTH_STEPS = 1800
"""Training steps in which the coprime order comes to mix all the shards that it may."""
FEWEST_SHARDS, MOST_SHARDS = 8, 64
"""Shards that a step of the coprime order mixes at first and at last: the published max(8, ranks) and
max(32, 8 * ranks) on eight ranks, here for any number of them."""


class Windows(NamedTuple):
    """A piece of an order."""

    shards: NDArray[np.int64]
    """`(R,)` index of each window's shard."""
    starts: NDArray[np.int64]
    """`(R,)` its first token in that shard."""


def shuffled_windows(sizes: Sequence[int], context: int, seed: int) -> Iterator[Windows]:
    """Yield all windows in random order, then all of the next pass with other phases, endlessly.

    A uniformly random order of all windows is the published one (ShuffledSequenceLoader, PR #1394 to #1493):
    a random order of each shard's windows, from which each sample takes the next window of a shard that it
    draws with probability proportional to the windows which the shard has left.

    Differs: there, each rank had shards of its own and a generator with its rank as the seed, so that the
    order depended on the number of ranks and not on the run's seed. Here it is the other way round.

    Args:
        sizes: tokens of each shard, at least one of them above `context`.
        context: C, tokens.
        seed: >= 0; with the number of the pass it decides the phases and the order.
    """
    for epoch in count():
        rng = np.random.default_rng((seed, epoch))
        phases = rng.integers(_phases(np.asarray(sizes), context))
        ends = np.cumsum((np.asarray(sizes) - 1 - phases) // context)
        order = rng.permutation(int(ends[-1]))
        begins = np.concatenate(([0], ends[:-1]))
        for at in range(0, order.size, _PIECE):
            picked = order[at : at + _PIECE]
            shards = np.searchsorted(ends, picked, side="right")
            yield Windows(shards, phases[shards] + (picked - begins[shards]) * context)


def coprime_windows(sizes: Sequence[int], context: int, seed: int, batch: int) -> Iterator[Windows]:
    """Yield the windows of one training step after another, each mixed from several shards.

    A shard visits its windows in the order (s + k t) mod N, k = 0 to N - 1, with a random start s and a
    random stride t that has no common divisor with N, so each of them once. Then it draws phase, s and t
    anew. With u = min(1, i / 1800), step i takes its B windows from

        m = round(low + u (high - low)) shards, low = min(8, E, B), high = min(64, E, B),

    E being the shards that have windows. They are drawn without replacement with probabilities q that are
    proportional to max(1, windows left)^a, a = 0.9 - 0.4 u. Each gives one window, and the others are shared
    out by a multinomial draw with the q of these shards. With 8 shards or fewer a step mixes all of them, and
    only a changes. A shard with fewer windows left than its share begins its next pass within the step.

    Source: PR #726 and #1060 (last in #1218). Differs: the seed is the run's and not a hash of the files'
    paths, m does not depend on the number of ranks, and the windows of a step are in random order instead of
    one from each shard in turn, which changes only which micro-batch of the step they are in.

    Args:
        sizes, context: as in `shuffled_windows`.
        seed: of the only generator, >= 0.
        batch: B, windows of a training step over all ranks, >= 1.
    """
    rng = np.random.default_rng(seed)
    walks = _Walks(np.asarray(sizes), context, rng)
    low, high = (min(shards, walks.shards.size, batch) for shards in (FEWEST_SHARDS, MOST_SHARDS))
    for step in count():
        grown = min(1.0, step / GROWTH_STEPS)
        weights = np.maximum(1, walks.left) ** (0.9 - 0.4 * grown)
        weights /= weights.sum()
        mixed = round(low + grown * (high - low))
        chosen = rng.choice(weights.size, mixed, replace=False, p=weights)
        share = weights[chosen] / weights[chosen].sum()
        windows = walks.take(chosen, 1 + rng.multinomial(batch - mixed, share))
        order = rng.permutation(batch)
        yield Windows(windows.shards[order], windows.starts[order])


def _phases(sizes: NDArray[np.int64], context: int) -> NDArray[np.int64]:
    """Return the number of phases that each shard may have; a shard of one window and no more has one."""
    return np.clip(sizes - context, 1, context)


class _Walks:
    """The ways through the shards that have windows, each with a coprime stride and again and again."""

    def __init__(self, sizes: NDArray[np.int64], context: int, rng: np.random.Generator) -> None:
        self.shards = np.flatnonzero(sizes > context)
        self._sizes, self._context, self._rng = sizes[self.shards], context, rng
        # Columns: phase, windows N, start s and stride t of the pass, windows of it that are taken.
        self._state: NDArray[np.int64] = np.array([self._begin(size) for size in self._sizes])

    @property
    def left(self) -> NDArray[np.int64]:
        """Windows left in the pass of each shard."""
        return self._state[:, 1] - self._state[:, 4]

    def take(self, chosen: NDArray[np.int64], counts: NDArray[np.int64]) -> Windows:
        """Return the next counts[i] windows of the way chosen[i], for all i."""
        shards, starts = [], []
        while counts.any():
            for i in chosen[(counts > 0) & (self.left[chosen] == 0)]:
                self._state[i] = self._begin(self._sizes[i])
            now = np.minimum(counts, self.left[chosen])
            phase, windows, start, stride, done = np.repeat(self._state[chosen], now, axis=0).T
            step = done + np.arange(done.size) - np.repeat(np.cumsum(now) - now, now)
            shards.append(np.repeat(self.shards[chosen], now))
            starts.append(phase + (start + step * stride) % windows * self._context)
            self._state[chosen, 4] += now
            counts = counts - now
        return Windows(np.concatenate(shards), np.concatenate(starts))

    def _begin(self, size: int) -> tuple[int, int, int, int, int]:
        """Draw a pass over a shard of `size` tokens: a row of the state."""
        phase = int(self._rng.integers(_phases(np.asarray(size), self._context)))
        windows = (int(size) - 1 - phase) // self._context
        start, stride = int(self._rng.integers(windows)), 1
        while windows > 1:
            stride = int(self._rng.integers(1, windows))
            if math.gcd(stride, windows) == 1:
                break
        return phase, windows, start, stride, 0


class WindowStream:
    """The rows of an order one after another, as one sequence that is read forward.

    It reads places all over the shards, so they should be in memory or on a disk without moving parts.

    Args:
        paths: shards.
        vocab_size: every id must be below it.
        context: C, tokens of a row.
        order: which windows follow each other, endlessly.
    """

    def __init__(
        self, paths: Sequence[Path], *, vocab_size: int, context: int, order: Iterator[Windows]
    ) -> None:
        self._paths = list(paths)
        self._vocab_size, self._context, self._order = vocab_size, context, order
        self._opened: dict[int, Tokens] = {}
        self._pieces = deque[tuple[int, Windows]]()  # each with the number of its first row
        self._end = 0

    def read(self, start: int, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return inputs and targets [start, start + number) of the sequence; `start` must not decrease.

        Returns:
            Two arrays `(number,)`; row r holds the inputs r * C to r * C + C.

        Raises:
            ValueError: a shard is damaged, or an id is not below the vocabulary size.
        """
        first, last = start // self._context, -(-(start + number) // self._context)
        while self._end < last:
            piece = next(self._order)
            self._pieces.append((self._end, piece))
            self._end += piece.starts.size
            self._drop(first)
        self._drop(first)
        rows = np.stack([self._window(*w) for w in self._between(first, last)]).astype(np.int64)
        skipped = start - first * self._context
        inputs, targets = (r.reshape(-1)[skipped : skipped + number] for r in (rows[:, :-1], rows[:, 1:]))
        return inputs, targets

    def _drop(self, first: int) -> None:
        while self._pieces and self._pieces[0][0] + self._pieces[0][1].starts.size <= first:
            self._pieces.popleft()

    def _between(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield shard and start of the rows [first, last)."""
        for begin, piece in self._pieces:
            part = slice(max(0, first - begin), last - begin)
            yield from zip(piece.shards[part].tolist(), piece.starts[part].tolist(), strict=True)

    def _window(self, shard: int, start: int) -> Tokens:
        if shard not in self._opened:
            # Not compared with the vocabulary size here: that would read all of it.
            self._opened[shard] = read_shard(self._paths[shard])
        tokens = self._opened[shard][start : start + self._context + 1]
        if int(tokens.max()) >= self._vocab_size:
            read_shard(self._paths[shard], vocab_size=self._vocab_size)  # names the place
        return tokens


def require_windows(folder: Path, sizes: Sequence[int], context: int, order: str) -> None:
    """Refuse a text that has no window.

    Raises:
        UserError: no shard has `context` + 1 tokens.
    """
    if max(sizes) <= context:
        raise UserError(
            f"{folder}: data.order={order} needs a shard of at least {context + 1} tokens, which is "
            f"model.max_context + 1, but the longest has {max(sizes)}; lower model.max_context, or take "
            "data.order=documents or stream"
        )


def row_starts(first: int, number: int, context: int) -> NDArray[np.int64]:
    """Return 0 and where rows begin in the tokens [first, first + number) of a sequence, minus `first`.

    Rows begin at the multiples of `context` in the sequence, so a row that the micro-batch before has not
    finished goes on in this one as a segment of its own.
    """
    starts = np.arange(-first % context, number, context)
    return starts if starts.size and starts[0] == 0 else np.concatenate((np.zeros(1, dtype=np.int64), starts))
