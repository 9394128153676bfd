"""The n-gram tilt: tokens that followed the same long context before become more probable.

For the token at t let c be the `order` - 1 tokens before it, over the starts of documents, n the number of
earlier places with the same c, h the token that first reached the highest count after them, and f that count
divided by n. Where n >= `seen` and f >= `threshold`, the distribution p of the predictor becomes

    p'(a) = p(a) exp(b [a = h]) / Z,   Z = 1 + p(h) (exp(b) - 1),   b = `boost`

which sums to 1, as the sum of p(a) exp(b [a = h]) is 1 - p(h) + p(h) exp(b). Elsewhere it stays p. h depends
on the tokens before t alone, whatever is scored in which order. Adapters learn from the loss without tilt.

The hints of a whole text come from sorts and running maxima that look backwards only, instead of from a table
that is walked token by token; contexts are compared exactly, without hashes. They are found when the first
question is asked, so the time counts as time of scoring.

Source: PRs #1145, #1514 and #2135 of parameter-golf, which hash the context into a table of fixed size.
Legend: `R` rows, `V` vocab.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf.config import TiltConfig
from pgolf.data.loader import ValidationText
from pgolf.evaluate.predictor import Distributions, Inputs, Lesson, Predictor


def find_hints(tokens: Tensor, config: TiltConfig) -> Tensor:
    """Return for each input of a text the token that its context suggests next, `(n,)` int64, -1 for none.

    Args:
        tokens: `(n,)` int64, the whole text; a hint depends on the tokens up to its own place alone.
        config: order, threshold and seen.
    """
    length = config.order - 1
    hints = torch.full_like(tokens, -1)
    classes = repeated_classes(tokens, length)
    begins = torch.nonzero(classes[: max(tokens.numel() - length, 0)] >= 0)[:, 0]
    if not begins.numel():
        return hints
    group, follows = classes[begins], tokens[begins + length]
    count = 1 + _ranks(group * (int(tokens.max()) + 1) + follows)
    group, order = torch.sort(group, stable=True)
    count, follows = count[order], follows[order]
    at = torch.arange(group.numel(), device=group.device)
    earlier = at - _begins(group)
    # Groups come one after another, so one running maximum over (group, count) serves all of them. The token
    # that reached a count first stays: an equal count is no new maximum.
    most = torch.cummax(group * (group.numel() + 1) + count, dim=0).values
    rises = torch.ones_like(at, dtype=torch.bool)
    rises[1:] = most[1:] > most[:-1]
    last = torch.cummax(torch.where(rises, at, 0), dim=0).values
    best = last[(at - 1).clamp_min(0)]  # exclusive: what the places before this one say
    # A quotient, because 14 / 25 is rounded as the setting 0.56 is, while 0.56 * 25 is above 14.
    share = count[best].double() / earlier.clamp_min(1)
    fires = (earlier >= config.seen) & (share >= config.threshold)
    hints[begins[order[fires]] + length - 1] = follows[best[fires]]
    return hints


def repeated_classes(tokens: Tensor, length: int) -> Tensor:
    """Return for each place a number that is equal where the next `length` tokens are; -1 if they are unique.

    A class of 2 m tokens is a pair of classes of m tokens, so there are about log2(length) sorts, of the
    places alone whose first m tokens occur elsewhere.

    Args:
        tokens: `(n,)` int64, >= 0.
        length: >= 1; places with fewer tokens after them have -1.
    """
    classes, done = _numbered(tokens), 1
    while done < length:
        shift = min(done, length - done)  # the pieces overlap where the length is no power of 2
        left, right = classes[: max(classes.numel() - shift, 0)], classes[shift:]
        both = torch.nonzero((left >= 0) & (right >= 0))[:, 0]
        classes = torch.full_like(tokens, -1)
        if both.numel():
            classes[both] = _numbered(left[both] * (int(right.max()) + 1) + right[both])
        done += shift
    return classes


def _numbered(keys: Tensor) -> Tensor:
    """Return numbers from 0 on in place of keys, and -1 for keys that occur once."""
    _, inverse, counts = torch.unique(keys, return_inverse=True, return_counts=True)
    more = counts > 1
    return torch.where(more, torch.cumsum(more, dim=0) - 1, -1)[inverse]


def _ranks(keys: Tensor) -> Tensor:
    """Return for each key the number of equal keys before it."""
    ordered, order = torch.sort(keys, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(order.numel(), device=order.device) - _begins(ordered)
    return ranks


def _begins(ordered: Tensor) -> Tensor:
    """Return for each of some sorted keys the place of the first one that is equal."""
    at = torch.arange(ordered.numel(), device=ordered.device)
    new = torch.ones_like(at, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return torch.cummax(torch.where(new, at, 0), dim=0).values


class TiltedHead(NamedTuple):
    """Distributions with a more probable token in the rows that have a hint."""

    inner: Distributions
    hints: Tensor
    """`(R,)` int64, -1 where there is none."""
    rows: Tensor
    """`(n,)` int64, the rows with a hint."""
    boost: float

    def nats(self, targets: Tensor) -> Tensor:
        """Return the losses of targets, see `Distributions`; their gradient is that without tilt."""
        nats, wanted = self.inner.nats(targets), targets[self.rows]
        with torch.no_grad():
            hints = self.hints[self.rows]
            logs = self.inner.log_probabilities(self.rows).gather(1, hints[:, None])[:, 0]
            change = self._log_sum(logs) - self.boost * (wanted == hints)
            change = torch.where(wanted < 0, 0.0, change)
            shift = torch.zeros_like(nats).index_copy(0, self.rows, change.to(nats.dtype))
        return nats + shift

    def log_probabilities(self, rows: Tensor) -> Tensor:
        """Return the logarithms of all probabilities, see `Distributions`."""
        logs, hints = self.inner.log_probabilities(rows), self.hints[rows]
        has, at = hints >= 0, hints.clamp_min(0)[:, None]
        log_sum = self._log_sum(logs.gather(1, at)[:, 0])
        raised = logs.scatter_add(1, at, torch.where(has, self.boost, 0.0).to(logs.dtype)[:, None])
        return raised - torch.where(has, log_sum, 0.0)[:, None]

    def _log_sum(self, logs: Tensor) -> Tensor:
        """Return log Z from the logarithms of the probabilities of the hints."""
        return torch.log1p(logs.exp() * math.expm1(self.boost))


class Tilted:
    """A predictor whose distributions are tilted.

    Args:
        predictor: what gives the distributions and learns.
        text: the whole text; of it, a distribution uses what comes before its own place (`find_hints`).
        config: settings.
        device: where the hints are found.
    """

    def __init__(
        self, predictor: Predictor, text: ValidationText, config: TiltConfig, device: torch.device
    ) -> None:
        self._predictor, self._text, self._config = predictor, text, config
        self._device = device
        self._hints: Tensor | None = None

    def begin(self) -> None:
        """Let other documents begin."""
        self._predictor.begin()

    def predict(self, inputs: Inputs) -> TiltedHead:
        """Return the tilted distributions."""
        if self._hints is None:
            tokens = torch.from_numpy(self._text.tokens.astype("int64")).to(self._device)
            self._hints = find_hints(tokens, self._config)
        at = inputs.positions
        hints = torch.where(at < 0, -1, self._hints[at.clamp_min(0)])
        rows = torch.nonzero(hints >= 0)[:, 0]
        return TiltedHead(self._predictor.predict(inputs), hints, rows, self._config.boost)

    def learn(self, lesson: Lesson) -> None:
        """Let the predictor learn, as if there were no tilt."""
        self._predictor.learn(lesson)

    def state(self) -> list[Tensor]:
        """Return what the predictor keeps; the hints do not change."""
        return self._predictor.state()
