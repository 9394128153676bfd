"""The model as a whole: size, initial loss, causality, document isolation, switches."""

import math
from dataclasses import replace

import pytest
import torch

from pgolf.config import ModelConfig
from pgolf.model.gpt import GPT, layer_order, parameter_shapes, skip_count
from pgolf.presets import naive, pr549, pr1855, tiny
from tests.conftest import requires_gpu, requires_hopper
from tests.model import reference

BOS = 1


def small(**changes) -> ModelConfig:
    sizes = {"vocab_size": 96, "width": 32, "heads": 4, "kv_heads": 2, "rope_dims": 4, "max_context": 24}
    layers = {"layers": 5, "xsa_layers": 5, "parallel_from": 4, "recurrence_start": 1, "recurrence_end": 2}
    return replace(tiny().model, **sizes, **layers, **changes)


def logits(model: GPT, ids: torch.Tensor, cu: torch.Tensor, *, loop: bool) -> torch.Tensor:
    hidden, table = model.hidden(ids, cu, max_seqlen=24, loop=loop)
    return hidden @ table.T


def randomized(config: ModelConfig, seed: int = 0) -> GPT:
    """A model in which the parts that start at zero are random, so that every path has an effect."""
    model = GPT(config, seed=seed)
    rng = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=rng)
    return model


def packed(lengths: list[int], vocab: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents of the given lengths, each of which starts with BOS, and their cu_seqlens."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocab, (sum(lengths),), generator=rng)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    ids[starts[:-1]] = BOS
    return ids, starts.to(torch.int32)


def test_record_parameter_count_is_the_published_one():
    assert sum(math.prod(s) for s in parameter_shapes(pr1855().model).values()) == 35_945_671


def test_record_initial_loss_is_uniform_over_the_vocabulary():
    model = GPT(pr1855().model, seed=0)
    ids, cu = packed([40, 88], 8192)
    with torch.no_grad():
        for loop in (False, True):
            loss = model(ids, ids.roll(-1), cu, max_seqlen=2048, loop=loop).mean().item()
            assert abs(loss - 9.011) < 0.02, f"loop={loop}: {loss}"


def test_model_trains_after_a_first_call_in_inference_mode():
    model = randomized(small())
    ids, cu = packed([5, 7], 96)
    with torch.inference_mode():
        scored = model(ids, ids.roll(-1), cu, max_seqlen=7, loop=False)
    loss = model(ids, ids.roll(-1), cu, max_seqlen=7, loop=False)
    assert torch.equal(loss.detach(), scored)
    loss.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_layer_order_matches_the_record_schedule():
    config = pr1855().model
    assert layer_order(config, loop=False) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10])
    assert layer_order(config, loop=True) == ([0, 1, 2, 3, 4, 5, 3, 4], [5, 3, 4, 5, 6, 7, 8, 9, 10])
    assert skip_count(config) == 8
    assert layer_order(naive().model, loop=True) == ([0, 1, 2, 3], [4, 5, 6, 7, 8])


@pytest.mark.parametrize("loop", [False, True])
def test_a_changed_future_token_changes_no_earlier_logit(loop):
    config = small()
    model, (ids, cu) = randomized(config), packed([11, 20], config.vocab_size)
    changed = ids.clone()
    changed[25] = 5 if ids[25] != 5 else 6
    with torch.no_grad():
        before, after = (logits(model, x, cu, loop=loop) for x in (ids, changed))
    assert torch.equal(before[:25], after[:25])
    assert not torch.equal(before[25:], after[25:])


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("kind", ["token", "channel"])
def test_a_changed_token_of_one_document_changes_no_logit_of_the_next(kind, loop):
    config = small(smear_kind=kind)
    model, (ids, cu) = randomized(config), packed([11, 20], config.vocab_size)
    for position in (3, 10):  # in the middle, and right before the next document's BOS
        changed = ids.clone()
        changed[position] = 5 if ids[position] != 5 else 6
        with torch.no_grad():
            before, after = (logits(model, x, cu, loop=loop) for x in (ids, changed))
        assert torch.equal(before[11:], after[11:]), f"position {position} leaks over the BOS at 11"
        assert not torch.equal(before[:11], after[:11])


