"""doc_attention_backward compared with autograd of attention in float64, compiled, in CUDA graphs.

The kernels run on a Hopper GPU alone. What Python adds to them (checks, errors, compilation) is tested on the
CPU too, where the operator computes with the reference.
"""

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from pgolf.model.attention import find_fa4, varlen_attention
from pgolf.ops import doc_attention, doc_attention_backward, doc_attention_backward_ref, doc_attention_ref
from tests.conftest import requires_gpu, requires_hopper
from tests.ops.checks import (
    assert_replays_like_a_call,
    assert_the_same_on_every_call,
    moved,
    no_waiting,
    part,
    transposed,
)

MODULE = sys.modules["pgolf.ops.doc_attention"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES = ("dq", "dk", "dv")
HEADS = [(1, 1), (2, 2), (4, 4), (8, 8), (8, 4), (8, 2), (4, 1), (3, 1)]
"""H and G."""
LENGTHS = {
    "one token": [1],
    "127": [127],
    "129": [129],
    "ones": [1] * 5,
    "mixed": [11, 0, 300, 1],
    "empty": [0, 0],
    "no documents": [],
}


class Problem(NamedTuple):
    """Arguments of the operator, in its order but for the upstream gradient, y and lse."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    grad: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        q, k, v, cu_seqlens, grad = self
        return Problem(q.to(dtype), k.to(dtype), v.to(dtype), cu_seqlens, grad.to(dtype))


def starts_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def make(
    lengths: Sequence[int],
    heads: int = 8,
    groups: int = 4,
    width: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = CUDA,
    factor: float = 1.0,
) -> Problem:
    """Return random inputs; k and v are columns of a wider matrix, as in the model. `factor` is that of q."""
    tokens = sum(lengths)
    g = torch.Generator().manual_seed(tokens * 10007 + heads * 100 + groups)
    q, grad = (torch.randn(tokens, heads, width, generator=g, dtype=torch.float64) for _ in range(2))
    both = torch.randn(tokens, 2 * groups, width, generator=g, dtype=torch.float64).to(device, dtype)
    return Problem(
        (factor * q).to(device, dtype),
        both[:, :groups],
        both[:, groups:],
        starts_of(lengths, device),
        grad.to(device, dtype),
    )


def published(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over all pairs of tokens, of which a mask allows those of one document."""
    at = torch.arange(len(q))
    document = torch.searchsorted(cu_seqlens, at, right=True)
    allowed = (document[:, None] == document) & (at[:, None] >= at)
    ratio = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(ratio, 1).transpose(0, 1) for t in (k, v))
    weights = (scale * q.transpose(0, 1) @ k.mT).exp() * allowed
    sums = weights.sum(-1)
    return (weights / sums[..., None] @ v).transpose(0, 1), sums.log()


def gradients(fn: Callable, problem: Problem, scale: float | None = None) -> dict[str, Tensor]:
    """Return what `fn` makes of the forward pass of the reference."""
    q, k, v, cu_seqlens, grad = problem
    y, lse = doc_attention_ref(q, k, v, cu_seqlens, scale)
    return dict(zip(NAMES, fn(grad, q, k, v, y, lse, cu_seqlens, scale), strict=True))


def test_a_warning_says_why_the_kernels_are_not_used_and_what_they_take() -> None:
    q, k = torch.zeros(3, 12, 128, dtype=torch.half), torch.zeros(3, 4, 128, dtype=torch.half)
    with pytest.warns(UserWarning) as found, torch.autocast("cpu"):
        MODULE._warn_of_reference("doc_attention", q, k)
    (warning,) = (str(w.message) for w in found)
    assert "take bfloat16, heads of 64 columns, and 1, 2 or 4 of them per kv head, on Hopper GPUs" in warning
    assert "got torch.float16, 12 heads of 128 columns, 4 kv heads on cpu, under autocast" in warning


@requires_gpu
def test_the_reference_on_a_gpu_is_not_silent() -> None:
    problem = make([5, 3], 2, 1, 32)
    with pytest.warns(UserWarning, match="doc_attention is computed by its reference"):
        doc_attention(*problem[:4])
    with pytest.warns(UserWarning, match="doc_attention_backward is computed by its reference"):
        gradients(doc_attention_backward, problem)


