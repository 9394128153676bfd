"""qk_norm_rope compared with its formula in float64 and with eager code, compiled, in CUDA graphs.

The kernels run on a GPU alone; csrc/tests/test_qk_norm_rope.cpp runs them on the host. What Python adds to
them (autograd, frozen inputs, errors, compilation) is tested on the CPU too, where the operators compute with
the references.
"""

import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from pgolf.model.gates import rms_norm
from pgolf.model.rope import rope_tables, rotate
from pgolf.ops import (
    qk_norm_rope,
    qk_norm_rope_backward,
    qk_norm_rope_backward_ref,
    qk_norm_rope_ref,
)
from tests.conftest import DEVICES, requires_gpu
from tests.ops.checks import (
    assert_no_worse_than_twice,
    assert_replays_like_a_call,
    assert_the_same_on_every_call,
    moved,
    no_waiting,
    part,
    transposed,
)

MODULE = sys.modules["pgolf.ops.qk_norm_rope"]
EPS = 1.1920929e-7
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Sizes(NamedTuple):
    """Tokens, heads and widths of one problem."""

    tokens: int
    heads: int = 8
    groups: int = 4
    width: int = 64  # K
    dims: int = 16  # R


# That of the model; no token, one, one round of a block's warps less or more one; every ratio of heads to
# groups, more heads than one warp holds, and both widths; no rotation, halves that are a multiple of eight
# columns and halves that are not, and all columns.
SIZES = [
    Sizes(300),
    Sizes(0),
    Sizes(1),
    Sizes(127),
    Sizes(129, 4, 4),
    Sizes(5000, 8, 2),
    Sizes(65, 1, 1),
    Sizes(65, 24, 12, 64, 32),
    Sizes(129, 8, 4, 128, 16),
    Sizes(33, 12, 3, 128, 64),
    Sizes(129, 8, 4, 64, 0),
    Sizes(129, 8, 4, 64, 64),
    Sizes(129, 8, 4, 64, 6),
    Sizes(65, 8, 4, 64, 20),
    Sizes(65, 2, 2, 128, 126),
    Sizes(65, 2, 1, 128, 96),
]


class Inputs(NamedTuple):
    """Arguments of the operator."""

    qkv: Tensor
    gain: Tensor
    cos: Tensor
    sin: Tensor
    head_dim: int

    def double(self) -> "Inputs":
        return Inputs(*(t.double() for t in self[:4]), self.head_dim)


def make_inputs(sizes: Sizes, dtype: torch.dtype = torch.bfloat16, device: torch.device = CUDA) -> Inputs:
    """Return inputs whose rows differ in size as those of the model do."""
    tokens, heads, groups, width, dims = sizes
    g = torch.Generator().manual_seed(tokens * 10007 + heads * 100 + dims)
    qkv = torch.randn(tokens, (heads + 2 * groups) * width, generator=g)
    qkv = qkv * (0.1 + 3 * torch.rand(tokens, 1, generator=g))
    gain = (1 + torch.randn(heads, generator=g)).to(torch.promote_types(dtype, torch.float32))
    cos, sin = rope_tables(tokens, dims, base=10_000.0, device=device)
    return Inputs(qkv.to(dtype).to(device), gain.to(device), cos, sin, width)


