"""The heads as one step of autograd: what they compute and keep, and what torch.compile makes of them."""

import operator
import sys
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from pgolf.model import attention, gpt, heads
from pgolf.model.adapted import compile_adapted
from pgolf.model.attention import (
    Attention,
    AttentionWeights,
    attention_branch,
    fa4_problem,
    find_fa4,
    sdpa_attention,
)
from pgolf.model.gates import SMALLEST_SQUARE
from pgolf.model.gpt import GPT
from pgolf.model.heads import attend_heads, doc_branch, heads_branch
from pgolf.model.own_attention import doc_kernel
from pgolf.model.rope import rope_tables
from pgolf.model.uncompiled import uncompiled
from tests.conftest import requires_hopper
from tests.evaluate.legal_helpers import small_model
from tests.model.test_adapted import check_sizes, small_like
from tests.model.test_gpt import SWITCHES, label, packed, randomized, small
from tests.model.test_gpt import passed as whole
from tests.model.test_threads import same, states

CPU = torch.device("cpu")


def exclude_self(y, v, beyond=None):
    """Return what `pgolf.model.gates.exclude_self` does, which computes in float32, in the inputs' dtype."""
    wide = v.repeat_interleave(y.shape[1] // v.shape[1], 1)
    along = (y * wide).sum(-1, keepdim=True) / wide.square().sum(-1, keepdim=True).clamp_min(SMALLEST_SQUARE)
    return y - (along if beyond is None else (1 + beyond)[:, None] * along) * wide


@pytest.fixture
def fa4(stand_in, monkeypatch):
    """Let a model on the CPU have both kernels for Hopper, and operators for heads of any size."""
    stand_in()
    found = find_fa4().found
    kernels = {"fa4": found, "doc": doc_kernel, "sdpa": sdpa_attention}

    def select(name, *_, **__):
        name = "sdpa" if name == "auto" else name
        return Attention(name, kernels[name], "")

    monkeypatch.setattr(gpt, "select_attention", select)
    monkeypatch.setattr(heads, "_takes", lambda *_: True)
    monkeypatch.setattr(attention, "exclude_self", exclude_self)


def installed_fa4():
    """The kernel of the installed flash-attn-4, whose operators earlier tests may have replaced."""
    sys.modules.pop("pgolf.model.fa4", None)
    peer = find_fa4()
    if peer.problem == "not installed":
        pytest.skip("flash-attn-4 is not installed: pip install 'pgolf[fa4]'")
    assert peer.usable, f"flash-attn-4 {peer.version} is {peer.problem}"
    fa4_problem.cache_clear()
    return peer.found


def kernel_of(form):
    """The attention kernel of a form on a Hopper GPU."""
    return installed_fa4() if form == "fa4" else doc_kernel


GATES = ["none", "sparse", "dense", "out"]
BRANCHES = {"fa4": heads_branch, "doc": doc_branch, "product": heads.WITH_PRODUCT["doc"]}
FORMS = pytest.mark.parametrize("form", BRANCHES)
"""Both kinds of attention, and the second with the product of q, k and v in the node."""
LENGTHS = {"documents": [11, 1, 13], "one token": [1], "ones": [1] * 5}


def layer(config, lengths, dtype=torch.float64, device=CPU):
    """The leaves of one layer's attention by name, and what else it takes."""
    rng = torch.Generator().manual_seed(0)
    tokens, gate_width = sum(lengths), config.width if config.head_gate == "dense" else config.gate_window
    shapes = {
        "n": (tokens, config.width),
        "qkv": (config.width + 2 * config.kv_width, config.width),
        "out": (config.width, config.width),
        "gain": (config.heads,),
        "gate": (config.heads, gate_width),
    }
    if config.head_gate == "none":
        del shapes["gate"]
    leaves = {n: torch.randn(s, generator=rng, dtype=torch.float64) for n, s in shapes.items()}
    leaves["qkv"] /= config.width**0.5
    leaves["out"] /= config.width**0.5
    leaves = {n: t.to(device, dtype).requires_grad_() for n, t in leaves.items()}
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    rope = rope_tables(tokens, config.rope_dims, base=1e4, device=device)
    return leaves, {"rope": rope, "cu_seqlens": cu}


def passed(branch, kernel, config, leaves, context, *, exclusive=True):
    """The output of a branch and the gradients of its leaves."""
    weights = AttentionWeights(leaves["qkv"], leaves["out"], leaves["gain"], leaves.get("gate"), None, None)
    out = branch(config, kernel, leaves["n"], weights, exclusive=exclusive, **context)
    rng = torch.Generator().manual_seed(1)
    direction = torch.randn(out.shape, generator=rng, dtype=torch.float64).to(out)
    return [out, *torch.autograd.grad(out, list(leaves.values()), direction)]


@FORMS
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_a_layer_and_its_gradients_are_those_of_the_composed_operators(fa4, gate, exclusive, lengths, form):
    for rope_dims, kv_heads in ((0, 1), (4, 2), (8, 4)):
        config = small(head_gate=gate)
        config = replace(config, rope_dims=rope_dims, kv_heads=kv_heads)
        leaves, context = layer(config, lengths)
        wanted = passed(attention_branch, sdpa_attention, config, leaves, context, exclusive=exclusive)
        found = passed(BRANCHES[form], None, config, leaves, context, exclusive=exclusive)
        for name, a, b in zip(("y", *leaves), found, wanted, strict=True):
            # The tables of the rotation are float32 in both.
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


@FORMS
@pytest.mark.parametrize("of", [("n",), ("qkv",), ("gain",), ("n", "gate")], ids="-".join)
def test_a_part_of_the_gradients_is_the_same_as_in_all_of_them(fa4, of, form):
    leaves, context = layer(small(), [11, 1, 13])
    wanted = dict(zip(("y", *leaves), passed(BRANCHES[form], None, small(), leaves, context), strict=True))
    frozen = {name: t if name in of else t.detach() for name, t in leaves.items()}
    weights = AttentionWeights(frozen["qkv"], frozen["out"], frozen["gain"], frozen["gate"], None, None)
    out = BRANCHES[form](small(), None, frozen["n"], weights, exclusive=True, **context)
    rng = torch.Generator().manual_seed(1)
    direction = torch.randn(out.shape, generator=rng, dtype=torch.float64)
    found = torch.autograd.grad(out, [frozen[name] for name in of], direction)
    for name, grad in zip(of, found, strict=True):
        assert torch.equal(grad, wanted[name]), name


@pytest.mark.parametrize("attention", heads.PLAIN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_product_in_the_node_has_the_bits_of_the_one_before_it(fa4, attention, dtype):
    leaves, context = layer(small(), [11, 1, 13], dtype)
    wanted, found = (
        passed(branches[attention], None, small(), leaves, context)
        for branches in (heads.PLAIN, heads.WITH_PRODUCT)
    )
    for name, a, b in zip(("y", *leaves), found, wanted, strict=True):
        assert a.dtype == dtype and torch.equal(a, b), name


@pytest.mark.parametrize("doc", [False, True])
@pytest.mark.parametrize(
    "gate", [None, (0.7, 1), (1.0, 2), (1.0, 0)], ids=["no mix", "sparse", "out", "none"]
)
def test_the_gradients_are_those_of_the_differences(fa4, gate, doc):
    rng = torch.Generator().manual_seed(0)
    qkv, z, gain = (
        torch.randn(s, generator=rng, dtype=torch.float64).requires_grad_() for s in ((5, 32), (5, 4), (4,))
    )
    used = z if gate and gate[1] else None
    rope = rope_tables(5, 2, base=1e4, device=CPU)
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)

    def run(qkv, gain, *z):
        return attend_heads(qkv, *(z or (None,)), gain, rope, cu, 3, head_dim=4, mix=gate, doc=doc)

    inputs = (qkv, gain) if used is None else (qkv, gain, used)
    torch.autograd.gradcheck(run, inputs)

    def with_product(weight, n, gain, *z):
        z = z or (None,)
        return attend_heads(n, *z, gain, rope, cu, 3, head_dim=4, mix=gate, doc=doc, weight=weight)

    n, weight = (
        torch.randn(s, generator=rng, dtype=torch.float64).requires_grad_() for s in ((5, 6), (32, 6))
    )
    torch.autograd.gradcheck(with_product, (weight, n, *inputs[1:]))


HOW = {"fa4": {"attention": "fa4", "heads": "plain"}, "doc": {"attention": "doc", "heads": "plain"}}
HOW["product"] = {"attention": "doc", "heads": "auto"}
HOW["composed"] = {"attention": "fa4", "heads": "composed"}
"""Form -> what `GPT.prepare` is told."""


def prepared(config, dtype=torch.float64, *, form="composed", **more) -> GPT:
    """A model with a kind of attention whose heads are one node, or with composed operators."""
    model = randomized(config)
    with mock.patch.object(heads, "_takes_product", lambda _: True):
        model = (model.double() if dtype == torch.float64 else model).prepare(CPU, **HOW[form], **more)
    model.compute_dtype = dtype
    return model


def nodes(output):
    """The names of all steps on the way back from `output`."""
    found, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [following for following, _ in node.next_functions]
    return [node.name() for node in found]


@pytest.mark.parametrize("change", SWITCHES, ids=label)
def test_states_and_gradients_of_a_model_are_the_composed_ones(fa4, change):
    config, lengths = replace(small(), **change), [11, 1, 13]
    for loop in (False, True):
        wanted = states(prepared(config), lengths, loop=loop)
        same(states(prepared(config, form="fa4"), lengths, loop=loop), wanted)
        same(states(prepared(config, form="fa4", threads=True), lengths, loop=loop), wanted)
        same(states(prepared(config, form="doc", threads=loop), lengths, loop=loop), wanted)
        same(states(prepared(config, form="product", threads=loop), lengths, loop=loop), wanted)


@FORMS
@pytest.mark.parametrize("change", [{"head_gate": "dense", "xsa_layers": 2}, {"value_embed_layers": 2}])
def test_without_gradients_a_model_computes_the_same(fa4, change, form):
    config = replace(small(), **change)
    ids, cu = packed([11, 1, 12], config.vocab_size)
    with torch.inference_mode():
        wanted, found = (
            prepared(config, form=name)(ids, ids.roll(-1), cu, max_seqlen=24, loop=True)
            for name in ("composed", form)
        )
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


PLAIN_LAYERS = [
    ({}, 5),
    ({"xsa_layers": 2}, 5),
    ({"head_gate": "none", "xsa_layers": 0}, 5),
    ({"value_embed_layers": 2, "value_embed_width": 6}, 3),
    ({"xsa_strength": True, "xsa_layers": 2}, 3),
]


@pytest.mark.parametrize(
    ("change", "layers"), PLAIN_LAYERS, ids=[label(change) for change, _ in PLAIN_LAYERS]
)
def test_only_layers_whose_values_and_mix_are_plain_use_the_node(fa4, change, layers):
    config = replace(small(), **change)
    ids, cu = packed([11, 1, 12], config.vocab_size)
    for name, steps in (("fa4", layers), ("doc", layers), ("composed", 0)):
        hidden, _ = prepared(config, form=name).hidden(ids, cu, max_seqlen=24, loop=False)
        assert nodes(hidden).count("_HeadsBackward") == steps


@FORMS
@pytest.mark.parametrize("places", ["qkvo", "ko", "v", "o"])
def test_what_adapters_add_has_the_composed_results_and_gradients(fa4, places, form):
    config = small()
    leaves, context = layer(config, [11, 1, 13])
    widths = {"q": config.width, "k": config.kv_width, "v": config.kv_width, "o": config.width}
    rng = torch.Generator().manual_seed(2)
    extra = {  # of five documents of five tokens
        f"{place}_{name}": torch.randn(5, rows, 3, generator=rng, dtype=torch.float64).requires_grad_()
        for place in places
        for name, rows in (("low", 5), ("b", widths[place]))
    }
    context["lora"] = tuple(
        (extra[f"{place}_low"], extra[f"{place}_b"]) if place in places else None for place in "qkvo"
    )
    wanted = passed(attention_branch, sdpa_attention, config, leaves | extra, context)
    found = passed(BRANCHES[form], None, config, leaves | extra, context)
    assert "_HeadsBackward" in nodes(found[0])
    for name, a, b in zip(("y", *leaves, *extra), found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.slow
def test_with_adapters_one_graph_of_each_kind_of_block_serves_all_sizes(fa4):
    model = small_model(shape=small_like("pr1855"))
    model.prepare(CPU, attention="doc")
    torch._dynamo.reset()
    compiled = compile_adapted(uncompiled(model), backend="eager")
    assert compiled.heads_name == "auto"
    check_sizes(compiled, uncompiled(model))


@FORMS
def test_a_second_derivative_is_an_error(fa4, form):
    leaves, context = layer(small(), [5])
    weights = AttentionWeights(leaves["qkv"], leaves["out"], leaves["gain"], leaves["gate"], None, None)
    out = BRANCHES[form](small(), None, leaves["n"], weights, exclusive=True, **context)
    (first,) = torch.autograd.grad(out.square().sum(), leaves["n"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable"):
        first.sum().backward()


def compiled_states(config, form, backend, *, loop=True, **more):
    """States and gradients in float64 of a model whose blocks are compiled."""
    torch._dynamo.reset()
    model = prepared(config, form=form, compile="blocks", backend=backend, **more)
    found = states(model, [11, 1, 13], loop=loop)
    torch._dynamo.reset()
    return found


@pytest.mark.parametrize(
    ("change", "threads", "form"),
    [
        ({}, None, "fa4"),
        ({"head_gate": "dense"}, False, "fa4"),
        ({"head_gate": "none", "xsa_layers": 2}, None, "fa4"),
        ({"xsa_layers": 2}, None, "doc"),
        ({"xsa_layers": 2}, None, "product"),
    ],
    ids=["threads", "plain", "half exclusive", "doc", "product"],
)
def test_compiled_blocks_compute_the_same(fa4, change, threads, form):
    config = replace(small(), **change)
    wanted = states(prepared(config), [11, 1, 13], loop=True)
    same(compiled_states(config, form, "aot_eager_decomp_partition", threads=threads), wanted)


@FORMS
def test_a_model_compiled_as_one_graph_computes_the_same(fa4, form):
    wanted = states(prepared(small()), [11, 1, 13], loop=True)
    torch._dynamo.reset()
    model = prepared(small(), form=form, compile="model", backend="aot_eager")
    same(states(model, [11, 1, 13], loop=True), wanted)
    torch._dynamo.reset()


@FORMS
def test_inductor_computes_the_same(fa4, form):
    config = small()
    wanted = states(prepared(config), [11, 1, 13], loop=False)
    same(compiled_states(config, form, "inductor", loop=False), wanted)


OPERATORS = ("qk_norm_rope", "head_mix", "head_mix_backward", "qk_norm_rope_backward")
ATTENTION = {"fa4": ("fa4_forward", "fa4_backward"), "doc": ("doc_attention", "doc_attention_backward")}
OPERATORS = {form: {f"pgolf.{n}.default" for n in (*OPERATORS, *two)} for form, two in ATTENTION.items()}
OPERATORS["product"] = OPERATORS["doc"] - {"pgolf.qk_norm_rope.default"} | {"pgolf.qkv_rope.default"}
VIEWS = {"aten.view.default", "aten.slice.Tensor", "aten.permute.default", "aten.t.default", "getitem"}
VIEWS |= {"aten._unsafe_view.default", "aten.reshape.default"}
PRODUCTS = {"aten.mm.default", "aten.addmm.default"}


def called(node):
    return getattr(node.target, "__name__", None) if node.target is operator.getitem else str(node.target)


def beyond_views(nodes, step):
    """Follow nodes through views; return what is there."""
    found = []
    for node in nodes:
        found += beyond_views(step(node), step) if called(node) in VIEWS else [node]
    return found


@pytest.mark.parametrize(
    ("change", "form"), [({}, "fa4"), ({"head_gate": "none"}, "fa4"), ({}, "doc"), ({}, "product")]
)
def test_next_to_attention_compiled_blocks_have_products_and_nothing_that_adds_or_copies(fa4, change, form):
    graphs, operators = [], OPERATORS[form]

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def backend(graph, inputs):
        partition = partial(min_cut_rematerialization_partition, compiler="inductor")
        tables = {"decompositions": select_decomp_table(), "partition_fn": partition}
        return aot_autograd(fw_compiler=keep, bw_compiler=keep, **tables)(graph, inputs)

    compiled_states(replace(small(), **change), form, backend, loop=False)
    seen = set()
    for graph in graphs:
        for node in graph.graph.nodes:
            if called(node) not in operators:
                continue
            seen.add(called(node))
            before = beyond_views(node.all_input_nodes, lambda n: n.all_input_nodes[:1])
            after = beyond_views(list(node.users), lambda n: list(n.users))
            if called(node) == "pgolf.qkv_rope.default":
                before = []  # a product, too: what it reads may be anything
            for other in (*before, *after):
                allowed = other.op in ("placeholder", "output") or called(other) in operators | PRODUCTS
                assert allowed, f"{called(other)} next to {called(node)}"
    assert seen == operators


def kept(config, **how):
    """Bytes that one pass of compiled blocks keeps for the backward pass, without the weights."""
    torch._dynamo.reset()
    model = prepared(config, torch.float32, compile="blocks", backend="aot_eager_decomp_partition", **how)
    ids, cu = packed([11, 1, 13], config.vocab_size)
    weights, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        hidden, _ = model.hidden(ids, cu, max_seqlen=24, loop=False)
    torch._dynamo.reset()
    assert hidden.requires_grad
    return sum(size for pointer, size in found.items() if pointer not in weights)


@FORMS
def test_compiled_blocks_keep_no_more_for_the_backward_pass(fa4, form):
    assert kept(small(), form=form) <= kept(small())


DOCUMENTS = [1, 129, 570, 2300, 1096]


def errors(found, truth):
    """The error of each tensor relative to the norm of the true one."""
    pairs = [(a.detach().double().cpu(), b.detach()) for a, b in zip(found, truth, strict=True)]
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


# Few are compiled, which takes long.
LAYERS = [(gate, exclusive, False) for gate in GATES for exclusive in (True, False)]
LAYERS += [("sparse", True, True), ("sparse", False, True), ("none", True, True)]


@requires_hopper
@FORMS
@pytest.mark.parametrize(("gate", "exclusive", "compiled"), LAYERS)
def test_the_kernels_of_a_layer_are_no_less_exact_than_the_composed_operators(
    gate, exclusive, compiled, form
):
    device, kernel = torch.device("cuda"), kernel_of(form)
    config = replace(small(head_gate=gate), width=512, heads=8, kv_heads=4, rope_dims=16, max_context=2304)
    leaves, context = layer(config, DOCUMENTS, torch.bfloat16, device)
    exact = {name: t.detach().double().cpu().requires_grad_() for name, t in leaves.items()}
    on_cpu = {"rope": tuple(t.cpu() for t in context["rope"]), "cu_seqlens": context["cu_seqlens"].cpu()}
    truth = passed(attention_branch, sdpa_attention, config, exact, on_cpu, exclusive=exclusive)
    torch._dynamo.reset()
    branches = BRANCHES[form], attention_branch
    if compiled:
        branches = [torch.compile(branch, fullgraph=True, dynamic=False) for branch in branches]
    ours, composed = (
        errors(passed(branch, kernel, config, leaves, context, exclusive=exclusive), truth)
        for branch in branches
    )
    torch._dynamo.reset()
    for name, error, bound in zip(("y", *leaves), ours, composed, strict=True):
        # The gradients of the gain and of the gate are few numbers, whose errors differ by chance.
        few = name in ("gain", "gate")
        assert error <= (2 * bound + 4e-3 if few else 1.05 * bound + 1e-4), (name, error, bound)


@requires_hopper
@FORMS
@pytest.mark.parametrize("compiled", [False, True])
def test_the_kernels_of_a_layer_give_the_same_bits_again(compiled, form):
    # Segments of up to 128 tokens: longer ones add to the gradient of a query in several parts, in any order.
    config = replace(small(), width=512, heads=8, kv_heads=4, rope_dims=16, max_context=128)
    leaves, context = layer(config, [128, 1, 77, 128, 50] * 10, torch.bfloat16, torch.device("cuda"))
    torch._dynamo.reset()
    branch = BRANCHES[form]
    if compiled:
        branch = torch.compile(branch, fullgraph=True, dynamic=False)
    kernel = kernel_of(form)
    first, again = (passed(branch, kernel, config, leaves, context) for _ in range(2))
    torch._dynamo.reset()
    for name, a, b in zip(("y", *leaves), first, again, strict=True):
        assert torch.equal(a, b), name


@requires_hopper
@pytest.mark.parametrize(
    ("change", "form", "more"),
    [
        ({}, "doc", {}),
        ({}, "doc", {"mix": "auto", "threads": False}),
        ({"xsa_layers": 2, "head_gate": "out"}, "doc", {}),
        ({}, "fa4", {}),
        ({}, "product", {}),
    ],
    ids=["threads", "stream_mix", "half exclusive", "flash-attn-4", "product"],
)
def test_compiled_blocks_with_the_kernels_are_no_less_exact_than_composed_operators(change, form, more):
    kernel_of(form)
    config = replace(small(), width=256, heads=4, kv_heads=2, rope_dims=16, **change)
    want = whole(randomized(config).prepare(CPU), True)

    def run(heads):
        torch._dynamo.reset()
        cuda = {**HOW[form], "compile": "blocks", "heads": heads, **more}
        return whole(randomized(config).prepare(torch.device("cuda"), **cuda), True)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours = run(HOW[form]["heads"])
    names = [event.key for event in profile.key_averages()]
    forward = "pgolf::qkv_rope" if form == "product" else "pgolf::qk_norm_rope"
    assert {forward, "pgolf::qk_norm_rope_backward"} <= set(names)
    assert {"pgolf::head_mix", "pgolf::head_mix_backward"} <= set(names)
    assert ("pgolf::doc_attention_backward" in names) == (form != "fa4")
    composed = run("composed")
    for name, truth in want.items():
        error, bound = (float((found[name].cpu() - truth).norm()) for found in (ours, composed))
        # The errors of few numbers differ by chance.
        few = truth.numel() < 100 and name != "losses"
        assert error <= 1.5 * bound or few, (name, error, bound)