@pytest.mark.parametrize("kind", ["token", "channel"])
def test_the_smear_gate_over_bos_leaks_one_token(kind):
    config = small(smear_over_bos=True, smear_kind=kind)
    model, (ids, cu) = randomized(config), packed([11, 20], config.vocab_size)
    changed = ids.clone()
    changed[10] = 5 if ids[10] != 5 else 6
    earlier = ids.clone()
    earlier[3] = 5 if ids[3] != 5 else 6
    with torch.no_grad():
        before, leaked, apart = (logits(model, x, cu, loop=True)[11:] for x in (ids, changed, earlier))
    assert not torch.equal(before, leaked) and torch.equal(before, apart)


def test_lanes_bound_the_recurrence_and_joint_layers_do_not():
    with pytest.raises(
        ValueError, match=r"must be below model\.parallel_from=4, got 4; only model\.parallel"
    ):
        replace(small(), recurrence_end=4)
    shapes = parameter_shapes(replace(small(), recurrence_end=4, parallel="gptj"))
    assert "lane_post" not in shapes and "lane_resid" not in shapes


@pytest.mark.parametrize("kind", ["token", "channel"])
def test_a_document_scores_the_same_alone_and_packed(kind):
    config = small(smear_kind=kind)
    model, (ids, cu) = randomized(config), packed([11, 20], config.vocab_size)
    alone = torch.tensor([0, 20, 20, 20], dtype=torch.int32)  # repeated ends are padding
    with torch.no_grad():
        together = logits(model, ids, cu, loop=True)[11:]
        single = logits(model, ids[11:], alone, loop=True)
    torch.testing.assert_close(together, single, atol=2e-5, rtol=1e-5)


SWITCHES = [
    {},
    {"activation": "relu2"},
    {"leaky_slope": 0.3},
    {"parallel": "gptj"},
    {"parallel": "gptj", "parallel_from": 1, "recurrence_end": 3},
    {"smear_over_bos": True},
    {"smear_window": 5},
    {"smear_kind": "channel"},
    {"smear_kind": "channel", "smear_over_bos": True, "bigram_buckets": 40, "bigram_width": 6},
    {"bigram_buckets": 40, "bigram_width": 6},
    {"bigram_buckets": 40, "bigram_width": 6, "smear_gate": False},
    {"value_embed_layers": 2, "value_embed_width": 6},
    {"value_embed_layers": 5, "value_embed_width": 6, "xsa_layers": 0},
    {"head_gate": "none"},
    {"head_gate": "dense"},
    {"head_gate": "out"},
    {"smear_gate": False},
    {"ln_scale": False},
    {"resid_mix": False},
    {"skip": "none"},
    {"skip": "weighted"},
    {"xsa_layers": 0},
    {"xsa_layers": 2},
    {"rope_dims": 0},
    {"rope_dims": 8},
    {"recurrence_repeats": 0},
    {"recurrence_repeats": 2},
    {"parallel_from": 5},
    {"xsa_strength": True},
    {"xsa_strength": True, "xsa_layers": 2},
    {"mudd": 7},
    {"mudd": 3, "parallel_from": 2, "recurrence_end": 1},
    {"mudd": 3, "parallel": "gptj", "parallel_from": 3, "recurrence_end": 4},
    {"mudd": 3, "parallel_from": 1, "recurrence_repeats": 0},
]


def label(change: dict[str, object]) -> str:
    return "-".join(f"{key}-{value}" for key, value in change.items()) or "base"


@pytest.mark.parametrize("change", SWITCHES, ids=label)
def test_every_switch_trains_and_changes_the_function(change):
    config = replace(small(), **change)
    model, (ids, cu) = randomized(config), packed([11, 13], config.vocab_size)
    losses = model(ids, ids.roll(-1), cu, max_seqlen=24, loop=True)
    losses.mean().backward()
    assert losses.shape == ids.shape and torch.isfinite(losses).all()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
    if change:
        base = randomized(small())
        with torch.no_grad():
            for name, p in base.named_parameters():
                own = dict(model.named_parameters()).get(name)
                if own is not None and own.shape == p.shape:
                    p.copy_(own)
            assert not torch.allclose(
                losses, base(ids, ids.roll(-1), cu, max_seqlen=24, loop=True), atol=1e-4
            )


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("change", SWITCHES, ids=label)
def test_states_and_gradients_are_those_of_the_plain_formulas(change, loop):
    config = replace(small(), **change)
    model, (ids, cu) = randomized(config).double(), packed([11, 1, 13], config.vocab_size)
    model.prepare(torch.device("cpu"))
    model.compute_dtype = torch.float64
    ours, _ = model.hidden(ids, cu, max_seqlen=24, loop=loop)
    plain = reference.hidden(model, ids, cu.tolist(), loop=loop)
    torch.testing.assert_close(ours, plain, atol=2e-5, rtol=1e-5)
    direction = torch.randn(plain.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found, wanted = (torch.autograd.grad(x, parameters, direction, allow_unused=True) for x in (ours, plain))
    for name, a, b in zip(names, found, wanted, strict=True):
        # A part that no layer of this order uses has no gradient in the plain form, and zeros in the other.
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, atol=2e-5 * float(b.abs().max() + 1), rtol=1e-4, msg=name)


