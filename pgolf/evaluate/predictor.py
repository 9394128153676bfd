"""One interface of all evaluators: a predictor is asked for distributions, then told what it may learn from.

`read` is the only loop that scores. For each question it asks the predictor for the distributions of the next
tokens, to which it gives the tokens before them and nothing else; the targets go to the distributions, which
are fixed by then; the losses go to the tally; and only then may the predictor learn, from tokens that are in
the tally. So an evaluator that is written against this interface meets the conditions of a valid submission
(issue 1017 of the challenge), as far as it holds no text of its own; `legality.py` tests that it does not.

Positions are those of inputs in the whole text: the target of the input at p is the token at p + 1.
Legend: `K` windows of a question, `T` tokens of its inputs, `R` rows of its distributions, `V` vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pgolf.data.loader import IGNORED_TARGET, ValidationText, padded_cu_seqlens
from pgolf.data.stream import cut_segments
from pgolf.dist import Dist
from pgolf.evaluate.bpb import Score, Tally
from pgolf.log import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgolf.evaluate.sums import Sums

LONG_WORK = 1_000_000
"""Window tokens of this rank from which on a first line of progress is printed before any work is done."""


class Inputs(NamedTuple):
    """What a predictor sees of a question."""

    ids: Tensor
    """`(T,)` int64, windows of the text one after another, padded with 0."""
    cu_seqlens: Tensor
    """int32 starts of the windows (and of pieces of the padding), then T."""
    width: int
    """Tokens of the longest window."""
    asked: int
    """Rows are wanted of the last `asked` tokens of each of the windows, which all have `width` tokens; 0: of
    all T tokens."""
    positions: Tensor
    """`(R,)` int64, where the inputs of the rows are in the text; -1 for padding."""
    lane: int = 0
    """Place of the first window's document among those that were begun together."""


class Distributions(Protocol):
    """The probabilities of the next token in R rows, fixed before any target is looked at."""

    def nats(self, targets: Tensor) -> Tensor:
        """Return the losses `(R,)` float32 of targets `(R,)` int64; 0 for a target of -100. It is pure."""

    def log_probabilities(self, rows: Tensor) -> Tensor:
        """Return the logarithms `(n, V)` float32 of the probabilities of all tokens, in the rows `(n,)`."""


class Lesson(NamedTuple):
    """What was scored, and may be learned from."""

    nats: Tensor | None
    """`(R,)` losses of the last question, with their graph; None if only `passages` are to be learned."""
    learners: int
    """The documents that go on after that question are those of its first `learners` windows."""
    passages: Sequence[Tensor]
    """Tokens `(n + 1,)` int64 of parts of the text: n inputs and their n targets, all of which are scored."""


class Predictor(Protocol):
    """Gives distributions, and may learn; it never sees a target before that target is scored."""

    def begin(self) -> None:
        """Forget what was learned from documents; others begin with the next question."""

    def predict(self, inputs: Inputs) -> Distributions:
        """Return the distributions of the tokens after those of `inputs`; changes nothing of `state`."""

    def learn(self, lesson: Lesson) -> None:
        """Learn from what was scored. Every rank is called at the same time if the lesson has passages."""

    def state(self) -> list[Tensor]:
        """Return the tensors that `begin` and `learn` change."""


class Question(NamedTuple):
    """Windows of the text whose last targets are asked for."""

    windows: NDArray[np.int64]
    """`(K, 3)` rows (begin, first, end): a window is the inputs [begin, end) of one document, and the targets
    of the inputs [first, end) are asked for."""
    width: int
    """Tokens of the longest window."""
    size: int = 0
    """Tokens of the buffer into which the windows are packed; 0: each is padded to `width` tokens."""
    asked: int = 0
    """Of padded windows: `width` minus the tokens before `first`, the same in all of them."""
    lane: int = 0
    """See `Inputs`."""

    @property
    def work(self) -> int:
        """Tokens of the windows."""
        return int((self.windows[:, 2] - self.windows[:, 0]).sum())

    @property
    def sizes(self) -> NDArray[np.int64]:
        """`(K,)` rows of the distributions that each window has, one after another."""
        if not self.size:
            return np.full(len(self.windows), self.asked)
        return self.windows[:, 2] - self.windows[:, 0]

    def tensors(self, text: ValidationText, device: torch.device) -> tuple[Inputs, Tensor]:
        """Return what the predictor sees, and the targets `(R,)`, -100 where none is asked for."""
        made = self._packed(text) if self.size else self._padded(text)
        ids, targets, cu_seqlens, positions = (t.to(device, non_blocking=True) for t in made)
        return Inputs(ids, cu_seqlens, self.width, self.asked, positions, self.lane), targets

    def _packed(self, text: ValidationText) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ids = torch.zeros(self.size, dtype=torch.int64)
        positions = torch.full((self.size,), -1)
        targets = torch.full((self.size,), IGNORED_TARGET, dtype=torch.int64)
        starts, at = [], 0
        for begin, first, end in self.windows.tolist():
            tokens = torch.from_numpy(text.tokens[begin : end + 1].astype(np.int64))
            stop = at + end - begin
            ids[at:stop] = tokens[:-1]
            positions[at:stop] = torch.arange(begin, end)
            targets[at + first - begin : stop] = tokens[1 + first - begin :]
            starts.append(at)
            at = stop
        bounds = np.array(starts if at == self.size else [*starts, at], dtype=np.int64)
        cu_seqlens = padded_cu_seqlens(cut_segments(bounds, self.size, self.width), self.size)
        return ids, targets, cu_seqlens, positions

    def _padded(self, text: ValidationText) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        begin, _, end = (column[:, None] for column in self.windows.T)
        at = begin + np.arange(self.width)
        inside = at < end
        last = text.tokens.size - 1
        # The tokens are unsigned, and -100 is not.
        ids, after = (text.tokens[np.minimum(at + k, last)].astype(np.int64) for k in (0, 1))
        ids, after = np.where(inside, ids, 0), np.where(inside, after, IGNORED_TARGET)
        rows = slice(self.width - self.asked, None)
        targets, positions = after[:, rows], np.where(inside, at, -1)[:, rows]
        starts = np.arange(0, ids.size + 1, self.width, dtype=np.int32)
        return (
            torch.from_numpy(ids).flatten(),
            torch.from_numpy(np.ascontiguousarray(targets)).flatten(),
            torch.from_numpy(starts),
            torch.from_numpy(np.ascontiguousarray(positions)).flatten(),
        )

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """Yield (row of the distributions, position of the first input, number of tokens) of each window."""
        at = 0
        for n, (begin, first, end) in enumerate(self.windows.tolist()):
            yield (at + first - begin if self.size else n * self.asked), first, end - first
            at += end - begin


