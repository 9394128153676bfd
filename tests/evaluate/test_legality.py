"""The four conditions of a valid submission, for every way to score (C1 to C4 of the challenge's issue 1017).

Each test changes the text or the scoring, and checks which losses change.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from pgolf.data.loader import ValidationText
from pgolf.evaluate.ttt import AdapterState
from tests.evaluate.legal_helpers import (
    ALONE,
    BOS,
    MODES,
    TTT,
    VOCAB,
    make_text,
    random_documents,
    shallow_model,
    small_model,
    token_losses,
)

# Shorter than a chunk, one past a chunk, several windows long, and exactly one window.
LENGTHS = [5, 100, 9, 31, 60]
STARTS = np.cumsum([0, *[n + 1 for n in LENGTHS]])
ROUNDING = 2e-5  # a document more in a batch changes the order of sums; losses here are about 3 nats


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def text():
    return make_text(random_documents(LENGTHS))


@pytest.fixture(scope="module")
def before(model, text):
    return {mode: token_losses(mode, model, text) for mode in MODES}


def changed(text: ValidationText, at: int, token: int) -> ValidationText:
    tokens = text.tokens.copy()
    assert tokens[at] != token
    tokens[at] = token
    return text._replace(tokens=tokens)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inside", [1, 40, 73, 99])
@pytest.mark.parametrize("what", ["token", "end"])
def test_c1_a_changed_token_changes_no_earlier_score(model, text, before, mode, inside, what):
    """`end` puts a BOS there, as the length of a document must not influence the scores before its end."""
    at = int(STARTS[1]) + inside
    token = BOS if what == "end" else 2 + (int(text.tokens[at]) - 1) % (VOCAB - 2)
    after = token_losses(mode, model, changed(text, at, token))
    np.testing.assert_allclose(after[1:at], before[mode][1:at], atol=ROUNDING, rtol=0)
    assert abs(after[at] - before[mode][at]) > 1e-3  # the changed token's own score


@pytest.mark.parametrize("mode", ALONE)
def test_c1_a_changed_document_changes_no_score_of_another(model, text, before, mode):
    tokens = text.tokens.copy()
    inside = slice(int(STARTS[1]) + 1, int(STARTS[2]))
    tokens[inside] = 2 + (tokens[inside] - 1) % (VOCAB - 2)
    after = token_losses(mode, model, text._replace(tokens=tokens))
    others = np.r_[1 : STARTS[1] + 1, STARTS[2] + 1 : text.tokens.size]
    np.testing.assert_allclose(after[others], before[mode][others], atol=ROUNDING, rtol=0)
    assert np.abs(after[inside] - before[mode][inside]).mean() > 1e-2


@pytest.mark.parametrize("mode", ALONE)
def test_c1_a_document_scores_alone_as_among_others(model, text, before, mode):
    for start, end in pairwise(STARTS):
        alone = ValidationText(text.tokens[start : end + 1], text.bytes[start : end + 1])
        got = token_losses(mode, model, alone)[1:]
        np.testing.assert_allclose(got, before[mode][start + 1 : end + 1], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inside", [3, 20, 90])  # the first chunk, and two that adapters have learned for
def test_c2_the_probabilities_of_all_tokens_sum_to_one(mode, inside):
    model, text, at = shallow_model(), make_text(random_documents([inside + 5])), inside
    total = 0.0
    for token in range(VOCAB):
        same = int(text.tokens[at]) == token
        total += np.exp(-token_losses(mode, model, text if same else changed(text, at, token))[at])
    assert abs(total - 1) < 1e-5


@pytest.mark.parametrize("skipped", [0, 2, 5])
def test_c3_a_chunk_is_scored_before_it_is_learned(model, monkeypatch, skipped):
    """Leaving out the update after chunk k changes the scores after chunk k, and none up to it."""
    text = make_text(random_documents([100]))
    config = replace(TTT, chunk_growth=0)
    with_all = token_losses("ttt", model, text, config=config)
    step, calls = AdapterState.step, []

    def spy(self, gradients, count):
        calls.append(count)
        if len(calls) != skipped + 1:
            step(self, gradients, count)

    monkeypatch.setattr(AdapterState, "step", spy)
    without = token_losses("ttt", model, text, config=config)
    end = 1 + config.chunk * (skipped + 1)
    assert len(calls) == 100 // config.chunk  # the last chunk teaches nobody
    np.testing.assert_array_equal(without[1:end], with_all[1:end])
    assert np.abs(without[end:] - with_all[end:]).mean() > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_c4_one_pass_scores_every_token_once(before, mode):
    """`token_losses` fails on a token that is scored twice; this test finds tokens that are not scored."""
    assert np.isnan(before[mode][0]) and np.isfinite(before[mode][1:]).all()


def test_the_checks_would_find_a_leak(model, text, before, monkeypatch):
    """Adapters that are not reset between batches leak one document into another; the test above sees it."""
    reset = AdapterState.reset
    first = []

    def once(self, *, warm):
        if len(first) < 2:  # the first call is that of the constructor
            reset(self, warm=warm)
        first.append(1)

    monkeypatch.setattr(AdapterState, "reset", once)
    leaking = token_losses("ttt", model, text, config=replace(TTT, batch_documents=1))
    assert np.abs(leaking[1:] - before["ttt"][1:]).max() > 1e-2
    assert torch.is_grad_enabled()
