"""Whether a score depends on what is scored next to it: other documents of a batch, and other ranks.

`legality.py` changes later text. It does not see what comes from earlier documents of the same batch, and it
runs on one rank. These tests run the whole evaluator again:

- alone (C1): in a way that keeps documents apart, a document that is the whole text has the losses that it
  has among others.
- ranks (C4): two ranks score every token once in all, with the losses of one rank. The ranks are threads of
  this process, whose collectives are sums over them, as `torchrun` would start them. In phases and with kept
  A, documents that a rank scores influence its later ones, so there the losses may move (`LOOSE`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgolf.config import LOOSE
from pgolf.data.loader import ValidationText
from pgolf.dist import Dist
from pgolf.env import Launch
from pgolf.errors import brief
from pgolf.evaluate.documents import document_bounds
from pgolf.evaluate.legality import Tested, loss_gap, losses_of
from pgolf.evaluate.predictor import Pass

Start = Callable[[ValidationText, Dist], Pass]
"""Starts the evaluator on a text, as one of several ranks."""
DOCUMENTS = 4
"""Documents that are scored alone."""
RANKS = 2


class _Meeting:
    """What the ranks of one process share."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count)
        self.parts: list[Tensor | None] = [None] * count


class ThreadRank(Dist):
    """A rank that is a thread of this process.

    Args:
        rank, meeting: its number, and what it shares with the others.
        device: where all of them compute.
    """

    def __init__(self, rank: int, meeting: _Meeting, device: torch.device) -> None:
        count = meeting.barrier.parties
        super().__init__(Launch(rank, count, rank, False), device)
        self._meeting = meeting

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over the ranks, in place, and return it."""
        meeting = self._meeting
        meeting.parts[self.rank] = tensor.clone()
        meeting.barrier.wait()
        total = torch.stack([part for part in meeting.parts if part is not None]).sum(
            dim=0, dtype=tensor.dtype
        )
        meeting.barrier.wait()  # else a rank could go on and overwrite its part before all have read it
        return tensor.copy_(total)


def check_neighbours(
    start: Start,
    text: ValidationText,
    *,
    bos_id: int,
    dist: Dist,
    apart: bool,
    limit: float,
    loose: bool = False,
) -> list[Tested]:
    """Test that documents and ranks do not influence each other.

    Args:
        start: starts the evaluator on a text.
        text: a sample of several documents.
        bos_id: the id that starts a document.
        dist: the device; one rank.
        apart: whether the way keeps documents apart; if not, they are not scored alone.
        limit: nats by which losses may differ.
        loose: as in `check_way`: losses may depend on the number of ranks.
    """
    base, error = losses_of(start(text, dist), text, dist, bos_id=bos_id)
    if error:
        return [Tested("C4", "ranks", "fails", error)]
    found = [_alone(start, text, base, bos_id, dist, limit)] if apart else []
    return [*found, _ranks(start, text, base, bos_id, dist, limit, loose)]


def _alone(
    start: Start, text: ValidationText, base: NDArray[np.float64], bos_id: int, dist: Dist, limit: float
) -> Tested:
    starts, lengths = document_bounds(text, bos_id)
    worst, count = 0.0, 0
    # The last ones: of a way that carries something along, they have the most before them.
    for begin, length in list(zip(starts.tolist(), lengths.tolist(), strict=True))[-DOCUMENTS:]:
        piece = slice(begin, begin + length + 1)
        document = ValidationText(text.tokens[piece], text.bytes[piece])
        if not document.bytes[1:].any():
            continue
        alone, _ = losses_of(start(document, dist), document, dist, bos_id=bos_id)
        worst, count = max(worst, loss_gap(base[piece][1:], alone[1:])), count + 1
    said = f"{count} documents scored alone: losses move by {worst:.1g} nats (limit {limit:.1g})"
    return Tested("C1", "alone", "ok" if worst <= limit else "fails", said)


def _ranks(
    start: Start,
    text: ValidationText,
    base: NDArray[np.float64],
    bos_id: int,
    dist: Dist,
    limit: float,
    loose: bool,
) -> Tested:
    meeting = _Meeting(RANKS)
    losses = np.full((RANKS, text.tokens.size), np.nan)
    errors: list[str] = []

    def work(rank: int) -> None:
        place = ThreadRank(rank, meeting, dist.device)
        try:
            losses[rank], error = losses_of(start(text, place), text, place, bos_id=bos_id)
            if error:
                errors.append(error)
                meeting.barrier.abort()  # the other one may wait for this rank
        except threading.BrokenBarrierError:
            pass  # another rank failed, and says why
        except Exception as e:
            errors.append(brief(e))
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        return Tested("C4", "ranks", "fails", f"on {RANKS} ranks: {errors[0]}")
    if np.isnan(losses).all(axis=1).any():
        return Tested(
            "C4", "ranks", "untested", f"on {RANKS} ranks a rank has nothing to score in this sample"
        )
    both = np.where(np.isfinite(losses[0]), losses[0], losses[1])
    worst = loss_gap(base[1:], both[1:])
    said = f"{RANKS} ranks score every token once in all; losses move by {worst:.1g} nats (limit {limit:.1g})"
    if worst <= limit:
        return Tested("C4", "ranks", "ok", said)
    return Tested("C4", "ranks", "accepted" if loose else "fails", f"{LOOSE}; {said}" if loose else said)
