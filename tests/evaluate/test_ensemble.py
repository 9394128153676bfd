"""An ensemble of adapters: the mean of the probabilities of members that learn as they would alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pgolf.config import EvaluateConfig, PhasesConfig, TttConfig
from pgolf.errors import UserError
from pgolf.evaluate.ensemble import MeanHead
from pgolf.evaluate.legality import check_way
from pgolf.evaluate.predictor import evaluating, read
from tests.evaluate.legal_helpers import (
    BOS,
    TTT,
    VOCAB,
    FakeDist,
    make_pass,
    make_text,
    random_documents,
    small_model,
    token_losses,
)
from tests.evaluate.violators import Vectors


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def text():
    return make_text(random_documents([5, 90, 17, 40]))


def test_the_mean_is_that_of_the_probabilities_in_float64():
    rng = torch.Generator().manual_seed(0)
    p = torch.softmax(3 * torch.randn(3, 5, VOCAB, generator=rng, dtype=torch.float64), dim=-1)
    head = MeanHead([Vectors(q.log().float()) for q in p])
    logs = head.log_probabilities(torch.arange(5))
    torch.testing.assert_close(logs.double(), p.mean(dim=0).log(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(5), atol=1e-6, rtol=0)
    targets = torch.tensor([3, 0, -100, VOCAB - 1, 7])
    expected = torch.where(
        targets < 0, 0.0, -p.mean(dim=0).log().gather(1, targets.clamp_min(0)[:, None])[:, 0]
    )
    torch.testing.assert_close(head.nats(targets).double(), expected, atol=1e-6, rtol=1e-6)


def test_an_ensemble_is_the_mean_of_passes_with_one_seed_each(model, text):
    """So no member sees another, and each learns as it would alone."""
    config = replace(TTT, lr=0.05, seed=3)
    alone = [token_losses("ttt", model, text, config=replace(config, seed=seed)) for seed in (3, 4, 5)]
    found = token_losses("ttt", model, text, config=replace(config, members=3))
    expected = -np.log(np.mean(np.exp(-np.array(alone)), axis=0))
    np.testing.assert_allclose(found[1:], expected[1:], atol=2e-5)
    assert np.abs(alone[0][1:] - alone[1][1:]).max() > 0.01
    assert np.nansum(found) < np.mean([np.nansum(losses) for losses in alone])  # the logarithm is concave


def test_one_member_is_what_there_was_before_bit_for_bit(model, text):
    with evaluating(model):
        run = make_pass("ttt", model, text, config=replace(TTT, members=1))
        wrapped = make_pass("ttt", model, text, config=replace(TTT, members=2))
        assert type(run.predictor).__name__ == "Adapted"
        read(run, text, FakeDist(), bos_id=BOS)
        read(wrapped, text, FakeDist(), bos_id=BOS)
    mine = run.predictor.state()
    assert all(torch.equal(a, b) for a, b in zip(mine, wrapped.predictor.state(), strict=False))
    assert len(wrapped.predictor.state()) == 2 * len(mine)


def test_an_ensemble_meets_all_conditions(model, text):
    def make(part):
        return make_pass("ttt", model, part, config=replace(TTT, members=2))

    found = check_way(make, text, bos_id=BOS, vocab_size=VOCAB, dist=FakeDist())
    assert {t.verdict for t in found} == {"ok"}, found
    assert "lessons:" in found[2].text


def test_numbers_of_members_are_checked():
    with pytest.raises(UserError, match=r"ttt.members must be >= 1, got 0"):
        TttConfig(members=0)
    with pytest.raises(UserError, match=r"phases.adapters.members must be 1 .* got 2"):
        PhasesConfig(adapters=TttConfig(members=2))
    assert EvaluateConfig().settings_of("ttt")["adapters.members"] == 1
