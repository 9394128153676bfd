"""qkv_rope compared with its formula in float64 and with eager code, compiled, in CUDA graphs.

The kernel runs on a Hopper GPU alone; csrc/tests/test_qkv_rope_sm90.cpp runs it on the host. What Python
adds to it (autograd, frozen inputs, errors, compilation) is tested on the CPU too, where the operator
computes with the reference.
"""

import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from pgolf.model.rope import rope_tables
from pgolf.ops import qk_norm_rope, qk_norm_rope_ref, qkv_rope, qkv_rope_ref
from tests.conftest import requires_gpu, requires_hopper
from tests.ops.checks import (
    assert_no_worse_than_twice,
    assert_replays_like_a_call,
    assert_the_same_on_every_call,
    moved,
    part,
    transposed,
)

MODULE = sys.modules["pgolf.ops.qkv_rope"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES = ("qkv", "q", "k", "dn", "dweight", "dgain")


class Sizes(NamedTuple):
    """Tokens, heads and widths of one problem."""

    tokens: int
    depth: int = 512  # D
    heads: int = 8
    groups: int = 4
    width: int = 64  # K
    dims: int = 16  # R


# That of the model; no token, one, tiles of 128 rows and pairs of them that are not full, more tiles than
# multiprocessors; widths of less than a slice of 64 and of a part of one; every ratio of heads to groups; no
# rotation.
SIZES = [
    Sizes(300),
    Sizes(0),
    Sizes(1),
    Sizes(127),
    Sizes(129, 8),
    Sizes(1000, 72, 4, 4),
    Sizes(257, 264, 8, 2),
    Sizes(513, 512, 4, 2),
    Sizes(385, 136, 16, 8),
    Sizes(300, dims=0),
    Sizes(40_000),
]
OTHERS = [
    Sizes(5, 12, 4, 2, 12, 4),
    Sizes(33, 512, 8, 4, 128, 16),
    Sizes(33, 512, 7, 7),
    Sizes(33, 512, 2, 2),
    Sizes(33, 520),
    Sizes(33, 12),
    Sizes(33, dims=32),
    Sizes(33, 64, 12, 2),
]
"""Sizes that the kernel does not take."""


class Inputs(NamedTuple):
    """Arguments of the operator."""

    n: Tensor
    weight: Tensor
    gain: Tensor
    cos: Tensor
    sin: Tensor
    head_dim: int

    def double(self) -> "Inputs":
        return Inputs(*(t.double() for t in self[:5]), self.head_dim)


def make_inputs(sizes: Sizes, dtype: torch.dtype = torch.bfloat16, device: torch.device = CUDA) -> Inputs:
    """Return inputs whose rows differ in size."""
    tokens, depth, heads, groups, width, dims = sizes
    g = torch.Generator().manual_seed(tokens * 10007 + depth + heads * 100 + dims)
    n = torch.randn(tokens, depth, generator=g) * (0.1 + 3 * torch.rand(tokens, 1, generator=g))
    weight = torch.randn((heads + 2 * groups) * width, depth, generator=g) / depth**0.5
    gain = (1 + torch.randn(heads, generator=g)).to(torch.promote_types(dtype, torch.float32))
    cos, sin = rope_tables(tokens, dims, base=10_000.0, device=device)
    n, weight = (t.to(dtype).to(device) for t in (n, weight))
    return Inputs(n, weight, gain.to(device), cos, sin, width)


def upstream_of(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in outputs]


def run(fn, inputs: Inputs, upstream: list[Tensor] | None = None) -> dict[str, Tensor]:
    """Return the outputs and the gradients by name."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs[:3]]
    outputs = fn(*leaves, *inputs[3:])
    given = upstream_of(outputs) if upstream is None else [u.to(outputs[0].dtype) for u in upstream]
    grads = torch.autograd.grad(outputs, leaves, given)
    return dict(zip(NAMES, (*(t.detach() for t in outputs), *grads), strict=True))


def assert_no_worse_than_twice_eager(inputs: Inputs) -> None:
    upstream = upstream_of(qkv_rope_ref(*inputs))
    got, base = (run(fn, inputs, upstream) for fn in (qkv_rope, qkv_rope_ref))
    want = run(qkv_rope_ref, inputs.double(), upstream)
    # The gradients of the gain are few numbers, whose errors differ by chance.
    assert_no_worse_than_twice(got, base, want, dgain=4e-3)


# ---- The composition.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [SIZES[0], *OTHERS])
def test_without_a_hopper_gpu_it_is_the_product_and_qk_norm_rope_bit_for_bit(sizes: Sizes, dtype) -> None:
    inputs = make_inputs(sizes, dtype, CPU)
    qkv = F.linear(*inputs[:2])
    want = qkv, *qk_norm_rope(qkv, *inputs[2:])
    for fn in (qkv_rope, qkv_rope_ref):
        assert all(map(torch.equal, fn(*inputs), want))


@pytest.mark.parametrize("sizes", [Sizes(3, 6, 4, 2, 12, 4), Sizes(2, 5, 2, 2, 6, 0)])
def test_gradcheck_accepts_the_composition_and_the_operator(sizes: Sizes) -> None:
    inputs = make_inputs(sizes, torch.float64, CPU)
    leaves = [t.requires_grad_() for t in inputs[:3]]
    for fn in (qkv_rope, qkv_rope_ref, torch.ops.pgolf.qkv_rope):
        assert torch.autograd.gradcheck(lambda *t, fn=fn: fn(*t, *inputs[3:]), leaves)


# ---- What Python adds to the kernel. On the CPU the operator computes with the reference.


def test_gradients_through_the_operator_are_those_of_the_reference(operator) -> None:
    inputs = make_inputs(Sizes(33), torch.float64, CPU)
    got, want = (run(fn, inputs) for fn in (qkv_rope, qkv_rope_ref))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
@pytest.mark.parametrize("of", [0, 1, 2])
def test_frozen_inputs_have_no_gradient_and_one_output_may_be_used_alone(operator, frozen, of: int) -> None:
    inputs = make_inputs(Sizes(9, 16, 4, 2, 12, 4), torch.float64, CPU)
    found = []
    for fn in (qkv_rope, qkv_rope_ref):
        leaves = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate(inputs[:3])]
        out = fn(*leaves, *inputs[3:])[of]
        if out.requires_grad:
            out.square().sum().backward()
        found.append([t.grad for t in leaves])
    for i, (got, want) in enumerate(zip(*found, strict=True)):
        if i in frozen:
            assert got is None
        else:
            torch.testing.assert_close(
                torch.zeros_like(inputs[i]) if got is None else got,
                torch.zeros_like(inputs[i]) if want is None else want,
            )


def test_compiled_the_operator_is_one_graph_with_the_same_values(operator) -> None:
    inputs = make_inputs(Sizes(33), torch.float64, CPU)
    compiled = torch.compile(qkv_rope, fullgraph=True, dynamic=False, backend="aot_eager")
    got, want = (run(fn, inputs) for fn in (compiled, qkv_rope_ref))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10, msg=name)
    torch._dynamo.reset()


def test_opcheck_accepts_the_operator_on_the_cpu() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(Sizes(33, 16), dtype, CPU)
        leaves = [t.requires_grad_() for t in inputs[:3]]
        torch.library.opcheck(torch.ops.pgolf.qkv_rope, (*leaves, *inputs[3:]))


@pytest.mark.parametrize("of", range(3))
def test_a_second_derivative_and_forward_mode_say_that_they_are_missing(of: int, operator) -> None:
    inputs = make_inputs(Sizes(5, 6, 4, 2, 12, 4), torch.float64, CPU)
    leaves = [t.requires_grad_() for t in inputs[:3]]
    outputs = qkv_rope(*leaves, *inputs[3:])
    (grad,) = torch.autograd.grad(sum(t.sum() for t in outputs), leaves[of], create_graph=True)
    for other in leaves:
        with pytest.raises(RuntimeError, match=r"qkv_rope: second derivatives .* use qkv_rope_ref"):
            torch.autograd.grad(grad.sum(), other, retain_graph=True)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="qkv_rope: forward-mode derivatives"):
        dual = forward_ad.make_dual(leaves[of].detach(), torch.ones_like(leaves[of]))
        mixed = [dual if i == of else t for i, t in enumerate(leaves)]
        qkv_rope(*mixed, *inputs[3:])
    with pytest.raises(RuntimeError, match="qkv_rope: cos has no derivative"):
        qkv_rope(*inputs[:3], inputs.cos.requires_grad_(), *inputs[4:])


N, WEIGHT, TABLE = torch.zeros(3, 10), torch.zeros(128, 10), torch.zeros(3, 1, 2)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"n": torch.zeros(3)}, ValueError, r"n must be \(T, D\), .* got \(3,\), \(128, 10\), \(8,\) and 8"),
        ({"gain": torch.zeros(8, 1)}, ValueError, r"gain \(H,\) and .* \(8, 1\)"),
        ({"head_dim": 0}, ValueError, "head_dim positive, .* and 0"),
        ({"head_dim": 16}, ValueError, "for H = 8 .*, K = 16 and some G, got 128"),
        ({"gain": torch.zeros(7)}, ValueError, "for H = 7 .*, got 128"),
        ({"gain": torch.zeros(0)}, ValueError, "for H = 0"),
        ({"n": N.long()}, TypeError, "floating-point dtype, got torch.int64"),
        ({"weight": torch.zeros(128, 9)}, ValueError, r"weight must be \(128, 10\), got \(128, 9\)"),
        ({"weight": WEIGHT.half()}, TypeError, "weight must be torch.float32, got torch.float16"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu as n is, got meta"),
        ({"gain": torch.zeros(8).half()}, TypeError, "gain must be torch.float32, got torch.float16"),
        ({"cos": TABLE.half()}, TypeError, "cos must be torch.float32, got torch.float16"),
        ({"sin": torch.zeros(3, 1, 3)}, ValueError, r"sin must be \(3, R/2\) .* the same R for both, got"),
        ({"cos": torch.zeros(3, 6), "sin": torch.zeros(3, 6)}, ValueError, r"with R <= 8, .* got \(3, 6\)"),
        ({"cos": torch.zeros(4, 1, 2)}, ValueError, r"cos must be \(3, R/2\) .* got \(4, 1, 2\)"),
        ({"sin": torch.zeros(3, 2, device="meta")}, ValueError, "sin must be on cpu as n is, got meta"),
    ],
)
def test_bad_input_is_named(changed: dict, error: type[Exception], message: str) -> None:
    arguments = {"n": N, "weight": WEIGHT, "gain": torch.zeros(8), "cos": TABLE, "sin": TABLE}
    with pytest.raises(error, match=f"qkv_rope: .*{message}"):
        qkv_rope(**{**arguments, "head_dim": 8, **changed})


# ---- The kernel.


def test_where_the_kernel_is_used(monkeypatch) -> None:
    monkeypatch.setattr(MODULE, "has_kernels", lambda *_: True)

    def takes(sizes: Sizes, dtype: torch.dtype = torch.bfloat16) -> bool:
        return MODULE._takes(*make_inputs(sizes, dtype, CPU))

    assert all(map(takes, SIZES[:-1]))
    assert not any(map(takes, OTHERS))
    assert not takes(Sizes(1), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes(Sizes(1))


@requires_hopper
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("gain_dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_eager(sizes: Sizes, gain_dtype: torch.dtype) -> None:
    inputs = make_inputs(sizes)
    assert_no_worse_than_twice_eager(inputs._replace(gain=inputs.gain.to(gain_dtype)))


@requires_hopper
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("scale", [1.0, 0.0, 1e-10, 1e15])
def test_q_and_k_have_the_bits_that_qk_norm_rope_makes_of_the_product(sizes: Sizes, scale: float) -> None:
    inputs = make_inputs(sizes)
    inputs.n[::3] *= scale
    qkv, q, k = qkv_rope(*inputs)
    want = qk_norm_rope(qkv, *inputs[2:])
    assert torch.equal(q, want[0]) and torch.equal(k, want[1])


@requires_hopper
@pytest.mark.parametrize("sizes", [Sizes(5_001), Sizes(501, 72, 8, 2)])
def test_result_is_the_same_on_every_call_and_reads_nothing_that_is_not_written(sizes: Sizes) -> None:
    inputs = make_inputs(sizes)
    assert_the_same_on_every_call(lambda: run(qkv_rope, inputs))


@requires_hopper
def test_a_row_with_nan_spoils_no_other() -> None:
    inputs = make_inputs(Sizes(300))
    inputs.n[7, 3] = torch.nan
    for found in qkv_rope(*inputs):
        assert found.flatten(1).isnan().any(1).nonzero().tolist() == [[7]]


@requires_hopper
def test_strides_and_odd_addresses_are_accepted() -> None:
    inputs = make_inputs(Sizes(129))
    inputs = inputs._replace(gain=inputs.gain.bfloat16())

    want = qkv_rope(*inputs)
    for change in (transposed, moved, part):
        changed = Inputs(*map(change, inputs[:5]), inputs.head_dim)
        assert all(map(torch.equal, qkv_rope(*changed), want))


@requires_hopper
def test_offsets_beyond_two_to_the_31_are_right() -> None:
    tokens = 2_100_000  # 2.15e9 elements of qkv
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    end = make_inputs(Sizes(600, 64))
    n, cos, sin = (torch.cat((t.new_zeros(tokens - 600, *t.shape[1:]), t)) for t in (end.n, *end[3:5]))
    found = qkv_rope(n, *end[1:3], cos, sin, end.head_dim)
    for value, truth in zip(found, qkv_rope(*end), strict=True):
        assert torch.equal(value[-600:], truth)


@requires_hopper
def test_compiled_it_is_one_graph_with_the_same_values() -> None:
    inputs = make_inputs(Sizes(300))
    compiled = torch.compile(qkv_rope, fullgraph=True, dynamic=False)
    got, want = (run(fn, inputs) for fn in (compiled, qkv_rope))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-3, msg=name)


@requires_hopper
def test_cuda_graph_replays_forward_and_backward() -> None:
    inputs = make_inputs(Sizes(257))
    leaves = [t.clone().requires_grad_() for t in inputs[:3]]
    upstream = upstream_of(qkv_rope(*inputs))

    def step() -> tuple[Tensor, ...]:
        outputs = qkv_rope(*leaves, *inputs[3:])
        return *outputs, *torch.autograd.grad(outputs, leaves, upstream)

    assert_replays_like_a_call(step, lambda: [leaf.mul_(0.5) for leaf in leaves])


@requires_hopper
def test_opcheck_accepts_the_operator() -> None:
    inputs = make_inputs(Sizes(33))
    leaves = [t.requires_grad_() for t in inputs[:3]]
    torch.library.opcheck(torch.ops.pgolf.qkv_rope, (*leaves, *inputs[3:]))


@requires_hopper
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("n", torch.zeros(3, 512), TypeError, "n must be BFloat16, got Float"),
        ("n", torch.zeros(3, 520).bfloat16(), ValueError, "D = 520"),
        ("weight", torch.zeros(1024, 504).bfloat16(), ValueError, r"weight must be \[1024, 512\], got"),
        ("weight", torch.zeros(1024, 512), TypeError, "weight must be BFloat16, got Float"),
        ("gain", torch.zeros(8).half(), TypeError, "gain must be float32 or bfloat16, got Half"),
        ("gain", torch.zeros(6), ValueError, "H = 6, G = 5 and R = 16"),
        ("head_dim", 32, ValueError, "K = 32, H = 8, G = 12 and R = 16"),
        ("cos", torch.zeros(3, 1, 16), ValueError, "and R = 32 for 1024 rows of weight"),
        ("sin", torch.zeros(3, 4), ValueError, r"sin must be \(3, R/2\) or \(3, 1, R/2\) with R = 16"),
    ],
)
def test_the_operator_names_what_its_kernel_would_misread(name, value, error, message: str) -> None:
    arguments = {
        "n": torch.zeros(3, 512).bfloat16(),
        "weight": torch.zeros(1024, 512).bfloat16(),
        "gain": torch.zeros(8),
        "cos": torch.zeros(3, 1, 8),
        "sin": torch.zeros(3, 1, 8),
        "head_dim": 64,
    }
    changed = [v.cuda() if isinstance(v, Tensor) else v for v in {**arguments, name: value}.values()]
    with pytest.raises(error, match=f"qkv_rope: .*{message}"):
        torch.ops.pgolf.qkv_rope(*changed)


@requires_gpu
def test_what_the_kernel_does_not_take_is_composed_on_cuda() -> None:
    for sizes in OTHERS:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = make_inputs(sizes, dtype)
            qkv = F.linear(*inputs[:2])
            want = qkv, *qk_norm_rope(qkv, *inputs[2:])
            assert all(map(torch.equal, qkv_rope(*inputs), want))
            want = qkv, *qk_norm_rope_ref(qkv, *inputs[2:])
            assert all(map(torch.equal, qkv_rope_ref(*inputs), want))
