"""stream_mix compared with its formula in float64 and with eager code, compiled, in CUDA graphs.

The kernels run on a GPU alone; csrc/tests/test_stream_mix.cpp runs them on the host. What Python adds to them
(sums of partials, frozen inputs, errors, compilation) is tested on the CPU too, where `kernels` puts a plain
version in their place.
"""

import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from pgolf.ops import stream_mix, stream_mix_ref
from tests.conftest import DEVICES, requires_gpu
from tests.ops.checks import (
    assert_no_worse_than_twice,
    assert_replays_like_a_call,
    assert_the_same_on_every_call,
    moved,
    no_waiting,
    transposed,
)

MODULE = sys.modules["pgolf.ops.stream_mix"]
EPS = 1.1920929e-7
CUDA = torch.device("cuda")
# (streams, sums, last): what the model's blocks need, and every other form once.
FORMS = [
    (2, 1, "both"),
    (3, 1, "both"),
    (2, 1, "norm"),
    (3, 2, "norm"),
    (4, 2, "sum"),
    (2, 2, "both"),
    (4, 1, "sum"),
    (4, 2, "both"),
]
# (T, D): no token, one, fewer tokens than blocks, more than one round of all blocks; widths of a part of a
# warp, of one warp, of two and of four, full and not.
SHAPES = [
    (0, 512),
    (1, 512),
    (257, 512),
    (1063, 8),
    (300, 72),
    (129, 256),
    (65, 264),
    (2500, 520),
    (77, 1024),
]


def make_inputs(
    rows: int,
    width: int,
    streams: int,
    sums: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = CUDA,
) -> list[Tensor]:
    """Return the streams, whose rows differ in size as those of the model do, and the coefficients."""
    g = torch.Generator().manual_seed(rows * 10007 + width + streams)
    found = [torch.randn(rows, width, generator=g) for _ in range(streams)]
    found = [t * (0.1 + 3 * torch.rand(rows, 1, generator=g)) for t in found]
    coefficients = torch.randn(sums, streams, width, generator=g)
    wide = torch.promote_types(dtype, torch.float32)
    return [*(t.to(dtype).to(device) for t in found), coefficients.to(wide).to(device)]


