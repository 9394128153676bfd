"""Phases of global SGD, the two caps, and what every output says of such scores."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from pgolf.config import LOOSE, EvaluateConfig, PhasesConfig, TttConfig
from pgolf.evaluate.heads import AdaptedHead
from pgolf.evaluate.phases import cut_passages, phased_pass, plan_phases
from pgolf.evaluate.ttt import plan_batches
from tests.evaluate.legal_helpers import (
    BOS,
    CONTEXT,
    PHASES,
    TTT,
    FakeDist,
    losses_of,
    make_text,
    random_documents,
    small_model,
    token_losses,
)

LENGTHS = [5, 40, 9, 31, 60, 0, 17, 44]


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def text():
    return make_text(random_documents(LENGTHS))


def phased(model, text, phases, config=TTT, dist=None):
    dist = dist or FakeDist()
    return phased_pass(
        model, text, dist, bos_id=BOS, context=CONTEXT, phases=replace(phases, adapters=config)
    )


def test_phases_begin_at_the_published_numbers_of_documents():
    assert PhasesConfig().boundaries == (833, 1666, 2500)
    assert PhasesConfig(documents=2000).boundaries == (666, 1333, 2000)
    lengths = np.arange(1, 31)
    batches = plan_batches(lengths, CONTEXT, TttConfig(batch_documents=4))
    parts = plan_phases(batches, PhasesConfig(documents=15, count=3))
    assert [sum(b.documents.size for b in part) for part in parts] == [8, 4, 4, 14]
    assert [b for part in parts for b in part] == batches
    few = plan_phases(batches[-2:], PhasesConfig(documents=15, count=3))
    assert [sum(b.documents.size for b in part) for part in few] == [6, 0]


def test_a_phase_learns_the_shortest_of_the_documents_scored_so_far(model, text):
    run = phased(model, text, PhasesConfig(documents=4, count=2), config=replace(TTT, batch_documents=3))
    lengths, read = np.array(LENGTHS) + 1, []
    for turn in run.turns:
        read += [] if turn.passages is None else [np.diff(turn.passages).flatten().tolist()]
    order = sorted(lengths.tolist(), reverse=True)
    assert read == [sorted(order[:3])[:2], sorted(order[:6])[:4]]


def test_passages_are_cut_into_chunks_that_miss_no_target():
    passages = [torch.arange(0, 8), torch.arange(100, 101), torch.arange(200, 206)]
    chunks = cut_passages(passages, 5)
    pairs = [[(a, b) for p in chunk for a, b in itertools.pairwise(p)] for chunk in chunks]
    assert [len(chunk) for chunk in pairs] == [5, 5, 2]
    flat = [(int(a), int(b)) for chunk in pairs for a, b in chunk]
    assert flat == [(i, i + 1) for i in (*range(7), *range(200, 205))]


def test_scores_before_the_first_phase_are_those_without_phases_and_later_ones_are_not(model, text):
    config = replace(TTT, batch_documents=2)
    plain = token_losses("ttt", model, text, config=config)
    found = losses_of(phased(model, text, replace(PHASES, documents=4, count=1), config), text)
    order = np.argsort(-np.array(LENGTHS))
    starts = np.cumsum([0, *[n + 1 for n in LENGTHS]])
    for place, document in enumerate(order.tolist()):
        inside = slice(starts[document] + 1, starts[document + 1] + 1)
        change = np.abs(found[inside] - plain[inside]).max()
        assert change == 0 if place < 4 else change > 1e-3, document
    without = losses_of(phased(model, text, replace(PHASES, lr=0.0), config), text)
    np.testing.assert_array_equal(without[1:], plain[1:])


@pytest.mark.parametrize("above", [30.0, 20.0])
def test_two_caps_are_the_formula_in_float64_and_learn_by_its_derivative(above):
    rng = torch.Generator().manual_seed(0)
    hidden, table = (torch.randn(n, 8, generator=rng) * 4 for n in (5, 11))
    caps = torch.tensor([above, 30.0], requires_grad=True)
    targets = torch.tensor([0, 3, 10, -100, 5])
    head = AdaptedHead(hidden, table, 30.0, caps)
    z = hidden.double() @ table.double().T
    c = torch.where(z > 0, above, 30.0)
    log_p = torch.log_softmax(c * torch.tanh(z / c), dim=-1)
    want = torch.where(targets < 0, 0.0, -log_p.gather(1, targets.clamp_min(0)[:, None])[:, 0])
    torch.testing.assert_close(head.nats(targets).double(), want, atol=1e-4, rtol=1e-5)
    found = head.log_probabilities(torch.tensor([4, 1])).double()
    torch.testing.assert_close(found, log_p[[4, 1]], atol=1e-4, rtol=1e-5)
    if above == 30.0:
        one = AdaptedHead(hidden, table, 30.0)
        torch.testing.assert_close(one.nats(targets), head.nats(targets), rtol=1e-5, atol=1e-5)
    (found,) = torch.autograd.grad(head.nats(targets).sum(), caps)
    slope = torch.tanh(z / c) - z / c * (1 - torch.tanh(z / c) ** 2)
    hot = torch.nn.functional.one_hot(targets.clamp_min(0), 11) * (targets >= 0)[:, None]
    dz = (log_p.exp() * (targets >= 0)[:, None] - hot) * slope
    expected = torch.stack([(dz * (z > 0)).sum(), (dz * (z <= 0)).sum()])
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_two_caps_learn_in_a_phase(model, text):
    run = phased(model, text, replace(PHASES, two_caps=True))
    learned = losses_of(run, text)
    caps = run.predictor._caps
    assert caps is not None and not torch.equal(caps, torch.full((2,), 30.0)) and caps[0] != caps[1]
    assert np.isfinite(learned[1:]).all()


def test_every_way_whose_scores_depend_on_other_documents_says_so():
    warm = replace(TTT, warm_a=True)
    assert EvaluateConfig().remark("phased") == LOOSE and "fails the strict reading" in LOOSE
    assert EvaluateConfig(adapters=warm).remark("ttt") == LOOSE
    assert [EvaluateConfig().remark(way) for way in ("plain", "sliding", "ttt", "sgd")] == [""] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": 0}, r"phases.documents must be >= 1, got 0"),
        ({"documents": 2, "count": 3}, r"phases.count must be at most phases.documents=2, got 3"),
        ({"epochs": 0}, r"sgd.epochs must be >= 1, got 0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PhasesConfig(**change)
