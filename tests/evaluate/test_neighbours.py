"""Other documents and other ranks change no score; rounding is measured, not assumed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pgolf.config import EvaluateConfig, TiltConfig, TttConfig
from pgolf.evaluate.documents import document_bounds
from pgolf.evaluate.legality import check_way, loss_gap, losses_of, trace
from pgolf.evaluate.neighbours import check_neighbours
from pgolf.evaluate.predictor import Pass, evaluating
from pgolf.evaluate.rounding import FACTOR, LEAST, MOST, measured_limit, nudged
from pgolf.evaluate.sliding import Fixed
from pgolf.evaluate.ttt import Adapted, batch_turns, plan_batches
from pgolf.model.uncompiled import uncompiled
from tests.evaluate.legal_helpers import (
    ALONE,
    BOS,
    CONTEXT,
    MODES,
    TTT,
    VOCAB,
    FakeDist,
    make_pass,
    make_text,
    random_documents,
    shallow_model,
)
from tests.evaluate.violators import Vectors


@pytest.fixture(scope="module")
def model():
    return shallow_model()


@pytest.fixture(scope="module")
def text():
    return make_text(random_documents([9, 50, 4, 35, 60]))


def verdicts(start, text, *, apart=True, **more):
    found = check_neighbours(start, text, bos_id=BOS, dist=FakeDist(), apart=apart, limit=1e-4, **more)
    return found, {t.test: t.verdict for t in found}


@pytest.mark.parametrize("mode", MODES)
def test_every_way_scores_alike_alone_and_on_two_ranks(model, text, mode):
    """Also SGD, whose ranks add their gradients in every step."""

    def start(part, dist):
        return make_pass(mode, model, part, dist, whole=text.tokens.size)

    with evaluating(model):
        found, by_test = verdicts(start, text, apart=mode in ALONE)
    assert by_test == ({"alone": "ok"} if mode in ALONE else {}) | {"ranks": "ok"}, found


def test_the_number_of_ranks_may_matter_where_documents_do_and_it_is_said(model, text):
    config = replace(TTT, warm_a=True, batch_documents=1)

    def start(part, dist):
        return make_pass("ttt", model, part, dist, config=config)

    with evaluating(model):
        found, by_test = verdicts(start, text, apart=False, loose=True)
        assert by_test == {"ranks": "accepted"}
        assert "fails the strict reading" in found[0].text
        assert verdicts(start, text, apart=False)[1] == {"ranks": "fails"}


class BatchNorm(Fixed):
    """States are shifted by their mean over the batch, other documents included."""

    def predict(self, inputs):
        head = super().predict(inputs)
        real = (inputs.positions >= 0)[:, None]
        return head._replace(hidden=head.hidden - 0.1 * (head.hidden * real).sum(0) / real.sum())


def batch_norm(model):
    return lambda text, dist: make_pass("plain", model, text, dist)._replace(predictor=BatchNorm(model))


class Forgets(Adapted):
    """Adapters that go on from one document to the next."""

    def begin(self):
        pass


def carries(model):
    """Documents in the order of the text, so that no later one matters, with adapters that are not reset."""

    def start(text, dist):
        config = replace(TTT, batch_documents=1)
        bounds = document_bounds(text, BOS)
        batches = sorted(plan_batches(bounds[1], CONTEXT, config), key=lambda b: int(b.documents[0]))
        turns = [
            turn for batch in batches[dist.rank :: dist.world_size] for turn in batch_turns(batch, bounds)
        ]
        return Pass(Forgets(uncompiled(model), config, documents=1), turns, "")

    return start


def seed_of_the_rank(model):
    return lambda text, dist: make_pass(
        "ttt", model, text, dist, config=replace(TTT, seed=dist.rank, batch_documents=1)
    )


def every_rank_scores_all(model):
    return lambda text, dist: make_pass("plain", model, text)


def a_rank_is_missing(model):
    def start(text, dist):
        run = make_pass("plain", model, text, dist, batch_tokens=CONTEXT)
        return run if not dist.rank else run._replace(turns=run.turns[:-1])

    return start


NEIGHBOURS = {
    "batch_norm": (batch_norm, {"alone"}),
    "carries": (carries, {"alone", "ranks"}),
    "seed_of_the_rank": (seed_of_the_rank, {"ranks"}),
    "every_rank_scores_all": (every_rank_scores_all, {"ranks"}),
    "a_rank_is_missing": (a_rank_is_missing, {"ranks"}),
}
"""Name -> what starts a violator, and the tests that must fail."""


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_leak_through_the_batch_or_the_ranks_is_caught(model, text, name):
    make, expected = NEIGHBOURS[name]
    with evaluating(model):
        found, by_test = verdicts(make(model), text)
    assert expected <= {test for test, verdict in by_test.items() if verdict == "fails"}, found
    if name == "every_rank_scores_all":
        assert "were scored by several ranks" in found[-1].text or "expected" in found[-1].text


def test_adapters_that_are_carried_along_meet_all_other_conditions(model, text):
    """So this test is needed: nothing later in the text matters, and all is scored before it is learned."""
    start = carries(model)
    with evaluating(model):
        found = check_way(
            lambda part: start(part, FakeDist()), text, bos_id=BOS, vocab_size=VOCAB, dist=FakeDist()
        )
    assert {t.verdict for t in found} == {"ok"}, found


def test_a_rank_without_work_is_not_a_test(model):
    text = make_text(random_documents([9]))
    with evaluating(model):
        found, by_test = verdicts(lambda part, dist: make_pass("plain", model, part, dist), text, apart=False)
    assert by_test == {"ranks": "untested"}
    assert "a rank has nothing to score" in found[0].text


def test_an_error_of_one_rank_ends_all_of_them(model, text):
    def start(part, dist):
        if dist.rank == 1:
            raise ValueError("no memory")
        return make_pass("sgd", model, part, dist)

    with evaluating(model):
        found, _ = verdicts(start, text, apart=False)
    assert found[0].verdict == "fails" and found[0].text.startswith("on 2 ranks: ValueError: no memory")


def test_which_ways_keep_documents_apart():
    settings = EvaluateConfig()
    assert [way for way in (*MODES, "phased", "slot") if settings.keeps_apart(way)] == [*ALONE, "slot"]
    assert not EvaluateConfig(adapters=TttConfig(warm_a=True)).keeps_apart("ttt")
    assert not EvaluateConfig(tilt=TiltConfig(on=True)).keeps_apart("plain")


@pytest.mark.parametrize("mode", [*MODES, "phased"])
def test_the_limit_is_measured_and_what_legal_ways_move_by_is_below_it(model, text, mode):
    """A cut text changes the shapes of all products; here that is compared without any allowance."""

    def make(part):
        return make_pass(mode, model, part, whole=text.tokens.size)

    with evaluating(model):
        limit = measured_limit(make, text, model, bos_id=BOS, dist=FakeDist())
        assert LEAST <= limit.nats <= MOST and limit.rounding > 0
        found = check_way(
            make,
            text,
            bos_id=BOS,
            vocab_size=VOCAB,
            dist=FakeDist(),
            limit=limit.nats,
            loose=mode == "phased",
        )
    assert not [t for t in found if t.verdict == "fails"], (limit, found)


def test_a_leak_of_half_a_thousandth_of_a_nat_is_found_with_the_measured_limit(model, text):
    """Below the limit that was assumed before it was measured, of 0.0001 nats."""

    class Peeks(Fixed):
        def predict(self, inputs):
            logs = super().predict(inputs).log_probabilities(torch.arange(inputs.ids.numel()))
            hint = torch.zeros_like(logs).scatter_(1, inputs.ids.roll(-1)[:, None], 5e-5)
            return Vectors(torch.log_softmax(logs + hint, dim=-1))

    def make(part):
        return make_pass("plain", model, part)._replace(predictor=Peeks(model))

    with evaluating(model):
        limit = measured_limit(make, text, model, bos_id=BOS, dist=FakeDist())
        assert limit.nats < 4e-5
        found = check_way(make, text, bos_id=BOS, vocab_size=VOCAB, dist=FakeDist(), limit=limit.nats)
    assert "C1" in {t.condition for t in found if t.verdict == "fails"}, found


def test_a_nudge_is_one_unit_in_the_last_place_and_is_undone(model):
    before = [p.detach().clone() for p in model.parameters()]
    with nudged(model, 0):
        for old, p in zip(before, model.parameters(), strict=True):
            moved = (p - old).abs() / old.abs().clamp_min(1e-30)
            assert moved.max() <= 2**-22 and (p.numel() < 50 or (moved > 0).float().mean() > 0.9)
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))


def test_rounding_that_is_too_large_says_so(model, text, monkeypatch):
    monkeypatch.setattr("pgolf.evaluate.rounding.FACTOR", 1e6)
    with evaluating(model):
        limit = measured_limit(
            lambda part: make_pass("plain", model, part), text, model, bos_id=BOS, dist=FakeDist()
        )
    assert limit.nats == MOST and "a test that fails may be rounding" in limit.text
    assert FACTOR == 16


def test_losses_of_are_those_of_the_trace(model, text):
    with evaluating(model):
        found, error = losses_of(make_pass("ttt", model, text), text, FakeDist(), bos_id=BOS)
        traced = trace(lambda part: make_pass("ttt", model, part), text, bos_id=BOS, dist=FakeDist())
    assert error == "" and loss_gap(found[1:], traced.losses[1:]) == 0
    assert np.isnan(found[0])
