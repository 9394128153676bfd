"""Test-time training: chunks, batches, the optimizer, and that learning helps with the rest of a document."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pgolf.config import PhasesConfig, TttConfig
from pgolf.evaluate import ttt
from pgolf.evaluate.heads import AdaptedHead
from pgolf.evaluate.phases import phased_pass
from pgolf.evaluate.predictor import evaluating
from pgolf.evaluate.ttt import (
    COMPILE_COST,
    COMPOSED_COST,
    AdapterState,
    adapted_pass,
    plan_batches,
    plan_chunks,
    share_batches,
    worth_compiling,
)
from pgolf.model.attention import low_product
from pgolf.model.gpt import GPT, layer_order
from pgolf.model.lora import Scales, adapter_shapes, bind, initial_adapters
from pgolf.model.uncompiled import uncompiled
from pgolf.presets import pr1855
from tests.conftest import ROOT, requires_gpu
from tests.evaluate.legal_helpers import (
    BOS,
    CONTEXT,
    TTT,
    VOCAB,
    FakeDist,
    losses_of,
    make_pass,
    make_text,
    random_documents,
    run_pass,
    small_config,
    small_model,
    token_losses,
)

LENGTHS = [5, 100, 9, 31, 60, 0, 17, 44]


@pytest.mark.parametrize("length", [1, 47, 48, 49, 3000])
def test_chunks_tile_a_document_and_do_not_know_its_length(length):
    longer = plan_chunks(40_000, 2048, TttConfig())
    chunks = plan_chunks(length, 2048, TttConfig())
    assert chunks == longer[: len(chunks)]
    assert [c.begin for c in longer] == [0, *[c.end for c in longer[:-1]]]
    assert all(c.end - c.start == min(c.end, 2048) for c in longer)
    assert chunks[-1].begin < length <= chunks[-1].end


def test_chunks_grow_from_64_to_256():
    sizes = {c.begin: c.end - c.begin for c in plan_chunks(97_113, 2048, TttConfig())}
    assert sizes[0] == 64 and max(sizes.values()) == 256
    assert all(size == 64 for begin, size in sizes.items() if begin < 640)
    assert all(size == 256 for begin, size in sizes.items() if begin >= 2048)
    assert list(sizes.values()) == sorted(sizes.values())
    assert len(sizes) == 392  # the longest document of the challenge: 2,024 chunks of 48
    assert len(plan_chunks(97_113, 2048, TttConfig(chunk=48, chunk_growth=0))) == 2024


def test_batches_hold_every_document_once_and_ranks_every_batch_once():
    lengths = np.random.default_rng(0).integers(1, 3000, 500)
    config = TttConfig(batch_tokens=8192, batch_documents=20)
    batches = plan_batches(lengths, 2048, config)
    assert sorted(np.concatenate([b.documents for b in batches]).tolist()) == list(range(500))
    for b in batches:
        widest = max(c.end - c.start for c in b.chunks)
        assert b.documents.size <= 20 and b.documents.size * widest <= 8192
        assert (np.diff(lengths[b.documents]) <= 0).all()
    for world in (1, 3, 8):
        shares = [share_batches(batches, rank, world) for rank in range(world)]
        assert sorted(id(b) for s in shares for b in s) == sorted(id(b) for b in batches)
        loads = [sum(b.cost for b in s) for s in shares]
        assert max(loads) <= sum(loads) / world + max(b.cost for b in batches)


def window_tokens(batch, lengths):
    read = [int((lengths[batch.documents] > c.begin).sum()) for c in batch.chunks]
    return sum(n * (c.end - c.start) for n, c in zip(read, batch.chunks, strict=True))


def test_eight_ranks_share_documents_of_real_lengths_evenly():
    """By the cost that is planned with, and by window tokens; before, the largest batch had 21 % of them."""
    quantiles = json.loads((ROOT / "bench" / "document_lengths.json").read_text())["quantiles"]
    lengths = np.tile(np.array(quantiles), 4)  # as many documents as the project's validation text has

    def largest(batches, weight, world=8):
        shares = [sum(map(weight, share_batches(batches, rank, world))) for rank in range(world)]
        return max(shares) / sum(shares)

    batches = plan_batches(lengths, 2048, TttConfig(), 8)
    assert sorted(np.concatenate([b.documents for b in batches]).tolist()) == list(range(lengths.size))
    assert largest(batches, lambda b: b.cost) < 1.03 / 8
    assert largest(batches, lambda b: window_tokens(b, lengths)) < 1.05 / 8
    large = plan_batches(lengths, 2048, TttConfig())
    assert largest(large, lambda b: window_tokens(b, lengths)) > 1.6 / 8
    steps, few = (sum(len(b.chunks) for b in plan) for plan in (batches, large))
    assert few < steps < 1.6 * few, "the price: smaller steps with the longest documents"


def test_smaller_batches_for_balance_do_not_change_the_scores(monkeypatch):
    model, text = small_model(), make_text(random_documents(LENGTHS))
    want = token_losses("ttt", model, text)
    count = len(plan_batches(np.array(LENGTHS) + 1, CONTEXT, TTT))
    monkeypatch.setattr(ttt, "LEAST_COST", 0.0)
    monkeypatch.setattr(ttt, "MOST_SHARE", 1 / 12)
    assert len(plan_batches(np.array(LENGTHS) + 1, CONTEXT, TTT)) > count
    np.testing.assert_allclose(token_losses("ttt", model, text)[1:], want[1:], atol=5e-5)


@pytest.mark.parametrize("make", [adapted_pass, phased_pass])
def test_a_rank_alone_takes_larger_batches_than_ranks_that_share_them(monkeypatch, make):
    model, text = small_model(), make_text(random_documents(LENGTHS))
    monkeypatch.setattr(ttt, "LEAST_COST", 0.0)
    settings = {"config": TTT} if make is adapted_pass else {"phases": PhasesConfig(adapters=TTT)}

    def steps(world):
        where = {"bos_id": BOS, "context": CONTEXT, **settings}
        passes = [make(model, text, FakeDist(rank, world), **where) for rank in range(world)]
        return sum(len(found.turns) for found in passes)

    assert steps(1) < steps(8)


def test_a_short_text_is_not_cut_into_small_batches():
    lengths = np.full(60, 800)
    assert len(plan_batches(lengths, 2048, TttConfig())) == 1


def test_record_has_the_published_number_of_adapter_parameters():
    config = pr1855().model
    slots = sum(map(len, layer_order(config, loop=True)))
    shapes = adapter_shapes(config, slots, TttConfig().rank)
    assert slots == 17 and sum(np.prod(s) for s in shapes.values()) == 17 * 368_640 + 696_320


@pytest.mark.parametrize(("on", "millions"), [("k,o,mlp,head", 4.53), ("o,mlp,head", 3.48), ("head", 0.70)])
def test_fewer_places_have_fewer_parameters(on, millions):
    config, places = pr1855().model, TttConfig(on=on).places
    slots = sum(map(len, layer_order(config, loop=True)))
    count = sum(int(np.prod(s)) for s in adapter_shapes(config, slots, TttConfig().rank, places).values())
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize("on", ["k,o,mlp,head", "head", "v", "q,mlp"])
def test_adapters_of_some_places_are_all_adapters_with_the_others_zero(on):
    """The losses are those of the full set with B = 0 elsewhere."""
    model, rng = small_model(), torch.Generator().manual_seed(0)
    slots, places = sum(map(len, layer_order(model.config, loop=True))), on.split(",")
    names = {"q": "q_b", "k": "k_b", "v": "v_b", "o": "bypass_b"}
    full = {
        n: torch.randn(2, *s, generator=rng) / 4 for n, s in adapter_shapes(model.config, slots, 3).items()
    }
    inside = [i for i, place in enumerate("qkvo") if place in places]
    part = {n: full[n] for n in adapter_shapes(model.config, slots, 3, places)}
    if inside:
        part["attn_a"] = torch.cat([full["attn_a"].split(3, dim=2)[i] for i in inside], dim=2)
    for place, name in (names | {"mlp": "mlp_b", "head": "head_b"}).items():
        if place not in places:
            full[name] = torch.zeros_like(full[name])
    cu = torch.tensor([0, 20, 40], dtype=torch.int32)
    ids = torch.randint(2, VOCAB, (40,), generator=rng)

    def losses(tensors):
        adapters = bind(tensors, model.config, torch.float32, scale=2.0)
        with torch.no_grad():
            hidden, table = model.hidden(ids, cu, max_seqlen=20, loop=True, adapters=adapters)
        return AdaptedHead(hidden, table, 30.0, adapters=adapters).nats(ids.roll(-1))

    torch.testing.assert_close(losses(part), losses(full), atol=1e-4, rtol=1e-4)
    assert (losses(part) - losses({n: torch.zeros_like(t) for n, t in full.items()})).abs().max() > 1e-3


def test_first_chunks_are_by_position_and_not_by_length():
    config = TttConfig(first_chunks="8,16,24")
    chunks = plan_chunks(1000, 2048, config)
    assert [c.end for c in chunks[:5]] == [8, 24, 48, 112, 176]
    assert plan_chunks(30, 2048, config) == chunks[:3]
    losses = token_losses("ttt", *two_texts(), config=replace(TTT, first_chunks="2,5"))
    assert np.isfinite(losses[1:]).all()


def two_texts():
    return small_model(), make_text(random_documents([3, 20, 0]))


def test_warm_adapters_keep_a_and_let_documents_into_each_other(capsys):
    model, text = small_model(), make_text(random_documents(LENGTHS))
    config = replace(TTT, batch_documents=1, warm_a=True)
    state = AdapterState(model, config, 1)
    start = {n: t.detach().clone() for n, t in state.leaves(1).items()}
    state.step({n: torch.ones_like(t) for n, t in start.items()}, 1)
    moved = {n: t.detach().clone() for n, t in state.leaves(1).items()}
    state.reset(warm=True)
    for n, t in state.leaves(1).items():
        assert torch.equal(t, moved[n] if n.endswith("_a") else start[n]), n
    warm = token_losses("ttt", model, text, config=config)
    cold = token_losses("ttt", model, text, config=replace(config, warm_a=False))
    first, last = slice(6, 106), slice(1, 6)  # the longest document comes first, the shortest last
    np.testing.assert_array_equal(warm[first][:40], cold[first][:40])
    assert np.abs(warm - cold)[1:].max() > 1e-3 and np.isfinite(warm[last]).all()


@pytest.mark.parametrize("mode", ["plain", "sliding", "ttt", "sgd", "phased"])
def test_a_context_longer_than_that_of_training_is_seen(mode):
    model, text = small_model(), make_text(random_documents([100]))
    narrow, wide = (token_losses(mode, model, text, context=c, batch_tokens=200) for c in (0, 64))
    assert np.abs(narrow - wide)[40:].max() > 1e-3 and model.config.max_context == CONTEXT
    if mode == "plain":
        ids = torch.from_numpy(text.tokens.astype(np.int64))
        cu = torch.tensor([0, 64], dtype=torch.int32)
        twin = uncompiled(model, context=64)
        np.testing.assert_allclose(
            wide[1:65], twin(ids[:64], ids[1:65], cu, max_seqlen=64, loop=True), atol=2e-5
        )


@pytest.mark.parametrize("mode", ["plain", "ttt"])
def test_a_document_of_100_000_tokens_between_the_shortest(mode):
    model = small_model(shape=small_config(layers=2, xsa_layers=2, parallel_from=2, recurrence_repeats=0))
    text = make_text(random_documents([0, 1, 100_000, 1, 0, 0]))
    config = TttConfig(rank=2, chunk=512, chunk_growth=0, chunk_max=512)
    score = run_pass(mode, model, text, config=config, context=512, batch_tokens=8192)
    assert (score.tokens, score.bytes) == (text.tokens.size - 1, int(text.bytes.sum()))


def test_fresh_adapters_change_nothing_and_others_do():
    model = small_model()
    ids = torch.randint(2, VOCAB, (3 * 20,), generator=torch.Generator().manual_seed(0))
    cu = torch.tensor([0, 20, 40, 60], dtype=torch.int32)
    slots = sum(map(len, layer_order(model.config, loop=True)))
    start = initial_adapters(model.config, slots, 4, seed=0)
    leaves = {n: t.expand(3, *t.shape).clone() for n, t in start.items()}

    def hidden(adapted: bool) -> torch.Tensor:
        adapters = bind(leaves, model.config, torch.float32, scale=2.0) if adapted else None
        with torch.no_grad():
            return model.hidden(ids, cu, max_seqlen=20, loop=True, adapters=adapters)[0]

    plain = hidden(False)
    torch.testing.assert_close(hidden(True), plain, atol=0, rtol=0)
    for name in [n for n in leaves if n.endswith("_b") and n != "head_b"]:
        leaves[name][1] += 0.1  # the second document only
        adapted = hidden(True)
        assert torch.equal(adapted[:20], plain[:20]) and torch.equal(adapted[40:], plain[40:]), name
        assert (adapted[20:40] - plain[20:40]).abs().max() > 1e-3, name
        leaves[name][1] -= 0.1


def test_a_layer_adapter_is_the_sum_that_its_docstring_says():
    model = small_model()
    rng = torch.Generator().manual_seed(0)
    slots = sum(map(len, layer_order(model.config, loop=True)))
    shapes = adapter_shapes(model.config, slots, 3)
    tensors = {n: torch.randn((2, *s), generator=rng) for n, s in shapes.items()}
    adapters = bind(tensors, model.config, torch.float32, scale=1.5)
    x = torch.randn(2 * 7, 32, generator=rng)
    scales = Scales(torch.tensor(0.5), *torch.randn(2, 32, generator=rng))
    for slot, layer in enumerate(adapters.layers):
        found = [low_product(*term) for term in layer.attention(x, scales)]
        for n in range(2):
            rows = x[7 * n : 7 * n + 7]
            a = tensors["attn_a"][n, slot].split(3)
            names = ("q_b", "k_b", "v_b", "bypass_b")
            for i, m in enumerate(names):
                want = 1.5 * 0.5 * rows @ a[i].T @ tensors[m][n, slot].T
                want = want * scales.attn if m == "bypass_b" else want
                torch.testing.assert_close(found[i][7 * n : 7 * n + 7], want, atol=1e-5, rtol=1e-5)
            m = 1.5 * 0.5 * rows @ tensors["mlp_a"][n, slot].T @ tensors["mlp_b"][n, slot].T * scales.mlp
            mine = layer.mlp(x, scales)[7 * n : 7 * n + 7]
            torch.testing.assert_close(mine, m, atol=1e-4, rtol=1e-4)


def test_the_step_is_adamw_without_momentum_on_a_prefix():
    model, config = small_model(), replace(TTT, lr=0.01, weight_decay=0.5)
    state = AdapterState(model, config, 3)
    state.reset(warm=False)
    mine = {n: t.detach().clone() for n, t in state.leaves(3).items()}
    theirs = {n: torch.nn.Parameter(t[:2].clone()) for n, t in mine.items()}
    adamw = torch.optim.AdamW(
        theirs.values(), lr=0.01, betas=(0.0, config.beta2), eps=config.eps, weight_decay=0.5
    )
    rng = torch.Generator().manual_seed(0)
    for _ in range(4):
        gradients = {n: torch.randn(t.shape, generator=rng) for n, t in mine.items()}
        for n, p in theirs.items():
            p.grad = gradients[n][:2].clone()
        adamw.step()
        state.step(gradients, 2)
    for n, t in state.leaves(3).items():
        torch.testing.assert_close(t[:2].detach(), theirs[n].detach(), atol=1e-6, rtol=1e-5)
        assert torch.equal(t[2], mine[n][2])


def test_the_step_on_all_tensors_at_once_is_its_formula(device):
    rng = torch.Generator().manual_seed(0)
    shapes, step = [(3, 4, 8), (3, 17), (3, 5, 2, 2), (90_001,)], 3
    values, gradients = ([torch.randn(s, generator=rng).to(device) for s in shapes] for _ in range(2))
    squares = [torch.rand(s, generator=rng).to(device) for s in shapes]
    gradients[0] = gradients[0].mT.contiguous().mT
    wanted = []
    for p, g, v in zip(values, gradients, squares, strict=True):
        p, g, v = (t.double() for t in (p, g, v))
        v = TTT.beta2 * v + (1 - TTT.beta2) * g.square()
        found = (v / (1 - TTT.beta2**step)).sqrt() + TTT.eps
        wanted.append(((1 - TTT.lr * TTT.weight_decay) * p - TTT.lr * g / found, v))
    ttt.adamw(values, squares, gradients, values, TTT, step)
    for p, v, (want_p, want_v) in zip(values, squares, wanted, strict=True):
        torch.testing.assert_close(p.double(), want_p, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(v.double(), want_v, rtol=1e-6, atol=0)


def test_the_model_reads_a_rounded_copy_and_the_step_is_in_float32():
    """As with CUDA's dtype: gradients are those of the copy, values keep what the copy rounds away."""
    model, config = small_model(), replace(TTT, lr=1e-4, weight_decay=0.0)
    exact = AdapterState(model, config, 2)
    model.compute_dtype = torch.bfloat16
    state = AdapterState(model, config, 2)
    assert len(state.tensors()) == 3 * len(exact.tensors()) // 2
    rng = torch.Generator().manual_seed(0)
    for _ in range(40):
        g = {n: torch.randn(t.shape, generator=rng).bfloat16() for n, t in state.leaves(2).items()}
        state.step(g, 2)
        exact.step({n: t.float() for n, t in g.items()}, 2)
    for n, copy in state.leaves(2).items():
        assert copy.dtype == torch.bfloat16 and torch.equal(copy, exact.leaves(2)[n].bfloat16()), n
        assert torch.equal(state._values[n], exact._values[n]), n
    state.reset(warm=True)
    for n, copy in state.leaves(2).items():
        start = exact.leaves(2)[n] if n.endswith("_a") else torch.zeros(())
        assert torch.equal(copy, start.bfloat16().expand_as(copy)), n


