"""norm_mlp compared with the published formula in float64 and with eager code, compiled, in CUDA graphs.

The Hopper kernels run on such a GPU alone. What Python adds to them (gradients of the matrices, frozen
inputs, errors, compilation) is tested on the CPU too, where `kernels` puts a plain version in their place.
"""

import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from pgolf.ops import norm_mlp, norm_mlp_ref
from tests.conftest import requires_gpu, requires_hopper
from tests.ops.checks import (
    assert_no_worse_than_twice,
    assert_replays_like_a_call,
    assert_the_same_on_every_call,
    moved,
    no_waiting,
    transposed,
)

MODULE = sys.modules["pgolf.ops.norm_mlp"]
EPS = 1.1920929e-7
CUDA = torch.device("cuda")
RESIDUALS = ["none", "x", "other"]
# (T, D, M): no token, one, tiles of 128 rows and pairs of them that are not full, widths of less than a slice
# of 64 and of a part of one, an odd number of tiles of columns, more tiles than multiprocessors.
SHAPES = [
    (0, 512, 2048),
    (1, 512, 2048),
    (127, 512, 2048),
    (129, 512, 2048),
    (1000, 512, 1536),
    (300, 8, 512),
    (257, 72, 640),
    (513, 264, 768),
    (40_000, 512, 2048),
]


