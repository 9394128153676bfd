"""Bits per byte on a validation text, which is the definition of the score; lower is better.

bpb = (sum of the losses in nats / ln 2) / bytes, where bytes are the UTF-8 bytes of the scored targets. The
losses of a document are summed in float64, on the device, so that the loop does not wait for it. The sums of
documents are added as whole numbers of 2^-60 nats, so that the total is the same in any order, and so at any
number of ranks and after an interruption. Every token must be counted exactly once, and in each document from
left to right, otherwise an error is raised.
Legend: `K` windows, `D` documents. Source: the metric of the parameter-golf challenge (its README); the bytes
of a target are counted as in the baseline script, PR #1855, whose pass over the text left out up to 0.3 %.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

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
    """Wall time of this rank, seconds; of what it scored itself, without `kept`."""
    kept: int = 0
    """Tokens whose losses are from an earlier, interrupted evaluation, see `sums.py`."""


class Piece(NamedTuple):
    """The sums of some documents, or of parts of documents that were scored together."""

    first: NDArray[np.int64]
    """`(D,)` position of the first input whose target is in the sum."""
    end: NDArray[np.int64]
    """`(D,)` position after the last one."""
    nats: Tensor
    """`(D,)` float64 sums of the losses."""


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
        self._tokens = self._size = self._kept = 0
        self._running = torch.zeros((), dtype=torch.float64, device=dist.device)
        self._nats = torch.zeros(self._starts.size, dtype=torch.float64, device=dist.device)
        self._begun: dict[int, int] = {}  # document -> first input of what is in `_nats`
        self._pieces: list[Piece] = []
        self._bad = torch.zeros(dist.world_size, dtype=torch.float64, device=dist.device)

    def resume(self, piece: Piece) -> None:
        """Take over sums of an earlier evaluation; one rank does it for all."""
        for first, end in zip(piece.first.tolist(), piece.end.tolist(), strict=True):
            self._scored[first:end] = 1
        tokens = int((piece.end - piece.first).sum())
        self._kept += tokens
        self._tokens += tokens
        self._size += int((self._bytes[piece.end] - self._bytes[piece.first]).sum())
        self._running += piece.nats.sum().to(self._running.device)
        self._pieces.append(piece)

    def add(self, windows: NDArray[np.int64], rows: NDArray[np.int64], nats: Tensor) -> None:
        """Add the tokens of one question.

        Args:
            windows: `(K, 3)` as in `Question`.
            rows: `(K,)` losses of each window in `nats`, one after another.
            nats: `(R,)` losses, float32; 0 for tokens that are not scored.

        Raises:
            ValueError: a token was scored before, or one after it in its document; or a window is not inside
                of one document.
        """
        self._batches += 1
        documents = self._count(windows)
        changes = np.flatnonzero(np.diff(documents, prepend=-1))
        counts = np.add.reduceat(rows, changes)
        # A copy that blocks would wait for all that the device has still to do.
        sizes, at = (
            torch.from_numpy(part).to(nats.device, non_blocking=True) for part in (counts, documents[changes])
        )
        sums = torch.segment_reduce(nats[: rows.sum()].double(), "sum", lengths=sizes, unsafe=True)
        self._nats.index_add_(0, at, sums)
        self._running += sums.sum()
        # Each rank has its own entry, the number of its first bad batch plus one; 0 means that there is none.
        mine = self._bad[self._dist.rank]
        finite = torch.isfinite(nats).all()
        self._bad[self._dist.rank] = torch.where(finite | (mine > 0), mine, float(self._batches))

    def _count(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        documents = np.searchsorted(self._starts, windows[:, 0], side="right") - 1
        for document, (begin, first, end) in zip(documents.tolist(), windows.tolist(), strict=True):
            if not (document >= 0 and begin <= first < end <= self._ends[document]):
                raise UserError(f"scoring: the window [{begin}, {end}) is not inside of one document")
            if first < self._frontier[document]:
                raise UserError(
                    f"scoring: token {first + 1} is scored twice or out of order: document {document} was "
                    f"scored up to token {self._frontier[document]}"
                )
            self._begun.setdefault(document, first)
            self._frontier[document] = end
            self._scored[first:end] = 1
            self._tokens += end - first
            self._size += int(self._bytes[end] - self._bytes[first])
        return documents

    def settle(self) -> Piece | None:
        """Close the sums of what was added since the last call, and return them; None if that is nothing."""
        if not self._begun:
            return None
        documents = np.array(sorted(self._begun), dtype=np.int64)
        at = torch.from_numpy(documents).to(self._nats.device, non_blocking=True)
        first = np.array([self._begun[d] for d in documents.tolist()], dtype=np.int64)
        piece = Piece(first, self._frontier[documents], self._nats[at])
        self._nats[at] = 0
        self._begun = {}
        self._pieces.append(piece)
        return piece

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
        return float(self._running) / math.log(2) / max(self._size, 1)

    def total(self) -> Score:
        """Sum over the ranks, check the counts and return the score.

        This is a collective: every rank must call it.

        Raises:
            ValueError: a token was scored by no rank or by several, so that the numbers of tokens or bytes
                are not those of the text (raised on every rank).
            RuntimeError: a loss is NaN or infinite; the message names the first such batch of each rank.
        """
        device = self._dist.device
        self.settle()
        parts = [piece.nats.cpu() for piece in self._pieces]
        high, low = _exactly(torch.cat([torch.zeros(0, dtype=torch.float64), *parts]).numpy())
        counts = [self._tokens, self._size, self._kept, high, low]
        sums = self._dist.all_reduce(torch.tensor(counts, dtype=torch.int64, device=device))
        self._dist.all_reduce(self._bad)
        times = self._dist.all_reduce(torch.from_numpy(self._scored).to(device))
        _check_finite(self._bad)
        tokens, size, kept, high, low = sums.tolist()
        total = ((high << LOW_BITS) + low) / (1 << (HIGH_BITS + LOW_BITS))
        _check_count("tokens", tokens, self._scored.size)
        _check_count("bytes", size, int(self._bytes[-1]))
        wrong = int((times != 1).sum())
        if wrong:
            raise UserError(f"scoring: {wrong:,} tokens were scored by several ranks, or by none")
        return Score(
            nats=total,
            tokens=tokens,
            bytes=size,
            bpb=total / math.log(2) / size,
            loss=total / tokens,
            seconds=time.perf_counter() - self._start,
            kept=kept,
        )


HIGH_BITS, LOW_BITS = 20, 40
"""Bits after the point, of the two whole numbers as which sums are added."""


def _exactly(sums: NDArray[np.float64]) -> tuple[int, int]:
    """Return whole numbers h and l with h 2^-20 + l 2^-60 = the sum of `sums`, without rounding.

    Only digits below 2^-60, which a float64 of 0.004 or more does not have, are rounded, in each of `sums`.
    """
    scaled = np.ldexp(np.nan_to_num(sums, posinf=0.0, neginf=0.0), HIGH_BITS)
    high = np.floor(scaled)
    low = np.rint(np.ldexp(scaled - high, LOW_BITS))
    return int(high.astype(np.int64).sum()), int(low.astype(np.int64).sum())


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
