"""Compiled blocks with symbols for documents and tokens: the same values as without, in few graphs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pgolf.config import PLACES, ModelConfig
from pgolf.evaluate.heads import AdaptedHead
from pgolf.evaluate.phases import phased_pass
from pgolf.evaluate.predictor import evaluating
from pgolf.evaluate.ttt import adapted_pass
from pgolf.model import attention
from pgolf.model.adapted import compile_adapted
from pgolf.model.gpt import GPT, layer_order
from pgolf.model.lora import adapter_shapes, bind
from pgolf.model.uncompiled import uncompiled
from pgolf.presets import PRESETS
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
FEW = small_config(xsa_layers=4, parallel_from=2, recurrence_repeats=0)
"""Two serial layers, one on two lanes, and the last one: two graphs."""
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


def some_adapters(model: GPT, places=PLACES) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    slots = sum(map(len, layer_order(model.config, loop=True)))
    shapes = adapter_shapes(model.config, slots, RANK, places)
    return {n: torch.randn(9, *s, generator=rng) / 8 for n, s in shapes.items()}


def run(
    model: GPT, documents: int, width: int, asked: int = 0, *, whole: bool = False, places=PLACES
) -> list[torch.Tensor]:
    """The losses of the last tokens of each document, half of them by default, and all adapters' gradients.

    With `whole`, the model gives the states of all tokens, and the others are dropped afterwards.
    """
    asked = asked or width // 2
    leaves = {n: t[:documents].clone().requires_grad_() for n, t in some_adapters(model, places).items()}
    rng = torch.Generator().manual_seed(100 * documents + width)
    ids = torch.randint(2, VOCAB, (documents * width,), generator=rng)
    starts = torch.arange(0, ids.numel() + 1, width, dtype=torch.int32)
    adapters = bind(leaves, model.config, torch.float32, scale=2.0)
    given = {"max_seqlen": width, "loop": True, "adapters": adapters, "asked": 0 if whole else asked}
    hidden, table = model.hidden(ids, starts, **given)
    if whole:
        hidden = hidden.view(documents, width, -1)[:, -asked:].flatten(0, 1)
    targets = ids.roll(-1).view(documents, width)[:, -asked:].flatten()
    nats = AdaptedHead(hidden, table, 30.0, adapters=adapters).nats(targets)
    if not torch.is_grad_enabled():
        return [nats]
    loss = nats.view(documents, asked).mean(dim=1).sum()
    return [nats.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


def small_like(preset: str) -> ModelConfig:
    """The network of a preset, with all its parts, in few and small layers; "mudd" is pr1855 with more."""
    c = PRESETS["pr1855" if preset == "mudd" else preset]().model
    if preset == "mudd":
        c = replace(c, mudd=2, xsa_strength=True)
    sizes = {"vocab_size": VOCAB, "width": 32, "heads": 4, "kv_heads": 2, "max_context": CONTEXT}
    parts = {"bigram_buckets": min(c.bigram_buckets, 16), "bigram_width": 8, "value_embed_width": 8}
    return replace(c, **sizes, **parts, rope_dims=4)


# Two lanes, without and with MUDD connections; another gate; one stream with parallel branches; value
# embeddings; none of these.
@pytest.mark.parametrize("preset", ["pr1855", "mudd", "pr1874", "pr1493", "pr549", "naive"])
@pytest.mark.parametrize("places", [PLACES, ("k", "o")])
def test_the_layer_that_runs_last_skips_the_other_tokens_exactly(preset, places):
    model = small_model(shape=small_like(preset))
    found, want = (run(model, 3, 21, 5, places=places, whole=whole) for whole in (False, True))
    for got, all_rows in zip(found, want, strict=True):
        torch.testing.assert_close(got, all_rows, atol=2e-6, rtol=2e-5)
    with torch.no_grad():
        torch.testing.assert_close(run(model, 3, 7, 7), run(model, 3, 7, 7, whole=True), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_one_graph_of_each_kind_of_block_serves_all_sizes():
    model = small_model(shape=small_like("pr1855"))
    torch._dynamo.reset()
    compiled = compile_adapted(uncompiled(model, masked_attention), backend="eager")
    check_sizes(compiled, uncompiled(model, masked_attention))


def check_sizes(compiled: GPT, plain: GPT) -> None:
    """Check that blocks compiled for adapters compute what `plain` does, in one graph of each kind."""
    torch._dynamo.utils.counters.clear()
    graphs, counted = [], torch._dynamo.utils.counters["stats"]
    for documents, width in SIZES:
        for got, want in zip(*(run(m, documents, width) for m in (compiled, plain)), strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        graphs.append(counted["unique_graphs"])
    # Of 17 layers: serial without and with a skip, parallel; the pass of one document adds none.
    assert graphs == [3] * len(SIZES)
    assert not torch._dynamo.utils.counters["graph_break"]
    with torch.no_grad():
        torch.testing.assert_close(run(compiled, 4, 12), run(plain, 4, 12), atol=0, rtol=0)
    assert counted["unique_graphs"] == 3


def passes(way: str, model: GPT, text, dist, config, *, compiled: bool):
    """The pass of test-time training, or of that with two phases and two caps that they learn."""
    where = {"bos_id": BOS, "context": CONTEXT, "compiled": compiled}
    if way == "ttt":
        return adapted_pass(model, text, dist, config=config, **where)
    adapters = replace(config, batch_documents=2)
    phases = replace(PHASES, documents=3, count=2, two_caps=True, adapters=adapters)
    return phased_pass(model, text, dist, phases=phases, **where)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "backend"), [("ttt", "aot_eager"), ("phased", "eager")])
def test_test_time_training_is_the_same_with_compiled_blocks_and_optimizer(way, backend, monkeypatch):
    """Without kernels of the compiler, which take a minute on a CPU; the test below has those of a GPU."""
    monkeypatch.setattr(attention, "sdpa_attention", masked_attention)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile_(f, **how | {"backend": backend}))
    torch._dynamo.reset()
    model, text = small_model(shape=FEW), make_text(random_documents([5, 60, 9, 31, 44]))
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
def test_on_a_gpu_compiled_scores_are_those_of_the_plain_blocks_and_of_composed_operators(way):
    device = torch.device("cuda")
    shape = replace(FEW, width=128, heads=2, kv_heads=1, rope_dims=16)
    model = small_model(shape=shape).prepare(device)
    text, dist = make_text(random_documents([5, 60, 9, 31, 44, 90, 90])), FakeDist()
    dist.device = device
    config, found = replace(TTT, rank=16, lr=1e-3), []
    composed = small_model(shape=shape).prepare(device, heads="composed", mlp="composed")
    for used, compiled in ((composed, False), (model, False), (model, True)):
        with evaluating(used):
            run = passes(way, used, text, dist, config, compiled=compiled)
            found.append(losses_of(run, text, dist)[1:])
    for losses in found[1:]:
        assert losses.mean() == pytest.approx(found[0].mean(), rel=2e-3)
