"""How far rounding moves the losses of an evaluator: the limit below which a difference means nothing.

The legality tests compare runs on texts of different lengths, whose products have other shapes and so add
their terms in another order. A product that is rounded otherwise is the exact product of slightly other
weights. So this module changes every weight of the model by one unit in its last place, up or down at random,
and runs the whole evaluator: what the losses move by is what rounding does to this model, with this way to
score, at this size, and with everything that learning makes larger (the first step of AdamW is the sign of a
gradient, however small). No text is changed, so no leak can hide in the measurement.

The limit is `FACTOR` times that. A rounding error grows with the square root of the number of terms, so 16
stands for sums of a few hundred terms whose roundings do not cancel; in the tests, what a legal way moves by
is at most the measurement itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from pgolf.data.loader import ValidationText
from pgolf.dist import Dist
from pgolf.evaluate.legality import Make, loss_gap, trace

FACTOR = 16.0
"""By which the limit is above what was measured."""
LEAST, MOST = 1e-5, 1e-3
"""Bounds of the limit, nats: 0.001 nats per token are 0.0004 bits per byte at 3.6 bytes per token, about the
difference between two runs, so a larger limit would prove nothing."""
NUDGES = 2
"""Runs with nudged weights."""


class Limit(NamedTuple):
    """What was measured."""

    nats: float
    """By which losses may differ."""
    rounding: float
    """Largest change of a loss by one unit in the last place of every weight."""

    @property
    def text(self) -> str:
        """The limit in a sentence."""
        said = f"one rounding of every weight moves a loss by {self.rounding:.1g} nats"
        if FACTOR * self.rounding > MOST:
            return f"{said}, so {FACTOR:g} times that is above {MOST:g}: a test that fails may be rounding"
        return f"{said}; losses may differ by {self.nats:.1g}"


@contextmanager
def nudged(model: nn.Module, seed: int) -> Iterator[None]:
    """Change every weight by one unit in its last place, up or down, for a while."""
    rng = torch.Generator().manual_seed(seed)
    kept = [p.detach().clone() for p in model.parameters()]
    try:
        with torch.no_grad():
            for p in model.parameters():
                up = torch.randint(0, 2, p.shape, generator=rng).to(p.device, p.dtype) * 2 - 1
                p.mul_(1 + up * torch.finfo(p.dtype).eps)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(model.parameters(), kept, strict=True):
                p.copy_(value)


def measured_limit(make: Make, text: ValidationText, model: nn.Module, *, bos_id: int, dist: Dist) -> Limit:
    """Return by how much the losses of an evaluator may differ.

    Args:
        make, text, bos_id, dist: as in `check_way`.
        model: the model that `make` starts the evaluator with.
    """
    base = trace(make, text, bos_id=bos_id, dist=dist).losses
    moved = 0.0
    for seed in range(NUDGES):
        with nudged(model, seed):
            other = trace(make, text, bos_id=bos_id, dist=dist).losses
        moved = max(moved, loss_gap(base[1:], other[1:]))
    return Limit(min(max(FACTOR * moved, LEAST), MOST), moved)
