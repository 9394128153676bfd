"""SLOT as published and its causal form, against a loop in float64 over single windows."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from pgolf.config import ILLEGAL, Config, EvaluateConfig, SlotConfig, TiltConfig
from pgolf.errors import UserError
from pgolf.evaluate.documents import document_bounds
from pgolf.evaluate.predictor import evaluating
from pgolf.evaluate.sliding import sliding_windows
from pgolf.evaluate.slot import slot_questions
from pgolf.presets import pr1298
from pgolf.report.legality_report import checked_reports
from pgolf.report.submission import rules
from pgolf.report.summary import format_table
from tests.evaluate.legal_helpers import (
    BOS,
    CONTEXT,
    SLOT,
    FakeDist,
    make_text,
    random_documents,
    run_pass,
    small_model,
    token_losses,
)
from tests.report.test_submission import finished, score

LENGTHS = [5, 100, 9, 31, 60]  # shorter than a window, several of them, exactly one


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def text():
    return make_text(random_documents(LENGTHS))


def cross_entropy(states, table, targets, cap):
    """Return the losses in float64, as the formulas say."""
    logits = cap * torch.tanh(states @ table.T / cap)
    return torch.logsumexp(logits, -1) - logits.gather(-1, targets[:, None])[:, 0]


def fitted(states, table, targets, cap, config):
    """Return the shift after some steps of AdamW, written out, in float64."""
    shift = torch.zeros(states.shape[-1], dtype=torch.float64, requires_grad=True)
    first, second = torch.zeros_like(shift), torch.zeros_like(shift)
    for t in range(1, config.steps + 1):
        loss = cross_entropy(states + shift, table, targets, cap).mean()
        (g,) = torch.autograd.grad(loss, [shift])
        first = 0.9 * first + 0.1 * g
        second = 0.999 * second + 0.001 * g * g
        step = (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        shift = (shift.detach() - config.lr * step).requires_grad_()
    return shift.detach()


def reference(model, text, config, *, causal, stride=5):
    """Return the loss of every token, one window after another."""
    losses = np.full(text.tokens.size, np.nan)
    windows = sliding_windows(*document_bounds(text, BOS), context=CONTEXT, stride=stride)
    table = model.tok_emb.detach().double()
    for begin, first, end in windows.tolist():
        ids = torch.from_numpy(text.tokens[begin : end + 1].astype(np.int64))
        bounds = torch.tensor([0, end - begin], dtype=torch.int32)
        with torch.no_grad():
            hidden, _ = model.hidden(ids[:-1], bounds, max_seqlen=end - begin, loop=True)
        states, targets, known = hidden.double(), ids[1:], first - begin
        shift = torch.zeros(states.shape[-1], dtype=torch.float64)
        if not causal:
            shift = fitted(states, table, targets, model.config.softcap, config)
        elif known:
            shift = fitted(states[:known], table, targets[:known], model.config.softcap, config)
        found = cross_entropy(states + shift, table, targets, model.config.softcap)
        losses[first + 1 : end + 1] = found[known:].numpy()
    return losses


@pytest.mark.parametrize("way", ["slot", "causal_slot"])
@pytest.mark.parametrize("config", [SLOT, SlotConfig()], ids=["fast", "published"])
@pytest.mark.parametrize("stride", [1, 5, CONTEXT])
def test_the_losses_are_those_of_a_loop_over_windows_in_float64(
    model, text, way, config, stride, monkeypatch
):
    monkeypatch.setattr("tests.evaluate.legal_helpers.SLOT", config)
    with evaluating(model):
        expected = reference(model, text, config, causal=way == "causal_slot", stride=stride)
    found = token_losses(way, model, text, stride=stride)
    np.testing.assert_allclose(found[1:], expected[1:], atol=3e-4)
    np.testing.assert_allclose(np.nanmean(found), np.nanmean(expected), atol=2e-5)
    sliding = token_losses("sliding", model, text, stride=stride)
    moved = np.abs(found[1:] - sliding[1:])
    first = np.isin(
        np.arange(1, text.tokens.size),
        np.concatenate(
            [
                np.arange(s + 1, s + 1 + min(n, CONTEXT))
                for s, n in zip(*document_bounds(text, BOS), strict=True)
            ]
        ),
    )
    if way == "causal_slot":
        assert moved[first].max() < 2e-5  # the first window of a document has no scored tokens
        assert stride == CONTEXT or moved[~first].max() > 1e-3
    else:
        assert moved.max() > 0.01
        assert np.nanmean(found) < np.nanmean(sliding) - 0.003  # it has seen the answers


@pytest.mark.parametrize("way", ["slot", "causal_slot"])
def test_the_score_does_not_depend_on_the_batch_or_on_the_number_of_ranks(model, text, way):
    whole = run_pass(way, model, text, batch_tokens=10 * CONTEXT)
    single = run_pass(way, model, text, batch_tokens=CONTEXT)
    assert single.nats == pytest.approx(whole.nats, abs=1e-3) and single.tokens == text.tokens.size - 1
    found = np.full((3, text.tokens.size), np.nan)
    for rank in range(3):
        with pytest.raises(UserError, match="expected 210"):  # this rank alone
            token_losses_of_rank(way, model, text, rank, found[rank])
    assert (np.isfinite(found).sum(axis=0)[1:] == 1).all()
    np.testing.assert_allclose(np.nansum(found, axis=0)[1:], token_losses(way, model, text)[1:], atol=1e-4)


def token_losses_of_rank(way, model, text, rank, losses):
    from pgolf.evaluate.predictor import read
    from tests.evaluate.legal_helpers import make_pass

    def put(question, distributions, nats) -> None:
        for row, first, count in question.rows():
            losses[first + 1 : first + 1 + count] = nats[row : row + count].double().numpy()

    dist = FakeDist(rank, 3)
    with evaluating(model):
        read(make_pass(way, model, text, dist), text, dist, bos_id=BOS, observe=put)


def test_windows_of_one_batch_have_the_same_context(text):
    windows = sliding_windows(*document_bounds(text, BOS), context=CONTEXT, stride=5)
    questions = slot_questions(windows, CONTEXT, 5, 3 * CONTEXT)
    rows = np.concatenate([question.windows for question in questions])
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, windows.tolist()))
    for question in questions:
        assert {int(w[1] - w[0]) for w in question.windows} == {question.width - question.asked}
        assert len(question.windows) * question.width <= 3 * CONTEXT
    assert questions[0].asked == CONTEXT and questions[-1].asked == 5


def test_slot_is_labelled_wherever_it_appears_and_the_causal_form_is_not():
    settings = EvaluateConfig()
    assert settings.remark("slot") == ILLEGAL == "not allowed: scores positions it learned from"
    assert settings.remark("causal_slot") == ""
    assert settings.settings_of("slot") == {"context": 0, "stride": 64, "slot.steps": 8, "slot.lr": 0.005}
    run = finished(scores={"quantized": score(1.1), "slot": score(1.0)})
    assert run.summary.headline == "slot" and f"slot: {ILLEGAL}" in format_table(run.summary).splitlines()
    facts = rules([run], {}, None)
    assert f"The headline score is {ILLEGAL}." in facts
    assert any("ALSO THOSE THAT IT THEN SCORES" in fact for fact in facts)
    causal = finished(scores={"quantized": score(1.1), "causal_slot": score(1.0)})
    assert not any(ILLEGAL in fact or "ALSO THOSE" in fact for fact in rules([causal], {}, None))


def test_a_tilt_is_named_in_the_submission():
    run = finished(scores={"quantized": score(1.1), "ttt": score(1.0)})
    tilted = replace(run.config.evaluate, tilt=TiltConfig(on=True))
    facts = rules([replace(run, config=replace(run.config, evaluate=tilted))], {}, None)
    assert any("n-gram tilt of order 16, threshold 0.8 and boost 2.625 is on top" in fact for fact in facts)
    assert not any("tilt" in fact for fact in rules([run], {}, None))


def test_a_submission_of_slot_is_refused_with_and_without_a_report_unless_the_user_says_so(tmp_path):
    run = replace(finished(scores={"quantized": score(1.1), "slot": score(1.0)}), folder=tmp_path)
    evaluate = replace(run.config.evaluate, method="slot", published=True)
    run = replace(run, config=replace(run.config, evaluate=evaluate))
    message = rf"the headline score is slot, {ILLEGAL}; .* --although-illegal"
    with pytest.raises(UserError, match=message):
        checked_reports([run], illegal=False)
    assert checked_reports([run], illegal=True) == {}
    (tmp_path / "legality.json").write_text(json.dumps({"legal": True}))
    with pytest.raises(UserError, match=message):
        checked_reports([run], illegal=False)


def test_the_preset_of_1298_is_scored_as_it_was_published_and_settings_are_checked():
    assert pr1298().evaluate.method == "slot" and pr1298().evaluate.slot == SlotConfig(steps=8, lr=0.005)
    with pytest.raises(UserError, match=r"slot.lr must be >= 0, got -1"):
        SlotConfig(lr=-1.0)
    with pytest.raises(UserError, match=r"evaluate.stride must be at most .*=2048, got 4096"):
        Config(evaluate=EvaluateConfig(method="slot", published=True, stride=4096))