def test_the_frozen_matrices_are_folded_once_for_each_batch(monkeypatch):
    model, text, calls = small_model(), make_text(random_documents(LENGTHS)), []
    made = GPT.layer_weights
    monkeypatch.setattr(GPT, "layer_weights", lambda *given: calls.append(given) or made(*given))
    token_losses("ttt", model, text, config=replace(TTT, batch_documents=3))
    batches = plan_batches(np.array(LENGTHS) + 1, CONTEXT, replace(TTT, batch_documents=3))
    assert len(calls) == len(batches) > 1


def test_documents_that_end_are_scored_apart_and_without_gradients(monkeypatch):
    model, text = small_model(), make_text(random_documents([20, 20, 20, 50, 50]))
    want = token_losses("ttt", model, text, config=replace(TTT, batch_tokens=1024))
    monkeypatch.setattr(ttt, "SPLIT_TOKENS", 1)
    run = make_pass("ttt", model, text, config=replace(TTT, batch_tokens=1024))
    lanes = [[(q.lane, len(q.windows)) for q in turn.questions] for turn in run.turns]
    assert [(3, 2)] not in lanes and [(2, 3), (0, 2)] in lanes
    graphs = []

    class Watch:
        def __init__(self, predictor):
            self.predictor = predictor

        def __getattr__(self, name):
            return getattr(self.predictor, name)

        def predict(self, inputs):
            graphs.append((inputs.lane, torch.is_grad_enabled()))
            return self.predictor.predict(inputs)

    with evaluating(model):
        got = losses_of(run._replace(predictor=Watch(run.predictor)), text)
    np.testing.assert_allclose(got[1:], want[1:], atol=5e-5)
    assert {grad for lane, grad in graphs if lane} == {False} and (0, True) in graphs