def upstream_of(inputs: Inputs, values: int = 0) -> list[Tensor]:
    """Return gradients of q, of k, and `values` ones of v."""
    g = torch.Generator().manual_seed(1)
    heads = inputs.gain.shape[0]
    groups = (inputs.qkv.shape[1] // inputs.head_dim - heads) // 2
    shapes = [heads, groups] + [groups] * values
    found = [torch.randn(inputs.qkv.shape[0], n, inputs.head_dim, generator=g) for n in shapes]
    return [t.to(inputs.qkv.device).to(inputs.qkv.dtype) for t in found]


def run(fn, inputs: Inputs, upstream: list[Tensor] | None = None) -> dict[str, Tensor]:
    """Return the outputs and the gradients by name."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs[:2]]
    outputs = fn(*leaves, *inputs[2:])
    upstream = upstream_of(inputs) if upstream is None else upstream
    grads = torch.autograd.grad(outputs, leaves, [u.to(outputs[0].dtype) for u in upstream])
    return dict(zip(("q", "k", "dqkv", "dgain"), (*(t.detach() for t in outputs), *grads), strict=True))


def assert_no_worse_than_twice_eager(inputs: Inputs) -> None:
    upstream = upstream_of(inputs)
    got, base = (run(fn, inputs, upstream) for fn in (qk_norm_rope, qk_norm_rope_ref))
    assert_no_worse_than_twice(got, base, run(qk_norm_rope_ref, inputs.double(), upstream))


def published(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """The formula, column by column of a complex rotation."""
    heads, half = gain.shape[0], cos.shape[-1]
    x = qkv.view(qkv.shape[0], -1, head_dim)
    x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(cos, -sin)
    x = torch.cat((turned.real, turned.imag, x[..., 2 * half :]), dim=-1)
    groups = (x.shape[1] - heads) // 2
    return gain[:, None] * x[:, :heads], x[:, heads : heads + groups]


# ---- The reference.

SMALL = [Sizes(5), Sizes(3, 4, 4, 12, 0), Sizes(3, 4, 1, 12, 12), Sizes(4, 4, 2, 10, 6), Sizes(1)]


@pytest.mark.parametrize("sizes", SMALL)
def test_reference_is_the_formula(sizes: Sizes) -> None:
    inputs = make_inputs(sizes, torch.float64, CPU).double()
    got, want = (run(fn, inputs) for fn in (qk_norm_rope, published))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_cpu_it_is_the_composed_code_bit_for_bit(dtype: torch.dtype) -> None:
    qkv, gain, cos, sin, width = make_inputs(Sizes(33), dtype, CPU)
    gain = gain.to(dtype)
    q, k, _ = torch.split(qkv, [512, 256, 256], dim=-1)
    want_q = rotate(rms_norm(q.view(33, 8, 64)) * gain[:, None], cos, sin)
    want_k = rotate(rms_norm(k.view(33, 4, 64)), cos, sin)
    for got, want in zip(qk_norm_rope(qkv, gain, cos, sin, width), (want_q, want_k), strict=True):
        assert got.dtype == dtype and torch.equal(got, want)


@pytest.mark.parametrize("flat", [False, True])
def test_tables_may_have_two_or_three_dims(flat: bool) -> None:
    inputs = make_inputs(Sizes(5), torch.float32, CPU)
    shaped = inputs._replace(cos=inputs.cos[:, 0], sin=inputs.sin[:, 0]) if flat else inputs
    for got, want in zip(qk_norm_rope(*shaped), qk_norm_rope_ref(*inputs), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("sizes", SMALL)
def test_gradcheck_accepts_the_reference_and_the_operator(sizes: Sizes) -> None:
    inputs = make_inputs(
        sizes._replace(tokens=2, heads=2 * sizes.heads // sizes.groups, groups=2), torch.float64, CPU
    )
    leaves = [t.requires_grad_() for t in inputs[:2]]
    for fn in (qk_norm_rope, torch.ops.pgolf.qk_norm_rope):
        assert torch.autograd.gradcheck(lambda *t, fn=fn: fn(*t, *inputs[2:]), leaves)


@pytest.mark.parametrize("sizes", [*SMALL, *SIZES[:4]])
@pytest.mark.parametrize("values", [0, 1, 2])
def test_backward_reference_is_the_derivative_and_sums_the_gradients_of_v(sizes: Sizes, values: int) -> None:
    inputs = make_inputs(sizes, torch.float64, CPU)
    dq, dk, *dv = upstream_of(inputs, values)
    dqkv, dgain = qk_norm_rope_backward(dq, dk, dv, *inputs)
    want = run(qk_norm_rope_ref, inputs, [dq, dk])
    columns = dk[0].numel() if len(dk) else sizes.groups * sizes.width
    of_values = torch.zeros_like(dk) if not dv else torch.stack(dv).sum(0)
    torch.testing.assert_close(dqkv[:, :-columns], want["dqkv"][:, :-columns], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dqkv[:, -columns:], of_values.flatten(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(dgain, want["dgain"], rtol=1e-10, atol=1e-11)


# ---- What Python adds to the kernels. On the CPU the operators compute with the references.


def test_gradients_through_the_operator_are_those_of_the_reference(operator) -> None:
    inputs = make_inputs(Sizes(7), torch.float64, CPU)
    got, want = (run(fn, inputs) for fn in (qk_norm_rope, qk_norm_rope_ref))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gain_dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_gain_has_its_dtype(gain_dtype: torch.dtype, operator) -> None:
    inputs = make_inputs(Sizes(7), torch.bfloat16, CPU)
    found = run(qk_norm_rope, inputs._replace(gain=inputs.gain.to(gain_dtype)))
    assert found["dgain"].dtype == gain_dtype and found["q"].dtype == torch.bfloat16


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_inputs_and_unused_outputs_get_no_gradient_and_change_no_other(device: str, request) -> None:
    if device == "cpu":
        request.getfixturevalue("operator")
    inputs = make_inputs(
        Sizes(129), torch.float64 if device == "cpu" else torch.bfloat16, torch.device(device)
    )
    upstream = upstream_of(inputs)
    for used in range(1, 4):
        masked = [u if used >> i & 1 else torch.zeros_like(u) for i, u in enumerate(upstream)]
        want = list(run(qk_norm_rope, inputs, masked).values())[2:]
        for needed in range(1, 4):
            leaves = [t.clone().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(inputs[:2])]
            outputs = qk_norm_rope(*leaves, *inputs[2:])
            chosen = [i for i in range(2) if used >> i & 1 and outputs[i].requires_grad]
            torch.autograd.backward([outputs[i] for i in chosen], [upstream[i] for i in chosen])
            for leaf, value in zip(leaves, want, strict=True):
                assert torch.equal(leaf.grad, value) if leaf.requires_grad else leaf.grad is None


def test_compile_in_one_graph_keeps_the_values(operator) -> None:
    inputs = make_inputs(Sizes(5), torch.float64, CPU)

    def block(qkv: Tensor, gain: Tensor, *rest) -> tuple[Tensor, Tensor]:
        q, k = qk_norm_rope(qkv * 2, gain.sin(), *rest)
        return q * 3, k * 3

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    got, want = (run(fn, inputs) for fn in (compiled, block))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("values", [0, 1, 2])
def test_opcheck_accepts_the_operators_on_the_cpu(values: int) -> None:
    inputs = make_inputs(Sizes(5), torch.float32, CPU)
    torch.library.opcheck(
        torch.ops.pgolf.qk_norm_rope, (*(t.requires_grad_() for t in inputs[:2]), *inputs[2:])
    )
    dq, dk, *dv = upstream_of(inputs, values)
    plain = [t.detach() for t in inputs[:4]]
    torch.library.opcheck(torch.ops.pgolf.qk_norm_rope_backward, (dq, dk, dv, *plain, inputs.head_dim))
    narrow = [t.bfloat16() for t in (dk, *dv, *plain[:2])]
    rest = narrow[0], narrow[1:-2], *narrow[-2:], *plain[2:], inputs.head_dim
    torch.library.opcheck(torch.ops.pgolf.qk_norm_rope_backward, (dq, *rest))


@pytest.mark.parametrize("of", range(2))
def test_a_second_derivative_and_forward_mode_say_that_they_are_missing(of: int, operator) -> None:
    inputs = make_inputs(Sizes(5), torch.float64, CPU)
    leaves = [t.requires_grad_() for t in inputs[:2]]
    outputs = qk_norm_rope(*leaves, *inputs[2:])
    (grad,) = torch.autograd.grad(sum(t.sum() for t in outputs), leaves[of], create_graph=True)
    for other in leaves:
        with pytest.raises(RuntimeError, match=r"qk_norm_rope: second derivatives .* use qk_norm_rope_ref"):
            torch.autograd.grad(grad.sum(), other, retain_graph=True)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="qk_norm_rope: forward-mode derivatives"):
        dual = forward_ad.make_dual(leaves[of].detach(), torch.ones_like(leaves[of]))
        mixed = [dual if i == of else t for i, t in enumerate(leaves)]
        qk_norm_rope(*mixed, *inputs[2:])
    with pytest.raises(RuntimeError, match="qk_norm_rope: cos has no derivative"):
        qk_norm_rope(*inputs[:2], inputs.cos.requires_grad_(), *inputs[3:])


QKV, TABLE = torch.zeros(3, 16 * 8), torch.zeros(3, 1, 2)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"qkv": torch.zeros(3)},
            ValueError,
            r"qkv must be \(T, \(H \+ 2G\) K\), .* got \(3,\), \(8,\) and 8",
        ),
        ({"gain": torch.zeros(8, 1)}, ValueError, r"gain \(H,\) and .* \(8, 1\)"),
        ({"head_dim": 0}, ValueError, "head_dim positive, .* and 0"),
        ({"head_dim": 16}, ValueError, "for H = 8 .*, K = 16 and some G, got 128"),
        ({"gain": torch.zeros(7)}, ValueError, "for H = 7 .*, got 128"),
        ({"gain": torch.zeros(0)}, ValueError, "for H = 0"),
        ({"qkv": QKV.long()}, TypeError, "floating-point dtype, got torch.int64"),
        ({"gain": torch.zeros(8).half()}, TypeError, "gain must be torch.float32, got torch.float16"),
        ({"cos": TABLE.half()}, TypeError, "cos must be torch.float32, got torch.float16"),
        ({"sin": torch.zeros(3, 1, 3)}, ValueError, r"sin must be \(3, R/2\) .* the same R for both, got"),
        ({"cos": torch.zeros(3, 6), "sin": torch.zeros(3, 6)}, ValueError, r"with R <= 8, .* got \(3, 6\)"),
        ({"cos": torch.zeros(4, 1, 2)}, ValueError, r"cos must be \(3, R/2\) .* got \(4, 1, 2\)"),
        ({"gain": torch.zeros(8, device="meta")}, ValueError, "gain must be on cpu as qkv is, got meta"),
    ],
)
def test_bad_input_is_named(changed: dict, error: type[Exception], message: str) -> None:
    arguments = {"qkv": QKV, "gain": torch.zeros(8), "cos": TABLE, "sin": TABLE, "head_dim": 8, **changed}
    with pytest.raises(error, match=f"qk_norm_rope: .*{message}"):
        qk_norm_rope(**arguments)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"dv": [torch.zeros(3, 4, 8)] * 3}, ValueError, "dv must be at most 2 tensors, got 3"),
        ({"dv": [torch.zeros(3, 8, 8)]}, ValueError, r"dv must be \(3, 4, 8\), got \(3, 8, 8\)"),
        ({"dq": torch.zeros(3, 4, 8)}, ValueError, r"dq must be \(3, 8, 8\), got \(3, 4, 8\)"),
        ({"dq": torch.zeros(3, 8, 8).half()}, TypeError, "dq must be torch.float32, got torch.float16"),
        ({"dk": torch.zeros(3, 4, 8).double()}, TypeError, "dk must be torch.float32, got torch.float64"),
        ({"dk": torch.zeros(3, 4, 8, device="meta")}, ValueError, "dk must be on cpu, got meta"),
    ],
)
def test_bad_gradients_are_named(changed: dict, error: type[Exception], message: str) -> None:
    arguments = {"dq": torch.zeros(3, 8, 8), "dk": torch.zeros(3, 4, 8), "dv": [], "qkv": QKV}
    arguments |= {"gain": torch.zeros(8), "cos": TABLE, "sin": TABLE, "head_dim": 8, **changed}
    with pytest.raises(error, match=f"qk_norm_rope_backward: .*{message}"):
        qk_norm_rope_backward(**arguments)


# ---- The kernels.


def test_where_the_kernels_are_used(monkeypatch) -> None:
    monkeypatch.setattr(MODULE, "has_kernels", lambda *_, hopper: not hopper)

    def takes(sizes: Sizes, dtype: torch.dtype = torch.bfloat16) -> bool:
        return MODULE._takes(*make_inputs(sizes, dtype, CPU))

    assert all(map(takes, SIZES))
    assert not takes(Sizes(1, width=32)) and not takes(Sizes(1, 6, 2)) and not takes(Sizes(1, 2, 4))
    assert not takes(Sizes(1), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes(Sizes(1))


@requires_gpu
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("gain_dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_eager(sizes: Sizes, gain_dtype: torch.dtype) -> None:
    inputs = make_inputs(sizes)
    assert_no_worse_than_twice_eager(inputs._replace(gain=inputs.gain.to(gain_dtype)))


@requires_gpu
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("values", [0, 1, 2])
def test_backward_error_is_at_most_twice_the_references(sizes: Sizes, values: int) -> None:
    inputs = make_inputs(sizes)
    dq, dk, *dv = upstream_of(inputs, values)
    names = ("dqkv", "dgain")
    got, base = (
        dict(zip(names, fn(dq, dk, dv, *inputs), strict=True))
        for fn in (qk_norm_rope_backward, qk_norm_rope_backward_ref)
    )
    wide = [dq.double(), dk.double(), [t.double() for t in dv]]
    want = qk_norm_rope_backward_ref(*wide, *inputs.double())
    assert_no_worse_than_twice(got, base, dict(zip(names, want, strict=True)))


@requires_gpu
@pytest.mark.parametrize("scale", [0.0, 1e-10, 1e-4, 1e3, 1e15])
def test_small_and_large_rows_are_at_most_twice_eager(scale: float) -> None:
    # 0: only eps is under the root, so the norm passes gradients 2,896 times as large.
    inputs = make_inputs(Sizes(300))
    inputs.qkv[::3] *= scale
    assert_no_worse_than_twice_eager(inputs)


@requires_gpu
def test_a_gain_of_zero_has_the_gradient_of_the_formula() -> None:
    inputs = make_inputs(Sizes(300))
    inputs.gain[::2] = 0
    found = run(qk_norm_rope, inputs)
    assert not found["q"][:, ::2].any() and found["dgain"].abs().min() > 0
    assert not found["dqkv"].view(300, 16, 64)[:, :8:2].any()
    assert_no_worse_than_twice_eager(inputs)


@requires_gpu
@pytest.mark.parametrize("sizes", [Sizes(5_001), Sizes(501, 8, 2, 128, 20)])
def test_result_is_the_same_on_every_call_and_reads_nothing_that_is_not_written(sizes: Sizes) -> None:
    inputs = make_inputs(sizes)
    dq, dk, *dv = upstream_of(inputs, 2)

    def everything() -> dict[str, Tensor]:
        both = qk_norm_rope_backward(dq, dk, dv, *inputs)
        wide = qk_norm_rope_backward(dq.float() * 1.0013, dk, dv, *inputs)
        with_v = {"with v": both[0], "gain with v": both[1], "float32": wide[0], "gain of float32": wide[1]}
        return {**run(qk_norm_rope, inputs), **with_v}

    assert_the_same_on_every_call(everything)


@requires_gpu
def test_a_head_with_nan_spoils_no_other() -> None:
    inputs = make_inputs(Sizes(300))
    inputs.qkv[7, 2 * 64 + 3] = torch.nan  # query head 2
    found = run(qk_norm_rope, inputs)
    assert found["q"].isnan().any(-1).nonzero().tolist() == [[7, 2]] and not found["k"].isnan().any()
    assert found["dqkv"].view(300, 16, 64).isnan().any(-1).nonzero().tolist() == [[7, 2]]
    assert found["dgain"].isnan().nonzero().tolist() == [[2]]


@requires_gpu
def test_strides_and_odd_addresses_are_accepted() -> None:
    inputs = make_inputs(Sizes(129))
    dq, dk, *dv = upstream_of(inputs, 2)

    want = *qk_norm_rope(*inputs), *qk_norm_rope_backward(dq, dk, dv, *inputs)
    of_wide = qk_norm_rope_backward(dq.float() * 1.0013, dk, dv, *inputs)
    for change in (transposed, moved, part):
        changed = Inputs(*map(change, inputs[:4]), inputs.head_dim)
        grads = change(dq), change(dk), [change(t) for t in dv]
        got = *qk_norm_rope(*changed), *qk_norm_rope_backward(*grads, *changed)
        assert all(map(torch.equal, got, want))
        got = qk_norm_rope_backward(change(dq.float() * 1.0013), *grads[1:], *changed)
        assert all(map(torch.equal, got, of_wide))


@requires_gpu
def test_offsets_beyond_two_to_the_31_are_right() -> None:
    tokens = 2_100_000  # 2.15e9 elements and 4.3 GB
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    end = make_inputs(Sizes(600))
    cos, sin = (torch.cat((t.new_zeros(tokens - 600, *t.shape[1:]), t)) for t in end[2:4])
    qkv = torch.zeros(tokens, 1024, dtype=torch.bfloat16, device="cuda")
    qkv[-600:] = end.qkv
    long = Inputs(qkv, end.gain, cos, sin, 64)
    upstream = upstream_of(end, 1)
    padded = [torch.cat((u.new_zeros(tokens - 600, *u.shape[1:]), u)) for u in upstream]
    got = [*qk_norm_rope(*long), *qk_norm_rope_backward(*padded[:2], padded[2:], *long)]
    want = [*qk_norm_rope(*end), *qk_norm_rope_backward(*upstream[:2], upstream[2:], *end)]
    for value, truth in zip(got[:3], want[:3], strict=True):
        assert torch.equal(value[-600:], truth)
    torch.testing.assert_close(got[3], want[3], rtol=1e-5, atol=1e-3)


@requires_gpu
@pytest.mark.parametrize("sizes", [Sizes(300), Sizes(129, 8, 2, 128, 6)])
def test_compiled_it_is_one_graph_with_the_same_values(sizes: Sizes) -> None:
    inputs = make_inputs(sizes)
    compiled = torch.compile(qk_norm_rope, fullgraph=True, dynamic=False)
    got, want = (run(fn, inputs) for fn in (compiled, qk_norm_rope))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-3)


@requires_gpu
def test_cuda_graph_replays_forward_and_backward() -> None:
    inputs = make_inputs(Sizes(257))
    leaves = [t.clone().requires_grad_() for t in inputs[:2]]
    upstream = upstream_of(inputs)

    def step() -> tuple[Tensor, ...]:
        outputs = qk_norm_rope(*leaves, *inputs[2:])
        return *outputs, *torch.autograd.grad(outputs, leaves, upstream)

    assert_replays_like_a_call(step, lambda: [leaf.mul_(0.5) for leaf in leaves])


@requires_gpu
@pytest.mark.parametrize("values", [0, 1, 2])
def test_opcheck_accepts_the_operators(values: int) -> None:
    inputs = make_inputs(Sizes(33))
    ops = torch.ops.pgolf
    torch.library.opcheck(ops.qk_norm_rope, (*(t.requires_grad_() for t in inputs[:2]), *inputs[2:]))
    dq, dk, *dv = upstream_of(inputs, values)
    plain = [t.detach() for t in inputs[:4]]
    for grad in (dq, dq.float()):
        torch.library.opcheck(ops.qk_norm_rope_backward, (grad, dk, dv, *plain, inputs.head_dim))


@requires_gpu
def test_it_keeps_only_its_inputs_and_backward_waits_for_nothing() -> None:
    inputs = make_inputs(Sizes(8192))
    leaves = [t.requires_grad_() for t in inputs[:2]]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    outputs = qk_norm_rope(*leaves, *inputs[2:])
    assert torch.cuda.memory_allocated() - before <= 8192 * 12 * 64 * 2
    with no_waiting():
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])


@requires_gpu
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("qkv", torch.zeros(3, 1024), TypeError, "qkv must be BFloat16, got Float"),
        ("gain", torch.zeros(8).half(), TypeError, "gain must be float32 or bfloat16, got Half"),
        ("gain", torch.zeros(6), ValueError, "got H = 6, G = 5, K = 64 and R = 16"),
        ("head_dim", 32, ValueError, "got H = 8, G = 12, K = 32 and R = 16"),
        ("cos", torch.zeros(3, 1, 33), ValueError, "K = 64 and R = 66"),
        ("sin", torch.zeros(3, 4), ValueError, r"sin must be \(3, R/2\) or \(3, 1, R/2\) with R = 16"),
        ("dq", torch.zeros(3, 4, 64).bfloat16(), ValueError, r"dq must be \[3, 8, 64\], got \[3, 4, 64\]"),
        ("dq", torch.zeros(3, 8, 64).half(), TypeError, "dq must be float32 or bfloat16, got Half"),
        ("dk", torch.zeros(3, 4, 64), TypeError, "dk must be BFloat16, got Float"),
        ("dv", [torch.zeros(3, 4, 64).bfloat16()] * 3, ValueError, "dv must be at most 2 tensors, got 3"),
        ("dv", [torch.zeros(3, 8, 64).bfloat16()], ValueError, r"dv must be \[3, 4, 64\], got"),
    ],
)
def test_the_operator_names_what_its_kernel_would_misread(name, value, error, message: str) -> None:
    arguments = {
        "dq": torch.zeros(3, 8, 64).bfloat16(),
        "dk": torch.zeros(3, 4, 64).bfloat16(),
        "dv": [torch.zeros(3, 4, 64).bfloat16()],
        "qkv": torch.zeros(3, 1024).bfloat16(),
        "gain": torch.zeros(8),
        "cos": torch.zeros(3, 1, 8),
        "sin": torch.zeros(3, 1, 8),
        "head_dim": 64,
    }

    def on_gpu(value):
        if isinstance(value, list):
            return [t.cuda() for t in value]
        return value.cuda() if isinstance(value, Tensor) else value

    changed = [on_gpu(v) for v in {**arguments, name: value}.values()]
    with pytest.raises(error, match=f"qk_norm_rope_backward: .*{message}"):
        torch.ops.pgolf.qk_norm_rope_backward(*changed)


@requires_gpu
def test_what_the_kernels_do_not_take_is_computed_by_the_reference_on_cuda() -> None:
    for sizes, dtype in ((Sizes(33, width=32), torch.bfloat16), (Sizes(33), torch.float32)):
        inputs = make_inputs(sizes, dtype)
        assert all(map(torch.equal, qk_norm_rope(*inputs), qk_norm_rope_ref(*inputs)))
        dq, dk, *dv = upstream_of(inputs, 1)
        got, want = (fn(dq, dk, dv, *inputs) for fn in (qk_norm_rope_backward, qk_norm_rope_backward_ref))
        assert all(map(torch.equal, got, want))