@requires_hopper
@pytest.mark.parametrize("compile", ["off", "blocks"])
@pytest.mark.parametrize("change", [{}, {"parallel": "gptj", "leaky_slope": 0.0}], ids=label)
def test_the_kernels_of_the_mlp_are_no_less_exact_than_composed_operators(change, compile):
    config = replace(small(), width=128, mlp_mult=4, **change)
    ids, cu = packed([11, 130, 24], config.vocab_size)
    config = replace(config, max_context=130)

    def run(device: str, mlp: str) -> dict[str, torch.Tensor]:
        torch._dynamo.reset()
        options = {"compile": compile, "attention": "varlen"} if device == "cuda" else {}
        model = randomized(config).prepare(torch.device(device), mlp=mlp, **options)
        losses = model(ids.to(device), ids.roll(-1).to(device), cu.to(device), max_seqlen=130, loop=True)
        losses.mean().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if name in GPT.bank_names}
        return {name: t.detach().cpu() for name, t in {"losses": losses, **grads}.items()}

    want = run("cpu", "composed")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours = run("cuda", "auto")
    names = [event.key for event in profile.key_averages()]
    assert "pgolf::norm_mlp_up" in names and "pgolf::norm_mlp_dact" in names
    composed = run("cuda", "composed")
    for name, truth in want.items():
        error, bound = (float((found[name] - truth).norm()) for found in (ours, composed))
        assert error <= 2 * bound, name


FORMS_OF_MIXES = [{}, {"skip": "weighted"}, {"skip": "none"}, {"parallel": "gptj"}, {"resid_mix": False}]