@pytest.mark.parametrize(("heads", "least"), [("auto", COMPILE_COST), ("composed", COMPOSED_COST)])
@pytest.mark.parametrize(
    ("device", "gpus", "may", "worth"),
    [("cuda", 1, True, True), ("cuda", 2, True, False), ("cpu", 1, True, False), ("cuda", 1, False, False)],
)
def test_blocks_are_compiled_where_each_gpu_has_enough_to_do(device, gpus, may, worth, heads, least):
    batch = plan_batches(np.array([2000] * 64), 2048, TttConfig())[0]
    batches = [batch] * round(1.5 * least / batch.cost)
    dist = SimpleNamespace(device=torch.device(device), devices=gpus)
    assert worth_compiling(batches, SimpleNamespace(compiled=may, heads_name=heads), dist) is worth


def test_a_model_says_whether_it_was_prepared_to_be_compiled(monkeypatch):
    """Adapters of a run with train.compile=off, or with sdpa, which no graph can hold, are not compiled."""
    cpu, kernel = torch.device("cpu"), lambda q, k, v, cu_seqlens, max_seqlen: q
    assert not small_model().compiled
    assert not small_model().prepare(cpu, compile="blocks", attention="sdpa").compiled
    chosen = "pgolf.model.gpt.select_attention"
    monkeypatch.setattr(chosen, lambda *of, **more: ("varlen", kernel, ""))
    assert small_model().prepare(cpu, compile="blocks").compiled
    assert not small_model().prepare(cpu, compile="off").compiled