class Turn(NamedTuple):
    """One round of a pass: this rank's questions, and what may be learned after all ranks' questions."""

    questions: Sequence[Question] = ()
    begins: bool = False
    """Whether other documents begin, so that the predictor forgets those before."""
    learners: int = 0
    """See `Lesson`; 0: nothing is learned from the last question."""
    passages: NDArray[np.int64] | None = None
    """`(P, 2)` inputs [begin, end) of parts of the text to be learned, the same on all ranks; None: none."""
    settles: bool = True
    """Whether what was scored up to here need not be scored again after an interruption."""


class Pass(NamedTuple):
    """A way to score a text: the predictor, and what it is asked in which order."""

    predictor: Predictor
    turns: Sequence[Turn]
    """Of this rank. If one has passages, every rank has as many turns with the same passages."""
    label: str
    """For progress."""


Observe = Callable[[Question, Distributions, Tensor], None]
"""Called with every question, its distributions and its losses `(R,)`, after they were counted."""


Done = Callable[[NDArray[np.int64]], bool]
"""Tells whether the targets of windows, `(K, 3)` as in `Question`, were scored before an interruption."""


def read(
    run: Pass,
    text: ValidationText,
    dist: Dist,
    *,
    bos_id: int,
    observe: Observe | None = None,
    sums: Sums | None = None,
) -> Score:
    """Score the text: ask, count, and only then let the predictor learn.

    Args:
        run: the pass of this rank.
        text: the whole text.
        dist: ranks that share the work; every rank must call this.
        bos_id: the id that starts a document.
        observe: see `Observe`.
        sums: where sums are kept; the pass leaves out what is `done` there, and all the rest is scored.

    Raises:
        ValueError: the text is empty; a token is scored twice, not at all, out of order, or in a window of
            two documents; or something is to be learned that is not scored yet.
        RuntimeError: a loss is NaN or infinite.
    """
    tally = Tally(dist, text, bos_id=bos_id)
    if sums is not None and dist.is_main:
        tally.resume(sums.before)
    work = sum(question.work for turn in run.turns for question in turn.questions)
    with Progress(run.label, max(work, 1), is_main=dist.is_main) as progress:
        if work >= LONG_WORK:
            progress.begin(f"{text.tokens.size - 1:,} tokens to score, {work:,} to read on this rank")
        for turn in run.turns:
            nats = _ask(run.predictor, turn, text, dist, tally, progress, observe)
            _teach(run.predictor, turn, nats, text, dist, tally)
            piece = tally.settle() if turn.settles else None
            if piece is not None and sums is not None:
                sums.add(piece)
        if sums is not None:
            sums.flush()
    return tally.total()


def _ask(
    predictor: Predictor,
    turn: Turn,
    text: ValidationText,
    dist: Dist,
    tally: Tally,
    progress: Progress,
    observe: Observe | None,
) -> Tensor | None:
    """Ask and count all questions of a turn; return the losses of the last one, with their graph."""
    if turn.begins:
        predictor.begin()
    nats = None
    for number, question in enumerate(turn.questions, 1):
        inputs, targets = question.tensors(text, dist.device)
        with torch.set_grad_enabled(turn.learners > 0 and number == len(turn.questions)):
            distributions = predictor.predict(inputs)
            nats = distributions.nats(targets)
        tally.add(question.windows, question.sizes, nats.detach())
        if observe is not None:
            observe(question, distributions, nats.detach())
        del distributions
        progress.advance(question.work, lambda: f"{tally.so_far():.4f} bpb")
    return nats


def _teach(
    predictor: Predictor, turn: Turn, nats: Tensor | None, text: ValidationText, dist: Dist, tally: Tally
) -> None:
    """Let the predictor learn what a turn says, of what is in the tally."""
    if turn.passages is not None:
        tally.check_scored(turn.passages)
    if turn.learners or turn.passages is not None:
        passages = [] if turn.passages is None else turn.passages.tolist()
        told = [torch.from_numpy(text.tokens[a : b + 1].astype(np.int64)) for a, b in passages]
        predictor.learn(
            Lesson(nats if turn.learners else None, turn.learners, [t.to(dist.device) for t in told])
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
