"""Gradients through the chunk alone: the states of one pass, and the gradients at constant context."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pgolf.evaluate.legality import check_way
from pgolf.model.attention import sdpa_attention
from pgolf.model.chunk_gradient import ChunkGradient
from pgolf.model.lora import bind
from pgolf.model.uncompiled import uncompiled
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
from tests.model.test_adapted import small_like, some_adapters

N, W, C = 3, 21, 5


def constant_context(q, k, v, cu_seqlens, max_seqlen):
    """Attention in which no gradient reaches the keys and values of the tokens before the chunk."""
    k, v = (
        torch.cat(
            (t.view(N, W, *t.shape[1:])[:, : W - C].detach(), t.view(N, W, *t.shape[1:])[:, W - C :]), 1
        )
        for t in (k, v)
    )
    return sdpa_attention(q, k.flatten(0, 1), v.flatten(0, 1), cu_seqlens, max_seqlen)


def states_and_gradients(model, hidden):
    leaves = {n: t[:N].clone().requires_grad_() for n, t in some_adapters(model).items() if "head" not in n}
    adapters = bind(leaves, model.config, torch.float32, scale=2.0)
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCAB, (N * W,), generator=rng)
    starts = torch.arange(0, ids.numel() + 1, W, dtype=torch.int32)
    states, _ = hidden(ids, starts, max_seqlen=W, adapters=adapters, asked=C)
    direction = torch.randn(states.shape, generator=rng)
    return [states.detach(), *torch.autograd.grad(states, list(leaves.values()), direction)]


@pytest.mark.parametrize("preset", ["pr1855", "pr1493", "pr549", "naive"])
def test_states_are_the_same_and_the_context_is_a_constant_for_gradients(preset):
    model = small_model(shape=small_like(preset))
    detached = uncompiled(model, constant_context)

    def hidden(of):
        return lambda *args, **what: of.hidden(*args, loop=True, **what)

    found = states_and_gradients(model, ChunkGradient(uncompiled(model)).hidden)
    for got, want in zip(found, states_and_gradients(model, hidden(detached)), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=2e-5)
    exact = states_and_gradients(model, hidden(uncompiled(model)))
    torch.testing.assert_close(found[0], exact[0], atol=1e-5, rtol=0)
    assert all(
        (got - all_of_it).abs().max() > 1e-2 for got, all_of_it in zip(found[1:], exact[1:], strict=True)
    )


def test_scores_are_the_same_given_the_adapters_and_what_is_learned_is_not():
    model, text = small_model(), make_text(random_documents([100, 60, 31]))
    chunk = replace(TTT, gradient="chunk")
    losses = [token_losses("ttt", model, text, config=c)[1:] for c in (TTT, chunk)]
    # Two chunks of 8: before the second, adapters have learned from the first, which has no context.
    np.testing.assert_allclose(losses[1][:16], losses[0][:16], atol=2e-6)
    assert np.abs(losses[1] - losses[0]).max() > 1e-4
    still = [token_losses("ttt", model, text, config=replace(c, lr=0.0))[1:] for c in (TTT, chunk)]
    np.testing.assert_allclose(still[1], still[0], atol=2e-6)


def test_it_meets_all_conditions():
    model, text = small_model(), make_text(random_documents([5, 40, 21]))

    def make(part):
        return make_pass("ttt", model, part, config=replace(TTT, gradient="chunk"))

    found = check_way(make, text, bos_id=BOS, vocab_size=VOCAB, dist=FakeDist())
    assert {t.verdict for t in found} == {"ok"}, found
