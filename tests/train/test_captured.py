"""Captured passes: those of a GPU against launched ones, and on the host which passes are replayed."""

import gc
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pgolf.cli.main import main
from pgolf.config import ModelConfig
from pgolf.data.loader import Batch, padded_cu_seqlens
from pgolf.model.attention import fa4_problem
from pgolf.model.fake_quant import FakeQuant
from pgolf.model.gpt import GPT
from pgolf.train import captured
from pgolf.train.captured import Form, MicroSteps, difference, even_starts, obstacle
from pgolf.train.weights import load_weights
from tests.conftest import requires_gpu
from tests.e2e.conftest import SMALL, make_shards

CPU = torch.device("cpu")
SHAPE = {"layers": 4, "xsa_layers": 4, "parallel_from": 3, "recurrence_start": 1, "recurrence_end": 2}
SMALLEST = ModelConfig(
    **SHAPE, vocab_size=32, width=16, heads=2, kv_heads=1, max_context=128, rope_dims=4, recurrence_repeats=1
)
HOPPER = ModelConfig(**SHAPE, vocab_size=512, width=256, heads=4, kv_heads=2, mlp_mult=2, max_context=128)
"""Heads of 64 dimensions and a wide MLP, so that the kernels of attention and norm_mlp compute it."""
OFF, ON = Form(loop=False), Form(loop=True)
ROUNDED = Form(loop=True, rounded=True)


def make_model(config, device=CPU, **how):
    """Return a prepared model that has gradients and no part that is zero."""
    model, rng = GPT(config, seed=1).prepare(torch.device(device), **how), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=rng).to(p.device)
            p.grad = torch.zeros_like(p)
    return model


