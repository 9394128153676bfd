"""linear_softcap_ce compared with float64 and eager code, at extreme inputs, compiled, in CUDA graphs."""

import importlib.util
import itertools
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pgolf.ops import linear_softcap_ce, linear_softcap_ce_ref
from tests.conftest import requires_gpu
from tests.ops.checks import assert_replays_like_a_call

CAP = 30.0
# (rows, vocab, width). Odd everywhere; one row; one past the 128-row and 256-column tiles, with rows of the
# factor 16-byte aligned (520, 72: the Hopper kernel's) and not (1031); several CPU chunks (50000).
SHAPES = [(3, 7, 5), (1, 256, 64), (129, 257, 33), (257, 520, 72), (130, 1031, 64), (140, 50000, 16)]
MODES = ["fast", "low"]
REDUCTIONS = ["mean", "sum", "none"]


def make_inputs(
    rows: int, vocab: int, width: int, dtype: torch.dtype, device: torch.device, scale: float = 4.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden, weight and targets; logits have a standard deviation of `scale`."""
    g = torch.Generator().manual_seed(rows * 10007 + vocab)
    hidden = torch.randn(rows, width, generator=g)
    weight = torch.randn(vocab, width, generator=g) * (scale / width**0.5)
    target = torch.randint(vocab, (rows,), generator=g)
    return hidden.to(dtype).to(device), weight.to(dtype).to(device), target.to(device)


def run(fn, hidden: Tensor, weight: Tensor, target: Tensor, cap: float | None, **options):
    """Return loss and both gradients; with "none", every row has a different upstream gradient."""
    x, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss = fn(x, w, target, cap, **options)
    g = torch.Generator().manual_seed(1)
    upstream = torch.randn(loss.shape, generator=g, dtype=torch.float64).to(loss.device)
    upstream = upstream if options.get("reduction") == "none" else torch.full_like(upstream, 3.0)
    grads = torch.autograd.grad((loss * upstream).sum(), (x, w))
    return loss.detach(), *grads


def eager(hidden: Tensor, weight: Tensor, target: Tensor, cap: float | None, **options) -> Tensor:
    """The usual code: logits in the dtype of `hidden`, the loss in float32."""
    return linear_softcap_ce_ref(hidden, weight, target, cap, **options)


def assert_no_worse_than_twice_eager(hidden, weight, target, cap, memory: str, **options) -> None:
    got = run(linear_softcap_ce, hidden, weight, target, cap, memory=memory, **options)
    base = run(eager, hidden, weight, target, cap, **options)
    want = run(linear_softcap_ce_ref, hidden.double(), weight.double(), target, cap, **options)
    assert got[0].dtype == torch.float32
    assert (got[1].dtype, got[2].dtype) == (hidden.dtype, weight.dtype)
    # Eager can be exact by luck (one row, one token): one rounding of the result is always allowed. In
    # float32 that rounding is the one of the exponent, of size 2 cap: exp(60) is known to 60 * 2^-24.
    eps = max(torch.finfo(hidden.dtype).eps, 2 * CAP * 2.0**-24)
    for name, ours, theirs, truth in zip(("loss", "hidden", "weight"), got, base, want, strict=True):
        scale = truth.norm().item()
        error, bound = ((t.double() - truth).norm().item() for t in (ours, theirs))
        assert error <= 2 * bound + eps * scale + 1e-30, f"{name}: error {error}, eager {bound}, norm {scale}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_eager(shape, memory: str, dtype: torch.dtype, device) -> None:
    hidden, weight, target = make_inputs(*shape, dtype, device)
    target[0] = -100 if shape[0] > 1 else target[0]
    for reduction in REDUCTIONS:
        assert_no_worse_than_twice_eager(hidden, weight, target, CAP, memory, reduction=reduction)


# Each takes another form of the Hopper kernels: hidden states resident in shared memory, or streamed in
# narrow or wide tiles; enough rows for the kernel of grad_hidden, with vocab, width and rows past its tiles.
@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("shape", [(300, 1056, 512), (150, 160, 600), (200, 608, 2056), (16700, 104, 72)])
def test_every_form_is_at_most_twice_eager(shape, memory: str, device) -> None:
    hidden, weight, target = make_inputs(*shape, torch.bfloat16, device)
    target[::7] = -100
    for reduction in ("mean", "none"):
        assert_no_worse_than_twice_eager(hidden, weight, target, CAP, memory, reduction=reduction)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize(
    ("cap", "z_loss"), [(None, 0.0), (None, 1e-3), (CAP, 1e-3), (5.0, 0.0), (100.0, 0.0)]
)
def test_caps_and_z_loss_are_at_most_twice_eager(cap, z_loss: float, memory: str, device) -> None:
    inputs = make_inputs(129, 520, 72, torch.bfloat16, device)
    for reduction in REDUCTIONS:
        assert_no_worse_than_twice_eager(*inputs, cap, memory, reduction=reduction, z_loss=z_loss)


@pytest.mark.parametrize("memory", MODES)
# 60: most logits beyond the cap; 300: all saturated; 0: all equal.
@pytest.mark.parametrize("scale", [60.0, 300.0, 0.0])
def test_saturated_and_equal_logits_are_at_most_twice_eager(scale: float, memory: str, device) -> None:
    inputs = make_inputs(129, 520, 72, torch.bfloat16, device, scale)
    assert_no_worse_than_twice_eager(*inputs, CAP, memory, reduction="none")


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("cap", [0.5, 4.0])
def test_every_logits_gradient_is_relatively_precise_where_tanh_saturates(
    cap: float, memory: str, device
) -> None:
    # One row, whose logits are the weight's first column: from -12 to 12 caps, where 1 - tanh^2 is 1.5e-10.
    vocab, width = 576, 64
    hidden = torch.zeros(1, width, dtype=torch.bfloat16, device=device)
    hidden[0, 0] = 1.0
    weight = torch.zeros(vocab, width, device=device)
    weight[:, 0] = torch.linspace(-12 * cap, 12 * cap, vocab).bfloat16().to(device)
    weight.requires_grad_()
    target = torch.tensor([200], device=device)
    (grad,) = torch.autograd.grad(linear_softcap_ce(hidden, weight, target, cap, memory=memory), weight)
    exact = weight.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(linear_softcap_ce_ref(hidden.double(), exact, target, cap), exact)
    # Rounded to bfloat16 twice: in the factor and in the scaled hidden state.
    torch.testing.assert_close(grad[:, 0].double(), want[:, 0], rtol=0.01, atol=0.0)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sure_and_surprised_rows_are_at_most_twice_eager(sign: float, memory: str, device) -> None:
    # Each row's target has the logit 25 (p near 1) or -25 (p near 0), all others are small.
    rows, vocab, width = 64, 520, 64
    hidden = torch.eye(rows, width, dtype=torch.bfloat16, device=device)
    _, weight, target = make_inputs(rows, vocab, width, torch.bfloat16, device, scale=0.5)
    target = torch.arange(rows, device=device) * 8
    weight[target] = sign * 25.0 * hidden
    assert_no_worse_than_twice_eager(hidden, weight, target, CAP, memory, reduction="none")


@pytest.mark.parametrize("memory", MODES)
def test_float32_weight_gets_a_float32_gradient(memory: str, device) -> None:
    hidden, weight, target = make_inputs(130, 520, 72, torch.bfloat16, device)
    got = run(linear_softcap_ce, hidden, weight.float(), target, CAP, memory=memory)
    rounded = run(linear_softcap_ce, hidden, weight, target, CAP, memory=memory)
    assert got[2].dtype == torch.float32 and got[1].dtype == torch.bfloat16
    assert torch.equal(got[1], rounded[1]) and not torch.equal(got[2].bfloat16().float(), got[2])
    torch.testing.assert_close(got[2].bfloat16(), rounded[2], rtol=2**-7, atol=1e-9)


@pytest.mark.parametrize("memory", MODES)
def test_float16_matches_float64(memory: str, device) -> None:
    inputs = make_inputs(130, 257, 33, torch.float16, device)
    for reduction in REDUCTIONS:
        assert_no_worse_than_twice_eager(*inputs, CAP, memory, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("memory", "reduction"), list(itertools.product(MODES, REDUCTIONS)))
def test_all_rows_ignored_give_zero(memory: str, reduction: str, dtype: torch.dtype, device) -> None:
    hidden, weight, target = make_inputs(130, 520, 72, dtype, device)
    target[:] = -100
    options = {"memory": memory, "reduction": reduction, "z_loss": 0.1}
    assert all((t == 0).all() for t in run(linear_softcap_ce, hidden, weight, target, CAP, **options))


@pytest.mark.parametrize("memory", MODES)
def test_ignored_rows_stay_zero_under_a_bad_upstream_gradient(memory: str, device) -> None:
    hidden, weight, target = make_inputs(130, 520, 72, torch.bfloat16, device)
    target[5] = -100
    x = hidden.clone().requires_grad_()
    loss = linear_softcap_ce(x, weight, target, CAP, reduction="none", memory=memory)
    upstream = torch.ones_like(loss)
    upstream[5] = math.nan
    (grad,) = torch.autograd.grad(loss, x, upstream)
    assert loss[5] == 0 and (grad[5] == 0).all() and grad.isfinite().all()


@pytest.mark.parametrize("memory", MODES)
def test_nan_in_a_row_reaches_its_loss_and_gradient(memory: str, device) -> None:
    hidden, weight, target = make_inputs(130, 520, 72, torch.bfloat16, device)
    hidden[7, 3] = math.nan
    loss, grad, _ = run(linear_softcap_ce, hidden, weight, target, CAP, reduction="none", memory=memory)
    assert loss.isnan().nonzero().tolist() == [[7]]
    assert grad.isnan().any(dim=1).nonzero().tolist() == [[7]]


@pytest.mark.parametrize(("memory", "reduction"), list(itertools.product(MODES, REDUCTIONS)))
def test_empty_batch(memory: str, reduction: str, device) -> None:
    inputs = make_inputs(0, 9, 4, torch.float32, device)
    loss, grad_hidden, grad_weight = run(linear_softcap_ce, *inputs, CAP, memory=memory, reduction=reduction)
    assert loss.sum() == 0 and grad_hidden.shape == (0, 4)
    assert grad_weight.shape == (9, 4) and (grad_weight == 0).all()


def test_leading_dimensions_and_strides_are_accepted(device) -> None:
    hidden, weight, target = make_inputs(24, 40, 16, torch.float32, device)
    flat = run(linear_softcap_ce, hidden, weight, target, CAP)
    stacked = run(
        linear_softcap_ce, hidden.view(2, 12, 16), weight.t().contiguous().t(), target.view(2, 12), CAP
    )
    torch.testing.assert_close(stacked[0], flat[0])
    torch.testing.assert_close(stacked[1], flat[1].view(2, 12, 16))
    torch.testing.assert_close(stacked[2], flat[2])
    rows = linear_softcap_ce(hidden.view(2, 12, 16), weight, target.view(2, 12), CAP, reduction="none")
    assert rows.shape == (2, 12)


@pytest.mark.parametrize(("memory", "reduction"), list(itertools.product(MODES, ["mean", "none"])))
@pytest.mark.parametrize("which", [0, 1])
def test_a_frozen_tensor_gets_no_gradient(which: int, memory: str, reduction: str, device) -> None:
    tensors = list(make_inputs(24, 40, 16, torch.float32, device))
    want = run(linear_softcap_ce, *tensors, CAP, memory=memory, reduction=reduction)
    tensors[which].requires_grad_()
    loss = linear_softcap_ce(*tensors, CAP, memory=memory, reduction=reduction)
    g = torch.Generator().manual_seed(1)
    upstream = torch.randn(loss.shape, generator=g, dtype=torch.float64) if reduction == "none" else 3.0
    (loss * torch.as_tensor(upstream, device=device)).sum().backward()
    assert torch.equal(tensors[which].grad, want[1 + which]) and tensors[1 - which].grad is None


@pytest.mark.parametrize("memory", MODES)
def test_shapes_are_known_on_the_meta_device(memory: str) -> None:
    hidden, weight, target = (
        t.to("meta") for t in make_inputs(24, 40, 16, torch.bfloat16, torch.device("cpu"))
    )
    x, w = hidden.requires_grad_(), weight.float().requires_grad_()
    for reduction, shape in (("mean", ()), ("none", (24,))):
        loss = linear_softcap_ce(x, w, target, CAP, memory=memory, reduction=reduction)
        grads = torch.autograd.grad(loss.sum(), (x, w))
        assert (loss.shape, loss.dtype, loss.device.type) == (shape, torch.float32, "meta")
        assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in (x, w)]


def test_without_gradients_the_loss_is_the_same(device) -> None:
    inputs = make_inputs(257, 520, 72, torch.bfloat16, device)
    want = run(linear_softcap_ce, *inputs, CAP, reduction="none")[0]
    for memory in MODES:
        got = linear_softcap_ce(*inputs, CAP, reduction="none", memory=memory)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert got.grad_fn is None


def test_the_reference_does_not_round_logits_where_no_gradient_is_wanted(device) -> None:
    x, w, target = make_inputs(257, 520, 72, torch.bfloat16, device)
    with torch.no_grad():
        got = linear_softcap_ce_ref(x, w, target, CAP, reduction="none")
    want = linear_softcap_ce_ref(x.double(), w.double(), target, CAP, reduction="none")
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("memory", "reduction"), list(itertools.product(MODES, ["mean", "none"])))
def test_result_is_the_same_on_every_call(memory: str, reduction: str, device) -> None:
    inputs = make_inputs(1500, 520, 72, torch.bfloat16, device)
    first, second = (
        run(linear_softcap_ce, *inputs, CAP, memory=memory, reduction=reduction) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("memory", "reduction"), list(itertools.product(MODES, ["mean", "none"])))
def test_a_second_backward_gives_the_same_gradients(memory: str, reduction: str, device) -> None:
    hidden, weight, target = make_inputs(130, 520, 72, torch.bfloat16, device)
    x = hidden.requires_grad_()
    loss = linear_softcap_ce(x, weight, target, CAP, memory=memory, reduction=reduction).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [CAP, None])
def test_opcheck_accepts_the_operators(cap: float | None, dtype: torch.dtype, device) -> None:
    hidden, weight, target = make_inputs(24, 40, 16, dtype, device)
    ops, options = torch.ops.pgolf, (cap, -100, 1e-3)
    x, w = hidden.clone().requires_grad_(), weight.float().clone().requires_grad_()
    for keep in (True, False):
        torch.library.opcheck(ops.linear_softcap_ce, (x, w, target, *options, keep, False))
    _, factor, scale, _ = ops.linear_softcap_ce(hidden, weight, target, *options, True, False)
    one = torch.ones((), device=device)
    rows = one.expand(24).contiguous()
    for needs in ((True, True), (True, False), (False, True)):
        kept = (rows, hidden, weight, factor, scale, torch.float32, *needs)
        torch.library.opcheck(ops.linear_softcap_ce_backward, kept)
        for upstream in (one, rows):
            swept = (upstream, hidden, weight, target, *options, *needs, False)
            torch.library.opcheck(ops.linear_softcap_ce_gradients, swept)


@pytest.mark.parametrize(("memory", "reduction"), list(itertools.product(MODES, ["mean", "none"])))
def test_compile_in_one_graph_matches_eager(memory: str, reduction: str, device) -> None:
    hidden, weight, target = make_inputs(24, 40, 16, torch.float32, device)

    def step(x: Tensor, w: Tensor) -> Tensor:
        return linear_softcap_ce(
            x * 2, w, target, CAP, memory=memory, reduction=reduction, z_loss=1e-3
        ).mean()

    def grads(fn) -> tuple[Tensor, ...]:
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        return torch.autograd.grad(fn(x, w), (x, w))

    for got, want in zip(grads(torch.compile(step, fullgraph=True)), grads(step), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_computes_in_its_dtype_and_returns_the_parameters_dtype(compiled, memory, device) -> None:
    hidden, weight, target = make_inputs(24, 40, 16, torch.float32, device)
    want = run(linear_softcap_ce, hidden.bfloat16(), weight, target, CAP, memory=memory)

    def step(*arguments, **options) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return linear_softcap_ce(*arguments, memory=memory, **options)

    got = run(torch.compile(step, fullgraph=True) if compiled else step, hidden, weight, target, CAP)
    assert got[1].dtype == got[2].dtype == torch.float32
    # The compiler leaves out a rounding of hidden's gradient to bfloat16.
    rtol = 2**-7 if compiled else 1e-6
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=rtol, atol=1e-7)


@pytest.mark.parametrize(("memory", "reduction"), list(itertools.product(MODES, ["mean", "none"])))
def test_second_derivative_says_that_it_is_missing(memory: str, reduction: str, device) -> None:
    hidden, weight, target = make_inputs(4, 9, 8, torch.float32, device)
    x = hidden.requires_grad_()
    loss = linear_softcap_ce(x, weight, target, CAP, memory=memory, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"linear_softcap_ce: second derivatives .* use linear_softcap_ce_ref"
    ):
        grad.sum().backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_accepts_the_reference(reduction: str) -> None:
    hidden, weight, target = make_inputs(3, 7, 5, torch.float64, torch.device("cpu"))
    target[0] = -100
    assert torch.autograd.gradcheck(
        lambda x, w: linear_softcap_ce_ref(x, w, target, CAP, reduction=reduction, z_loss=0.01),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


def test_low_memory_never_holds_all_logits() -> None:
    # Half a GiB of logits; both modes must agree, and only one may allocate them.
    hidden, weight, target = make_inputs(4096, 32768, 8, torch.float32, torch.device("cpu"))
    peaks = {}
    for memory in MODES:
        x = hidden.clone().requires_grad_()
        with torch.profiler.profile(
            profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
        ) as prof:
            linear_softcap_ce(x, weight, target, CAP, memory=memory).backward()
        peaks[memory] = max(e.self_cpu_memory_usage for e in prof.events())
    assert peaks["fast"] >= 4096 * 32768 * 4
    assert peaks["low"] <= 64 << 20, peaks


@pytest.mark.parametrize("memory", MODES)
def test_backward_allocates_nothing_of_the_size_of_the_logits(memory: str) -> None:
    # Autograd would fill a gradient of the saved factor with zeros if it were not told not to.
    hidden, weight, target = make_inputs(4096, 8192, 8, torch.float32, torch.device("cpu"))
    loss = linear_softcap_ce(hidden.requires_grad_(), weight, target, CAP, memory=memory)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=activities) as prof:
        loss.backward()
    assert max(e.self_cpu_memory_usage for e in prof.events()) < 16 << 20


@requires_gpu
@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_record_shape_is_at_most_twice_eager(weight_dtype: torch.dtype, memory: str) -> None:
    hidden, weight, target = make_inputs(4096, 8192, 512, torch.bfloat16, torch.device("cuda"))
    for reduction in ("mean", "none"):
        assert_no_worse_than_twice_eager(
            hidden, weight.to(weight_dtype), target, CAP, memory, reduction=reduction
        )


@requires_gpu
def test_low_memory_stays_within_its_chunk_on_cuda() -> None:
    hidden, weight, target = make_inputs(32768, 8192, 128, torch.bfloat16, torch.device("cuda"))
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_softcap_ce(x, w, target, CAP, memory="low").backward()
    assert torch.cuda.max_memory_allocated() - before < 400 << 20  # all logits are 512 MiB


@requires_gpu
def test_a_thread_may_begin_with_it() -> None:
    # Such a thread has no CUDA context yet; autograd's is one when the loss is all of a backward pass.
    inputs = make_inputs(257, 8192, 128, torch.bfloat16, torch.device("cuda"))
    expected = linear_softcap_ce(*inputs, CAP)
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(linear_softcap_ce, *inputs, CAP).result(), expected)


@requires_gpu
@pytest.mark.parametrize(("memory", "reduction"), list(itertools.product(MODES, ["mean", "none"])))
def test_cuda_graph_replays_forward_and_backward(memory: str, reduction: str) -> None:
    hidden, weight, target = make_inputs(257, 8192, 128, torch.bfloat16, torch.device("cuda"))
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        loss = linear_softcap_ce(x, w, target, CAP, memory=memory, reduction=reduction).sum()
        return loss, *torch.autograd.grad(loss, (x, w))

    assert_replays_like_a_call(step, lambda: x.mul_(0.5))


@requires_gpu
@pytest.mark.parametrize("bad", [520, -1, 2**40])
@pytest.mark.parametrize("memory", MODES)
def test_cuda_target_out_of_range_makes_its_row_nan(memory: str, bad: int, monkeypatch) -> None:
    hidden, weight, target = make_inputs(130, 520, 72, torch.bfloat16, torch.device("cuda"))
    target[3] = bad
    loss, grad, _ = run(linear_softcap_ce, hidden, weight, target, CAP, reduction="none", memory=memory)
    assert loss.isnan().nonzero().tolist() == [[3]]
    assert grad.isnan().all(dim=1).nonzero().tolist() == [[3]]
    monkeypatch.setattr(sys.modules["pgolf.ops.linear_softcap_ce"], "CHECK_TARGETS", True)
    with pytest.raises(ValueError, match=rf"linear_softcap_ce: target must be .* got {bad} at row 3"):
        run(linear_softcap_ce, hidden, weight, target, CAP, memory=memory)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_cpu_target_out_of_range_names_the_row(bad: int, memory: str) -> None:
    target = torch.tensor([0, 4, bad, bad])
    weight = torch.zeros(5, 8, requires_grad=True)
    message = rf"linear_softcap_ce: target must be in \[0, vocab=5\) or ignore_index=-100, got {bad} at row 2"
    with pytest.raises(ValueError, match=message):
        linear_softcap_ce(torch.zeros(4, 8), weight, target, CAP, memory=memory)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden": torch.zeros(8)}, ValueError, r"hidden must be \(rows, width\) or .*, got \(8,\)"),
        ({"hidden": torch.zeros(4, 0)}, ValueError, r"hidden must be \(rows, width\) with width > 0"),
        ({"weight": torch.zeros(5, 7)}, ValueError, r"weight must be .*\(vocab > 0, 8\), got \[5, 7\]"),
        ({"weight": torch.zeros(0, 8)}, ValueError, r"weight must be .*, got \[0, 8\]"),
        ({"hidden": torch.zeros(4, 8).int()}, TypeError, "hidden must be float32, .* got Int"),
        ({"weight": torch.zeros(5, 8).half()}, TypeError, "weight must be float32 or Float .* got Half"),
        (
            {"target": torch.zeros(3).long()},
            ValueError,
            r"target must be \(4,\), hidden's shape .* got \(3,\)",
        ),
        ({"target": torch.zeros(4).short()}, TypeError, "target must be int64 or int32, got torch.int16"),
        ({"cap": 0.0}, ValueError, "cap must be finite and > 0, or None for no cap, got 0"),
        ({"cap": math.inf}, ValueError, "or None for no cap, got inf"),
        ({"z_loss": math.nan}, ValueError, "z_loss must be finite and >= 0, got nan"),
        ({"reduction": "avg"}, ValueError, 'linear_softcap_ce: reduction must be "none", "mean" or "sum"'),
        ({"memory": "tiny"}, ValueError, 'linear_softcap_ce: memory must be "fast" or "low", got \'tiny\''),
    ],
)
def test_bad_input_is_named(changed: dict, error, message: str) -> None:
    arguments = {"hidden": torch.zeros(4, 8), "weight": torch.zeros(5, 8), "target": torch.zeros(4).long()}
    with pytest.raises(error, match=message):
        linear_softcap_ce(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.zeros(9, 4)}, "weight must be BFloat16 as hidden is, got Float"),
        ({"grad_loss": torch.ones(3).double()}, "grad_loss and scale must be float32, got Double and Float"),
        ({"scale": torch.ones(3).bfloat16()}, "grad_loss and scale must be float32, got Float and BFloat16"),
    ],
)
def test_backward_operator_names_a_dtype_that_its_kernels_would_misread(changed: dict, message: str) -> None:
    tensors = {
        "grad_loss": torch.ones(3),
        "hidden": torch.zeros(3, 4).bfloat16(),
        "weight": torch.zeros(9, 4).bfloat16(),
        "factor": torch.zeros(3, 9).bfloat16(),
        "scale": torch.ones(3),
    }
    torch.ops.pgolf.linear_softcap_ce_backward(*tensors.values(), torch.float32, True, True)
    with pytest.raises(TypeError, match=f"linear_softcap_ce_backward: {message}"):
        torch.ops.pgolf.linear_softcap_ce_backward(*(tensors | changed).values(), torch.float32, True, True)


def test_example_trains_alike_and_keeps_less(monkeypatch) -> None:
    path = Path(__file__).parents[2] / "examples" / "fused_loss_dropin.py"
    spec = importlib.util.spec_from_file_location("fused_loss_dropin", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "STEPS", 3)
    monkeypatch.setattr(example, "VOCAB", 2048)
    (usual, most), (fused, less), (low, least) = (
        example.train("", f) for f in (example.usual_loss, example.fused_loss, example.fused_loss_low)
    )
    assert fused == pytest.approx(usual, rel=1e-5) and low == pytest.approx(usual, rel=1e-5)
    logits = example.BATCH * example.LENGTH * 2048 * 4 / 2**20
    assert least < less < most - 0.9 * logits and least < logits
