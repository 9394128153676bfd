"""softcap_ce compared with float64, at the edges of its input, under autograd, torch.compile, CUDA graphs."""

import math
import sys

import pytest
import torch
from torch import Tensor

from pgolf import env
from pgolf.ops import softcap_ce, softcap_ce_ref
from tests.conftest import requires_gpu
from tests.ops.checks import assert_replays_like_a_call

CAP = 30.0
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# 1 and 7: rows shorter than a 16-byte load. 129, 1031: odd rows, so every row has another alignment. 4096:
# several loads per thread. The real vocabulary is the case below.
SHAPES = [(1, 1), (3, 7), (5, 129), (4, 1031), (3, 4096)]
# Relative error of a gradient rounded once to the dtype, with a little room for the arithmetic before it.
GRAD_RTOL = {torch.float32: 2e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
# Half the spacing of the smallest float16; bfloat16 and float32 reach far lower.
GRAD_ATOL = {torch.float32: 1e-9, torch.bfloat16: 1e-9, torch.float16: 6e-8}


def make_inputs(
    rows: int, vocab: int, dtype: torch.dtype, device: torch.device, scale: float = 8.0
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows * 10007 + vocab)
    logits = (torch.randn(rows, vocab, generator=g) * scale).to(dtype)
    target = torch.randint(vocab, (rows,), generator=g)
    return logits.to(device), target.to(device)


def loss_and_grad(
    fn, logits: Tensor, target: Tensor, cap: float | None, weight: Tensor, **options
) -> tuple[Tensor, Tensor]:
    x = logits.detach().clone().requires_grad_()
    loss = fn(x, target, cap, **{"reduction": "none", **options})
    (grad,) = torch.autograd.grad((loss * weight).sum(), x)
    return loss.detach(), grad


def assert_matches_float64(logits: Tensor, target: Tensor, cap: float | None, z_loss: float = 0.0) -> None:
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(len(target), generator=g).to(logits.device)
    loss, grad = loss_and_grad(softcap_ce, logits, target, cap, weight, z_loss=z_loss)
    want_loss, want_grad = loss_and_grad(
        softcap_ce_ref, logits.double(), target, cap, weight.double(), z_loss=z_loss
    )
    assert loss.dtype == torch.float32 and grad.dtype == logits.dtype
    # A loss is a difference of numbers of size cap: their float32 spacing bounds it.
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=4e-7 * (cap or CAP))
    dtype = logits.dtype
    torch.testing.assert_close(grad.double(), want_grad, rtol=GRAD_RTOL[dtype], atol=GRAD_ATOL[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), SHAPES)
def test_loss_and_gradient_match_float64(rows: int, vocab: int, dtype: torch.dtype, device) -> None:
    assert_matches_float64(*make_inputs(rows, vocab, dtype, device), CAP)


def test_real_vocabulary_matches_float64(device) -> None:
    assert_matches_float64(*make_inputs(33, 8192, torch.bfloat16, device), CAP)


# 0.5 saturates every logit; 40 is the last cap with a fixed offset in the CUDA sum, 41 the first without;
# 1e4 is no cap at all for these logits.
@pytest.mark.parametrize("cap", [0.5, 5.0, 40.0, 41.0, 300.0, 1e4])
def test_other_caps_match_float64(cap: float, device) -> None:
    assert_matches_float64(*make_inputs(5, 257, torch.float32, device), cap)


# The ends of what float32 can divide by; the logits are where tanh is neither linear nor saturated.
@pytest.mark.parametrize("cap", [2.0**-126, 2.0**126])
def test_extreme_caps_match_float64(cap: float, device) -> None:
    logits = torch.tensor([[0.0, cap, -cap / 2, 3 * cap]], device=device)
    target = torch.tensor([1], device=device)
    loss = softcap_ce(logits, target, cap).item()
    assert loss == pytest.approx(softcap_ce_ref(logits.double(), target, cap).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), SHAPES)