def make_batch(config, tokens, shortest, longest, seed, device=CPU):
    """Return random tokens in segments of random lengths, odd and even."""
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *rng.integers(shortest, longest + 1, size=tokens // shortest)])
    ids = torch.from_numpy(rng.integers(0, config.vocab_size, size=tokens + 1)).to(device)
    cu = padded_cu_seqlens(starts[starts < tokens], tokens).to(device)
    return Batch(ids[:-1].clone(), ids[1:].clone(), cu, config.max_context, 0.0)


def make_batches(config, tokens=4096, device=CPU):
    """Return batches whose cu_seqlens have 64, 128, 192 and 256 entries."""
    half = config.max_context // 2
    spans = ((half + 1, config.max_context), (21, 61), (11, 40), (1, 34))
    batches = [make_batch(config, tokens, *span, seed, device) for seed, span in enumerate(spans)]
    assert [b.cu_seqlens.numel() for b in batches] == [64, 128, 192, 256]
    return batches


def plan(batches):
    """Return passes in which form, length and tokens change from one to the next."""
    a, b, c, d = batches
    other = replace(a, inputs=b.inputs, targets=c.targets)
    return [(b, OFF), (a, OFF), (c, ON), (other, ON), (d, ON), (d, OFF), (b, ON), (c, OFF), (a, ON), (b, ON)]


def take(micro, model, passes):
    """Return the sum of the losses and all gradients after each pass; the weights change in the middle."""
    before, found = [p.detach().clone() for p in model.parameters()], []
    for p in model.parameters():
        p.grad.zero_()
    micro.begin()
    for i, (batch, form) in enumerate(passes):
        if i == len(passes) // 2:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.01)
        micro.forward(batch, form)
        micro.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        found.append({"total": micro.total.clone(), **gradients})
    with torch.no_grad():
        for p, old in zip(model.parameters(), before, strict=True):
            p.copy_(old)
    return found


def unequal(one, other):
    """Return the pass and the name of everything that is not equal bit for bit."""
    pairs = enumerate(zip(one, other, strict=True))
    return [(i, name) for i, (a, b) in pairs for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture
def fixed_order(monkeypatch):
    """Let torch and its compiler add the parts of a gradient in a fixed order, where they can."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def captured_on_gpu(model, batches, forms):
    """Return passes that are captured for cu_seqlens of 64, 128 and 192 entries."""
    micro = MicroSteps(model, torch.device("cuda"), passes=3, rounding=FakeQuant(3.0, 3.0).__call__)
    for form in forms:
        for batch in batches[:2]:
            micro.forward(batch, form)
            micro.backward()
    note = micro.capture(batches[:1], forms)
    assert re.fullmatch(
        rf"passes of {len(forms)} forms are captured as CUDA graphs, for cu_seqlens of 64, 128, 192 entries; "
        r"they hold [\d,]+ MiB",
        note,
    ), note
    assert micro.pool_bytes > 0
    return micro


# Segments of up to 128 tokens: longer ones add to the gradient of a query in several parts.
@requires_gpu
@pytest.mark.parametrize(
    ("attention", "compile", "heads"),
    [
        ("varlen", "off", "composed"),
        ("auto", "blocks", "composed"),
        ("auto", "blocks", "auto"),
        ("fa4", "blocks", "auto"),
    ],
)
def test_replayed_passes_equal_launched_ones_bit_for_bit(attention, compile, heads, fixed_order):
    why = fa4_problem(torch.device("cuda"), 4, 2, 64) if attention == "fa4" else ""
    if why in ("not installed", "needs a Hopper GPU"):
        pytest.skip(f"flash-attn-4 {why}")
    torch._dynamo.reset()
    model = make_model(HOPPER, "cuda", attention=attention, compile=compile, heads=heads)
    batches = make_batches(HOPPER, device="cuda")
    passes = plan(batches)
    launching = MicroSteps(model, torch.device("cuda"), passes=3)
    take(launching, model, passes)  # compiles
    launched, again = take(launching, model, passes), take(launching, model, passes)
    assert unequal(launched, again) == [], "launched passes do not equal each other"
    micro = captured_on_gpu(model, batches, [OFF, ON])
    assert unequal(launched, take(micro, model, passes)) == []
    assert unequal(launched, take(launching, model, passes)) == [], "launched passes changed"


@requires_gpu
def test_replayed_passes_of_long_segments_and_rounded_matrices_are_near_launched_ones():
    config = replace(HOPPER, max_context=512)
    torch._dynamo.reset()
    model = make_model(config, "cuda", attention="auto", compile="off")
    spans = ((300, 512), (35, 61), (25, 30))
    batches = [make_batch(config, 4096, *s, i, "cuda") for i, s in enumerate(spans)]
    passes = [(b, form) for b in batches for form in (ROUNDED, OFF)]
    micro = captured_on_gpu(model, [batches[0], batches[1]], [OFF, ROUNDED])
    launching = MicroSteps(model, torch.device("cuda"), passes=3, rounding=FakeQuant(3.0, 3.0).__call__)
    for wanted, got in zip(take(launching, model, passes), take(micro, model, passes), strict=True):
        assert torch.equal(wanted.pop("total"), got["total"])
        norms = {name: gradient.norm() for name, gradient in wanted.items()}
        # A gradient of one number is a sum over tokens, most of which cancels: its noise is small beside all
        # gradients, not beside itself.
        floor = torch.stack(list(norms.values())).norm() / 100
        for name, norm in norms.items():
            error = (got[name] - wanted[name]).norm()
            assert error < 0.02 * (norm + floor), (name, float(error), float(norm), float(floor))


def fail_to_capture():
    """Capture an attention that waits for the device; return the note, and what is different afterwards."""
    model = make_model(HOPPER, "cuda", attention="varlen", compile="off")
    batches, device = make_batches(HOPPER, device="cuda"), torch.device("cuda")
    kernel, stream = model._attention, torch.cuda.current_stream()
    launched = take(MicroSteps(model, device), model, plan(batches))

    def waiting(q, k, v, cu_seqlens, max_seqlen):
        return kernel(q, k, v, cu_seqlens, int(cu_seqlens[0] == 0) * max_seqlen)

    model._attention = waiting
    micro = MicroSteps(model, device)
    take(micro, model, plan(batches))
    note = micro.capture(batches[:1], [OFF, ON])
    same_stream = torch.cuda.current_stream() == stream
    return note, same_stream, unequal(launched, take(micro, model, plan(batches)))


# In a process of its own, because torch keeps traces of a capture that failed.
@requires_gpu
def test_a_capture_that_fails_says_why_and_leaves_launched_passes_as_they_were():
    program = "from tests.train import test_captured as t; print(*t.fail_to_capture(), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    note, *after = done.stdout.splitlines()[-3:]
    assert note.startswith("passes are launched kernel by kernel and not captured as CUDA graphs: ")
    assert "Error: CUDA error: operation not permitted when stream is capturing" in note
    assert after == ["True", "[]"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("corpus"))


def run(shards, out, *words):
    """Run a small training on one text; return its raw weights and its log."""
    common = ["train", "tiny", "--data", str(shards), "--out", str(out), *SMALL, "--train.no-quantize"]
    assert main([*common, *words]) == 0
    (folder,) = out.iterdir()
    return load_weights(folder / "raw.safetensors")[0], (folder / "log.txt").read_text()


@requires_gpu
def test_a_run_with_captured_passes_has_the_same_weights(shards, tmp_path, fixed_order):
    words = ["--train.device", "cuda", "--train.compile", "off", "--train.attention", "varlen"]
    launched, _ = run(shards, tmp_path / "launched", *words)
    replayed, log = run(shards, tmp_path / "replayed", *words, "--train.capture")
    assert "warm-up: passes of 2 forms are captured as CUDA graphs, for cu_seqlens of 64, " in log
    assert [name for name in launched if not torch.equal(launched[name], replayed[name])] == []


def test_without_a_gpu_a_run_says_that_passes_are_launched_and_is_the_same(shards, tmp_path, one_thread):
    launched, before = run(shards, tmp_path / "launched")
    asked, log = run(shards, tmp_path / "asked", "--train.capture")
    why = "passes are launched kernel by kernel and not captured as CUDA graphs: the device is cpu, at "
    assert f"warm-up: {why}" in log and why not in before
    assert [name for name in launched if not torch.equal(launched[name], asked[name])] == []


# On the host a replay is the work itself, which runs each time on what is in the buffers then.


class HostRecorder:
    """Counts what is captured; `wrong` and `fails` are the numbers of a capture that does, from 0."""

    wrong: int | None = None
    fails: int | None = None

    def __init__(self, device):
        self.recorded = 0
        HostRecorder.last = self

    def launch(self, work):
        work()

    def record(self, work):
        index, self.recorded = self.recorded, self.recorded + 1
        if index == self.fails:
            try:
                raise RuntimeError("operation not permitted when stream is capturing\nmore about it")
            finally:
                raise ValueError("and the capture could not be ended")
        if index == self.wrong:
            return lambda: setattr(work.__self__, "_loss", None) if hasattr(work, "__self__") else work()
        return work

    def held(self):
        return self.recorded << 20


@pytest.fixture
def on_host(monkeypatch):
    monkeypatch.setattr(captured, "Recorder", HostRecorder)
    monkeypatch.setattr(captured, "obstacle", lambda model, device: "")
    monkeypatch.setattr(HostRecorder, "wrong", None)
    monkeypatch.setattr(HostRecorder, "fails", None)


def count_launches(micro, monkeypatch):
    """Return a list that gets the length of cu_seqlens of every forward pass of the model."""
    lengths, forward = [], micro._model.forward

    def counted(inputs, targets, cu_seqlens, **how):
        lengths.append(cu_seqlens.numel())
        return forward(inputs, targets, cu_seqlens, **how)

    monkeypatch.setattr(micro._model, "forward", counted)
    return lengths


def test_batches_run_in_the_next_longer_graphs_and_equal_launched_ones(on_host, monkeypatch):
    model, batches = make_model(SMALLEST), make_batches(SMALLEST)
    passes = plan(batches)
    launched = take(MicroSteps(model, CPU, passes=3), model, passes)
    micro = MicroSteps(model, CPU, passes=3)
    micro.forward(batches[1], OFF)
    micro.backward()
    note = micro.capture(batches[1:2], [OFF, ON])
    assert note == (
        "passes of 2 forms are captured as CUDA graphs, for cu_seqlens of 128, 192 entries; they hold 8 MiB"
    )
    assert HostRecorder.last.recorded == 2 * 2 * 2  # forms, lengths, halves of a pass
    lengths = count_launches(micro, monkeypatch)
    assert unequal(launched, take(micro, model, passes)) == []
    # 64 entries run in the graphs of 128; 256 are launched.
    ran = {64: 128, 128: 128, 192: 192, 256: 256}
    assert lengths == [ran[batch.cu_seqlens.numel()] for batch, _ in passes]
    d = batches[3]
    assert micro._captured_length(d, OFF) is None and micro._captured_length(batches[0], OFF) == 128
    assert micro._captured_length(batches[0], ROUNDED) is None
    assert micro._captured_length(replace(batches[0], max_seqlen=64), OFF) is None
    assert micro._captured_length(make_batch(SMALLEST, 2048, 65, 128, 9), OFF) is None


def test_batches_of_the_capture_need_not_be_those_that_were_launched(on_host):
    model, batches = make_model(SMALLEST), make_batches(SMALLEST)
    micro = MicroSteps(model, CPU)
    micro.forward(batches[0], OFF)
    micro.backward()
    assert "of 64, 192, 256 entries" in micro.capture(batches[2:3], [OFF])


@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_capture_that_raises_leaves_launched_passes(on_host, monkeypatch, number):
    monkeypatch.setattr(HostRecorder, "fails", number)
    model, batches = make_model(SMALLEST), make_batches(SMALLEST)
    launched = take(MicroSteps(model, CPU), model, plan(batches))
    micro = MicroSteps(model, CPU)
    assert micro.capture(batches[:1], [OFF, ON]) == (
        "passes are launched kernel by kernel and not captured as CUDA graphs: "
        "RuntimeError: operation not permitted when stream is capturing"
    )
    assert "more about it" in micro.trace and "in record" in micro.trace
    assert unequal(launched, take(micro, model, plan(batches))) == []


def test_graphs_that_do_not_compute_the_gradients_are_not_used(on_host, monkeypatch):
    monkeypatch.setattr(HostRecorder, "wrong", 3)  # a backward pass
    model, batches = make_model(SMALLEST), make_batches(SMALLEST)
    micro = MicroSteps(model, CPU)
    note = micro.capture(batches[:1], [OFF, ON])
    assert re.search(
        r"not captured as CUDA graphs: RunError: the gradient of \w+ differs when Form\(loop=True, "
        r"rounded=False\) is replayed with 64 entries of cu_seqlens$",
        note,
    ), note
    assert micro._captured_length(batches[0], ON) is None


def test_differences_of_losses_and_gradients():
    wanted = {"the loss": torch.tensor(2.0), "a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1e-3])}
    assert difference(wanted, {**wanted}) == ""
    assert difference(wanted, {**wanted, "a": torch.tensor([3.0, 4.4])}) == ""
    assert difference(wanted, {**wanted, "a": torch.tensor([3.0, 4.6])}) == "the gradient of a"
    # Noise of the large ones may be more than a small one.
    assert difference(wanted, {**wanted, "b": torch.tensor([4e-3])}) == ""
    assert difference(wanted, {**wanted, "b": torch.tensor([9e-3])}) == "the gradient of b"
    assert difference(wanted, {**wanted, "a": torch.tensor([3.0, torch.nan])}) == "the gradient of a"
    loss = torch.tensor(2.0 + 2**-22)
    assert difference(wanted, {**wanted, "the loss": loss}).startswith("the loss, 2.0 launched and 2.0000002")


def test_what_forbids_a_capture_is_named(monkeypatch):
    model, cuda = make_model(SMALLEST), torch.device("cuda")
    assert obstacle(model, CPU) == "the device is cpu"
    assert obstacle(model, cuda).startswith("the attention sdpa reads the segments on the host")
    model.attention_name = "varlen"
    assert obstacle(model, cuda) == ""
    monkeypatch.setenv("PGOLF_CHECK_TARGETS", "1")
    assert obstacle(model, cuda) == "with PGOLF_CHECK_TARGETS=1 each loss waits for the device"
    monkeypatch.delenv("PGOLF_CHECK_TARGETS")
    model.qo_bank.grad = None
    assert obstacle(model, cuda) == "qo_bank has no gradient whose address a graph could hold"


def accumulator(p):
    """Return the autograd node that adds to the gradient of `p`; all graphs in which it is share one."""
    return p.expand_as(p).grad_fn.next_functions[0][0]


def test_no_node_of_a_pass_outlives_it():
    """A node adds to its gradient on the stream on which it was made, and a graph holds one stream only."""
    model, batches = make_model(SMALLEST), make_batches(SMALLEST)
    micro, parameters = MicroSteps(model, CPU), dict(model.named_parameters())
    gc.disable()  # which would find nodes that hold each other
    try:
        for form in (OFF, ON):
            micro.forward(batches[0], form)
            for p in parameters.values():
                accumulator(p).metadata["seen"] = True
            assert all("seen" in accumulator(p).metadata for p in parameters.values())
            micro.backward()
            assert [name for name, p in parameters.items() if "seen" in accumulator(p).metadata] == []
    finally:
        gc.enable()


class OnDevice(TorchDispatchMode):
    """Refuse every operator that reads a number on the host or has a tensor elsewhere than on meta."""

    HOST = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "lift_fresh")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        assert func.overloadpacket.__name__ not in self.HOST, func
        assert all(t.device.type == "meta" for t in tensors), func
        return out


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"bigram_buckets": 64, "bigram_width": 16, "value_embed_layers": 2, "value_embed_width": 16},
        {"mudd": 8, "xsa_strength": True, "smear_over_bos": True},
        {"smear_kind": "channel", "parallel": "gptj", "head_gate": "dense", "skip": "weighted"},
    ],
    ids=str,
)
def test_a_pass_reads_and_sends_nothing(parts, monkeypatch):
    """A CUDA graph can hold no copy between host and device; the device here is one that computes nothing."""
    monkeypatch.setattr(sys.modules["pgolf.ops.norm_mlp"], "_takes", lambda *_: True)
    config, meta = replace(HOPPER, **parts), torch.device("meta")
    model = GPT(config).to_empty(device=meta).prepare(meta)
    model.compute_dtype = torch.bfloat16
    model._attention = lambda q, k, v, cu, longest: q + (k + v).repeat_interleave(2, 1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    ids = torch.empty(4096, dtype=torch.int64, device=meta)
    batch = Batch(ids, ids.clone(), torch.empty(64, dtype=torch.int32, device=meta), 128, 0.0)
    micro = MicroSteps(model, meta, rounding=FakeQuant(3.0, 3.0).__call__)
    with pytest.raises(AssertionError, match="aten"), OnDevice():
        micro.forward(batch, OFF)  # makes the tables of the rotation on the host
    model.rope(4096)
    for form in (OFF, ON, ROUNDED):
        with OnDevice():
            micro.forward(batch, form)
            micro.backward()
    model._attention = lambda q, k, v, cu, longest: q * int(cu[1])
    with pytest.raises((AssertionError, RuntimeError), match=r"_local_scalar_dense|item"), OnDevice():
        micro.forward(batch, OFF)


@pytest.mark.parametrize("tokens", [65, 4096, 98_304])
@pytest.mark.parametrize("length", [64, 128, 192])
def test_segments_of_the_capture_cover_the_tokens_and_none_is_longer_than_of_any_batch(tokens, length):
    starts = even_starts(torch.zeros(tokens, dtype=torch.int64), length)
    assert starts.shape == (length,) and starts.dtype == torch.int32
    lengths = starts.diff()
    assert starts[0] == 0 and starts[-1] == tokens and (lengths >= 0).all()
    # `length` entries hold at most length - 1 segments, so some batch's longest has at least this many.
    assert lengths.max() == -(-tokens // (length - 1))