def test_without_learning_the_scores_are_those_of_the_windows():
    model, text = small_model(), make_text(random_documents(LENGTHS))
    config = replace(TTT, lr=0.0, chunk=8, chunk_growth=0)
    got = token_losses("ttt", model, text, config=config)
    want = token_losses("sliding", model, text, stride=8)  # 32 + 8 k, as chunks of 8 end
    np.testing.assert_allclose(got[1:], want[1:], atol=2e-5)


@pytest.mark.parametrize("batch", [{"batch_documents": 1}, {"batch_tokens": 40}, {"batch_tokens": 4096}])
def test_the_batches_do_not_change_the_scores(batch):
    model, text = small_model(), make_text(random_documents(LENGTHS))
    got, want = (token_losses("ttt", model, text, config=c) for c in (replace(TTT, **batch), TTT))
    np.testing.assert_allclose(got[1:], want[1:], atol=5e-5)


@pytest.mark.parametrize("world_size", [2, 3, 8])  # 8 ranks: some have nothing to do
def test_the_score_is_the_sum_over_tokens_at_any_number_of_ranks(world_size):
    model, text = small_model(), make_text(random_documents(LENGTHS))
    losses = token_losses("ttt", model, text)
    alone = run_pass("ttt", model, text, FakeDist(), config=TTT)
    assert alone.nats == pytest.approx(float(np.nansum(losses)), rel=1e-9)
    assert (alone.tokens, alone.bytes) == (text.tokens.size - 1, int(text.bytes.sum()))
    sent = []
    for rank in range(world_size):
        dist = FakeDist(rank, world_size)
        with pytest.raises(ValueError, match="scored"):
            run_pass("ttt", model, text, dist, config=TTT)
        sent.append(dist.seen)
    others = [sum(s[i] for s in sent[1:]) for i in range(3)]
    score = run_pass("ttt", model, text, FakeDist(0, world_size, others), config=TTT)
    assert score.nats == alone.nats