# ---- The references.


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_references_are_attention_and_its_derivative(heads: int, groups: int, lengths: list[int]) -> None:
    width = 5 if groups % 2 else 64
    problem = make(lengths, heads, groups, width, torch.float64, CPU)
    for scale in (None, 0.3):
        leaves = [t.detach().clone().requires_grad_() for t in problem[:3]]
        want_y, want_lse = published(*leaves, problem.cu_seqlens, width**-0.5 if scale is None else scale)
        y, lse = doc_attention_ref(*problem[:4], scale)
        torch.testing.assert_close(y, want_y.detach(), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(lse, want_lse.detach(), rtol=1e-11, atol=1e-12)
        want = torch.autograd.grad(want_y, leaves, problem.grad)
        for got, value in zip(gradients(doc_attention_backward, problem, scale).values(), want, strict=True):
            assert got.is_contiguous()
            torch.testing.assert_close(got, value, rtol=1e-10, atol=1e-11)


def test_delta_is_the_part_of_the_gradient_along_the_output_and_holds_the_gradient_of_lse() -> None:
    q, k, v, cu_seqlens, grad = make([11, 0, 30, 1], dtype=torch.float64, device=CPU)
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    y, lse = doc_attention_ref(*leaves, cu_seqlens)
    given = [t.detach() for t in (y, lse)]
    along, of_lse = (grad * given[0]).sum(-1).t(), torch.randn_like(given[1])
    arguments = grad, q, k, v, *given, cu_seqlens
    for delta, upstream in ((along, torch.zeros_like(of_lse)), (along - of_lse, of_lse)):
        want = torch.autograd.grad((y, lse), leaves, (grad, upstream), retain_graph=True)
        for got, value in zip(doc_attention_backward(*arguments, delta=delta), want, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-10, atol=1e-11)


def test_large_scores_do_not_overflow() -> None:
    problem = make([60, 3], 2, 1, 8, torch.float64, CPU, factor=2000.0)
    assert (problem.q[-1, 0] * problem.k[-3:, 0]).sum(-1).abs().max() > 1000  # exp of it is infinite
    leaves = [t.detach().clone().requires_grad_() for t in problem[:3]]
    y, lse = doc_attention_ref(*leaves, problem.cu_seqlens)
    want = torch.autograd.grad(y, leaves, problem.grad)
    assert y.isfinite().all() and lse.isfinite().all()
    for got, value in zip(gradients(doc_attention_backward, problem).values(), want, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-9)


def test_gradcheck_accepts_the_forward_reference() -> None:
    q, k, v, cu_seqlens, _ = make([2, 0, 3], 2, 1, 3, torch.float64, CPU)
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *t: doc_attention_ref(*t, cu_seqlens), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    problem = make([40, 1, 130], dtype=dtype, device=CPU)
    q, k, v, cu_seqlens, grad = problem
    y, lse = doc_attention_ref(q, k, v, cu_seqlens)
    assert y.dtype == dtype and lse.dtype == torch.float32
    wide_y, wide_lse = doc_attention_ref(*problem.to(torch.float32)[:4])
    assert torch.equal(y, wide_y.to(dtype)) and torch.equal(lse, wide_lse)
    wide = problem.to(torch.float32)
    want = doc_attention_backward_ref(wide.grad, *wide[:3], y.float(), lse, cu_seqlens)
    got = doc_attention_backward(grad, q, k, v, y, lse, cu_seqlens)
    # The gradient of q is not rounded.
    for one, value, kind in zip(got, want, (torch.float32, dtype, dtype), strict=True):
        assert one.dtype == kind and torch.equal(one, value.to(kind))


# ---- What Python adds to the kernels. On the CPU the operator computes with the reference.


def test_where_the_kernels_are_used(monkeypatch) -> None:
    asked = []

    def has_kernels(name: str, device: str, index: int | None, hopper: bool = True) -> bool:
        asked.append((name, device, hopper))
        return True

    monkeypatch.setattr(MODULE, "has_kernels", has_kernels)

    def takes(heads: int, groups: int, width: int = 64, dtype: torch.dtype = torch.bfloat16) -> bool:
        return MODULE._takes(*make([1], heads, groups, width, dtype, CPU)[:2])

    assert takes(1, 1) and takes(8, 8) and takes(8, 4) and takes(8, 2)
    assert set(asked) == {("doc_attention", "cpu", True)}
    assert not takes(3, 1) and not takes(8, 1) and not takes(8, 4, 128)
    assert not takes(8, 4, 32) and not takes(8, 4, dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes(8, 4)
    monkeypatch.setattr(MODULE, "has_kernels", lambda *_: False)
    assert not takes(8, 4)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_compile_in_one_graph_keeps_the_values(operator, scale: float | None) -> None:
    q, k, v, cu_seqlens, grad = make([11, 0, 30, 1], dtype=torch.float64, device=CPU)
    y, lse = doc_attention_ref(q, k, v, cu_seqlens, scale)

    def block(grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(3 * t for t in doc_attention_backward(2 * grad, q, k, v, y, lse, cu_seqlens, scale))

    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(grad), block(grad), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=requires_hopper)])