def test_without_a_cap_it_is_cross_entropy(rows: int, vocab: int, dtype: torch.dtype, device) -> None:
    assert_matches_float64(*make_inputs(rows, vocab, dtype, device), None)


def test_without_a_cap_masked_and_large_logits_match_float64(device) -> None:
    logits, target = make_inputs(3, 129, torch.float32, device, scale=200.0)
    logits[:, 5] = -math.inf
    target[:] = 7
    assert_matches_float64(logits, target, None)


# 1e-4 is usual; 0.1 makes the penalty the larger part. Cap 41 takes the CUDA sum with a running maximum.
@pytest.mark.parametrize("z_loss", [1e-4, 0.1])
@pytest.mark.parametrize("cap", [CAP, 41.0, None])
def test_z_loss_matches_float64(cap: float | None, z_loss: float, device) -> None:
    assert_matches_float64(*make_inputs(5, 257, torch.float32, device), cap, z_loss)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("cap", [CAP, 41.0, None])
def test_one_pass_matches_float64(cap, reduction: str, inplace: bool, dtype: torch.dtype, device) -> None:
    logits, target = make_inputs(7, 1031, dtype, device)
    target[3] = -100
    # 1 is the upstream gradient that costs nothing; float16's smallest gradients need the larger one.
    for upstream in (1.0, 64.0):
        weight = torch.tensor(upstream, device=device)
        options = {"reduction": reduction, "z_loss": 1e-3}
        loss, grad = loss_and_grad(softcap_ce, logits, target, cap, weight, inplace=inplace, **options)
        want_loss, want_grad = loss_and_grad(
            softcap_ce_ref, logits.double(), target, cap, weight.double(), **options
        )
        assert loss.shape == () and loss.dtype == torch.float32 and grad.dtype == dtype
        torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=4e-7 * CAP)
        # Rounded when it is stored and when it is multiplied.
        atol = 2 * upstream * GRAD_ATOL[dtype]
        torch.testing.assert_close(grad.double(), want_grad, rtol=2 * GRAD_RTOL[dtype], atol=atol)


def test_inplace_leaves_the_gradient_in_the_logits(device) -> None:
    logits, target = make_inputs(4, 129, torch.float32, device)
    x = logits.clone().requires_grad_()
    y = x * 1.0
    softcap_ce(y, target, CAP, inplace=True).backward()
    assert not torch.equal(y, logits) and torch.equal(y, x.grad)
    other = logits.clone().requires_grad_()
    softcap_ce(other, target, CAP).backward()
    assert torch.equal(other, logits) and torch.equal(other.grad, x.grad)


def test_inplace_without_gradients_leaves_the_logits(device) -> None:
    logits, target = make_inputs(4, 129, torch.float32, device)
    x = logits.clone()
    softcap_ce(x, target, CAP, inplace=True)
    assert torch.equal(x, logits)


def test_inplace_is_noticed_by_an_operator_that_saved_the_logits(device) -> None:
    logits, target = make_inputs(4, 129, torch.float32, device)
    y = logits.requires_grad_() * 1.0
    other = y.square().sum()
    loss = softcap_ce(y, target, CAP, inplace=True) + other
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_backward_in_one_pass_raises_and_does_not_scale_twice(device) -> None:
    logits, target = make_inputs(4, 129, torch.float32, device)
    loss = softcap_ce(logits.requires_grad_(), target, CAP)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored_give_zero(reduction: str, device) -> None:
    logits, target = make_inputs(4, 129, torch.float32, device)
    target[:] = -100
    options = {"reduction": reduction, "z_loss": 0.1}
    loss, grad = loss_and_grad(softcap_ce, logits, target, CAP, torch.ones((), device=device), **options)
    assert (loss == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4, 3e38, math.inf, -math.inf])
def test_equal_logits_give_the_logarithm_of_the_vocabulary(value: float, device) -> None:
    logits = torch.full((2, 37), value, device=device)
    target = torch.tensor([0, 36], device=device)
    loss, grad = loss_and_grad(softcap_ce, logits, target, CAP, torch.ones(2, device=device))
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(37)))
    assert grad.isfinite().all()
    if value != 0.0:
        assert (grad == 0).all(), "saturated logits have no gradient"


