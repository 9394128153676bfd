"""The one loop that scores, and its sums: definition in float64, ranks, and what it refuses."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from pgolf.data.loader import ValidationText
from pgolf.evaluate.bpb import _exactly
from pgolf.evaluate.documents import document_bounds
from pgolf.evaluate.predictor import Lesson, Pass, Question, Turn, read
from pgolf.evaluate.sliding import sliding_windows, window_questions
from tests.evaluate.legal_helpers import BOS, VOCAB, FakeDist, make_text, random_documents

LENGTHS = [5, 40, 9, 0, 31, 60]
CONTEXT = 16


class Losses(NamedTuple):
    losses: torch.Tensor

    def nats(self, targets):
        assert targets.shape == self.losses.shape[:1]
        return torch.where(targets < 0, 0.0, self.losses.gather(1, targets.clamp_min(0)[:, None])[:, 0])


class Table:
    """A bigram table as the predictor: each loss is one look-up, so it can be computed in float64 too."""

    def __init__(self, vocab=VOCAB, seed=0):
        self.logits = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed))
        self.events = []

    def begin(self):
        self.events.append("begin")

    def predict(self, inputs):
        assert not torch.is_grad_enabled()
        self.events.append("predict")
        return Losses(-torch.log_softmax(self.logits, dim=-1)[inputs.ids])

    def learn(self, lesson: Lesson):
        self.events.append("learn")

    def state(self):
        return []


@pytest.fixture
def text():
    return make_text(random_documents(LENGTHS))


def questions(text, rank=0, world_size=1, batch_tokens=21):
    windows = sliding_windows(*document_bounds(text, BOS), context=CONTEXT, stride=CONTEXT)
    return window_questions(
        windows, context=CONTEXT, batch_tokens=batch_tokens, rank=rank, world_size=world_size
    )


def table_pass(text, model=None, **share):
    return Pass(model or Table(), [Turn([q]) for q in questions(text, **share)], "table")


def score(text, run, dist=None):
    return read(run, text, dist or FakeDist(), bos_id=BOS)


def test_score_equals_the_definition_in_float64(text):
    model = Table()
    found = score(text, table_pass(text, model))
    log_p = torch.log_softmax(model.logits.double(), dim=-1)
    pairs = zip(text.tokens[:-1].tolist(), text.tokens[1:].tolist(), strict=True)
    nats = sum(-log_p[x, y].item() for x, y in pairs)
    assert (found.tokens, found.bytes) == (text.tokens.size - 1, int(text.bytes.sum()))
    assert found.nats == pytest.approx(nats, rel=1e-6)
    assert found.loss == pytest.approx(nats / found.tokens, rel=1e-6)
    assert found.bpb == pytest.approx(nats / math.log(2) / found.bytes, rel=1e-6)
    assert found.seconds > 0


def test_sums_do_not_lose_small_losses(text):
    """2^25 + 1 is not a float32: many batches after a huge one must still count."""

    class Constant(Table):
        def predict(self, inputs):
            value = 2.0**25 if not self.events else 1.0
            self.events.append("predict")
            return Losses(torch.full((inputs.ids.numel(), VOCAB), value))

    run = table_pass(text, Constant(), batch_tokens=CONTEXT)
    first = run.turns[0].questions[0].work
    found = score(text, run)
    assert len(run.turns) > 5 and found.nats == first * 2**25 + text.tokens.size - 1 - first


@pytest.mark.parametrize("world_size", [2, 3, 40])  # 40 ranks: most of them have nothing to do
def test_score_does_not_depend_on_the_number_of_ranks(text, world_size):
    alone = score(text, table_pass(text))
    sent = []
    for rank in range(world_size):
        dist = FakeDist(rank, world_size)
        with pytest.raises(ValueError, match="scored"):
            score(text, table_pass(text, rank=rank, world_size=world_size), dist)
        sent.append(dist.seen)
    assert world_size < 40 or any(float(seen[0][1]) == 0 for seen in sent)
    for rank in range(min(world_size, 3)):
        others = [sum(s[i] for r, s in enumerate(sent) if r != rank) for i in range(3)]
        found = score(
            text, table_pass(text, rank=rank, world_size=world_size), FakeDist(rank, world_size, others)
        )
        assert (found.tokens, found.bytes) == (alone.tokens, alone.bytes)
        assert found.nats == alone.nats


def test_sums_are_added_without_rounding():
    """In any order: 2^30 hides 2^-30 in float64, and thousands of float64 sums round in every order."""
    rng = np.random.default_rng(0)
    sums = np.concatenate((rng.gamma(2.0, 1e3, 5000), rng.random(5000) / 16, [2.0**30, 2.0**-30, 0.0]))
    found = []
    for order in (slice(None), slice(None, None, -1), rng.permutation(sums.size)):
        high, low = _exactly(sums[order])
        found.append(((high << 40) + low) / 2**60)
    assert found == [math.fsum(sums)] * 3
    assert _exactly(np.array([np.nan, np.inf, 1.5])) == (1536 * 1024, 0)


def window(*row):
    return Question(np.array([row]), CONTEXT, size=64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-1], r"scored [0-9]+ tokens, expected [0-9]+ \(-[0-9]+\); the questions of all ranks"),
        (lambda t: [*t, t[-1]], r"token [0-9]+ is scored twice or out of order: document 5 was scored up to"),
        (lambda t: [t[0], t[2], t[1], *t[3:]], r"token 7 is scored twice or out of order"),
        (lambda t: [Turn([window(0, 0, 8)]), *t], r"the window \[0, 8\) is not inside of one document"),
        (lambda t: [Turn([window(0, 2, 2)]), *t], r"the window \[0, 2\) is not inside of one document"),
        (
            lambda t: [Turn(t[0].questions, passages=np.array([[0, 30]])), *t[1:]],
            r"[0-9]+ tokens were to be learned before they were scored",
        ),
    ],
)
def test_what_is_not_one_pass_from_left_to_right_is_refused(text, change, message):
    run = table_pass(text)
    with pytest.raises(ValueError, match=message):
        score(text, run._replace(turns=change(list(run.turns))))


def test_a_token_that_two_ranks_score_is_found_although_the_counts_agree(text):
    """Rank 1 scores the same tokens as rank 0, and as many as are missing."""
    half = [t for t in table_pass(text).turns if t.questions[0].windows[-1, 2] <= 60]
    others = FakeDist()
    with pytest.raises(ValueError, match="scored"):
        score(text, Pass(Table(), half, ""), others)
    sums, bad, scored = others.seen
    rest = text.tokens.size - 1 - 2 * sums[0], int(text.bytes.sum()) - 2 * sums[1]
    missing = torch.tensor([*rest, 0, 0, 0])
    dist = FakeDist(others=[sums + missing, bad, scored])
    with pytest.raises(ValueError, match=r"[0-9]+ tokens were scored by several ranks, or by none"):
        score(text, Pass(Table(), half, ""), dist)


def test_nothing_is_learned_before_it_is_counted(text):
    """The order of one turn: begin, predict, learn."""
    model = Table()
    run = table_pass(text, model, batch_tokens=1000)
    inputs = text.tokens.size - 1
    turn = run.turns[0]._replace(begins=True, passages=np.array([[0, inputs]]))
    score(text, run._replace(turns=[turn]))
    assert model.events == ["begin", "predict", "learn"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_losses_name_the_first_bad_batch_on_every_rank(text, value):
    class Broken(Table):
        def predict(self, inputs):
            self.events.append("predict")
            bad = len(self.events) in (3, 5)
            return Losses(torch.full((inputs.ids.numel(), VOCAB), value if bad else 1.0))

    dist = FakeDist(rank=1, world_size=3)
    run = table_pass(text, Broken())
    with pytest.raises(RuntimeError, match=r"NaN or infinite, first in batch 2 of rank 1; these weights"):
        score(text, run, dist)
    healthy = FakeDist(rank=0, world_size=3, others=dist.seen)
    with pytest.raises(RuntimeError, match=r"first in batch 2 of rank 1;"):
        score(text, table_pass(text)._replace(turns=[]), healthy)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([BOS], "at least 2 tokens, got 1"),
        ([BOS, BOS, BOS], r"the 2 tokens to score have no bytes \(only empty documents\)"),
        ([5, 6, 7], r"no BOS \(id 1\) in 3 validation tokens, so there are no documents"),
    ],
)
def test_a_text_without_documents_is_refused(tokens, message):
    ids = np.array(tokens, dtype=np.uint16)
    empty = ValidationText(ids, np.where(ids == BOS, 0, 1))
    with pytest.raises(ValueError, match=message):
        score(empty, Pass(Table(), [], ""))