def test_opcheck_accepts_the_operator(device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v, cu_seqlens, grad = make([128, 0, 33], dtype=dtype, device=torch.device(device))
    y, lse = doc_attention_ref(q, k, v, cu_seqlens)
    torch.library.opcheck(
        torch.ops.pgolf.doc_attention_backward, (grad, q, k, v, y, lse, cu_seqlens, 0.125, None)
    )


def test_a_derivative_and_forward_mode_say_that_they_are_missing(operator) -> None:
    q, k, v, cu_seqlens, grad = make([5, 3], dtype=torch.float64, device=CPU)
    y, lse = doc_attention_ref(q, k, v, cu_seqlens)
    found = doc_attention_backward(grad.requires_grad_(), q, k, v, y, lse, cu_seqlens)
    with pytest.raises(
        RuntimeError, match=r"^doc_attention_backward: not differentiable; .*doc_attention_backward_ref"
    ):
        found[0].sum().backward()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="doc_attention_backward: forward-mode"):
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        doc_attention_backward(grad.detach(), dual, k, v, y, lse, cu_seqlens)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


STARTS = torch.tensor([0, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": ones(3, 8)}, ValueError, r"q must be \(T, H, K\) and k .* got \(3, 8\) and \(3, 2, 8\)"),
        ({"k": ones(3)}, ValueError, r"k \(T, G, K\), got \(3, 4, 8\) and \(3,\)"),
        ({"k": ones(3, 3, 8)}, ValueError, "H must be a multiple of G, got 4 and 3"),
        ({"k": ones(3, 0, 8)}, ValueError, "H must be a multiple of G, got 4 and 0"),
        ({"q": ones(3, 0, 8)}, ValueError, "H must be a multiple of G, got 0 and 2"),
        ({"q": ones(3, 4, 0)}, ValueError, "at least one column per head"),
        ({"q": ones(3, 4, 8).long()}, TypeError, "q must have a floating-point dtype, got torch.int64"),
        ({"k": ones(4, 2, 8)}, ValueError, r"k must be \(3, 2, 8\), got \(4, 2, 8\)"),
        ({"v": ones(3, 2, 7)}, ValueError, r"v must be \(3, 2, 8\), got \(3, 2, 7\)"),
        ({"v": ones(3, 2, 8).half()}, TypeError, "v must be torch.float32, got torch.float16"),
        ({"v": ones(3, 2, 8).to("meta")}, ValueError, "v must be on cpu as q is, got meta"),
        ({"grad": ones(3, 2, 8)}, ValueError, r"grad must be \(3, 4, 8\), got \(3, 2, 8\)"),
        ({"y": ones(3, 4, 8).double()}, TypeError, "y must be torch.float32, got torch.float64"),
        ({"lse": ones(3, 4)}, ValueError, r"lse must be \(4, 3\), got \(3, 4\)"),
        ({"lse": ones(4, 3).bfloat16()}, TypeError, "lse must be torch.float32, got torch.bfloat16"),
        ({"delta": ones(3, 4)}, ValueError, r"delta must be \(4, 3\), got \(3, 4\)"),
        ({"scale": 0.0}, ValueError, "scale must be positive, got 0.0"),
        ({"cu_seqlens": STARTS[:0]}, ValueError, r"cu_seqlens must be \(S \+ 1,\), got \(0,\)"),
        ({"cu_seqlens": STARTS[None]}, ValueError, r"cu_seqlens must be \(S \+ 1,\), got \(1, 2\)"),
        ({"cu_seqlens": STARTS.long()}, TypeError, "cu_seqlens must be torch.int32, got torch.int64"),
        ({"cu_seqlens": STARTS.to("meta")}, ValueError, "cu_seqlens must be on cpu as q is, got meta"),
        ({"cu_seqlens": STARTS + 1}, ValueError, r"begin with 0, .* and end with T = 3, got \[1, 4\]"),
        ({"cu_seqlens": STARTS[:1]}, ValueError, "end with T = 3, got one number"),
        (
            {"cu_seqlens": torch.tensor([0, 2, 1, 3]).int()},
            ValueError,
            r"never decrease .* got \[0, 2, 1, 3\]",
        ),
        ({"cu_seqlens": torch.arange(12).int()}, ValueError, r"T = 3, got \[0, \.\.\., 11\]"),
    ],
)
def test_bad_input_is_named(changed: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "grad": ones(3, 4, 8),
        "q": ones(3, 4, 8),
        "k": ones(3, 2, 8),
        "v": ones(3, 2, 8),
        "y": ones(3, 4, 8),
        "lse": ones(4, 3),
        "cu_seqlens": STARTS,
        **changed,
    }
    with pytest.raises(error, match=f"^doc_attention_backward(_ref)?: .*{message}"):
        doc_attention_backward(**arguments)
    if not set(changed) & {"grad", "y", "lse", "delta"}:
        rest = *(arguments[name] for name in ("q", "k", "v", "cu_seqlens")), arguments.get("scale")
        with pytest.raises(error, match=f"^doc_attention(_ref)?: .*{message}"):
            doc_attention(*rest)
        with pytest.raises(error, match=f"^doc_attention_ref: .*{message}"):
            doc_attention_ref(*rest)


