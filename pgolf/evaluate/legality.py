"""The four conditions of a valid submission, tested on a real evaluator by changing what it reads.

The conditions are those of the challenge's issue 1017: C1, a distribution depends on the tokens before it
alone; C2, it is a distribution over the whole vocabulary, fixed before its token is looked at; C3, a token is
scored before anything learns from it; C4, every token is scored once, from left to right. Each test runs the
whole evaluator on a sample of the text, and compares losses and full distributions:

- future (C1): the text is cut, or everything after a token is replaced by other tokens; no loss before it
  changes. "Before" has two readings. Strict: earlier in the text. Accepted by the challenge: scored earlier.
- self (C1): one token is replaced; the distribution at its own place does not change.
- sum (C2): the probabilities of all tokens sum to 1, and the loss of every token tried is that of the vector.
- state (C3): answering a question changes nothing that the predictor keeps; with all of it destroyed after a
  lesson, the losses up to that lesson are the same, and later ones are not.
- once (C4): `predictor.read` found no token that was scored twice, out of order, or not at all.

The evaluator runs in float32, where a text that is cut changes rounding only; `rounding.py` measures how much
that may be. `neighbours.py` tests other documents and ranks, `pgolf.report.reproduced` the counted program.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgolf.config import LOOSE
from pgolf.data.loader import IGNORED_TARGET, ValidationText
from pgolf.dist import Dist
from pgolf.errors import RunError, UserError, brief
from pgolf.evaluate.documents import document_bounds
from pgolf.evaluate.predictor import Distributions, Inputs, Lesson, Pass, Predictor, Question, read

ROUNDING = 1e-4
"""Nats by which losses and logarithms may differ where it was not measured, see `rounding.py`."""
SUM_ERROR = 1e-5
"""By which the sum of all probabilities may differ from 1."""
PLACES = 6
"""Tokens at which distributions are compared."""

Make = Callable[[ValidationText], Pass]
"""Starts the evaluator on a text."""
Verdict = Literal["ok", "accepted", "fails", "untested"]


@dataclass(frozen=True)
class Tested:
    """What was found about one condition."""

    condition: Literal["C1", "C2", "C3", "C4"]
    test: str
    verdict: Verdict
    text: str


class Trace(NamedTuple):
    """What one run of an evaluator did."""

    losses: NDArray[np.float64]
    """`(n,)` of every token as a target, NaN where it was not scored."""
    asked: NDArray[np.int64]
    """`(n,)` number of the question that scored it, -1: none."""
    taught: NDArray[np.int64]
    """`(n,)` number of lessons before that question."""
    vectors: dict[int, Tensor]
    """Token -> `(V,)` float64 logarithms of the probabilities at its place, where they were asked for."""
    off: float
    """Largest difference between the loss of a token that was tried at these places and its logarithm."""
    changed: int
    """Questions whose answers changed what the predictor keeps."""
    lessons: int
    error: str
    """What `read` refused; empty if nothing."""


class Watched:
    """A predictor that is watched, and whose state may be destroyed after a lesson.

    Args:
        predictor: what is watched.
        at: number of a lesson, from 1; 0: none.
        how: destroy everything that the predictor keeps after that lesson, or skip all lessons from it on.
    """

    def __init__(self, predictor: Predictor, at: int, how: Literal["destroy", "skip"]) -> None:
        self._predictor, self._at, self._how = predictor, at, how
        self._before: list[float] = []
        self.lessons = self.changed = 0

    def begin(self) -> None:
        """Let other documents begin."""
        self._predictor.begin()

    def predict(self, inputs: Inputs) -> Distributions:
        """Ask the predictor, and note its state before."""
        self._before = self._sums()
        return self._predictor.predict(inputs)

    def check(self) -> None:
        """Compare the state with that before the question."""
        self.changed += not np.array_equal(self._before, self._sums(), equal_nan=True)

    def learn(self, lesson: Lesson) -> None:
        """Let the predictor learn, unless the lesson is to be skipped."""
        self.lessons += 1
        if self._how == "skip" and 0 < self._at <= self.lessons:
            return
        self._predictor.learn(lesson)
        if self._how == "destroy" and self.lessons == self._at:
            for tensor in self.state():
                tensor.detach().fill_(float("nan"))

    def state(self) -> list[Tensor]:
        """Return what the predictor says it keeps."""
        return self._predictor.state()

    def _sums(self) -> list[float]:
        return [float(t.detach().sum(dtype=torch.float64)) for t in self.state()]


def trace(
    make: Make,
    text: ValidationText,
    *,
    bos_id: int,
    dist: Dist,
    places: tuple[int, ...] = (),
    at: int = 0,
    how: Literal["destroy", "skip"] = "destroy",
) -> Trace:
    """Run an evaluator on a text.

    Args:
        make, text, bos_id: as in `check_way`.
        dist: the device; one rank.
        places: tokens at whose places the whole distribution is wanted.
        at, how: see `Watched`.
    """
    size = text.tokens.size
    losses, asked = np.full(size, np.nan), np.full(size, -1)
    taught, off = np.zeros(size, dtype=np.int64), [0.0]
    vectors: dict[int, Tensor] = {}
    run = make(text)
    watched = Watched(run.predictor, at, how)
    number = iter(range(10**9))

    def see(question: Question, distributions: Distributions, nats: Tensor) -> None:
        watched.check()
        which = next(number)
        rows: dict[int, int] = {}
        for row, first, count in question.rows():
            inside = slice(first + 1, first + 1 + count)
            losses[inside] = nats[row : row + count].double().cpu().numpy()
            asked[inside], taught[inside] = which, watched.lessons
            rows |= {p: row + p - first - 1 for p in places if first < p <= first + count}
        if rows:
            found, wrong = _vectors(distributions, list(rows.values()), nats)
            vectors.update(zip(rows, found, strict=True))
            off.append(wrong)

    error = ""
    try:
        read(run._replace(predictor=watched, label="legality"), text, dist, bos_id=bos_id, observe=see)
    except UserError as e:
        error = brief(e)
    except RunError:
        pass  # the losses are NaN, as is wanted where the state was destroyed; else the comparison finds it
    return Trace(losses, asked, taught, vectors, max(off), watched.changed, watched.lessons, error)


def losses_of(run: Pass, text: ValidationText, dist: Dist, *, bos_id: int) -> tuple[NDArray[np.float64], str]:
    """Return the loss of every token that this rank scores, NaN elsewhere, and what `read` refused."""
    losses = np.full(text.tokens.size, np.nan)

    def see(question: Question, distributions: Distributions, nats: Tensor) -> None:  # noqa: ARG001
        for row, first, count in question.rows():
            losses[first + 1 : first + 1 + count] = nats[row : row + count].double().cpu().numpy()

    try:
        read(run._replace(label="legality"), text, dist, bos_id=bos_id, observe=see)
    except (UserError, RunError) as e:
        return losses, brief(e)
    return losses, ""


def _vectors(distributions: Distributions, rows: list[int], nats: Tensor) -> tuple[list[Tensor], float]:
    """Return the logarithms in some rows, and how far losses of several targets are from them."""
    at = torch.tensor(rows, device=nats.device)
    with torch.no_grad():
        vectors = distributions.log_probabilities(at).double()
        likely = vectors.topk(4, dim=-1).indices
        unlikely = vectors.topk(4, dim=-1, largest=False).indices
        wrong = 0.0
        for tried in torch.cat((likely, unlikely), dim=-1).unbind(-1):
            targets = torch.full((nats.numel(),), IGNORED_TARGET, device=nats.device)
            targets[at] = tried
            losses = distributions.nats(targets)[at].double()
            wrong = max(wrong, gap(losses, -vectors.gather(1, tried[:, None])[:, 0]))
    return list(vectors.cpu()), wrong


def gap(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, infinity where only one of two numbers is finite."""
    difference = torch.where(a == b, 0.0, (a - b).abs())
    return float(torch.nan_to_num(difference, nan=float("inf")).max()) if a.numel() else 0.0


