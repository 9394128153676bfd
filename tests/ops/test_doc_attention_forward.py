"""doc_attention compared with attention in float64, and its derivative, compiled and in CUDA graphs.

csrc/tests/test_doc_attention.cpp runs the kernels on the host; tests/ops/test_doc_attention.py tests the
backward pass by itself.
"""

import sys

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from pgolf.ops import doc_attention, doc_attention_ref
from tests.conftest import requires_hopper
from tests.ops.checks import assert_replays_like_a_call, assert_the_same_on_every_call
from tests.ops.test_doc_attention import (
    CPU,
    CUDA,
    DOCUMENTS,
    KERNEL_LENGTHS,
    LENGTHS,
    SHORT,
    Problem,
    make,
    published,
    starts_of,
)

MODULE = sys.modules["pgolf.ops.doc_attention"]


def leaves_of(problem: Problem) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in problem[:3]]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("of_lse", [False, True])
def test_the_operator_is_attention_and_differentiates_it(operator, of_lse: bool, lengths: list[int]) -> None:
    problem = make(lengths, 4, 2, 5, torch.float64, CPU)
    ours, theirs = leaves_of(problem), leaves_of(problem)
    found = doc_attention(*ours, problem.cu_seqlens, 0.3)
    wanted = published(*theirs, problem.cu_seqlens, 0.3)
    upstream = problem.grad, torch.randn_like(wanted[1])
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    used = slice(0, 2 if of_lse else 1)
    got_grads = torch.autograd.grad(found[used], ours, upstream[used])
    want_grads = torch.autograd.grad(wanted[used], theirs, upstream[used])
    for got, want in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


def test_the_gradient_of_lse_alone_is_right(operator) -> None:
    problem = make([7, 3], 4, 2, 5, torch.float64, CPU)
    ours, theirs = leaves_of(problem), leaves_of(problem)
    found = torch.autograd.grad(doc_attention(*ours, problem.cu_seqlens)[1].sum(), ours)
    lse = doc_attention_ref(*theirs, problem.cu_seqlens)[1]
    wanted = torch.autograd.grad(lse.sum(), theirs, allow_unused=True)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            got, torch.zeros_like(got) if want is None else want, rtol=1e-10, atol=1e-11
        )


def test_gradients_of_narrow_inputs_have_their_dtype(operator) -> None:
    problem = make([9, 4], dtype=torch.bfloat16, device=CPU)
    leaves = leaves_of(problem)
    y, lse = doc_attention(*leaves, problem.cu_seqlens)
    assert y.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert [g.dtype for g in torch.autograd.grad(y, leaves, problem.grad)] == [torch.bfloat16] * 3


def test_compiled_it_is_one_graph_forward_and_backward(operator) -> None:
    problem = make([11, 0, 30, 1], dtype=torch.float64, device=CPU)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 3 * doc_attention(2 * q, k, v, problem.cu_seqlens)[0]

    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for fn in (compiled, block):
        leaves = leaves_of(problem)
        out = fn(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, problem.grad)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=requires_hopper)])
def test_opcheck_accepts_the_operator(device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    problem = make([128, 0, 33], dtype=dtype, device=torch.device(device))
    torch.library.opcheck(torch.ops.pgolf.doc_attention, (*leaves_of(problem), problem.cu_seqlens, 0.125))


def test_second_derivatives_and_forward_mode_say_that_they_are_missing(operator) -> None:
    problem = make([5, 3], dtype=torch.float64, device=CPU)
    leaves = leaves_of(problem)
    y, _ = doc_attention(*leaves, problem.cu_seqlens)
    (first, *_) = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"doc_attention: second derivatives .* doc_attention_ref"):
        first.sum().backward()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="doc_attention: forward-mode"):
        dual = forward_ad.make_dual(problem.q, torch.ones_like(problem.q))
        doc_attention(dual, *problem[1:4])


def errors(problem: Problem) -> dict[str, tuple[float, float]]:
    """Return error and norm of y and lse against float64."""
    found = doc_attention(*problem[:4])
    truth = doc_attention_ref(*problem.to(torch.float64)[:4])
    assert all(t.isfinite().all() for t in found)
    pairs = zip(("y", "lse"), found, truth, strict=True)
    return {name: (float((a.double() - b).norm()), float(b.norm())) for name, a, b in pairs}


@requires_hopper
@pytest.mark.parametrize("lengths", KERNEL_LENGTHS.values(), ids=KERNEL_LENGTHS)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 4), (8, 2), (1, 1), (20, 5)])
@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_the_kernel_rounds_p_and_the_result_and_nothing_else(heads, groups, lengths, factor) -> None:
    found = errors(make(lengths, heads, groups, factor=factor))
    # p and y are rounded to bfloat16, by 2^-9 at most and 2^-10 in the mean square or less.
    assert found["y"][0] <= 2**-8.5 * found["y"][1]
    assert found["lse"][0] <= 2e-6 * found["lse"][1] + 1e-5


@requires_hopper
def test_it_differentiates_on_the_gpu() -> None:
    problem = make(DOCUMENTS)
    truth = problem.to(torch.float64)
    ours, theirs = leaves_of(problem), leaves_of(truth)
    found = torch.autograd.grad(doc_attention(*ours, problem.cu_seqlens)[0], ours, problem.grad)
    wanted = torch.autograd.grad(doc_attention_ref(*theirs, problem.cu_seqlens)[0], theirs, truth.grad)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).norm() <= 3 * 2**-9 * want.norm()


@requires_hopper
def test_the_same_bits_again_and_nothing_is_read_that_is_not_written() -> None:
    problem = make(DOCUMENTS)
    assert_the_same_on_every_call(lambda: dict(zip(("y", "lse"), doc_attention(*problem[:4]), strict=True)))


@requires_hopper
def test_documents_do_not_depend_on_each_other() -> None:
    lengths = [400, 90, 1, 700]
    problem = make(lengths)
    y, lse = doc_attention(*problem[:4])
    begin = 0
    for length in lengths:
        rows = slice(begin, begin + length)
        own, sums = doc_attention(*(t[rows] for t in problem[:3]), starts_of([length], CUDA))
        assert torch.equal(own, y[rows]) and torch.equal(sums, lse[:, rows])
        begin += length


@requires_hopper
def test_a_cuda_graph_replays_it_with_other_documents_and_the_host_waits_for_nothing() -> None:
    problem = make(SHORT)

    def give(lengths: list[int]) -> None:
        starts = starts_of(lengths, CUDA)
        problem.cu_seqlens.fill_(int(starts[-1]))
        problem.cu_seqlens[: len(starts)].copy_(starts)

    # One document where there were many: a list of tiles is never longer than the first one.
    changes = (lambda: give(SHORT[::-1])), (lambda: give([sum(SHORT)]))
    assert_replays_like_a_call(lambda: doc_attention(*problem[:4]), *changes)
