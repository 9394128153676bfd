"""Score-first SGD: against a plain loop over windows and steps, ranks, and the end of the text."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pgolf.config import SgdConfig
from pgolf.evaluate.documents import document_bounds
from pgolf.evaluate.sgd import Learner, sgd_pass
from pgolf.evaluate.sliding import sliding_windows
from pgolf.model.uncompiled import uncompiled
from tests.evaluate.legal_helpers import (
    BOS,
    CONTEXT,
    SGD,
    FakeDist,
    losses_of,
    make_pass,
    make_text,
    random_documents,
    run_pass,
    small_model,
    token_losses,
)

LENGTHS = [5, 70, 0, 31, 12]


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def text():
    return make_text(random_documents(LENGTHS))


def dull_losses(model, text, config, stride):
    """Windows one by one; the published update written out, on all of a chunk at once."""
    twin = uncompiled(model, own=True)
    ids = torch.from_numpy(text.tokens.astype(np.int64))
    starts, lengths = document_bounds(text, BOS)
    windows = sliding_windows(starts, lengths, context=CONTEXT, stride=stride)
    losses, inputs = np.full(text.tokens.size, np.nan), text.tokens.size - 1
    chunks = math.ceil(inputs / config.chunk_tokens)
    speed = [torch.zeros_like(p) for p in twin.parameters()]

    def forward(begin, end):
        bounds = [begin, *(s for s in starts.tolist() if begin < s < end), end]
        cuts = [at for a, b in itertools.pairwise(bounds) for at in range(a, b, CONTEXT)] + [end]
        cu = torch.tensor(cuts, dtype=torch.int32) - begin
        return twin(ids[begin:end], ids[begin + 1 : end + 1], cu, max_seqlen=CONTEXT, loop=True)

    for c in range(chunks):
        begin, end = c * config.chunk_tokens, min((c + 1) * config.chunk_tokens, inputs)
        for a, first, b in windows[(windows[:, 1] >= begin) & (windows[:, 1] < end)].tolist():
            with torch.no_grad():
                losses[first + 1 : b + 1] = forward(a, b)[first - a :].numpy()
        if c == chunks - 1:
            break
        rate = config.lr * 0.5 * (1 + math.cos(math.pi * c / (chunks - 1)))
        for _ in range(config.epochs):
            twin.requires_grad_(True)
            gradients = torch.autograd.grad(forward(begin, end).mean(), list(twin.parameters()))
            norm = torch.stack([g.norm() for g in gradients]).norm()
            scale = min(1.0, config.grad_clip / float(norm + 1e-6))
            with torch.no_grad():
                for p, g, v in zip(twin.parameters(), gradients, speed, strict=True):
                    v.mul_(config.momentum).add_(scale * g)
                    p.sub_(rate * v)
            twin.requires_grad_(False)
    return losses


def test_the_scores_are_those_of_a_plain_loop_over_chunks_windows_and_steps(model, text):
    found = token_losses("sgd", model, text)
    want = dull_losses(model, text, SGD, stride=5)
    np.testing.assert_allclose(found[1:], want[1:], atol=1e-4)
    fixed = token_losses("sliding", model, text)
    assert np.abs(found[60:] - fixed[60:]).mean() > 1e-2, "the model learned"
    np.testing.assert_allclose(found[1:30], fixed[1:30], atol=2e-5)


def test_without_a_rate_it_is_the_sliding_window(model, text):
    run = sgd_pass(
        model,
        text,
        FakeDist(),
        bos_id=BOS,
        context=CONTEXT,
        stride=5,
        batch_tokens=96,
        config=SgdConfig(lr=0),
    )
    np.testing.assert_allclose(losses_of(run, text)[1:], token_losses("sliding", model, text)[1:], atol=2e-5)


def test_the_model_is_left_as_it_was_and_nothing_follows_the_last_chunk(model, text):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = make_pass("sgd", model, text)
    assert run.turns[-1].passages is None and all(t.passages is not None for t in run.turns[:-1])
    covered = np.concatenate([t.passages for t in run.turns[:-1]])
    assert covered[:, 0].tolist() == [0, *covered[:-1, 1].tolist()] and covered[-1, 1] == 120
    losses_of(run, text)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


@pytest.mark.parametrize("world_size", [2, 3, 8])  # 8 ranks: some have nothing to learn from
def test_a_step_is_the_same_on_any_number_of_ranks(model, text, world_size):
    config = replace(SGD, epochs=1)
    ids = torch.from_numpy(text.tokens.astype(np.int64))
    passages = [ids[:7], ids[6:78]]

    def after(dist):
        learner = Learner(model, config, dist, context=16)
        learner.study(passages, done=0.0)
        return learner.state()

    alone = after(FakeDist())
    sent = []
    for rank in range(1, world_size):
        dist = FakeDist(rank, world_size)
        after(dist)
        sent.append(dist.seen[0])
    shared = after(FakeDist(0, world_size, [sum(sent)]))
    for one, other in zip(alone, shared, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert any(not torch.equal(a, p) for a, p in zip(alone, model.parameters(), strict=True))


def test_batches_do_not_change_the_score(model, text):
    one = run_pass("sgd", model, text, batch_tokens=10_000)
    other = run_pass("sgd", model, text, batch_tokens=CONTEXT)
    assert one.nats == pytest.approx(other.nats, rel=1e-6)


def test_the_beginning_of_a_text_scores_as_in_the_whole_with_the_same_rates(model, text):
    part = text._replace(tokens=text.tokens[:90], bytes=text.bytes[:90])
    whole = token_losses("sgd", model, text)
    found = token_losses("sgd", model, part, whole=text.tokens.size)
    np.testing.assert_allclose(found[1:], whole[1:90], atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, r"sgd.epochs must be >= 1, got 0"),
        ({"momentum": 1.0}, r"sgd.momentum must be in \[0, 1\), got 1.0"),
        ({"lr": -1.0}, r"sgd.lr must be >= 0, got -1.0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SgdConfig(**change)