def test_target_gradient_keeps_its_precision_where_the_model_is_sure(device) -> None:
    # p - 1 is about -1e-9 here: in float32 a subtraction would return 0.
    logits = torch.zeros(1, 50, device=device)
    logits[0, 7] = 40.0
    target = torch.tensor([7], device=device)
    loss, grad = loss_and_grad(softcap_ce, logits, target, CAP, torch.ones(1, device=device))
    want_loss, want_grad = loss_and_grad(
        softcap_ce_ref, logits.double(), target, CAP, torch.ones(1, device=device).double()
    )
    assert 0 < want_loss.item() < 1e-8
    torch.testing.assert_close(loss.double(), want_loss, rtol=2e-5, atol=0)
    torch.testing.assert_close(grad[0, 7].double(), want_grad[0, 7], rtol=2e-5, atol=0)


def test_slope_keeps_its_precision_near_saturation(device) -> None:
    # 1 - tanh(10)^2 = 8e-9 rounds to 0 when tanh is rounded first.
    logits = torch.tensor([[10 * CAP, -10 * CAP, 0.0]], device=device)
    target = torch.tensor([2], device=device)
    _, grad = loss_and_grad(softcap_ce, logits, target, CAP, torch.ones(1, device=device))
    x = logits.double()
    p = torch.softmax(CAP * torch.tanh(x / CAP), 1)
    slope = 1 / torch.cosh(x / CAP) ** 2
    torch.testing.assert_close(grad[0, 0].double(), (p * slope)[0, 0], rtol=5e-5, atol=0)


def test_ignored_rows_have_zero_loss_and_gradient(device) -> None:
    logits, target = make_inputs(4, 129, torch.float32, device)
    target[1] = -100
    logits[1] = math.nan
    loss, grad = loss_and_grad(softcap_ce, logits, target, CAP, torch.ones(4, device=device))
    assert loss[1] == 0 and (grad[1] == 0).all()
    assert (loss[[0, 2, 3]] > 0).all() and (grad[[0, 2, 3]] != 0).any(dim=1).all()


def test_ignore_index_may_be_a_token(device) -> None:
    logits, target = make_inputs(6, 5, torch.float32, device)
    target[0] = 3
    loss = softcap_ce(logits, target, CAP, reduction="none", ignore_index=3)
    want = softcap_ce_ref(logits, target, CAP, reduction="none", ignore_index=3)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    assert loss[0] == 0


@pytest.mark.parametrize("cap", [CAP, 300.0])
@pytest.mark.parametrize("column", [0, 64, 128])
def test_nan_reaches_only_its_own_row(column: int, cap: float, device) -> None:
    logits, target = make_inputs(3, 129, torch.float32, device)
    target[1] = 64
    logits[1, column] = math.nan
    loss, grad = loss_and_grad(softcap_ce, logits, target, cap, torch.ones(3, device=device))
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().any(dim=1).tolist() == [False, True, False]


def test_empty_batch_gives_empty_loss(device) -> None:
    logits, target = make_inputs(0, 9, torch.float32, device)
    loss, grad = loss_and_grad(softcap_ce, logits, target, CAP, torch.ones(0, device=device))
    assert loss.shape == (0,) and grad.shape == (0, 9)


