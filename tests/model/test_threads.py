"""Threaded streams: the blocks compute what they do without, and leave autograd fewer sums of gradients.

Odd sizes, because tiles and vectors have even ones.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pgolf.model import _no_threads, gpt
from pgolf.model.gpt import GPT, layer_order
from pgolf.model.lora import adapter_shapes, bind
from pgolf.presets import PRESETS
from tests.conftest import requires_gpu
from tests.model.test_adapted import masked_attention
from tests.model.test_gpt import SWITCHES, label, packed, passed, randomized, small

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
def test_threads_change_no_state_and_no_gradient(change):
    config, lengths = replace(small(), **change), [11, 1, 13]
    wanted = states(prepared(config), lengths, loop=True)
    same(states(prepared(config, threads=True), lengths, loop=True), wanted)


def shrunk(name: str):
    """The model of a preset with its parts and few sizes."""
    model = PRESETS[name]().model
    own = {
        f: getattr(small(), f) for f in ("vocab_size", "width", "heads", "kv_heads", "rope_dims", "layers")
    }
    own |= {f: getattr(small(), f) for f in ("parallel_from", "recurrence_start", "recurrence_end")}
    return replace(model, **own, xsa_layers=min(model.xsa_layers, 5), max_context=24)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_compute_the_same_with_threads(name):
    config, lengths = shrunk(name), [11, 1, 12]
    for loop in (False, True):
        wanted = states(prepared(config), lengths, loop=loop)
        same(states(prepared(config, threads=True), lengths, loop=loop), wanted)


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES)
def test_bfloat16_is_as_exact_as_without_threads(lengths):
    config = replace(small(), max_context=130)
    truth = states(prepared(config), lengths, loop=True)
    plain, ours = (
        states(prepared(config, torch.bfloat16, threads=threads), lengths, loop=True)
        for threads in (False, True)
    )
    for name, value in truth.items():
        error, bound = (float((found[name] - value).norm()) for found in (ours, plain))
        # The errors of few numbers differ by chance.
        few = value.numel() < 100 and name != "hidden"
        assert error <= 2 * bound or (few and error <= 2 * bound + 0.02 * float(value.norm())), name


def steps(output: torch.Tensor) -> set[torch.autograd.graph.Node]:
    """All steps on the way back from `output`."""
    found, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [following for following, _ in node.next_functions]
    return found


def additions(output: torch.Tensor, shape: tuple[int, ...]) -> int:
    """How often autograd itself adds two gradients of a shape on the way back from `output`."""
    edges = Counter(edge for node in steps(output) for edge in node.next_functions if edge[0] is not None)
    sizes = {key: tuple(key[0]._input_metadata[key[1]].shape) for key, n in edges.items() if n > 1}
    return sum(edges[key] - 1 for key, size in sizes.items() if size == shape)


@pytest.mark.parametrize("loop", [False, True])
def test_compiled_blocks_with_threads_leave_autograd_three_sums_and_have_no_more_graphs(loop):
    config, lengths = small(), [11, 1, 13]
    ids, cu = packed(lengths, config.vocab_size)
    counted, graphs, found = {}, {}, {}
    for name, threads in {"plain": False, "thread": None}.items():
        torch._dynamo.reset()
        compiler = CompileCounterWithBackend("aot_eager")
        model = prepared(config, torch.float32, compile="blocks", backend=compiler, threads=threads)
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
    plain, ours = (prepared(config, threads=threads) for threads in (False, True))
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
    for threads in (False, True):
        model, inputs = prepared(config, threads=threads), []
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
@pytest.mark.parametrize("compile", ["off", "blocks"])
def test_threads_on_a_gpu_are_no_less_exact_than_autograd(compile):
    torch._dynamo.reset()
    config, cuda = small(), {"attention": "varlen", "compile": compile}
    want = passed(randomized(config).prepare(CPU), True)
    ours, plain = (
        passed(randomized(config).prepare(torch.device("cuda"), threads=threads, **cuda), True)
        for threads in (True, False)
    )
    for name, truth in want.items():
        error, bound = (float((found[name].cpu() - truth).norm()) for found in (ours, plain))
        # The errors of few numbers differ by chance.
        assert error <= 2 * bound or (truth.numel() < 100 and name != "losses"), name


@pytest.mark.parametrize(
    ("options", "threaded"),
    [
        ({}, False),
        ({"compile": "blocks", "backend": "eager"}, True),
        ({"compile": "blocks", "backend": "eager", "threads": False}, False),
        ({"compile": "model", "backend": "eager", "threads": True}, False),
        ({"threads": True}, True),
    ],
)
def test_compiled_blocks_have_threads_unless_they_are_switched_off(options, threaded):
    torch._dynamo.reset()
    model = prepared(small(), torch.float32, attention="sdpa", **options)
    model._attention = masked_attention
    ids, cu = packed([11, 1, 13], model.config.vocab_size)
    hidden, _ = model.hidden(ids, cu, max_seqlen=13, loop=True)
    torch._dynamo.reset()
    assert ("_TiedBackward" in {step.name() for step in steps(hidden)}) == threaded


def test_what_the_program_that_scores_has_for_threads_leaves_the_plain_model(monkeypatch):
    config, lengths = small(), [11, 1, 13]
    wanted = states(prepared(config), lengths, loop=True)
    monkeypatch.setattr(gpt, "threaded", _no_threads.threaded)
    model = prepared(config, threads=True)
    found = states(model, lengths, loop=True)
    assert model._threads is None and all(torch.equal(found[name], t) for name, t in wanted.items())