def make_inputs(
    rows: int, width: int, hidden: int, dtype: torch.dtype = torch.bfloat16, device: torch.device = CUDA
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, up, down and another residual; the rows of x differ in size, as those of a stream do."""
    g = torch.Generator().manual_seed(rows * 10007 + width + hidden)
    x = torch.randn(rows, width, generator=g) * (0.1 + 3 * torch.rand(rows, 1, generator=g))
    up = torch.randn(hidden, width, generator=g) / width**0.5
    down = torch.randn(width, hidden, generator=g) / hidden**0.5
    residual = torch.randn(rows, width, generator=g)
    return tuple(t.to(dtype).to(device) for t in (x, up, down, residual))


def run(fn, inputs: tuple[Tensor, ...], which: str, slope: float, upstream: Tensor) -> dict[str, Tensor]:
    """Return the output and every gradient by name."""
    names = ("x", "up", "down", "residual")[: 4 if which == "other" else 3]
    leaves = {n: t.detach().clone().requires_grad_() for n, t in zip(names, inputs, strict=False)}
    residual = leaves["x"] if which == "x" else leaves.get("residual")
    y = fn(leaves["x"], leaves["up"], leaves["down"], residual, slope=slope)
    grads = torch.autograd.grad(y, list(leaves.values()), upstream.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def upstream_of(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x.device)


def assert_no_worse_than_twice_eager(inputs: tuple[Tensor, ...], which: str, slope: float) -> None:
    upstream = upstream_of(inputs[0]).to(inputs[0].dtype)
    got, base = (run(fn, inputs, which, slope, upstream) for fn in (norm_mlp, norm_mlp_ref))
    want = run(norm_mlp_ref, tuple(t.double() for t in inputs), which, slope, upstream)
    assert all(t.dtype == inputs[0].dtype for t in got.values())
    assert_no_worse_than_twice(got, base, want)


def published(x: Tensor, up: Tensor, down: Tensor, residual: Tensor | None, slope: float) -> Tensor:
    """The formula, term by term."""
    n = x / (x.square().mean(1, keepdim=True) + EPS).sqrt()
    h = n @ up.T
    y = torch.where(h > 0, h, slope * h) ** 2 @ down.T
    return y if residual is None else y + residual


@pytest.mark.parametrize("slope", [0.0, 0.5, -0.1, 1.5])
def test_reference_is_the_published_formula(slope: float) -> None:
    x, up, down, residual = make_inputs(7, 24, 40, torch.float64, torch.device("cpu"))
    for r in (None, x, residual):
        torch.testing.assert_close(norm_mlp(x, up, down, r, slope=slope), published(x, up, down, r, slope))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_hopper_gpu_it_is_the_composed_branch_bit_for_bit(dtype: torch.dtype) -> None:
    x, up, down, _ = make_inputs(33, 64, 512, dtype, torch.device("cpu"))
    n = F.rms_norm(x, (64,), eps=EPS)
    want = x + F.linear(F.leaky_relu(F.linear(n, up), 0.5).square(), down)
    assert torch.equal(norm_mlp(x, up, down, x, slope=0.5), want)


def test_gradcheck_accepts_the_reference() -> None:
    inputs = make_inputs(3, 6, 10, torch.float64, torch.device("cpu"))
    assert torch.autograd.gradcheck(
        lambda *t: norm_mlp(*t, slope=0.5), tuple(t.requires_grad_() for t in inputs)
    )


# ---- What Python adds to the kernels, with a plain version of them on the CPU.


def pack(negative: Tensor) -> Tensor:
    """Return the words of the signs of whole tiles of 128 rows."""
    rows, hidden = negative.shape
    bits = F.pad(negative.long(), (0, 0, 0, -rows % 128)).view(-1, hidden // 32, 32)
    return (bits << torch.arange(32)).sum(-1).flatten().to(torch.int32)


def unpack(words: Tensor, act: Tensor) -> Tensor:
    bits = (words.long()[:, None] >> torch.arange(32)) & 1
    return bits.view(-1, act.shape[1])[: act.shape[0]].bool()


def plain_up(x: Tensor, up: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    rho = (x.to(wide).square().mean(1) + EPS).rsqrt()
    h = rho[:, None] * (x.to(wide) @ up.to(wide).T)
    return F.leaky_relu(h, slope).square().to(x.dtype), pack(h < 0), rho


def plain_dact(
    grad: Tensor, down_t: Tensor, act: Tensor, signs: Tensor, rho: Tensor, slope: float
) -> tuple[Tensor, Tensor]:
    q = grad.to(rho.dtype) @ down_t.to(rho.dtype).T
    rate = 2 * act.to(rho.dtype).sqrt() * torch.where(unpack(signs, act), -slope, 1.0)
    partials = 2 * (q * act).view(len(act), -1, 128).sum(-1).T.contiguous()
    return (rho[:, None] * q * rate).to(grad.dtype), partials


def plain_sum(
    a: Tensor,
    b: Tensor,
    residual: Tensor | None,
    x: Tensor | None,
    rho: Tensor | None,
    partials: Tensor | None,
) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    y = a.to(wide) @ b.to(wide)
    if residual is not None:
        y = y + residual
    if x is not None:
        y = y - (rho.square() * partials.sum(0) / x.shape[1])[:, None] * x
    return y.to(a.dtype)


@pytest.fixture
def kernels(monkeypatch) -> Iterator[None]:
    """Give the CPU a plain version of the kernels, which takes every dtype."""
    monkeypatch.setattr(MODULE, "_takes", lambda *_: True)
    with torch.library._scoped_library("pgolf", "IMPL") as library:
        for name, function in (("up", plain_up), ("dact", plain_dact), ("sum", plain_sum)):
            library.impl(f"norm_mlp_{name}", function, "CPU")
        yield


def small(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return make_inputs(5, 8, 128, dtype, torch.device("cpu"))


@pytest.mark.parametrize("slope", [0.0, 0.5])
@pytest.mark.parametrize("which", RESIDUALS)
def test_gradients_around_the_kernels_are_exact(which: str, slope: float, kernels) -> None:
    inputs = small()
    upstream = upstream_of(inputs[0])
    got, want = (run(fn, inputs, which, slope, upstream) for fn in (norm_mlp, norm_mlp_ref))
    for name, truth in want.items():
        torch.testing.assert_close(got[name], truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("which", RESIDUALS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=requires_hopper)])
def test_frozen_inputs_get_no_gradient_and_change_no_other(which: str, device: str, request) -> None:
    if device == "cpu":
        request.getfixturevalue("kernels")
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    inputs = make_inputs(129, 64, 512, dtype, torch.device(device))
    upstream = upstream_of(inputs[0]).to(dtype)
    want = run(norm_mlp, inputs, which, 0.5, upstream)
    for needed in range(1, 16):
        x, up, down, other = (
            t.detach().clone().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(inputs)
        )
        residual = {"none": None, "x": x, "other": other}[which]
        y = norm_mlp(x, up, down, residual, slope=0.5)
        if not y.requires_grad:
            continue
        y.backward(upstream)
        for name, t in zip(("x", "up", "down", "residual"), (x, up, down, other), strict=True):
            if t.requires_grad and name in want:
                assert torch.equal(t.grad, want[name]), name
            else:
                assert t.grad is None or name == "residual"


@pytest.mark.parametrize("which", RESIDUALS)
def test_compile_in_one_graph_keeps_the_values_and_adds_x_once(which: str, kernels) -> None:
    inputs, graphs = small(), []
    upstream = upstream_of(inputs[0])

    def backend(graph, example):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph.code)
        return aot_eager(graph, example)

    def branch(x: Tensor, up: Tensor, down: Tensor, residual: Tensor | None, *, slope: float) -> Tensor:
        x = x * 2
        return norm_mlp(x, up, down, x if which == "x" else residual, slope=slope)

    compiled = torch.compile(branch, fullgraph=True, backend=backend)
    got, want = (run(fn, inputs, which, 0.5, upstream) for fn in (compiled, branch))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-14)
    assert len(graphs) == 1 and ("None, True, 0.5" in graphs[0]) == (which == "x"), graphs


def test_opcheck_accepts_the_operators_around_the_kernels(kernels) -> None:
    x, up, down, residual = small(torch.float32)
    for r, add_x in ((None, False), (None, True), (residual, False)):
        leaves = [t.clone().requires_grad_() for t in (x, up, down)]
        torch.library.opcheck(torch.ops.pgolf._norm_mlp, (*leaves, r, add_x, 0.5))


@pytest.mark.parametrize("of", range(3))
def test_a_second_derivative_and_forward_mode_say_that_they_are_missing(of: int, kernels) -> None:
    inputs = [t.requires_grad_() for t in small()[:3]]
    y = norm_mlp(*inputs, inputs[0], slope=0.5)
    (grad,) = torch.autograd.grad(y.sum(), inputs[of], create_graph=True)
    for other in inputs:
        with pytest.raises(RuntimeError, match=r"norm_mlp: second derivatives .* use norm_mlp_ref"):
            torch.autograd.grad(grad.sum(), other, retain_graph=True, allow_unused=True)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="norm_mlp: forward-mode derivatives"):
        dual = forward_ad.make_dual(inputs[of].detach(), torch.ones_like(inputs[of]))
        norm_mlp(*(dual if i == of else t for i, t in enumerate(inputs)), slope=0.5)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(4)}, ValueError, r"x must be \(T, D\) and up \(M, D\), got \(4,\) and \(6, 8\)"),
        ({"up": torch.zeros(6, 7)}, ValueError, r"norm_mlp: up must be \(6, 8\), got \(6, 7\)"),
        ({"down": torch.zeros(6, 8)}, ValueError, r"norm_mlp: down must be \(8, 6\), got \(6, 8\)"),
        ({"residual": torch.zeros(1, 8)}, ValueError, r"norm_mlp: residual must be \(4, 8\), got \(1, 8\)"),
        ({"down": torch.zeros(8, 6).double()}, TypeError, "norm_mlp: down must be torch.float32 as x is"),
        ({"up": torch.zeros(6, 8, device="meta")}, ValueError, "norm_mlp: up must be on cpu as x is"),
        ({"x": torch.zeros(4, 8).long()}, TypeError, "x must have a floating-point dtype, got torch.int64"),
    ],
)
def test_bad_input_is_named(changed: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": torch.zeros(4, 8), "up": torch.zeros(6, 8), "down": torch.zeros(8, 6)}
    with pytest.raises(error, match=message):
        norm_mlp(**{**arguments, **changed}, slope=0.5)


# ---- The kernels.


def test_where_the_kernels_are_used(monkeypatch) -> None:
    monkeypatch.setattr(MODULE, "has_kernels", lambda *_: True)

    def takes(width: int, hidden: int, slope: float = 0.5, dtype: torch.dtype = torch.bfloat16) -> bool:
        return MODULE._takes(torch.zeros(1, width, dtype=dtype), torch.zeros(1).expand(hidden, width), slope)

    assert takes(512, 2048) and takes(8, 512, 0.0) and takes(256, 640, 1.0)
    assert not takes(520, 2048) and not takes(12, 2048) and not takes(512, 384) and not takes(512, 2000)
    assert takes(512, 65_536) and not takes(512, 65_664)
    assert not takes(512, 2048, -0.1) and not takes(512, 2048, 1.1)
    assert not takes(512, 2048, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes(512, 2048)


@requires_hopper
@pytest.mark.parametrize("which", RESIDUALS)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_eager(shape: tuple[int, int, int], which: str) -> None:
    for slope in (0.0, 0.5):
        assert_no_worse_than_twice_eager(make_inputs(*shape), which, slope)


@requires_hopper
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e3])
def test_small_and_large_rows_are_at_most_twice_eager(scale: float) -> None:
    # 0: only eps is under the root, and every gradient of x passes through the residual.
    x, up, down, residual = make_inputs(300, 512, 2048)
    x[::3] *= scale
    assert_no_worse_than_twice_eager((x, up, down, residual), "other", 0.5)


@requires_hopper
@pytest.mark.parametrize("which", RESIDUALS)
def test_result_is_the_same_on_every_call_and_reads_nothing_that_is_not_written(which: str) -> None:
    inputs = make_inputs(1_000, 512, 2048)
    upstream = upstream_of(inputs[0])
    assert_the_same_on_every_call(lambda: run(norm_mlp, inputs, which, 0.5, upstream))


@requires_hopper
def test_a_row_with_nan_spoils_no_other() -> None:
    inputs = make_inputs(300, 512, 2048)
    inputs[0][7, 3] = torch.nan
    found = run(norm_mlp, inputs, "x", 0.5, upstream_of(inputs[0]))
    for name in ("y", "x"):
        assert found[name].isnan().any(1).nonzero().tolist() == [[7]]


@requires_hopper
def test_strides_and_odd_addresses_are_accepted() -> None:
    inputs = make_inputs(129, 64, 512)
    upstream = upstream_of(inputs[0])
    want = run(norm_mlp, inputs, "none", 0.5, upstream)

    for change in (transposed, moved):
        x, up, down = (change(t).detach().requires_grad_() for t in inputs[:3])
        y = norm_mlp(x, up, down, slope=0.5)
        grads = torch.autograd.grad(y, (x, up, down), change(upstream.to(y.dtype)))
        assert torch.equal(y, want["y"])
        for name, grad in zip(("x", "up", "down"), grads, strict=True):
            torch.testing.assert_close(grad, want[name], rtol=2**-7, atol=1e-3)


@requires_hopper
def test_without_gradients_the_output_is_the_same() -> None:
    inputs = make_inputs(257, 512, 2048)
    want = run(norm_mlp, inputs, "x", 0.5, upstream_of(inputs[0]))["y"]
    got = norm_mlp(*inputs[:3], inputs[0], slope=0.5)
    assert torch.equal(got, want) and got.grad_fn is None
    with torch.inference_mode():
        assert torch.equal(norm_mlp(*inputs[:3], inputs[0], slope=0.5), want)


@requires_hopper
@pytest.mark.parametrize("which", RESIDUALS)
def test_compiled_it_is_one_graph_with_the_same_values(which: str) -> None:
    inputs = make_inputs(300, 512, 2048)
    upstream = upstream_of(inputs[0])
    compiled = torch.compile(norm_mlp, fullgraph=True, dynamic=False)
    got, want = (run(fn, inputs, which, 0.5, upstream) for fn in (compiled, norm_mlp))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=2**-7, atol=1e-3)


@requires_hopper
@pytest.mark.parametrize("which", RESIDUALS)
def test_cuda_graph_replays_forward_and_backward(which: str) -> None:
    inputs = make_inputs(257, 512, 2048)
    x, up, down, other = (t.clone().requires_grad_() for t in inputs)
    upstream = upstream_of(x).to(x.dtype)
    residual = {"none": None, "x": x, "other": other}[which]

    def step() -> tuple[Tensor, ...]:
        y = norm_mlp(x, up, down, residual, slope=0.5)
        return y, *torch.autograd.grad(y, (x, up, down), upstream)

    assert_replays_like_a_call(step, lambda: (x.mul_(0.5), up.mul_(-1)))


@requires_hopper
def test_opcheck_accepts_the_operators() -> None:
    # Whole tiles: the words of rows that do not exist are never written, and opcheck compares all.
    x, up, down, residual = make_inputs(128, 64, 512)
    ops = torch.ops.pgolf
    leaves = [t.clone().requires_grad_() for t in (x, up, down)]
    torch.library.opcheck(ops._norm_mlp, (*leaves, residual, False, 0.5))
    torch.library.opcheck(ops.norm_mlp_up, (x, up, 0.5))
    act, signs, rho = ops.norm_mlp_up(x, up, 0.5)
    torch.library.opcheck(ops.norm_mlp_dact, (x, up, act, signs, rho, 0.5))
    e, partials = ops.norm_mlp_dact(x, up, act, signs, rho, 0.5)
    torch.library.opcheck(ops.norm_mlp_sum, (act, up, residual, None, None, None))
    torch.library.opcheck(ops.norm_mlp_sum, (e, up, None, x, rho, partials))


@requires_hopper
def test_it_keeps_less_than_eager_and_backward_waits_for_nothing() -> None:
    x, up, down, _ = make_inputs(8192, 512, 2048)
    for t in (x, up, down):
        t.requires_grad_()
    kept = {}
    for fn in (norm_mlp, norm_mlp_ref):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = fn(x, up, down, x, slope=0.5)
        kept[fn] = torch.cuda.memory_allocated() - before
        with no_waiting():
            y.backward(torch.ones_like(y))
    # In sizes of x: y, 4 of the activation and 1/4 of signs, against at least y, n, and 4 each of h and act.
    size = x.numel() * 2
    assert kept[norm_mlp] < 6 * size < 10 * size <= kept[norm_mlp_ref]


@requires_hopper
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("grad", torch.zeros(4, 8), ValueError, "width 8, hidden width 64"),
        ("act", torch.zeros(4, 512), TypeError, "norm_mlp_dact: act must be BFloat16, got Float"),
        ("signs", torch.zeros(7).int(), ValueError, r"norm_mlp_dact: signs must be \[2048\], got \[7\]"),
        ("rho", torch.zeros(5), ValueError, r"norm_mlp_dact: rho must be \[4\], got \[5\]"),
    ],
)
def test_the_operators_name_what_their_kernels_would_misread(name, value, error, message: str) -> None:
    grad, down_t = torch.zeros(4, 64).bfloat16().cuda(), torch.zeros(512, 64).bfloat16().cuda()
    act, signs, rho = torch.ops.pgolf.norm_mlp_up(grad, down_t, 0.5)
    arguments = {"grad": grad, "down_t": down_t, "act": act, "signs": signs, "rho": rho}
    if name == "grad":
        arguments["down_t"] = torch.zeros(64, 8).bfloat16().cuda()
        value = value.bfloat16()
    with pytest.raises(error, match=message):
        torch.ops.pgolf.norm_mlp_dact(*{**arguments, name: value.cuda()}.values(), 0.5)


@requires_gpu
def test_what_the_kernels_do_not_take_is_computed_by_the_reference_on_cuda() -> None:
    for shape, dtype in (((33, 520, 2048), torch.bfloat16), ((33, 64, 512), torch.float32)):
        x, up, down, _ = make_inputs(*shape, dtype)
        assert torch.equal(norm_mlp(x, up, down, x, slope=0.5), norm_mlp_ref(x, up, down, x, slope=0.5))