def test_strided_logits_are_accepted(device) -> None:
    logits, target = make_inputs(6, 40, torch.float32, device)
    loss, grad = loss_and_grad(softcap_ce, logits[:, ::2], target // 2, CAP, torch.ones(6, device=device))
    want = softcap_ce_ref(logits[:, ::2], target // 2, CAP, reduction="none")
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    assert grad.shape == (6, 20)


def test_result_is_the_same_on_every_call(device) -> None:
    logits, target = make_inputs(257, 513, torch.bfloat16, device)
    weight = torch.ones(257, device=device)
    first = loss_and_grad(softcap_ce, logits, target, CAP, weight)
    second = loss_and_grad(softcap_ce, logits, target, CAP, weight)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    passes = [loss_and_grad(softcap_ce, logits, target, CAP, weight[0], reduction="mean") for _ in range(2)]
    assert torch.equal(passes[0][0], passes[1][0]) and torch.equal(passes[0][1], passes[1][1])


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    logits, target = make_inputs(300, 513, torch.float32, torch.device("cpu"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = softcap_ce(logits, target, CAP, reduction="none")
        torch.set_num_threads(3)
        three = softcap_ce(logits, target, CAP, reduction="none")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)


@pytest.mark.parametrize("cap", [CAP, None])
def test_opcheck_accepts_the_operators(cap: float | None, device) -> None:
    logits, target = make_inputs(3, 7, torch.float32, device)
    options = (cap, -100, 1e-3)
    ops = torch.ops.pgolf
    torch.library.opcheck(ops.softcap_ce, (logits.clone().requires_grad_(), target, *options, False))
    loss, lse = ops.softcap_ce(logits, target, *options, False)
    torch.library.opcheck(
        ops.softcap_ce_backward, (torch.ones_like(loss), logits, target, loss, lse, *options)
    )
    one = torch.ones((), device=device)
    torch.library.opcheck(ops.softcap_ce_gradient, (logits, target, one, *options, False))
    torch.library.opcheck(ops.softcap_ce_gradient_, (logits.clone(), target, one, *options, False))
    torch.library.opcheck(ops.softcap_ce_rescale_, (logits.clone(), one * 3))


@pytest.mark.parametrize("factor", [1.0, 0.0, -2.5, math.nan])
def test_rescale_multiplies(factor: float, device) -> None:
    grad, _ = make_inputs(5, 129, torch.float32, device)
    want = grad * factor
    torch.ops.pgolf.softcap_ce_rescale_(grad, torch.tensor(factor, device=device))
    torch.testing.assert_close(grad, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("cap", [CAP, None])
def test_gradcheck_accepts_the_reference(cap: float | None, reduction: str) -> None:
    logits, target = make_inputs(3, 7, torch.float64, torch.device("cpu"))
    target[0] = -100
    assert torch.autograd.gradcheck(
        lambda x: softcap_ce_ref(x, target, cap, reduction=reduction, z_loss=0.01), logits.requires_grad_()
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_in_one_graph_matches_eager(reduction: str, device) -> None:
    logits, target = make_inputs(9, 129, torch.float32, device)

    def step(x: Tensor) -> Tensor:
        return softcap_ce(x * 2, target, CAP, reduction=reduction, z_loss=1e-3, inplace=True).mean()

    x = logits.clone().requires_grad_()
    y = logits.clone().requires_grad_()
    step(x).backward()
    torch.compile(step, fullgraph=True)(y).backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_says_that_it_is_missing(reduction: str, device) -> None:
    logits, target = make_inputs(2, 5, torch.float32, device)
    x = logits.requires_grad_()
    loss = softcap_ce(x, target, CAP, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(
        RuntimeError, match="softcap_ce: second derivatives are not implemented; use softcap_ce_ref"
    ):
        grad.sum().backward()


@requires_gpu
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_cuda_graph_replays_forward_and_backward(reduction: str) -> None:
    logits, target = make_inputs(17, 8192, torch.bfloat16, torch.device("cuda"))
    x = logits.clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = softcap_ce(x, target, CAP, reduction=reduction)
        return loss, torch.autograd.grad(loss.sum(), x)[0]

    assert_replays_like_a_call(step, lambda: x.mul_(0.5))
    weight = torch.ones((), device="cuda")
    want = loss_and_grad(softcap_ce, x, target, CAP, weight, reduction=reduction)
    assert all(map(torch.equal, step(), want))


@requires_gpu
def test_debug_switch_names_the_bad_row_on_cuda(monkeypatch) -> None:
    # The package's attribute of that name is the function, so the module comes from sys.modules.
    monkeypatch.setattr(sys.modules["pgolf.ops.softcap_ce"], "CHECK_TARGETS", True)
    target = torch.tensor([0, 4, 5, 5], device="cuda")
    with pytest.raises(ValueError, match=r"ignore_index=-100, got 5 at row 2"):
        softcap_ce(torch.zeros(4, 5, device="cuda"), target, CAP)


@requires_gpu
@pytest.mark.parametrize("bad", [129, -1, 2**40])
def test_cuda_target_out_of_range_makes_its_row_nan(bad: int) -> None:
    logits, target = make_inputs(3, 129, torch.float32, torch.device("cuda"))
    target[1] = bad
    loss, grad = loss_and_grad(softcap_ce, logits, target, CAP, torch.ones(3, device="cuda"))
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().all(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_cpu_target_out_of_range_names_the_row(bad: int) -> None:
    target = torch.tensor([0, 4, bad, bad])
    with pytest.raises(
        ValueError, match=rf"target must be in \[0, vocab=5\) or ignore_index=-100, got {bad} at row 2"
    ):
        softcap_ce(torch.zeros(4, 5), target, CAP)


@pytest.mark.parametrize(
    ("logits", "target", "cap", "error", "message"),
    [
        (torch.zeros(4), torch.zeros(4).long(), 30.0, ValueError, r"logits must be \(rows, vocab\)"),
        (torch.zeros(4, 0), torch.zeros(4).long(), 30.0, ValueError, r"vocab > 0, got \[4, 0\]"),
        (
            torch.zeros(4, 5),
            torch.zeros(3).long(),
            30.0,
            ValueError,
            r"target must be \(rows,\)=\(4,\), got \[3\]",
        ),
        (torch.zeros(4, 5), torch.zeros(4).short(), 30.0, TypeError, "int64 or int32, got torch.int16"),
        (
            torch.zeros(4, 5),
            torch.zeros(4).long(),
            0.0,
            ValueError,
            "cap must be finite and > 0, or None for no cap, got 0",
        ),
        (
            torch.zeros(4, 5),
            torch.zeros(4).long(),
            math.nan,
            ValueError,
            "> 0, or None for no cap, got nan",
        ),
        (
            torch.zeros(4, 5),
            torch.zeros(4).long(),
            math.inf,
            ValueError,
            "> 0, or None for no cap, got inf",
        ),
        (torch.zeros(4, 5), torch.zeros(4).long(), 1e-40, ValueError, r"got 1e-40; float32 divides by 1\."),
        (torch.zeros(4, 5), torch.zeros(4).long(), 1e38, ValueError, r"got 1e\+38; float32 divides by 1\."),
        (
            torch.zeros(4, 5).int(),
            torch.zeros(4).long(),
            30.0,
            TypeError,
            "dtype must be float32, .* got Int",
        ),
    ],
)
def test_bad_input_is_named(logits: Tensor, target: Tensor, cap: float, error, message: str, device) -> None:
    with pytest.raises(error, match=message):
        softcap_ce(logits.to(device), target.to(device), cap)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "avg"}, r'reduction must be "none", "mean" or "sum", got \'avg\''),
        ({"z_loss": -1.0}, "z_loss must be finite and >= 0, got -1"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        softcap_ce(torch.zeros(4, 5), torch.zeros(4).long(), CAP, **options)


def test_inplace_refuses_strided_logits() -> None:
    logits = torch.zeros(4, 10, requires_grad=True)[:, ::2]
    with pytest.raises(ValueError, match="logits must be contiguous to be overwritten"):
        softcap_ce(logits, torch.zeros(4).long(), CAP, inplace=True)


def test_debug_switch_must_be_zero_or_one(monkeypatch) -> None:
    monkeypatch.setenv("PGOLF_CHECK_TARGETS", "yes")
    with pytest.raises(ValueError, match="PGOLF_CHECK_TARGETS must be 0 or 1, got 'yes'"):
        env.check_targets()
    monkeypatch.setenv("PGOLF_CHECK_TARGETS", "1")
    assert env.check_targets()