def test_the_model_is_left_as_it_was():
    model, text = small_model(), make_text(random_documents(LENGTHS))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.train()
    run_pass("ttt", model, text, FakeDist(), config=TTT)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def patterned(count: int, seed: int) -> list[list[int]]:
    """Documents that repeat a random line of 40 tokens, longer than the window, six times."""
    rng = np.random.default_rng(seed)
    return [np.tile(rng.integers(2, VOCAB, 40), 6).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def trained():
    """A model that was trained shortly on such documents, but not on those of the tests."""
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(40):
        ids = torch.tensor([t for d in patterned(2, 100 + step) for t in (BOS, *d)])
        cu = torch.arange(0, ids.numel() + 1, 241 // 8, dtype=torch.int32)
        cu = torch.cat((cu, torch.tensor([ids.numel()], dtype=torch.int32)))
        model(ids, ids.roll(-1), cu, max_seqlen=CONTEXT, loop=True).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_adapting_helps_on_documents_that_repeat_themselves(trained):
    """The pattern is longer than the window, so only the adapters can improve the prediction."""
    text = make_text(patterned(4, seed=0))
    fixed = token_losses("ttt", trained, text, config=replace(TTT, lr=0.0))
    adapted = token_losses("ttt", trained, text)
    scores = [run_pass("ttt", trained, text, FakeDist(), config=c).bpb for c in (replace(TTT, lr=0.0), TTT)]
    assert scores[1] < 0.9 * scores[0], scores
    gain = (fixed - adapted)[1:].reshape(4, 241)
    assert (gain[:, 200:].mean(axis=1) > 0.5).all(), "every document gains at its end"
    assert abs(gain[:, :8]).max() == 0, "the first chunk is scored before anything is learned"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"on": "q,z"}, r"ttt.on must name some of q,k,v,o,mlp,head, each once, got 'q,z'"),
        ({"on": ""}, r"ttt.on must name some of"),
        ({"first_chunks": "8,x"}, r"ttt.first_chunks must look like 8,16,24, got '8,x'"),
        ({"first_chunks": "8,0"}, r"ttt.first_chunks must be in \[1, ttt.chunk_max=256\], got 8,0"),
        ({"rank": 0}, r"ttt.rank must be >= 1, got 0"),
        ({"chunk": 64, "chunk_max": 32}, r"ttt.chunk_max must be at least ttt.chunk=64, got 32"),
        ({"beta2": 1.0}, r"ttt.beta2 must be in \[0, 1\), got 1.0"),
        ({"lr": -1.0}, r"ttt.lr must be >= 0, got -1.0"),
        ({"alpha": 0.0}, r"must be > 0, got 0.0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TttConfig(**change)


@requires_gpu
def test_cuda_scores_as_the_cpu_does():
    """CUDA computes in bfloat16, the CPU in float32: losses differ by the rounding, their mean hardly."""
    shape = replace(small_config(), width=128, heads=2, kv_heads=1, rope_dims=16)
    text = make_text(random_documents(LENGTHS))
    # A small rate: the first steps have the size of the rate whatever the gradient's, so signs that rounding
    # turns would show.
    config = replace(TTT, rank=8, alpha=16.0, lr=1e-3)
    scores = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        model = small_model(shape=shape).prepare(device)
        dist = FakeDist()
        dist.device = device
        scores.append(run_pass("ttt", model, text, dist, config=config))
    assert (scores[0].tokens, scores[0].bytes) == (scores[1].tokens, scores[1].bytes)
    assert scores[1].loss == pytest.approx(scores[0].loss, rel=1e-2)