def upstream_of(inputs: list[Tensor], count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    shape = inputs[0].shape
    found = [torch.randn(shape, generator=g, dtype=torch.float64).to(inputs[0].device) for _ in range(count)]
    return [t.to(inputs[0].dtype) for t in found]


def run(fn, inputs: list[Tensor], last: str, upstream: list[Tensor] | None = None) -> dict[str, Tensor]:
    """Return the outputs and every gradient by name."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = fn(leaves[:-1], leaves[-1], last=last)
    upstream = upstream_of(inputs, len(outputs)) if upstream is None else upstream
    grads = torch.autograd.grad(outputs, leaves, [u.to(outputs[0].dtype) for u in upstream])
    names = [f"stream {i}" for i in range(len(inputs) - 1)] + ["coefficients"]
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    return {**found, **dict(zip(names, grads, strict=True))}


def assert_no_worse_than_twice_eager(inputs: list[Tensor], last: str) -> None:
    upstream = upstream_of(inputs, len(stream_mix_ref(inputs[:-1], inputs[-1], last=last)))
    got, base = (run(fn, inputs, last, upstream) for fn in (stream_mix, stream_mix_ref))
    want = run(stream_mix_ref, [t.double() for t in inputs], last, upstream)
    assert got["coefficients"].dtype == inputs[-1].dtype
    assert all(t.dtype == inputs[0].dtype for name, t in got.items() if name != "coefficients")
    assert_no_worse_than_twice(got, base, want)


def published(streams: list[Tensor], coefficients: Tensor, *, last: str) -> list[Tensor]:
    """The formula, term by term."""
    sums = list((coefficients[:, :, None] * torch.stack(streams)).sum(1))
    y = sums[-1]
    n = y / (y.square().mean(1, keepdim=True) + EPS).sqrt()
    return {"sum": sums, "norm": [*sums[:-1], n], "both": [*sums, n]}[last]


@pytest.mark.parametrize("form", [*FORMS, (1, 1, "sum"), (6, 3, "both")])
def test_reference_is_the_formula_and_takes_any_number_of_streams(form: tuple[int, int, str]) -> None:
    streams, sums, last = form
    inputs = make_inputs(7, 12, streams, sums, torch.float64, torch.device("cpu"))
    got, want = (run(fn, inputs, last) for fn in (stream_mix, published))
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_cpu_it_is_the_composed_mix_bit_for_bit(dtype: torch.dtype) -> None:
    x, x0, c = make_inputs(33, 64, 2, 1, dtype, torch.device("cpu"))
    y = c[0, 0].to(dtype) * x + c[0, 1].to(dtype) * x0
    want = y, F.rms_norm(y, (64,), eps=EPS)
    for got, value in zip(stream_mix([x, x0], c, last="both"), want, strict=True):
        assert got.dtype == dtype and torch.equal(got, value)


@pytest.mark.parametrize("last", ["sum", "norm", "both"])
def test_gradcheck_accepts_the_reference(last: str) -> None:
    inputs = make_inputs(3, 5, 3, 2, torch.float64, torch.device("cpu"))
    assert torch.autograd.gradcheck(
        lambda *t: stream_mix(t[:-1], t[-1], last=last), tuple(t.requires_grad_() for t in inputs)
    )


# ---- What Python adds to the kernels, with a plain version of them on the CPU.


def plain_forward(streams: list[Tensor], coefficients: Tensor, keep: bool, norm: bool) -> list[Tensor]:
    last = {(True, True): "both", (True, False): "sum", (False, True): "norm"}[keep, norm]
    return [t.clone() for t in published(streams, coefficients, last=last)]


def plain_backward(
    grads: list[Tensor], streams: list[Tensor], coefficients: Tensor, keep: bool, norm: bool
) -> list[Tensor]:
    """The formula of the kernel, with all of the tokens in two rows of partials."""
    y = (coefficients[-1, :, None] * torch.stack(streams)).sum(0)
    g = [*grads[: len(coefficients) - (not keep)], *([] if keep else [torch.zeros_like(y)])]
    if norm:
        dn, rho = grads[-1], (y.square().mean(1, keepdim=True) + EPS).rsqrt()
        g[-1] = g[-1] + rho * dn - rho**3 / y.shape[1] * (dn * y).sum(1, keepdim=True) * y
    partials = coefficients.new_zeros(MODULE.PARTIALS, *coefficients.shape)
    for o, grad in enumerate(g):
        for i, stream in enumerate(streams):
            for row, half in enumerate((slice(0, 2), slice(2, None))):
                partials[row * 100, o, i] = (grad[half] * stream[half]).sum(0)
    of_streams = [
        sum(c[i] * grad for c, grad in zip(coefficients, g, strict=True)) for i in range(len(streams))
    ]
    return [*of_streams, partials]


@pytest.fixture
def kernels(monkeypatch) -> Iterator[None]:
    """Give the CPU a plain version of the kernels, which takes every dtype."""
    monkeypatch.setattr(MODULE, "_takes", lambda *_: True)
    with torch.library._scoped_library("pgolf", "IMPL") as library:
        library.impl("stream_mix", plain_forward, "CPU")
        library.impl("stream_mix_backward", plain_backward, "CPU")
        yield


def small(streams: int = 3, sums: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return make_inputs(5, 8, streams, sums, dtype, torch.device("cpu"))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_around_the_kernels_are_exact(form: tuple[int, int, str], kernels) -> None:
    streams, sums, last = form
    inputs = small(streams, sums)
    got, want = (run(fn, inputs, last) for fn in (stream_mix, stream_mix_ref))
    for name, truth in want.items():
        torch.testing.assert_close(got[name], truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_inputs_and_unused_outputs_get_no_gradient_and_change_no_other(device: str, request) -> None:
    if device == "cpu":
        request.getfixturevalue("kernels")
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    inputs = make_inputs(129, 64, 2, 2, dtype, torch.device(device))
    upstream = upstream_of(inputs, 3)
    for used in range(1, 8):
        masked = [u if used >> i & 1 else torch.zeros_like(u) for i, u in enumerate(upstream)]
        want = list(run(stream_mix, inputs, "both", masked).values())[3:]
        for needed in range(1, 8):
            leaves = [t.clone().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(inputs)]
            outputs = stream_mix(leaves[:-1], leaves[-1], last="both")
            chosen = [i for i in range(3) if used >> i & 1]
            torch.autograd.backward([outputs[i] for i in chosen], [upstream[i] for i in chosen])
            for leaf, value in zip(leaves, want, strict=True):
                assert torch.equal(leaf.grad, value) if leaf.requires_grad else leaf.grad is None


@pytest.mark.parametrize("last", ["norm", "both"])
def test_compile_in_one_graph_keeps_the_values(last: str, kernels) -> None:
    inputs = small()

    def block(streams: list[Tensor], coefficients: Tensor, *, last: str) -> tuple[Tensor, ...]:
        found = stream_mix([s * 2 for s in streams], coefficients.sin(), last=last)
        return tuple(t * 3 for t in found)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    got, want = (run(fn, inputs, last) for fn in (compiled, block))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-13)


def test_opcheck_accepts_the_operators_around_the_kernels(kernels) -> None:
    for streams, sums, last in FORMS[:5]:
        inputs = [t.requires_grad_() for t in small(streams, sums, torch.float32)]
        arguments = inputs[:-1], inputs[-1], last != "norm", last != "sum"
        torch.library.opcheck(torch.ops.pgolf.stream_mix, arguments)


@pytest.mark.parametrize("of", range(4))
def test_a_second_derivative_and_forward_mode_say_that_they_are_missing(of: int, kernels) -> None:
    inputs = [t.requires_grad_() for t in small()]
    outputs = stream_mix(inputs[:-1], inputs[-1], last="both")
    (grad,) = torch.autograd.grad(sum(t.sum() for t in outputs), inputs[of], create_graph=True)
    for other in inputs:
        with pytest.raises(RuntimeError, match=r"stream_mix: second derivatives .* use stream_mix_ref"):
            torch.autograd.grad(grad.sum(), other, retain_graph=True)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="stream_mix: forward-mode derivatives"):
        dual = forward_ad.make_dual(inputs[of].detach(), torch.ones_like(inputs[of]))
        mixed = [dual if i == of else t for i, t in enumerate(inputs)]
        stream_mix(mixed[:-1], mixed[-1])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"streams": []}, ValueError, r"streams must be one or more \(T, D\), got \[\]"),
        (
            {"streams": [torch.zeros(8)] * 2},
            ValueError,
            r"must be one or more \(T, D\), got \[\(8,\), \(8,\)\]",
        ),
        ({"streams": [torch.zeros(4, 8).long()] * 2}, TypeError, "floating-point dtype, got torch.int64"),
        (
            {"streams": [torch.zeros(4, 8), torch.zeros(1, 8)]},
            ValueError,
            r"stream 1 must be \(4, 8\) as stream 0 is, got \(1, 8\)",
        ),
        (
            {"streams": [torch.zeros(4, 8), torch.zeros(4, 8).double()]},
            TypeError,
            "stream 1 must be torch.float32 as stream 0 is, got torch.float64",
        ),
        (
            {"streams": [torch.zeros(4, 8), torch.zeros(4, 8, device="meta")]},
            ValueError,
            "stream 1 must be on cpu as stream 0 is, got meta",
        ),
        (
            {"coefficients": torch.zeros(2, 8)},
            ValueError,
            r"coefficients must be \(o, 2, 8\) with o > 0, got \(2, 8\)",
        ),
        ({"coefficients": torch.zeros(0, 2, 8)}, ValueError, r"with o > 0, got \(0, 2, 8\)"),
        ({"coefficients": torch.zeros(1, 3, 8)}, ValueError, r"\(o, 2, 8\) with o > 0, got \(1, 3, 8\)"),
        (
            {"coefficients": torch.zeros(1, 2, 8).half()},
            TypeError,
            "coefficients must be torch.float32, or torch.float32 as the streams, got torch.float16",
        ),
        ({"last": "mean"}, ValueError, "last must be 'sum', 'norm' or 'both', got 'mean'"),
    ],
)
def test_bad_input_is_named(changed: dict, error: type[Exception], message: str) -> None:
    arguments = {"streams": [torch.zeros(4, 8)] * 2, "coefficients": torch.zeros(1, 2, 8), "last": "sum"}
    with pytest.raises(error, match=f"stream_mix: .*{message}"):
        stream_mix(**{**arguments, **changed})


# ---- The kernels.


def test_where_the_kernels_are_used(monkeypatch) -> None:
    monkeypatch.setattr(MODULE, "has_kernels", lambda *_, hopper: not hopper)

    def takes(width: int, streams: int, sums: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        return MODULE._takes([torch.zeros(1, width, dtype=dtype)] * streams, torch.zeros(sums, 1, 1))

    assert takes(512, 2, 1) and takes(8, 4, 2) and takes(1024, 3, 1)
    assert not takes(1032, 2, 1) and not takes(12, 2, 1) and not takes(0, 2, 1)
    assert not takes(512, 1, 1) and not takes(512, 5, 1) and not takes(512, 2, 3)
    assert not takes(512, 2, 1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes(512, 2, 1)


@requires_gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_eager(shape: tuple[int, int], form: tuple[int, int, str]) -> None:
    streams, sums, last = form
    assert_no_worse_than_twice_eager(make_inputs(*shape, streams, sums), last)


@requires_gpu
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e3])
def test_small_and_large_rows_are_at_most_twice_eager(scale: float) -> None:
    # 0: only eps is under the root, so the norm passes gradients 2,896 times as large.
    inputs = make_inputs(300, 512, 3, 2)
    for stream in inputs[:-1]:
        stream[::3] *= scale
    assert_no_worse_than_twice_eager(inputs, "both")


@requires_gpu
def test_offsets_beyond_two_to_the_31_are_right() -> None:
    rows, width = 2_100_000, 1024  # 2.15e9 elements and 4.3 GB a tensor
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of GPU memory")
    ends = make_inputs(600, width, 2, 1)
    streams = [torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    for stream, end in zip(streams, ends, strict=False):
        stream[-600:] = end
    upstream = upstream_of(ends, 2)
    padded = [torch.zeros_like(streams[0]) for _ in upstream]
    for long, short in zip(padded, upstream, strict=True):
        long[-600:] = short
    got = run(stream_mix, [*streams, ends[-1]], "both", padded)
    want = run(stream_mix, ends, "both", upstream)
    for name, value in want.items():
        if name == "coefficients":
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-3)
        else:
            assert torch.equal(got[name][-600:], value), name


@requires_gpu
@pytest.mark.parametrize("form", FORMS)
def test_result_is_the_same_on_every_call_and_reads_nothing_that_is_not_written(
    form: tuple[int, int, str],
) -> None:
    streams, sums, last = form
    inputs = make_inputs(5_001, 512, streams, sums)
    assert_the_same_on_every_call(lambda: run(stream_mix, inputs, last))


@requires_gpu
def test_a_row_with_nan_spoils_no_other() -> None:
    inputs = make_inputs(300, 512, 2, 1)
    inputs[0][7, 3] = torch.nan
    found = run(stream_mix, inputs, "both")
    for name in ("output 1", "stream 0", "stream 1"):
        assert found[name].isnan().any(1).nonzero().tolist() == [[7]]
    assert found["output 0"].isnan().nonzero().tolist() == [[7, 3]]


@requires_gpu
def test_strides_and_odd_addresses_are_accepted() -> None:
    inputs = make_inputs(129, 64, 3, 2)
    want = run(stream_mix, inputs, "both")

    def change_and_run(change) -> dict[str, Tensor]:
        leaves = [change(t).detach().requires_grad_() for t in inputs]
        outputs = stream_mix(leaves[:-1], leaves[-1], last="both")
        grads = torch.autograd.grad(outputs, leaves, [change(u) for u in upstream_of(inputs, 3)])
        return dict(zip(want, (*outputs, *grads), strict=True))

    for change in (transposed, moved):
        for name, value in change_and_run(change).items():
            assert torch.equal(value, want[name]), name


@requires_gpu
@pytest.mark.parametrize("form", FORMS[:5])
def test_compiled_it_is_one_graph_with_the_same_values(form: tuple[int, int, str]) -> None:
    streams, sums, last = form
    inputs = make_inputs(300, 512, streams, sums)
    compiled = torch.compile(stream_mix, fullgraph=True, dynamic=False)
    got, want = (run(fn, inputs, last) for fn in (compiled, stream_mix))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-3)


@requires_gpu
def test_cuda_graph_replays_forward_and_backward() -> None:
    leaves = [t.clone().requires_grad_() for t in make_inputs(257, 512, 3, 2)]
    upstream = upstream_of(leaves, 3)

    def step() -> tuple[Tensor, ...]:
        outputs = stream_mix(leaves[:-1], leaves[-1], last="both")
        return *outputs, *torch.autograd.grad(outputs, leaves, upstream)

    assert_replays_like_a_call(step, lambda: [leaf.mul_(0.5) for leaf in leaves])


@requires_gpu
def test_opcheck_accepts_the_operators() -> None:
    ops = torch.ops.pgolf
    for streams, sums, last in FORMS:
        *rows, coefficients = (t.requires_grad_() for t in make_inputs(33, 64, streams, sums))
        settings = coefficients, last != "norm", last != "sum"
        torch.library.opcheck(ops.stream_mix, (rows, *settings))
        grads = [t.detach() for t in ops.stream_mix(rows, *settings)]
        plain = [t.detach() for t in rows]
        torch.library.opcheck(ops.stream_mix_backward, (grads, plain, coefficients.detach(), *settings[1:]))


@requires_gpu
def test_it_keeps_only_its_inputs_and_backward_waits_for_nothing() -> None:
    leaves = [t.requires_grad_() for t in make_inputs(8192, 512, 3, 1)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    outputs = stream_mix(leaves[:-1], leaves[-1], last="both")
    assert torch.cuda.memory_allocated() - before <= 2 * leaves[0].numel() * 2
    with no_waiting():
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])


@requires_gpu
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("streams", [torch.zeros(4, 12).bfloat16()] * 2, ValueError, "2 streams, 1 sums, width 12"),
        ("streams", [torch.zeros(4, 8)] * 2, TypeError, "each stream must be BFloat16, got Float"),
        ("grads", [torch.zeros(4, 8).bfloat16()], ValueError, "needs 2 gradients, one of each output, got 1"),
        (
            "grads",
            [torch.zeros(4, 8).bfloat16(), torch.zeros(5, 8).bfloat16()],
            ValueError,
            r"each gradient must be \[4, 8\], got \[5, 8\]",
        ),
        (
            "coefficients",
            torch.zeros(1, 3, 8),
            ValueError,
            r"coefficients must be \[1, 2, 8\], got \[1, 3, 8\]",
        ),
    ],
)
def test_the_operator_names_what_its_kernel_would_misread(name, value, error, message: str) -> None:
    arguments = {
        "grads": [torch.zeros(4, 8).bfloat16()] * 2,
        "streams": [torch.zeros(4, 8).bfloat16()] * 2,
        "coefficients": torch.zeros(1, 2, 8),
    }
    changed = {**arguments, name: value}.values()
    on_gpu = [[t.cuda() for t in v] if isinstance(v, list) else v.cuda() for v in changed]
    with pytest.raises(error, match=f"stream_mix_backward: .*{message}"):
        torch.ops.pgolf.stream_mix_backward(*on_gpu, True, True)


@requires_gpu
def test_what_the_kernels_do_not_take_is_computed_by_the_reference_on_cuda() -> None:
    for shape, dtype in (((33, 12, 2, 1), torch.bfloat16), ((33, 64, 3, 1), torch.float32)):
        *streams, coefficients = make_inputs(*shape, dtype)
        got, want = (fn(streams, coefficients, last="both") for fn in (stream_mix, stream_mix_ref))
        assert all(map(torch.equal, got, want))