# ---- The kernels.

DOCUMENTS = [1, 129, 570, 2300, 1096]
SHORT = [128, 1, 77, 0, 128, 50] * 10
"""Documents of up to 128 tokens: the gradient of a longer one's queries is added in parts, in any order."""


def peer(problem: Problem, longest: int) -> dict[str, Tensor]:
    """Return the gradients of flash-attn-4, or of torch's attention where it is not installed."""
    sys.modules.pop("pgolf.model.fa4", None)  # an earlier test may have replaced its operators
    found = find_fa4()
    attend = found.found if found.usable else varlen_attention
    q, k, v, cu_seqlens, grad = problem
    leaves = [t.detach().contiguous().requires_grad_() for t in (q, k, v)]
    out = attend(*leaves, cu_seqlens, longest)
    return dict(zip(NAMES, torch.autograd.grad(out, leaves, grad), strict=True))


def assert_about_as_exact_as_the_peer(problem: Problem, longest: int) -> None:
    got, bound = gradients(doc_attention_backward, problem), peer(problem, longest)
    truth = gradients(doc_attention_backward_ref, problem.to(torch.float64))
    for name, true in truth.items():
        kind = torch.float32 if name == "dq" else torch.bfloat16
        assert got[name].dtype == kind and got[name].shape == true.shape, name
        assert got[name].isfinite().all(), name
        error, other = (float((t[name].double() - true).norm()) for t in (got, bound))
        # dq and dk of a document of one token are 0, and what is computed is the rounding of float32.
        rest = 1e-5 * float(truth["dv"].norm())
        assert error <= 1.5 * other + rest, (name, error, other, float(true.norm()))


KERNEL_LENGTHS = {
    "documents": DOCUMENTS,
    "T = 1": [1],
    "T = 127": [127],
    "T = 128": [128],
    "T = 129": [129],
    "mixed": [11, 0, 300, 1],
    "long": [5000],
    "many": [70, 1, 0, 200, 128, 385] * 20,
}


@requires_hopper
@pytest.mark.parametrize("lengths", KERNEL_LENGTHS.values(), ids=KERNEL_LENGTHS)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 4), (8, 2)])
def test_errors_are_those_of_the_peer(heads: int, groups: int, lengths: list[int]) -> None:
    assert_about_as_exact_as_the_peer(make(lengths, heads, groups), max(lengths))


@requires_hopper
@pytest.mark.parametrize("lengths", [DOCUMENTS, [129]], ids=["documents", "T = 129"])
def test_errors_with_large_scores_are_those_of_the_peer(lengths: list[int]) -> None:
    assert_about_as_exact_as_the_peer(make(lengths, factor=8.0), max(lengths))


@requires_hopper
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 3), (6, 3), (4, 1), (20, 5)])
def test_other_numbers_of_heads_are_as_exact_as_rounding_allows(heads: int, groups: int) -> None:
    problem = make([11, 0, 300, 1, 700], heads, groups)
    truth = gradients(doc_attention_backward_ref, problem.to(torch.float64))
    for name, got in gradients(doc_attention_backward, problem).items():
        # Those of p, ds and the result, of 2^-9 each at most.
        assert (got.double() - truth[name]).norm() <= 3 * 2**-9 * truth[name].norm(), name


