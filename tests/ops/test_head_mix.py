"""head_mix compared with its formula in float64 and with eager code, compiled, in CUDA graphs.

The kernels run on a GPU alone; csrc/tests/test_head_mix.cpp runs them on the host. What Python adds to them
(autograd, frozen inputs, errors, compilation) is tested on the CPU too, where the operators compute with the
references.
"""

import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from pgolf.model.gates import exclude_self, head_gate
from pgolf.ops import head_mix, head_mix_backward, head_mix_backward_ref, head_mix_ref
from tests.conftest import DEVICES, requires_gpu
from tests.ops.checks import (
    assert_no_worse_than_twice,
    assert_replays_like_a_call,
    assert_the_same_on_every_call,
    moved,
    no_waiting,
    transposed,
)

MODULE = sys.modules["pgolf.ops.head_mix"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SCALE = 0.5
KINDS = [0, 1, 2]


class Sizes(NamedTuple):
    """Tokens, heads and width of one problem."""

    tokens: int
    heads: int = 8
    groups: int = 4
    width: int = 64  # K


# That of the model; no token, one, one round of a block's warps less or more one; every ratio of heads to
# groups, fewer and more groups than one warp holds, and both widths.
SIZES = [
    Sizes(300),
    Sizes(0),
    Sizes(1),
    Sizes(127),
    Sizes(129, 4, 4),
    Sizes(5000, 8, 2),
    Sizes(65, 1, 1),
    Sizes(65, 24, 6),
    Sizes(129, 8, 4, 128),
    Sizes(33, 12, 3, 128),
    Sizes(33, 3, 3, 128),
]


class Inputs(NamedTuple):
    """Tensors of the operator."""

    y: Tensor
    v: Tensor
    z: Tensor | None

    def each(self, change) -> "Inputs":
        return Inputs(*(None if t is None else change(t) for t in self))


def make_inputs(
    sizes: Sizes, kind: int, dtype: torch.dtype = torch.bfloat16, device: torch.device = CUDA
) -> Inputs:
    """Return inputs in which y has a part along v, as attention to the own token gives it."""
    tokens, heads, groups, width = sizes
    g = torch.Generator().manual_seed(tokens * 10007 + heads * 100 + kind)
    v = torch.randn(tokens, groups, width, generator=g) * (0.1 + 3 * torch.rand(tokens, 1, 1, generator=g))
    y = torch.randn(tokens, heads, width, generator=g)
    y = y + 0.5 * v.repeat_interleave(heads // groups, dim=1)
    z = 2 * torch.randn(tokens, heads, generator=g) if kind else None
    return Inputs(y, v, z).each(lambda t: t.to(dtype).to(device))


def upstream_of(inputs: Inputs) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(inputs.y.shape, generator=g).to(inputs.y.device).to(inputs.y.dtype)


def run(fn, inputs: Inputs, kind: int, upstream: Tensor | None = None) -> dict[str, Tensor]:
    """Return the output and the gradients by name."""
    leaves = inputs.each(lambda t: t.detach().clone().requires_grad_())
    out = fn(*leaves, SCALE, kind)
    upstream = upstream_of(inputs) if upstream is None else upstream
    given = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(out, given, upstream.to(out.dtype))
    return {"out": out.detach(), **dict(zip(("dy", "dv", "dz"), grads, strict=False))}


def assert_no_worse_than_twice_eager(inputs: Inputs, kind: int) -> None:
    upstream = upstream_of(inputs)
    got, base = (run(fn, inputs, kind, upstream) for fn in (head_mix, head_mix_ref))
    want = run(head_mix_ref, inputs.each(Tensor.double), kind, upstream)
    assert_no_worse_than_twice(got, base, want)


def assert_delta_is_of_the_rounded_gradient(inputs: Inputs, found: tuple[Tensor, ...]) -> None:
    dy, _, _, delta = found
    assert delta.dtype == torch.float32 and delta.is_contiguous() and delta.shape == dy.shape[1::-1]
    want = (dy.double() * inputs.y.double()).sum(-1).t()
    terms = (dy.double() * inputs.y.double()).abs().sum(-1).t()
    assert ((delta - want).abs() <= 1e-6 * terms).all()


def published(y: Tensor, v: Tensor, z: Tensor | None, scale: float, kind: int) -> Tensor:
    """The formula, head by head."""
    ratio = y.shape[1] // v.shape[1]
    found = []
    for h in range(y.shape[1]):
        u = torch.nn.functional.normalize(v[:, h // ratio], dim=-1)
        e = y[:, h] - (y[:, h] * u).sum(-1, keepdim=True) * u
        if kind:
            e = e * (2 * z[:, h].sigmoid() if kind == 2 else (scale * z[:, h]).sigmoid())[:, None]
        found.append(e)
    return torch.stack(found, dim=1)


# ---- The reference.

SMALL = [Sizes(5), Sizes(3, 4, 4, 12), Sizes(3, 4, 1, 7), Sizes(1, 6, 2, 5)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SMALL)
def test_reference_is_the_formula(sizes: Sizes, kind: int) -> None:
    inputs = make_inputs(sizes, kind, torch.float64, CPU)
    got, want = (run(fn, inputs, kind) for fn in (head_mix, published))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", ["none", "sparse", "dense", "out"])
def test_on_the_cpu_it_is_the_composed_code_bit_for_bit(dtype: torch.dtype, gate: str) -> None:
    kind = {"none": 0, "sparse": 1, "dense": 1, "out": 2}[gate]
    y, v, _ = make_inputs(Sizes(33), 0, dtype, CPU)
    n, weight = torch.randn(33, 12).to(dtype), torch.randn(8, 12).to(dtype)
    want = exclude_self(y, v)
    if kind:
        want = want * head_gate(gate, n, weight, scale=SCALE)
    z = torch.nn.functional.linear(n, weight) if kind else None
    got = head_mix(y, v, z, SCALE if gate == "sparse" else 1.0, kind)
    assert got.dtype == dtype and torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [Sizes(2), Sizes(2, 4, 4, 3), Sizes(2, 4, 1, 3)])
def test_gradcheck_accepts_the_reference_and_the_operator(sizes: Sizes, kind: int) -> None:
    inputs = make_inputs(sizes._replace(width=3), kind, torch.float64, CPU).each(Tensor.requires_grad_)
    for fn in (head_mix, torch.ops.pgolf.head_mix):
        assert torch.autograd.gradcheck(lambda *t, fn=fn: fn(*t, SCALE, kind), tuple(inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [*SMALL, *SIZES[:4]])
def test_backward_reference_is_the_derivative(sizes: Sizes, kind: int) -> None:
    inputs = make_inputs(sizes, kind, torch.float64, CPU)
    # A value of zeros, and one so small that its square is replaced.
    inputs.v[:1] = 0
    inputs.v[1:2] *= 1e-14
    upstream = upstream_of(inputs)
    *got, delta = head_mix_backward(upstream, *inputs, SCALE, kind)
    want = run(head_mix_ref, inputs, kind, upstream)
    for value, name in zip(got, ("dy", "dv", "dz"), strict=True):
        if name in want:
            torch.testing.assert_close(value, want[name], rtol=1e-10, atol=1e-12)
        else:
            assert value.shape == (0,)
    torch.testing.assert_close(delta, (want["dy"] * inputs.y).sum(-1).t(), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_delta_is_of_the_rounded_gradient_and_is_not_rounded(dtype: torch.dtype) -> None:
    inputs = make_inputs(Sizes(33), 1, dtype, CPU)
    assert_delta_is_of_the_rounded_gradient(inputs, head_mix_backward(upstream_of(inputs), *inputs, SCALE, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_with_delta_the_gradients_of_a_query_s_scores_add_up_to_zero(dtype: torch.dtype) -> None:
    # Attention to the own group's values, in float64 but for the dtype of dy and y.
    inputs = make_inputs(Sizes(17, 4, 2), 1, torch.float64, CPU)
    g = torch.Generator().manual_seed(2)
    p = torch.randn(4, 17, 17, generator=g, dtype=torch.float64).softmax(-1)
    v = inputs.v.repeat_interleave(2, dim=1)
    inputs = inputs._replace(y=torch.einsum("hts,shk->thk", p, v)).each(lambda t: t.to(dtype))
    dy, _, _, delta = head_mix_backward(upstream_of(inputs), *inputs, SCALE, 1)
    rows = (p * (torch.einsum("thk,shk->hts", dy.double(), v) - delta[..., None])).sum(-1)
    error = (dy.double() * (torch.einsum("hts,shk->thk", p, v) - inputs.y.double())).sum(-1).t()
    # Only the rounding of y is left, none of dy or delta.
    torch.testing.assert_close(rows, error, rtol=1e-5, atol=1e-6 if dtype == torch.bfloat16 else 1e-12)


# ---- What Python adds to the kernels. On the CPU the operators compute with the references.


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_the_operator_are_those_of_the_reference(kind: int, operator) -> None:
    inputs = make_inputs(Sizes(7), kind, torch.float64, CPU)
    got, want = (run(fn, inputs, kind) for fn in (head_mix, head_mix_ref))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_logits_has_their_dtype(dtype: torch.dtype, operator) -> None:
    inputs = make_inputs(Sizes(7), 1, torch.bfloat16, CPU)
    found = run(head_mix, inputs._replace(z=inputs.z.to(dtype)), 1)
    assert found["dz"].dtype == dtype and found["out"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", DEVICES)
def test_frozen_inputs_get_no_gradient_and_change_no_other(device: str, kind: int, request) -> None:
    if device == "cpu":
        request.getfixturevalue("operator")
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    inputs = make_inputs(Sizes(129), kind, dtype, torch.device(device))
    want = list(run(head_mix, inputs, kind).values())[1:]
    for needed in range(1, 8 if kind else 4):
        leaves = [
            None if t is None else t.clone().requires_grad_(bool(needed >> i & 1))
            for i, t in enumerate(inputs)
        ]
        torch.autograd.backward(head_mix(*leaves, SCALE, kind), upstream_of(inputs))
        for leaf, value in zip(leaves, want, strict=False):
            assert torch.equal(leaf.grad, value) if leaf.requires_grad else leaf.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_compile_in_one_graph_keeps_the_values(kind: int, operator) -> None:
    inputs = make_inputs(Sizes(5), kind, torch.float64, CPU)

    def block(y: Tensor, v: Tensor, z: Tensor | None, scale: float, kind: int) -> Tensor:
        return head_mix(y * 2, v.sin(), None if z is None else z * 2, scale, kind) * 3

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    got, want = (run(fn, inputs, kind) for fn in (compiled, block))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_accepts_the_operators(device: str, kind: int) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    inputs = make_inputs(Sizes(33), kind, dtype, torch.device(device))
    ops, upstream = torch.ops.pgolf, upstream_of(inputs)
    torch.library.opcheck(ops.head_mix_backward, (upstream, *inputs, SCALE, kind))
    torch.library.opcheck(ops.head_mix, (*inputs.each(Tensor.requires_grad_), SCALE, kind))


@pytest.mark.parametrize("of", range(3))
def test_a_second_derivative_and_forward_mode_say_that_they_are_missing(of: int, operator) -> None:
    inputs = make_inputs(Sizes(5), 1, torch.float64, CPU).each(Tensor.requires_grad_)
    (grad,) = torch.autograd.grad(head_mix(*inputs, SCALE, 1).sum(), inputs[of], create_graph=True)
    for other in inputs:
        with pytest.raises(RuntimeError, match=r"head_mix: second derivatives .* use head_mix_ref"):
            torch.autograd.grad(grad.sum(), other, retain_graph=True)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="head_mix: forward-mode derivatives"):
        dual = forward_ad.make_dual(inputs[of].detach(), torch.ones_like(inputs[of]))
        head_mix(*(dual if i == of else t for i, t in enumerate(inputs)), SCALE, 1)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"y": torch.zeros(3, 64)}, ValueError, r"y must be \(T, H, K\) .* got \(3, 64\) and \(3, 4, 8\)"),
        ({"y": torch.zeros(3, 8, 8).long()}, TypeError, "floating-point dtype, got torch.int64"),
        ({"v": torch.zeros(3, 3, 8)}, ValueError, "H must be a multiple of G, got 8 and 3"),
        ({"v": torch.zeros(3, 0, 8)}, ValueError, "H must be a multiple of G, got 8 and 0"),
        ({"v": torch.zeros(4, 4, 8)}, ValueError, r"v must be \(3, 4, 8\), got \(4, 4, 8\)"),
        ({"v": torch.zeros(3, 4, 8).double()}, TypeError, "v must be torch.float32, got torch.float64"),
        ({"v": torch.zeros(3, 4, 8, device="meta")}, ValueError, "v must be on cpu as y is, got meta"),
        ({"z": torch.zeros(3, 4)}, ValueError, r"z must be \(3, 8\), got \(3, 4\)"),
        ({"z": torch.zeros(3, 8).half()}, TypeError, "z must be torch.float32, got torch.float16"),
        ({"z": None}, ValueError, "z must be a tensor with kind 1"),
        ({"kind": 0}, ValueError, "z must be None with kind 0"),
        ({"kind": 3}, ValueError, "kind must be 0, 1 or 2, got 3"),
    ],
)
def test_bad_input_is_named(changed: dict, error: type[Exception], message: str) -> None:
    arguments = {"y": torch.zeros(3, 8, 8), "v": torch.zeros(3, 4, 8), "z": torch.zeros(3, 8)}
    arguments |= {"scale": SCALE, "kind": 1, **changed}
    with pytest.raises(error, match=f"head_mix: .*{message}"):
        head_mix(**arguments)
    with pytest.raises(error, match=f"head_mix: .*{message}"):
        head_mix_backward(torch.zeros(3, 8, 8), **arguments)


def test_a_bad_upstream_gradient_is_named() -> None:
    rest = torch.zeros(3, 8, 8), torch.zeros(3, 4, 8), None, SCALE, 0
    with pytest.raises(ValueError, match=r"head_mix_backward: grad must be \(3, 8, 8\), got \(3, 4, 8\)"):
        head_mix_backward(torch.zeros(3, 4, 8), *rest)
    with pytest.raises(TypeError, match=r"head_mix_backward: grad must be torch.float32, got torch.float64"):
        head_mix_backward(torch.zeros(3, 8, 8).double(), *rest)


# ---- The kernels.


def test_where_the_kernels_are_used(monkeypatch) -> None:
    monkeypatch.setattr(MODULE, "has_kernels", lambda *_, hopper: not hopper)

    def takes(sizes: Sizes, dtype: torch.dtype = torch.bfloat16) -> bool:
        return MODULE._takes(*make_inputs(sizes, 0, dtype, CPU)[:2])

    assert all(map(takes, SIZES))
    assert not takes(Sizes(1, width=32)) and not takes(Sizes(1, 6, 2)) and not takes(Sizes(1, 8, 1))
    assert not takes(Sizes(1), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes(Sizes(1))


@requires_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_error_is_at_most_twice_eager(sizes: Sizes, kind: int) -> None:
    assert_no_worse_than_twice_eager(make_inputs(sizes, kind), kind)


@requires_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_backward_error_is_at_most_twice_the_references(sizes: Sizes, kind: int) -> None:
    inputs = make_inputs(sizes, kind)
    upstream = upstream_of(inputs)
    names = ("dy", "dv", "dz", "delta")
    got, base = (
        dict(zip(names, fn(upstream, *inputs, SCALE, kind), strict=True))
        for fn in (head_mix_backward, head_mix_backward_ref)
    )
    want = head_mix_backward_ref(upstream.double(), *inputs.each(Tensor.double), SCALE, kind)
    assert_no_worse_than_twice(got, base, dict(zip(names, want, strict=True)))
    assert_delta_is_of_the_rounded_gradient(inputs, tuple(got.values()))


@requires_gpu
def test_float32_logits_are_at_most_twice_eager() -> None:
    inputs = make_inputs(Sizes(300), 1)
    assert_no_worse_than_twice_eager(inputs._replace(z=inputs.z.float() * 1.001), 1)


@requires_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, 1e-14, 1e-4, 1e3, 1e12])
def test_small_and_large_values_are_at_most_twice_eager(scale: float, kind: int) -> None:
    # 0 and 1e-14: |v|^2 is replaced, so v has a gradient of another form, and a large one.
    inputs = make_inputs(Sizes(300), kind)
    inputs.v[::3] *= scale
    assert_no_worse_than_twice_eager(inputs, kind)
    inputs.y[1::3] *= scale
    assert_no_worse_than_twice_eager(inputs, kind)


@requires_gpu
def test_saturated_gates_are_at_most_twice_eager() -> None:
    for kind in (1, 2):
        inputs = make_inputs(Sizes(300), kind)
        inputs.z[::2] *= 100
        found = run(head_mix, inputs, kind)
        assert all(t.isfinite().all() for t in found.values())
        assert_no_worse_than_twice_eager(inputs, kind)


@requires_gpu
def test_a_value_of_zeros_removes_nothing() -> None:
    inputs = make_inputs(Sizes(129), 0)
    assert torch.equal(head_mix(inputs.y, torch.zeros_like(inputs.v), None, SCALE, 0), inputs.y)


@requires_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [Sizes(5_001), Sizes(501, 12, 3, 128)])
def test_result_is_the_same_on_every_call_and_reads_nothing_that_is_not_written(
    sizes: Sizes, kind: int
) -> None:
    inputs = make_inputs(sizes, kind)

    def everything() -> dict[str, Tensor]:
        delta = head_mix_backward(upstream_of(inputs), *inputs, SCALE, kind)[3]
        return {**run(head_mix, inputs, kind), "delta": delta}

    assert_the_same_on_every_call(everything)


@requires_gpu
def test_a_head_with_nan_spoils_no_other_group() -> None:
    inputs = make_inputs(Sizes(300), 1)
    inputs.y[7, 3, 5] = torch.nan  # of group 1
    found = run(head_mix, inputs, 1)
    assert found["out"].isnan().any(-1).nonzero().tolist() == [[7, 3]]
    assert not found["dy"].isnan().any()  # it does not depend on y
    assert found["dv"].isnan().any(-1).nonzero().tolist() == [[7, 1]]
    assert found["dz"].isnan().nonzero().tolist() == [[7, 3]]
    delta = head_mix_backward(upstream_of(inputs), *inputs, SCALE, 1)[3]
    assert delta.isnan().nonzero().tolist() == [[3, 7]]


@requires_gpu
def test_strides_and_odd_addresses_are_accepted() -> None:
    inputs = make_inputs(Sizes(129), 1)
    upstream = upstream_of(inputs)

    def columns(t: Tensor, odd: int = 0) -> Tensor:
        """The same values as the last columns of a wider matrix, as v is a part of the product of q, k, v."""
        flat = t.flatten(1)
        before = torch.full((len(flat), 64 + odd), torch.nan, device=t.device, dtype=t.dtype)
        return torch.cat((before, flat), dim=1)[:, 64 + odd :].view(t.shape)

    want = head_mix(*inputs, SCALE, 1), *head_mix_backward(upstream, *inputs, SCALE, 1)
    for change in (transposed, moved, columns, lambda t: columns(t, 3)):
        for changed in (inputs.each(change), inputs._replace(v=change(inputs.v))):
            back = head_mix_backward(change(upstream), *changed, SCALE, 1)
            got = head_mix(*changed, SCALE, 1), *back
            assert all(map(torch.equal, got, want))


@requires_gpu
def test_offsets_beyond_two_to_the_31_are_right() -> None:
    tokens = 4_200_000  # 2.15e9 elements and 4.3 GB a tensor
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    end = make_inputs(Sizes(600), 1)

    def padded(t: Tensor) -> Tensor:
        return torch.cat((t.new_zeros(tokens - 600, *t.shape[1:]), t))

    upstream = upstream_of(end)
    long = end.each(padded)
    got = head_mix(*long, SCALE, 1), *head_mix_backward(padded(upstream), *long, SCALE, 1)
    want = head_mix(*end, SCALE, 1), *head_mix_backward(upstream, *end, SCALE, 1)
    for value, truth in zip(got[:-1], want[:-1], strict=True):
        assert torch.equal(value[-600:], truth)
    assert torch.equal(got[-1][:, -600:], want[-1])


@requires_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_it_is_one_graph_with_the_same_values(kind: int) -> None:
    inputs = make_inputs(Sizes(300), kind)
    compiled = torch.compile(head_mix, fullgraph=True, dynamic=False)
    got, want = (run(fn, inputs, kind) for fn in (compiled, head_mix))
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@requires_gpu
def test_cuda_graph_replays_forward_and_backward() -> None:
    leaves = make_inputs(Sizes(257), 1).each(Tensor.requires_grad_)
    upstream = upstream_of(leaves)

    def step() -> tuple[Tensor, ...]:
        out = head_mix(*leaves, SCALE, 1)
        return out, *torch.autograd.grad(out, leaves, upstream)

    assert_replays_like_a_call(step, lambda: [leaf.mul_(0.5) for leaf in leaves])


@requires_gpu
def test_it_keeps_only_its_inputs_and_backward_waits_for_nothing() -> None:
    leaves = make_inputs(Sizes(8192), 1).each(Tensor.requires_grad_)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = head_mix(*leaves, SCALE, 1)
    assert torch.cuda.memory_allocated() - before <= leaves.y.numel() * 2
    with no_waiting():
        torch.autograd.backward(out, torch.ones_like(out))


@requires_gpu
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("y", torch.zeros(3, 8, 32).bfloat16(), ValueError, "got H = 8, G = 4 and K = 32"),
        ("y", torch.zeros(3, 8, 64), TypeError, "y must be BFloat16, got Float"),
        ("v", torch.zeros(3, 1, 64).bfloat16(), ValueError, "got H = 8, G = 1 and K = 64"),
        ("v", torch.zeros(4, 4, 64).bfloat16(), ValueError, r"v must be \[3, 4, 64\], got \[4, 4, 64\]"),
        ("z", torch.zeros(3, 4), ValueError, r"z must be \[3, 8\], got \[3, 4\]"),
        ("z", torch.zeros(3, 8).half(), TypeError, "z must be float32 or bfloat16, got Half"),
        ("z", None, ValueError, "z must be given with kind 1 and 2, and only then, got kind 1"),
        ("kind", 3, ValueError, "kind must be 0, 1 or 2, got 3"),
        ("grad", torch.zeros(3, 4, 64).bfloat16(), ValueError, r"grad must be \[3, 8, 64\], got"),
    ],
)
def test_the_operator_names_what_its_kernel_would_misread(name, value, error, message: str) -> None:
    arguments = {
        "grad": torch.zeros(3, 8, 64).bfloat16(),
        "y": torch.zeros(3, 8, 64).bfloat16(),
        "v": torch.zeros(3, 4, 64).bfloat16(),
        "z": torch.zeros(3, 8).bfloat16(),
        "scale": SCALE,
        "kind": 1,
    }
    changed = {**arguments, name: value}.values()
    on_gpu = [t.cuda() if isinstance(t, Tensor) else t for t in changed]
    with pytest.raises(error, match=f"head_mix_backward: .*{message}"):
        torch.ops.pgolf.head_mix_backward(*on_gpu)


@requires_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_kernels_do_not_take_is_computed_by_the_reference_on_cuda(kind: int) -> None:
    for sizes, dtype in ((Sizes(33, width=32), torch.bfloat16), (Sizes(33), torch.float32)):
        inputs = make_inputs(sizes, kind, dtype)
        got, want = (fn(*inputs, SCALE, kind) for fn in (head_mix, head_mix_ref))
        assert torch.equal(got, want)
        upstream = upstream_of(inputs)
        got, want = (fn(upstream, *inputs, SCALE, kind) for fn in (head_mix_backward, head_mix_backward_ref))
        assert all(map(torch.equal, got, want))