def loss_gap(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return the same of losses."""
    return gap(torch.from_numpy(a), torch.from_numpy(b))


def check_way(
    make: Make,
    text: ValidationText,
    *,
    bos_id: int,
    vocab_size: int,
    dist: Dist,
    loose: bool = False,
    tilted: bool = False,
    limit: float = ROUNDING,
    seed: int = 0,
) -> list[Tested]:
    """Test all conditions on one evaluator.

    Args:
        make: starts the evaluator on a text, such as a changed or shorter form of `text`.
        text: a sample of a few thousand tokens, see `sample_text`.
        bos_id: the id that starts a document; it is not changed.
        vocab_size: number of tokens.
        dist: the device; one rank.
        loose: the evaluator is known to fail the strict reading (on other text, if not on this); then the
            verdict is "accepted" if it meets the accepted one.
        tilted: the evaluator reads earlier text for its hints, also of documents that it scores later.
        limit: nats by which losses and logarithms may differ, from rounding.
        seed: of the places and replacements.
    """
    probe = _Probe(make, text, bos_id, vocab_size, dist, np.random.default_rng(seed), limit)
    base = probe.run(text)
    found = [_once(base)]
    if found[0].verdict == "fails":
        return found  # the losses of the others mean nothing
    return [
        *found,
        _sum(base, limit),
        _state(probe, base),
        _self(probe, base),
        _future(probe, base, loose=loose, tilted=tilted),
    ]


class _Probe:
    """An evaluator, a text and places in it."""

    def __init__(
        self,
        make: Make,
        text: ValidationText,
        bos_id: int,
        vocab_size: int,
        dist: Dist,
        rng: np.random.Generator,
        limit: float,
    ) -> None:
        self.limit = limit
        self.text, self._make, self._bos, self._vocab = text, make, bos_id, vocab_size
        self._dist, self._rng = dist, rng
        starts, lengths = document_bounds(text, bos_id)
        longest = np.argsort(-lengths, kind="stable")[:2]
        late = [int(starts[d] + lengths[d] * share) for d in longest for share in (0.35, 0.8)]
        inner = np.flatnonzero(text.tokens[1:] != bos_id) + 1
        some = [*late, *rng.permutation(inner)[:PLACES].tolist()]
        places = dict.fromkeys(p for p in some if p > 0 and text.tokens[p] != bos_id)
        self.places = tuple(places)[:PLACES]

    def run(self, text: ValidationText, at: int = 0, how: Literal["destroy", "skip"] = "destroy") -> Trace:
        return trace(self._make, text, bos_id=self._bos, dist=self._dist, places=self.places, at=at, how=how)

    def changed(self, where: NDArray[np.bool_]) -> ValidationText:
        """Return the text with other tokens there, except for BOS, which stay and do not appear."""
        ids = self.text.tokens.astype(np.int64)
        others = np.delete(np.arange(self._vocab), self._bos)
        shift = self._rng.integers(1, self._vocab - 1, ids.size)
        place = np.searchsorted(others, ids)
        noise = others[(place + shift) % others.size]
        tokens = np.where(where & (ids != self._bos), noise, ids)
        return ValidationText(tokens.astype(self.text.tokens.dtype), self.text.bytes)


def _once(base: Trace) -> Tested:
    text = base.error or "every token is scored once, in each document from left to right"
    return Tested("C4", "once", "fails" if base.error else "ok", text)


def _sum(base: Trace, limit: float) -> Tested:
    totals = [float(vector.exp().sum()) - 1 for vector in base.vectors.values()]
    worst = max(map(abs, totals), default=float("inf"))
    good = worst <= SUM_ERROR and base.off <= limit
    return Tested(
        "C2",
        "sum",
        "ok" if good else "fails",
        f"{len(totals)} distributions: the probabilities sum to 1 within {worst:.1g} (limit {SUM_ERROR:g}); "
        f"the losses of 8 tokens tried in each are theirs within {base.off:.1g} nats (limit {limit:.1g})",
    )


def _state(probe: _Probe, base: Trace) -> Tested:
    if base.changed:
        text = f"answering changed what the predictor keeps, in {base.changed} questions"
        return Tested("C3", "state", "fails", text)
    if not base.lessons:
        return Tested("C3", "state", "ok", "nothing is learned on this sample")
    for at in dict.fromkeys((1, (base.lessons + 1) // 2)):
        destroyed, skipped = (probe.run(probe.text, at, how) for how in ("destroy", "skip"))
        before = base.taught < at
        for other in (destroyed, skipped):
            worst = loss_gap(base.losses[before][1:], other.losses[before][1:])
            if worst > probe.limit:
                text = f"a loss before lesson {at} depends on that lesson, by {worst:.1g} nats"
                return Tested("C3", "state", "fails", text)
        learns = loss_gap(base.losses[~before], skipped.losses[~before]) > probe.limit
        if learns and np.isfinite(destroyed.losses[~before]).all():
            text = "with everything that the predictor says it keeps destroyed, it still scores as before"
            return Tested("C3", "state", "fails", text)
    return Tested(
        "C3",
        "state",
        "ok",
        f"{base.lessons} lessons: answering changes nothing, no loss knows a later lesson",
    )


def _self(probe: _Probe, base: Trace) -> Tested:
    worst = 0.0
    for place in probe.places:
        where = np.arange(probe.text.tokens.size) == place
        other = probe.run(probe.changed(where))
        worst = max(worst, gap(base.vectors[place], other.vectors[place]))
    text = f"{len(probe.places)} tokens replaced: the distribution at each one's place moves by {worst:.1g}"
    verdict: Verdict = "ok" if worst <= probe.limit else "fails"
    return Tested("C1", "self", verdict, f"{text} nats (limit {probe.limit:.1g})")


def _future(probe: _Probe, base: Trace, *, loose: bool, tilted: bool) -> Tested:
    worst = _strict(probe, base)
    limit = f"(limit {probe.limit:.1g})"
    text = f"text cut or replaced after a token: losses before it move by {worst:.1g} nats {limit}"
    if not loose:
        return Tested("C1", "future", "ok" if worst <= probe.limit else "fails", text)
    worst = _processed(probe, base, tilted=tilted)
    what = (
        "everything that is scored after a token and comes later"
        if tilted
        else "everything scored after a token"
    )
    text = f"{LOOSE}; {what} replaced: losses of those scored before it move by {worst:.1g} nats {limit}"
    return Tested("C1", "future", "accepted" if worst <= probe.limit else "fails", text)


def _strict(probe: _Probe, base: Trace) -> float:
    """Return the largest change of a loss by later tokens of the text."""
    text, worst = probe.text, 0.0
    size = text.tokens.size
    for number, place in enumerate(sorted(probe.places)):
        cut = ValidationText(text.tokens[: place + 1], text.bytes[: place + 1])
        others = [cut] if cut.bytes[1:].any() else []
        others += [probe.changed(np.arange(size) > place)] if number % 2 else []
        for other in map(probe.run, others):
            worst = max(worst, loss_gap(base.losses[1 : place + 1], other.losses[1 : place + 1]))
    return worst


def _processed(probe: _Probe, base: Trace, *, tilted: bool) -> float:
    """Return the largest change of a loss by tokens that are scored later (and come later, if `tilted`)."""
    worst = 0.0
    for place in sorted(probe.places)[1::2]:
        which = base.asked[place]
        after = np.arange(base.asked.size) > place if tilted else np.ones(base.asked.size, dtype=np.bool_)
        other = probe.run(probe.changed((base.asked > which) & after))
        before = (base.asked >= 0) & (base.asked <= which)
        before &= ~after | (not tilted)
        worst = max(worst, loss_gap(base.losses[before], other.losses[before]))
    return worst


def sample_text(text: ValidationText, bos_id: int, tokens: int) -> ValidationText:
    """Return the beginnings of the first documents as a text of about `tokens` tokens.

    They give at most a quarter, a twelfth and a sixth of them in turn, so that there are several documents,
    which are not in the order of their lengths.

    Raises:
        ValueError: tokens < 32, or the text has no BOS.
    """
    if tokens < 32:
        raise UserError(f"a sample needs at least 32 tokens, got {tokens}")
    starts, lengths = document_bounds(text, bos_id)
    ids, sizes, room = [], [], tokens
    most = itertools.cycle((4, 12, 6))
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        count = min(length, max(tokens // next(most), 8), room)
        ids.append(text.tokens[start : start + count])
        sizes.append(text.bytes[start : start + count])
        room -= count
        if room <= 0:
            break
    end = np.array([bos_id], dtype=text.tokens.dtype)
    return ValidationText(np.concatenate([*ids, end]), np.concatenate([*sizes, [0]]))