@requires_hopper
def test_the_scale_is_that_of_the_scores() -> None:
    problem = make(SHORT)
    twice = problem._replace(q=2 * problem.q)
    got = gradients(doc_attention_backward, problem, 0.25)
    want = gradients(doc_attention_backward, twice, 0.125)
    for name, factor in (("dq", 2), ("dk", 1), ("dv", 1)):
        torch.testing.assert_close(got[name], factor * want[name], rtol=2**-7, atol=1e-3)


@requires_hopper
def test_short_documents_have_the_same_bits_again_and_nothing_is_read_that_is_not_written() -> None:
    problem = make(SHORT)
    assert_the_same_on_every_call(lambda: gradients(doc_attention_backward, problem))


@requires_hopper
def test_documents_do_not_depend_on_each_other() -> None:
    lengths = [128, 90, 1, 128]
    q, k, v, cu_seqlens, grad = make(lengths)
    y, lse = doc_attention_ref(q, k, v, cu_seqlens)
    whole = doc_attention_backward(grad, q, k, v, y, lse, cu_seqlens)
    for begin, length in zip((0, 128, 218, 219), lengths, strict=True):
        rows = slice(begin, begin + length)
        own = *(t[rows] for t in (grad, q, k, v, y)), lse[:, rows]
        alone = doc_attention_backward(*own, starts_of([length], CUDA))
        assert all(torch.equal(one, value[rows]) for one, value in zip(alone, whole, strict=True)), begin


@requires_hopper
def test_strides_and_odd_addresses_are_accepted_and_inputs_are_kept() -> None:
    q, k, v, cu_seqlens, grad = make(SHORT)
    y, lse = doc_attention_ref(q, k, v, cu_seqlens)
    inputs = grad, q, k, v, y, lse

    def rows(t: Tensor) -> Tensor:
        """The same values as the last heads of more."""
        return torch.cat((torch.full_like(t[:, :1], torch.nan), t), dim=1)[:, 1:]

    want = doc_attention_backward(*inputs, cu_seqlens)
    before = [t.clone() for t in inputs]
    for change in (transposed, moved, part, rows):
        got = doc_attention_backward(*map(change, inputs), cu_seqlens)
        assert all(map(torch.equal, got, want))
        assert all(t.is_contiguous() for t in got)
    assert all(map(torch.equal, inputs, before))
    frozen = [t.clone().requires_grad_(i % 2 == 0) for i, t in enumerate(inputs)]
    assert all(map(torch.equal, doc_attention_backward(*frozen, cu_seqlens), want))


@requires_hopper
def test_a_gradient_whose_rows_are_one_row_is_accepted() -> None:
    problem = make(SHORT)
    row = problem.grad[:1]
    got, want = (
        gradients(doc_attention_backward, problem._replace(grad=grad))
        for grad in (row.expand(problem.grad.shape), row.repeat(len(problem.grad), 1, 1))
    )
    assert all(torch.equal(got[name], want[name]) for name in NAMES)


@requires_hopper
def test_offsets_beyond_two_to_the_31_are_right() -> None:
    tokens = 4_300_800  # 2.2e9 elements and 4.4 GB of q
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of GPU memory")
    end = make([128, 90, 38, 128])
    count = len(end.q)
    y, lse = doc_attention_ref(*end[:4])
    inputs = end.grad, end.q, end.k, end.v, y
    padded = [torch.cat((t.new_zeros(tokens - count, *t.shape[1:]), t)) for t in inputs]
    long_lse = torch.cat((lse.new_zeros(lse.shape[0], tokens - count), lse), dim=1)
    before = torch.arange(0, tokens - count, 128, dtype=torch.int32, device="cuda")
    starts = torch.cat((before, tokens - count + end.cu_seqlens))
    got = doc_attention_backward(*padded, long_lse, starts)
    want = doc_attention_backward(*inputs, lse, end.cu_seqlens)
    for value, truth in zip(got, want, strict=True):
        assert torch.equal(value[-count:], truth) and not value[:-count].any()


@requires_hopper
def test_compiled_it_is_one_graph_with_the_same_values() -> None:
    problem = make(SHORT)
    torch.compiler.reset()
    compiled = torch.compile(doc_attention_backward, fullgraph=True, dynamic=False)
    got, want = (gradients(fn, problem) for fn in (compiled, doc_attention_backward))
    assert all(torch.equal(got[name], want[name]) for name in NAMES)