def passed(model: GPT, loop: bool) -> dict[str, torch.Tensor]:
    """The losses of three documents and all gradients, by name."""
    device = model.tok_emb.device
    ids, cu = (t.to(device) for t in packed([11, 1, 12], model.config.vocab_size))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = model(ids, ids.roll(-1), cu, max_seqlen=24, loop=loop)
    losses.mean().backward()
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[name]), f"the pass changed {name}"
    return {
        "losses": losses.detach(),
        **{n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    }


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("change", FORMS_OF_MIXES, ids=label)
def test_mixes_by_the_operator_change_nothing_but_roundings_of_the_lanes(change, loop):
    config = replace(small(), **change)
    composed, ours = (
        passed(randomized(config).prepare(torch.device("cpu"), mix=mix), loop) for mix in ("composed", "auto")
    )
    assert composed.keys() == ours.keys()
    for name, value in composed.items():
        # The gradient of a scalar is a sum over tokens, then columns, in place of one over both.
        exact = name not in ("lane_post", "lane_resid")
        assert (
            torch.equal(ours[name], value)
            if exact
            else torch.allclose(ours[name], value, rtol=1e-5, atol=1e-7)
        )


@requires_gpu
@pytest.mark.parametrize("compile", ["off", "blocks"])
@pytest.mark.parametrize("change", FORMS_OF_MIXES, ids=label)
def test_the_kernels_of_the_mixes_are_no_less_exact_than_composed_operators(change, compile):
    torch._dynamo.reset()
    config = replace(small(), **change)
    want = passed(randomized(config).prepare(torch.device("cpu")), True)
    cuda = {"attention": "varlen", "compile": compile}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours = passed(randomized(config).prepare(torch.device("cuda"), mix="auto", **cuda), True)
    names = [event.key for event in profile.key_averages()]
    assert "pgolf::stream_mix" in names and "pgolf::stream_mix_backward" in names
    composed = passed(randomized(config).prepare(torch.device("cuda"), **cuda), True)
    for name, truth in want.items():
        error, bound = (float((found[name].cpu() - truth).norm()) for found in (ours, composed))
        # The errors of few numbers differ by chance.
        assert error <= 2 * bound or (truth.numel() < 100 and name != "losses"), name


def test_ignored_targets_cost_nothing():
    config = small()
    model, (ids, cu) = randomized(config), packed([24], config.vocab_size)
    targets = ids.roll(-1)
    targets[7:] = -100
    losses = model(ids, targets, cu, max_seqlen=24, loop=True)
    assert (losses[7:] == 0).all() and (losses[:7] > 0).all()


def test_observe_sees_every_matrix_input_on_every_pass():
    config = small()
    model, (ids, cu) = randomized(config), packed([24], config.vocab_size)
    seen: dict[tuple[str, int], list[torch.Size]] = {}
    with torch.no_grad():
        model(
            ids,
            ids,
            cu,
            max_seqlen=24,
            loop=True,
            observe=lambda k, i, x: seen.setdefault((k, i), []).append(x.shape),
        )
    encoder, decoder = layer_order(config, loop=True)
    assert {key for keys in model.quant_inputs().values() for key in keys} == seen.keys()
    for (kind, layer), shapes in seen.items():
        expected = 1 if kind == "head" else (encoder + decoder).count(layer)
        assert len(shapes) == expected, (kind, layer)
    banks = dict(model.named_parameters())
    for name, keys in model.quant_inputs().items():
        for key in keys:
            assert seen[key][0][-1] == banks[name].shape[-1], (name, key)


def test_too_long_a_segment_is_refused():
    model, (ids, cu) = GPT(small()), packed([24], 96)
    with pytest.raises(ValueError, match="max_context=24, got 25"):
        model(ids, ids, cu, max_seqlen=25, loop=False)


def test_initialization_follows_the_seed():
    a, b, c = (GPT(small(), seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["tok_emb"], c["tok_emb"])
    up = a["mlp_up_bank"][0]
    torch.testing.assert_close(up.T @ up, torch.eye(up.shape[1]), atol=1e-5, rtol=0)


@torch.library.custom_op("pgolf_test::attention", mutates_args=())
def opaque_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> torch.Tensor:
    from pgolf.model.attention import sdpa_attention

    return sdpa_attention(q, k, v, cu_seqlens, max_seqlen).contiguous()


@opaque_attention.register_fake
def _(q, k, v, cu_seqlens, max_seqlen):
    return q.new_empty(q.shape)


# blocks: stem, fold, join, and serial and parallel, with and without a skip. model: stem, fold, and all
# layers, with and without the loop. The further parts add the value embeddings' graph, and to "blocks" serial
# layers that are joint or have value embeddings instead of the parallel ones.
PARTS = {"bigram_buckets": 40, "value_embed_layers": 2, "parallel": "gptj", "leaky_slope": 0.3}
PARTS["smear_kind"] = "channel"
# One more graph each in "blocks": the sums before the last layer and before the last norm.
MUDD = {"mudd": 3, "xsa_strength": True}


@pytest.mark.parametrize(
    "compile, change, graphs",
    [
        ("blocks", {}, 7),
        ("model", {}, 4),
        ("blocks", PARTS, 9),
        ("model", PARTS, 5),
        ("blocks", MUDD, 9),
        ("model", MUDD, 4),
    ],
)
def test_layers_trace_without_breaks_into_few_graphs(compile, change, graphs):
    # CUDA attention is one opaque op; an opaque stand-in shows here that nothing else breaks the graph.
    config = replace(small(), **change)
    model, (ids, cu) = randomized(config), packed([11, 13], config.vocab_size)
    model.prepare(torch.device("cpu"), compile=compile, backend="aot_eager")
    model._attention = torch.ops.pgolf_test.attention
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        compiled = model(ids, ids, cu, max_seqlen=24, loop=True)
        model(ids, ids, cu, max_seqlen=24, loop=False)
        eager = randomized(config)(ids, ids, cu, max_seqlen=24, loop=True)
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= graphs


def test_no_network_has_more_graphs_than_the_compiler_keeps():
    # A trained and a scored layer are two graphs, and #549 has five kinds of layers.
    sizes = {"vocab_size": 96, "width": 32, "heads": 4, "kv_heads": 2, "rope_dims": 4, "max_context": 24}
    config = replace(pr549().model, **sizes)
    model, (ids, cu) = GPT(config), packed([11, 13], config.vocab_size)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        model.prepare(torch.device("cpu"), compile="blocks", backend="eager")
        model._attention = torch.ops.pgolf_test.attention
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                model(ids, ids, cu, max_seqlen=24, loop=True)
