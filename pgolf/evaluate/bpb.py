"""Bits per byte on a validation split: the one definition of the score.

bpb = (sum of nats / ln 2) / bytes, where bytes are the UTF-8 bytes of the scored targets. Sums are float64,
on the device until the end (no host sync inside the loop), then over the ranks. Every token must be counted:
a missing or doubled one is an error, not a rounding.
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
    """A model's result on a whole split, the same on every rank."""

    nats: float
    """Sum of the losses of all scored tokens, nats."""
    tokens: int
    """Scored tokens."""
    bytes: int
    """UTF-8 bytes of the scored tokens."""
    bpb: float
    """Bits per byte: nats / ln 2 / bytes."""
    loss: float
    """Mean loss, nats per token."""
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
        model: called as `model(inputs, targets, cu_seqlens, max_seqlen=, loop=)`, returns `(T,)` nats, 0
            where the target is -100. Runs in evaluation mode without gradients; the mode is restored.
        batches: this rank's share of the split; may be empty on a rank.
        dist: sums over the ranks and names the device.
        expected_tokens: scored tokens of the whole split. expected_bytes: their bytes.
        loop: run the repeated layers.
    Returns:
        The score of the whole split.
    Raises:
        ValueError: an empty split, or another number of tokens or bytes was scored (on every rank alike).
        RuntimeError: a loss is NaN or infinite; names the first such batch of every rank that has one.
    """
    if expected_tokens < 1 or expected_bytes < 1:
        raise UserError(
            f"evaluate_bpb: expected a split that is not empty, got {expected_tokens} tokens and "
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
    """The running sums of one rank: float64, on the device, no host sync until they are read.

    Every way to score adds to one of these: the whole split's score is `total`.
    """

    def __init__(self, dist: Dist) -> None:
        self._dist = dist
        self._start = time.perf_counter()
        self._batches = 0
        self._sums = torch.zeros(3, dtype=torch.float64, device=dist.device)
        self._bad = torch.zeros(dist.world_size, dtype=torch.float64, device=dist.device)

    def add(self, nats: Tensor, scored: Tensor, sizes: Tensor) -> None:
        """Count the tokens of one batch.

        Args:
            nats: losses, float32, any shape; 0 where not scored.
            scored: bool, the same shape: which targets count.
            sizes: int64, the same shape: bytes of each target.
        """
        self._batches += 1
        self._sums += torch.stack(
            [nats.double().sum(), scored.sum().double(), (sizes * scored).sum().double()]
        )
        # Batch number plus one: 0 means none, and the sum over ranks keeps each rank's own.
        mine = self._bad[self._dist.rank]
        finite = torch.isfinite(nats).all()
        self._bad[self._dist.rank] = torch.where(finite | (mine > 0), mine, float(self._batches))

    def so_far(self) -> float:
        """Return this rank's bits per byte until now; waits for the device."""
        nats, _, size = self._sums.tolist()
        return float(nats / math.log(2) / max(size, 1.0))

    def total(self, *, expected_tokens: int, expected_bytes: int) -> Score:
        """Sum over the ranks, check and return the score; every rank calls it. Raises as `evaluate_bpb`."""
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
    """Return the losses of a batch, which targets count, and their bytes, each `(T,)` on the device."""
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
        raise RunError(f"evaluate_bpb: the loss is NaN or infinite, first in {where}; the weights are broken")


def _check_count(what: str, got: int, expected: int) -> None:
    if got != expected:
        raise UserError(
            f"evaluate_bpb: scored {got:,} {what}, expected {expected:,} ({got - expected:+,}); every "
            "rank must get its own share of the whole split, each token once"
        )