@requires_hopper
def test_a_cuda_graph_replays_it_with_other_documents() -> None:
    q, k, v, cu_seqlens, grad = make(SHORT)
    y, lse = doc_attention_ref(q, k, v, cu_seqlens)
    inputs = grad, q, k, v, y, lse, cu_seqlens

    def give(lengths: Sequence[int]) -> None:
        q.mul_(0.5)
        cu_seqlens.copy_(starts_of(lengths, CUDA))
        for old, new in zip((y, lse), doc_attention_ref(q, k, v, cu_seqlens), strict=True):
            old.copy_(new)

    changes = (lambda: give(SHORT[::-1])), (lambda: give(SHORT))
    assert_replays_like_a_call(lambda: doc_attention_backward(*inputs), *changes)


@requires_hopper
def test_no_documents_are_no_work_and_the_host_waits_for_nothing() -> None:
    for lengths in ([], [0, 0], DOCUMENTS):
        q, k, v, cu_seqlens, grad = make(lengths)
        y, lse = doc_attention_ref(q, k, v, cu_seqlens)
        torch.cuda.synchronize()
        with no_waiting():
            dq, dk, dv = doc_attention_backward(grad, q, k, v, y, lse, cu_seqlens)
        assert dq.shape == q.shape and dk.shape == k.shape and dv.shape == v.shape


@requires_hopper
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("q", ones(3, 512), ValueError, r"q must be \(T, H, K\) and k \(T, G, K\), got \[3, 512\] and"),
        ("q", ones(3, 8, 64), TypeError, "q must be BFloat16, got Float"),
        ("q", ones(3, 6, 64).bfloat16(), ValueError, "got H = 6, G = 4 and K = 64"),
        ("q", ones(3, 8, 128).bfloat16(), ValueError, "got H = 8, G = 4 and K = 128"),
        ("k", ones(3, 4, 32).bfloat16(), ValueError, r"k must be \[3, 4, 64\], got \[3, 4, 32\]"),
        ("v", ones(3, 8, 64).bfloat16(), ValueError, r"v must be \[3, 4, 64\], got"),
        ("grad", ones(3, 4, 64).bfloat16(), ValueError, r"grad must be \[3, 8, 64\], got"),
        ("y", ones(3, 8, 64).half(), TypeError, "y must be BFloat16, got Half"),
        ("lse", ones(3, 8), ValueError, r"lse must be \[8, 3\], got \[3, 8\]"),
        ("delta", ones(3, 8), ValueError, r"delta must be \[8, 3\], got \[3, 8\]"),
        ("cu_seqlens", STARTS.long(), TypeError, "cu_seqlens must be Int, got Long"),
        ("cu_seqlens", STARTS[:0], ValueError, r"cu_seqlens must be \(S \+ 1,\), got \[0\]"),
        ("cu_seqlens", STARTS[:1], ValueError, "end with T = 3, got one number"),
    ],
)
def test_the_operator_names_what_its_kernels_would_misread(name, value, error, message: str) -> None:
    arguments = {
        "grad": ones(3, 8, 64).bfloat16(),
        "q": ones(3, 8, 64).bfloat16(),
        "k": ones(3, 4, 64).bfloat16(),
        "v": ones(3, 4, 64).bfloat16(),
        "y": ones(3, 8, 64).bfloat16(),
        "lse": ones(8, 3),
        "cu_seqlens": STARTS,
        "scale": 0.125,
        "delta": ones(8, 3),
    }
    given = {**arguments, name: value}
    changed = [t.cuda() if isinstance(t, Tensor) else t for t in given.values()]
    with pytest.raises(error, match=f"doc_attention_backward: .*{message}"):
        torch.ops.pgolf.doc_attention_backward(*changed)


@requires_gpu
@pytest.mark.filterwarnings("ignore:doc_attention_backward is computed by its reference")
def test_what_the_kernels_do_not_take_is_computed_by_the_reference_on_cuda() -> None:
    for heads, width, dtype in ((8, 32, torch.bfloat16), (12, 64, torch.bfloat16), (8, 64, torch.float32)):
        problem = make([11, 0, 300, 1], heads, width=width, dtype=dtype)
        got, want = (gradients(fn, problem) for fn in (doc_attention_backward, doc_attention_backward_ref))
        assert all(torch.equal(got[name], want[name]) for name in NAMES)
