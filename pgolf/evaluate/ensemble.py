"""An ensemble of adapters: several sets per document, which learn on their own; their mean is scored.

The members are adapters with different seeds. The probability of a token is the arithmetic mean of what the
k members give it, p(a) = (1 / k) sum_j p_j(a), which sums to 1 because each of them does. Each member learns
from its own loss, so it is at any time what it would be alone. A pass costs k passes, and k times the memory
of the adapters and their moments.

Legend: `R` rows, `V` vocab.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf.data.loader import IGNORED_TARGET
from pgolf.evaluate.predictor import Distributions, Inputs, Lesson, Predictor


class MeanHead(NamedTuple):
    """The arithmetic mean of several distributions."""

    heads: Sequence[Distributions]

    def nats(self, targets: Tensor) -> Tensor:
        """Return the losses of targets, see `Distributions`.

        Their gradient is that of the sum of the members' losses, with which each member learns as if alone.
        """
        losses = [head.nats(targets) for head in self.heads]
        summed = torch.stack(losses).sum(dim=0)
        with torch.no_grad():
            mean = math.log(len(losses)) - torch.logsumexp(-torch.stack(losses), dim=0)
            mean = torch.where(targets == IGNORED_TARGET, 0.0, mean)
        # Equal to `mean`; the difference is exactly 0 and carries the gradient.
        return mean + (summed - summed.detach())

    def log_probabilities(self, rows: Tensor) -> Tensor:
        """Return the logarithms of all probabilities, see `Distributions`."""
        logs = torch.stack([head.log_probabilities(rows) for head in self.heads])
        return torch.logsumexp(logs, dim=0) - math.log(len(self.heads))


class Ensemble:
    """A predictor that gives the mean of others.

    Args:
        members: predictors that share no state.
    """

    def __init__(self, members: Sequence[Predictor]) -> None:
        self._members = members

    def begin(self) -> None:
        """Let other documents begin."""
        for member in self._members:
            member.begin()

    def predict(self, inputs: Inputs) -> MeanHead:
        """Return the mean of the members' distributions."""
        return MeanHead([member.predict(inputs) for member in self._members])

    def learn(self, lesson: Lesson) -> None:
        """Let every member learn from its own loss."""
        for member in self._members:
            member.learn(lesson)

    def state(self) -> list[Tensor]:
        """Return what all members keep."""
        return [tensor for member in self._members for tensor in member.state()]
