"""Bits per byte on a validation text, which is the definition of the score; lower is better.

bpb = (sum of the losses in nats / ln 2) / bytes, where bytes are the UTF-8 bytes of the scored targets. The
sums are float64 and stay on the device until the end, so that the loop does not wait for the device; then
they are summed over the ranks. Every token must be counted exactly once, otherwise an error is raised.
Legend: `T` tokens of a batch. Source: the metric of the parameter-golf challenge (its README); the bytes of a
target are counted as in the baseline script, PR #1855, whose pass over the text left out up to 0.3 % of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgolf.data.loader import IGNORED_TARGET, ValBatch
from pgolf.dist import Dist
from pgolf.errors import RunError, UserError


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


def evaluate_bpb(
    model: nn.Module,
    batches: Iterable[ValBatch],
    dist: Dist,
    *,
    expected_tokens: int,
    expected_bytes: int,
    loop: bool = True,
) -> Score:
    """Score every target of this rank's batches and sum over the ranks.

    Args:
        model: called as `model(inputs, targets, cu_seqlens, max_seqlen=, loop=)`; returns losses `(T,)` in
            nats, 0 where the target is -100. It runs in evaluation mode without gradients; afterwards its
            mode is restored.
        batches: this rank's part of the text; it may be empty.
        dist: sums over the ranks and names the device.
        expected_tokens: number of targets of the whole text.
        expected_bytes: their bytes.
        loop: whether the repeated layers run several times (depth recurrence).

    Returns:
        The score of the whole text.

    Raises:
        ValueError: the text is empty, or another number of tokens or bytes was scored (raised on every rank).
        RuntimeError: a loss is NaN or infinite; the message names the first such batch of each rank.
    """
    if expected_tokens < 1 or expected_bytes < 1:
        raise UserError(
            f"evaluate_bpb: expected a text that is not empty, got {expected_tokens} tokens and "
            f"{expected_bytes} bytes"
        )
    training = model.training
    model.eval()
    tally = Tally(dist)
    with torch.no_grad():
        for batch in batches:
            tally.add(*_score(model, batch, dist.device, loop=loop))
    model.train(training)
    return tally.total(expected_tokens=expected_tokens, expected_bytes=expected_bytes)


class Tally:
    """The running sums of one rank, float64 on the device, which is not waited for until they are read.

    All ways of scoring add to a tally, whose `total` is the score of the whole text.
    """

    def __init__(self, dist: Dist) -> None:
        self._dist = dist
        self._start = time.perf_counter()
        self._batches = 0
        self._sums = torch.zeros(3, dtype=torch.float64, device=dist.device)
        self._bad = torch.zeros(dist.world_size, dtype=torch.float64, device=dist.device)

    def add(self, nats: Tensor, scored: Tensor, sizes: Tensor) -> None:
        """Add the tokens of one batch.

        Args:
            nats: losses, float32, any shape; 0 for tokens that are not scored.
            scored: bool, the same shape; whether a target counts.
            sizes: int64, the same shape; bytes of each target.
        """
        self._batches += 1
        self._sums += torch.stack(
            [nats.double().sum(), scored.sum().double(), (sizes * scored).sum().double()]
        )
        # Each rank has its own entry, the number of its first bad batch plus one; 0 means that there is none.
        mine = self._bad[self._dist.rank]
        finite = torch.isfinite(nats).all()
        self._bad[self._dist.rank] = torch.where(finite | (mine > 0), mine, float(self._batches))

    def so_far(self) -> float:
        """Return the bits per byte of this rank so far; waits for the device."""
        nats, _, size = self._sums.tolist()
        return float(nats / math.log(2) / max(size, 1.0))

    def total(self, *, expected_tokens: int, expected_bytes: int) -> Score:
        """Sum over the ranks, check the counts and return the score.

        This is a collective: every rank must call it. Errors are those of `evaluate_bpb`.
        """
        self._dist.all_reduce(self._sums)
        self._dist.all_reduce(self._bad)
        _check_finite(self._bad)
        total, tokens, size = self._sums.tolist()
        _check_count("tokens", round(tokens), expected_tokens)
        _check_count("bytes", round(size), expected_bytes)
        return Score(
            nats=total,
            tokens=round(tokens),
            bytes=round(size),
            bpb=total / math.log(2) / size,
            loss=total / tokens,
            seconds=time.perf_counter() - self._start,
        )


def _score(
    model: nn.Module, batch: ValBatch, device: torch.device, *, loop: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses of a batch, whether each target counts, and its bytes, all `(T,)` on the device."""
    inputs, targets, cu_seqlens, sizes = (
        t.to(device, non_blocking=True)
        for t in (batch.inputs, batch.targets, batch.cu_seqlens, batch.target_bytes)
    )
    nats: Tensor = model(inputs, targets, cu_seqlens, max_seqlen=batch.max_seqlen, loop=loop)
    return nats, targets != IGNORED_TARGET, sizes


def _check_finite(bad: Tensor) -> None:
    ranks = [(rank, round(number) - 1) for rank, number in enumerate(bad.tolist()) if number]
    if ranks:
        where = ", ".join(f"batch {index} of rank {rank}" for rank, index in ranks)
        raise RunError(
            f"evaluate_bpb: the loss is NaN or infinite, first in {where}; these weights cannot be scored"
        )


def _check_count(what: str, got: int, expected: int) -> None:
    if got != expected:
        raise UserError(
            f"evaluate_bpb: scored {got:,} {what}, expected {expected:,} ({got - expected:+,}); the batches "
            "of all ranks together must have each token of the text once"
        )
