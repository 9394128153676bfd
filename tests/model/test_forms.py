"""The forms of the blocks that `GPT.prepare` offers: the joined head gate and threaded streams.

Each computes what the plain form does. Odd sizes, because tiles and vectors have even ones.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pgolf.model.blocks import GATE_ROWS
from pgolf.model.gpt import GPT, layer_order
from pgolf.model.lora import adapter_shapes, bind
from pgolf.model.threads import Threads
from pgolf.presets import PRESETS
from tests.conftest import requires_gpu
from tests.model.test_adapted import masked_attention
from tests.model.test_gpt import SWITCHES, label, packed, passed, randomized, small

FORMS = {
    "gate": lambda: {"join_gate": True},
    "thread": lambda: {"threads": Threads()},
    "gate+thread": lambda: {"join_gate": True, "threads": Threads()},
}
CPU = torch.device("cpu")
CASES = {
    "1 token": [1],
    "127 tokens": [127],
    "129 tokens": [24, 1, 104],
    "documents of one token": [1] * 7,
}


def prepared(config, dtype=torch.float64, device=CPU, **form) -> GPT:
    model = randomized(config)
    model = (model.double() if dtype == torch.float64 else model).prepare(device, **form)
    model.compute_dtype = dtype
    return model


def states(model: GPT, lengths: list[int], *, loop: bool) -> dict[str, torch.Tensor]:
    """The final states and all gradients in float64, by name."""
    ids, cu = packed(lengths, model.config.vocab_size)
    hidden, _ = model.hidden(ids, cu, max_seqlen=max(lengths), loop=loop)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    hidden.backward(direction.to(hidden.dtype))
    found = {"hidden": hidden.detach(), **{n: p.grad for n, p in model.named_parameters()}}
    return {name: t.double() for name, t in found.items() if t is not None}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-11 * scale + 1e-13, msg=name)


@pytest.mark.parametrize("change", SWITCHES, ids=label)
def test_a_form_changes_no_state_and_no_gradient(change):
    config, lengths = replace(small(), **change), [11, 1, 13]
    wanted = states(prepared(config), lengths, loop=True)
    for form in FORMS.values():
        same(states(prepared(config, **form()), lengths, loop=True), wanted)


def test_a_joined_gate_is_rows_of_the_matrix_of_q_k_and_v():
    config = small()
    model = randomized(config).prepare(CPU, join_gate=True)
    joined, apart = model.layer_weights(join_gate=True)[3].attn, model.layer_weights()[3].attn
    rows, (heads, columns) = apart.qkv.shape[0], apart.gate.shape
    assert joined.gate is None and joined.qkv.shape == (rows + GATE_ROWS, config.width)
    assert torch.equal(joined.qkv[:rows], apart.qkv)
    assert torch.equal(joined.qkv[rows : rows + heads, :columns], apart.gate)
    assert not joined.qkv[rows + heads :].any() and not joined.qkv[rows:, columns:].any()


def shrunk(name: str):
    """The model of a preset with its parts and few sizes."""
    model = PRESETS[name]().model
    own = {
        f: getattr(small(), f) for f in ("vocab_size", "width", "heads", "kv_heads", "rope_dims", "layers")
    }
    own |= {f: getattr(small(), f) for f in ("parallel_from", "recurrence_start", "recurrence_end")}
    return replace(model, **own, xsa_layers=min(model.xsa_layers, 5), max_context=24)


GATED = [name for name in PRESETS if PRESETS[name]().model.head_gate != "none"]


def test_some_presets_have_a_gate_of_each_width():
    assert {PRESETS[name]().model.gate_window for name in GATED} >= {12, 24}


@pytest.mark.parametrize("name", GATED)
def test_presets_with_a_gate_compute_the_same_in_every_form(name):
    config, lengths = shrunk(name), [11, 1, 12]
    for loop in (False, True):
        wanted = states(prepared(config), lengths, loop=loop)
        same(states(prepared(config, **FORMS["gate+thread"]()), lengths, loop=loop), wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES)
def test_bfloat16_is_as_exact_as_in_the_plain_form(lengths, form):
    config = replace(small(), max_context=130)
    truth = states(prepared(config), lengths, loop=True)
    plain, ours = (
        states(prepared(config, torch.bfloat16, **options), lengths, loop=True)
        for options in ({}, FORMS[form]())
    )
    for name, value in truth.items():
        error, bound = (float((found[name] - value).norm()) for found in (ours, plain))
        # The errors of few numbers differ by chance.
        few = value.numel() < 100 and name != "hidden"
        assert error <= 2 * bound or (few and error <= 2 * bound + 0.02 * float(value.norm())), name


def additions(output: torch.Tensor, shape: tuple[int, ...]) -> int:
    """How often autograd itself adds two gradients of a shape on the way back from `output`."""
    edges: Counter[tuple[object, int]] = Counter()
    nodes, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node in nodes:
            continue
        nodes.add(node)
        for following, slot in node.next_functions:
            if following is not None:
                edges[following, slot] += 1
                todo.append(following)
    sizes = {key: tuple(key[0]._input_metadata[key[1]].shape) for key, n in edges.items() if n > 1}
    return sum(edges[key] - 1 for key, size in sizes.items() if size == shape)


@pytest.mark.parametrize("loop", [False, True])
def test_compiled_blocks_with_threads_leave_autograd_three_sums_and_have_no_more_graphs(loop):
    config, lengths = small(), [11, 1, 13]
    ids, cu = packed(lengths, config.vocab_size)
    counted, graphs, found = {}, {}, {}
    for name, options in {"plain": {}, "thread": FORMS["thread"]()}.items():
        torch._dynamo.reset()
        compiler = CompileCounterWithBackend("aot_eager")
        model = prepared(config, torch.float32, compile="blocks", backend=compiler, **options)
        model._attention = masked_attention
        hidden, _ = model.hidden(ids, cu, max_seqlen=13, loop=loop)
        counted[name], graphs[name] = additions(hidden, (25, config.width)), compiler.frame_count
        hidden.square().sum().backward()
        found[name] = {n: p.grad for n, p in model.named_parameters()}
    torch._dynamo.reset()
    encoder, decoder = layer_order(config, loop=loop)
    skips = min(len(encoder), len(decoder))
    # Plain: x0 in every block and as the first x, a skip and the next block, both lanes. With threads: the
    # first block reads x0 twice, the first of the decoder x and the same as a skip, and both lanes remain.
    assert counted == {"plain": len(encoder) + len(decoder) + skips + 1, "thread": 3}
    assert graphs["thread"] <= graphs["plain"]
    for name, grad in found["plain"].items():
        torch.testing.assert_close(
            found["thread"][name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max())
        )


@pytest.mark.parametrize("asked", [0, 3])
def test_adapters_see_the_plain_model(asked):
    config = small()
    plain, ours = (prepared(config, **options) for options in ({}, FORMS["gate+thread"]()))
    ids, cu = packed([9, 9], config.vocab_size)
    slots = sum(map(len, layer_order(config, loop=True)))
    rng = torch.Generator().manual_seed(5)
    shapes = adapter_shapes(config, slots, 2)
    tensors = {
        n: (torch.randn(2, *s, generator=rng, dtype=torch.float64) / 4).requires_grad_()
        for n, s in shapes.items()
    }

    def run(model: GPT) -> list[torch.Tensor]:
        adapters = bind(tensors, config, torch.float64, scale=1.0)
        hidden, _ = model.hidden(ids, cu, max_seqlen=9, loop=True, adapters=adapters, asked=asked)
        used = [t for n, t in tensors.items() if not n.startswith("head")]
        return [hidden, *torch.autograd.grad(hidden.square().sum(), used)]

    for found, wanted in zip(run(ours), run(plain), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_observers_see_the_same_inputs_and_the_state_has_the_same_names():
    config = small()
    ids, cu = packed([11, 1, 12], config.vocab_size)
    seen, models = [], []
    for options in ({}, FORMS["gate+thread"]()):
        model, inputs = prepared(config, **options), []
        model(
            ids,
            ids.roll(-1),
            cu,
            max_seqlen=24,
            loop=True,
            observe=lambda kind, i, x, inputs=inputs: inputs.append((kind, i, x.detach())),
        )
        seen.append(inputs)
        models.append(model)
    assert [entry[:2] for entry in seen[0]] == [entry[:2] for entry in seen[1]]
    for (_, _, wanted), (_, _, found) in zip(*seen, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    before, after = (model.state_dict() for model in models)
    assert list(before) == list(after) and all(torch.equal(after[n], t) for n, t in before.items())


@requires_gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compile", ["off", "blocks"])
def test_forms_on_a_gpu_are_no_less_exact_than_the_plain_one(compile, form):
    torch._dynamo.reset()
    config, cuda = small(), {"attention": "varlen", "compile": compile}
    want = passed(randomized(config).prepare(CPU), True)
    ours, plain = (
        passed(randomized(config).prepare(torch.device("cuda"), **options, **cuda), True)
        for options in (FORMS[form](), {})
    )
    for name, truth in want.items():
        error, bound = (float((found[name].cpu() - truth).norm()) for found in (ours, plain))
        # The errors of few numbers differ by chance.
        assert error <= 2 * bound or (truth.numel() < 100 and name != "losses"), name
