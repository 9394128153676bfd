"""Compiled blocks with symbols for documents and tokens: the same values as without, in few graphs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pgolf.evaluate.heads import AdaptedHead
from pgolf.evaluate.phases import phased_pass
from pgolf.evaluate.predictor import evaluating
from pgolf.evaluate.ttt import adapted_pass
from pgolf.model import attention
from pgolf.model.adapted import compile_adapted
from pgolf.model.gpt import GPT, layer_order
from pgolf.model.lora import adapter_shapes, bind
from pgolf.model.uncompiled import uncompiled
from tests.conftest import requires_gpu
from tests.evaluate.legal_helpers import (
    BOS,
    CONTEXT,
    PHASES,
    TTT,
    VOCAB,
    FakeDist,
    losses_of,
    make_text,
    random_documents,
    small_config,
    small_model,
)

RANK = 3
TINY = small_config(layers=3, xsa_layers=3, parallel_from=2, recurrence_repeats=0)
"""One serial layer without a skip, then one with a skip on one and one on two lanes."""
MUDD = replace(TINY, mudd=2, xsa_strength=True)
SIZES = [(5, 8), (5, 16), (3, 16), (9, 32), (2, 20), (1, 20), (7, 8)]
"""Documents and tokens of each: both alone change, both change, and one document."""


def masked_attention(q, k, v, cu_seqlens, max_seqlen):
    """Attention of torch's operators alone: the CPU's reads `cu_seqlens` on the host, as no GPU's does."""
    del max_seqlen
    at = torch.arange(q.shape[0], device=q.device)
    document = torch.bucketize(at, cu_seqlens[1:].long(), right=True)
    mask = (document[:, None] == document[None]) & (at[:, None] >= at[None])
    qh, kh, vh = (t.transpose(0, 1)[None] for t in (q, k, v))
    return F.scaled_dot_product_attention(qh, kh, vh, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def some_adapters(model: GPT) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    slots = sum(map(len, layer_order(model.config, loop=True)))
    shapes = adapter_shapes(model.config, slots, RANK)
    return {n: torch.randn(9, *s, generator=rng) / 8 for n, s in shapes.items()}


def run(model: GPT, documents: int, width: int) -> list[torch.Tensor]:
    """The losses and the gradients of all adapters."""
    leaves = {n: t[:documents].clone().requires_grad_() for n, t in some_adapters(model).items()}
    rng = torch.Generator().manual_seed(100 * documents + width)
    ids = torch.randint(2, VOCAB, (documents * width,), generator=rng)
    starts = torch.arange(0, ids.numel() + 1, width, dtype=torch.int32)
    adapters = bind(leaves, model.config, torch.float32, scale=2.0)
    hidden, table = model.hidden(ids, starts, max_seqlen=width, loop=True, adapters=adapters)
    nats = AdaptedHead(hidden, table, 30.0, adapters=adapters).nats(ids.roll(-1))
    if not torch.is_grad_enabled():
        return [nats]
    loss = nats.view(documents, width)[:, width // 2 :].mean(dim=1).sum()
    return [nats.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


@pytest.mark.slow
def test_one_graph_of_each_kind_of_block_serves_all_sizes():
    model = small_model(shape=MUDD)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = compile_adapted(uncompiled(model, masked_attention), backend="aot_eager")
    plain = uncompiled(model, masked_attention)
    graphs = []
    for documents, width in SIZES:
        for got, want in zip(*(run(m, documents, width) for m in (compiled, plain)), strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # stem, join, serial with and without a skip, parallel, two sums of sources; the pass of one document adds
    # none of blocks
    assert graphs[0] <= 7 and graphs[-1] == graphs[0], graphs
    assert not torch._dynamo.utils.counters["graph_break"]
    with torch.no_grad():
        torch.testing.assert_close(run(compiled, 4, 12), run(plain, 4, 12), atol=0, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs[0]


def passes(way: str, model: GPT, text, dist, config, *, compiled: bool):
    """The pass of test-time training, or of that with two phases and two caps that they learn."""
    where = {"bos_id": BOS, "context": CONTEXT, "compiled": compiled}
    if way == "ttt":
        return adapted_pass(model, text, dist, config=config, **where)
    adapters = replace(config, batch_documents=2)
    phases = replace(PHASES, documents=3, count=2, two_caps=True, adapters=adapters)
    return phased_pass(model, text, dist, phases=phases, **where)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ttt", "phased"])
def test_test_time_training_is_the_same_with_compiled_blocks_and_optimizer(way, monkeypatch):
    monkeypatch.setattr(attention, "sdpa_attention", masked_attention)
    torch._dynamo.reset()
    model, text = small_model(shape=TINY), make_text(random_documents([5, 60, 9, 31, 44]))
    config = replace(TTT, chunk=16, chunk_max=16, lr=1e-3)
    losses = []
    for compiled in (False, True):
        with evaluating(model):
            run = passes(way, model, text, FakeDist(), config, compiled=compiled)
            losses.append(losses_of(run, text)[1:])
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-4)
    still = replace(config, lr=0.0)
    run = passes("ttt", model, text, FakeDist(), still, compiled=False)
    assert np.abs(losses_of(run, text)[1:] - losses[0]).max() > 1e-2, "it learns"


@requires_gpu
@pytest.mark.parametrize("way", ["ttt", "phased"])
def test_on_a_gpu_compiled_scores_are_those_of_the_plain_blocks(way):
    device = torch.device("cuda")
    shape = replace(TINY, width=128, heads=2, kv_heads=1, rope_dims=16)
    model = small_model(shape=shape).prepare(device)
    text, dist = make_text(random_documents([5, 60, 9, 31, 44, 90, 90])), FakeDist()
    dist.device = device
    config, found = replace(TTT, rank=16, lr=1e-3), []
    for compiled in (False, True):
        with evaluating(model):
            run = passes(way, model, text, dist, config, compiled=compiled)
            found.append(losses_of(run, text, dist)[1:])
    assert found[1].mean() == pytest.approx(found[0].mean(), rel=2e-3)
