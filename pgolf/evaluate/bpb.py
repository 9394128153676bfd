"""Bits per byte on a validation text, which is the definition of the score; lower is better.

bpb = (sum of the losses in nats / ln 2) / bytes, where bytes are the UTF-8 bytes of the scored targets. The
sum of the losses is float64 and stays on the device until the end, so that the loop does not wait for the
device; then it is summed over the ranks. Every token must be counted exactly once, and in each document from
left to right, otherwise an error is raised.
Legend: `K` windows. Source: the metric of the parameter-golf challenge (its README); the bytes of a target
are counted as in the baseline script, PR #1855, whose pass over the text left out up to 0.3 % of it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgolf.data.loader import ValidationText
from pgolf.dist import Dist
from pgolf.errors import RunError, UserError
from pgolf.evaluate.documents import document_bounds


@dataclass(frozen=True)
class Score:
    """The result of a model on a whole text, the same on every rank."""

    nats: float
    """Sum of the losses of all scored tokens, nats."""
    tokens: int
    """Number of scored tokens."""
    bytes: int
    """UTF-8 bytes of the scored tokens."""
    bpb: float
    """Bits per byte, nats / ln 2 / bytes; lower is better."""
    loss: float
    """Mean loss, nats per token; lower is better."""
    seconds: float
    """Wall time of this rank, seconds."""


class Tally:
    """The running sums of one rank, and which tokens it has scored.

    All ways of scoring add to a tally, whose `total` is the score of the whole text.

    Args:
        dist: ranks that share the text.
        text: the whole text.
        bos_id: the id that starts a document.

    Raises:
        ValueError: the text has no targets, no bytes or no BOS.
    """

    def __init__(self, dist: Dist, text: ValidationText, *, bos_id: int) -> None:
        self._starts, lengths = document_bounds(text, bos_id)
        self._ends = self._starts + lengths
        if not text.bytes[1:].any():
            raise UserError(
                f"the {text.tokens.size - 1} tokens to score have no bytes (only empty documents), so there "
                "are no bits per byte; score more --documents"
            )
        self._dist = dist
        self._start = time.perf_counter()
        self._frontier = self._starts.copy()  # first input of each document whose target is not scored
        self._scored = np.zeros(text.tokens.size - 1, dtype=np.uint8)
        self._bytes = np.concatenate(([0], np.cumsum(text.bytes[1:])))
        self._batches = 0
        self._tokens = self._size = 0
        self._nats = torch.zeros((), dtype=torch.float64, device=dist.device)
        self._bad = torch.zeros(dist.world_size, dtype=torch.float64, device=dist.device)

    def add(self, windows: NDArray[np.int64], nats: Tensor) -> None:
        """Add the tokens of one question.

        Args:
            windows: `(K, 3)` as in `Question`.
            nats: losses, float32, any shape; 0 for tokens that are not scored.

        Raises:
            ValueError: a token was scored before, or one after it in its document; or a window is not inside
                of one document.
        """
        self._batches += 1
        self._count(windows)
        self._nats += nats.double().sum()
        # Each rank has its own entry, the number of its first bad batch plus one; 0 means that there is none.
        mine = self._bad[self._dist.rank]
        finite = torch.isfinite(nats).all()
        self._bad[self._dist.rank] = torch.where(finite | (mine > 0), mine, float(self._batches))

    def _count(self, windows: NDArray[np.int64]) -> None:
        documents = np.searchsorted(self._starts, windows[:, 0], side="right") - 1
        for document, (begin, first, end) in zip(documents.tolist(), windows.tolist(), strict=True):
            if not (document >= 0 and begin <= first < end <= self._ends[document]):
                raise UserError(f"scoring: the window [{begin}, {end}) is not inside of one document")
            if first < self._frontier[document]:
                raise UserError(
                    f"scoring: token {first + 1} is scored twice or out of order: document {document} was "
                    f"scored up to token {self._frontier[document]}"
                )
            self._frontier[document] = end
            self._scored[first:end] = 1
            self._tokens += end - first
            self._size += int(self._bytes[end] - self._bytes[first])

    def check_scored(self, passages: NDArray[np.int64]) -> None:
        """Raise on every rank if a target of these inputs `(P, 2)` was scored by no rank; a collective.

        Raises:
            ValueError: some tokens are not scored, so nothing may be learned from them.
        """
        parts = [self._scored[begin:end] for begin, end in passages.tolist()]
        seen = torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *parts])).to(self._dist.device)
        missing = int((self._dist.all_reduce(seen) == 0).sum())
        if missing:
            raise UserError(f"scoring: {missing:,} tokens were to be learned before they were scored")

    def so_far(self) -> float:
        """Return the bits per byte of this rank so far; waits for the device."""
        return float(self._nats) / math.log(2) / max(self._size, 1)

    def total(self) -> Score:
        """Sum over the ranks, check the counts and return the score.

        This is a collective: every rank must call it.

        Raises:
            ValueError: a token was scored by no rank or by several, so that the numbers of tokens or bytes
                are not those of the text (raised on every rank).
            RuntimeError: a loss is NaN or infinite; the message names the first such batch of each rank.
        """
        device = self._dist.device
        counts = torch.tensor([self._tokens, self._size], dtype=torch.float64, device=device)
        sums = self._dist.all_reduce(torch.cat((self._nats[None], counts)))
        self._dist.all_reduce(self._bad)
        times = self._dist.all_reduce(torch.from_numpy(self._scored).to(device))
        _check_finite(self._bad)
        total, tokens, size = sums.tolist()
        _check_count("tokens", round(tokens), self._scored.size)
        _check_count("bytes", round(size), int(self._bytes[-1]))
        wrong = int((times != 1).sum())
        if wrong:
            raise UserError(f"scoring: {wrong:,} tokens were scored by several ranks, or by none")
        return Score(
            nats=total,
            tokens=round(tokens),
            bytes=round(size),
            bpb=total / math.log(2) / size,
            loss=total / tokens,
            seconds=time.perf_counter() - self._start,
        )


def _check_finite(bad: Tensor) -> None:
    ranks = [(rank, round(number) - 1) for rank, number in enumerate(bad.tolist()) if number]
    if ranks:
        where = ", ".join(f"batch {index} of rank {rank}" for rank, index in ranks)
        raise RunError(
            f"scoring: the loss is NaN or infinite, first in {where}; these weights cannot be scored"
        )


def _check_count(what: str, got: int, expected: int) -> None:
    if got != expected:
        raise UserError(
            f"scoring: scored {got:,} {what}, expected {expected:,} ({got - expected:+,}); the "
            "questions of all ranks together must have each token of the text once"
        )
