"""Arguments of the cross-entropies that their kernels do not know, against F.cross_entropy in float64."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pgolf.ops import _smoothed_ce as smoothed
from pgolf.ops import linear_softcap_ce, linear_softcap_ce_ref, softcap_ce, softcap_ce_ref
from tests.conftest import requires_gpu

VOCAB, WIDTH = 67, 24
REDUCTIONS = ["mean", "sum", "none"]
WEIGHTINGS = ["class_weight", "label_smoothing", "logit_scale", "all"]
# Rounded once to the dtype, with room for the arithmetic in float32 before it.
RTOL = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def make_logits(dtype: torch.dtype, device: torch.device, *leading: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(*leading, VOCAB, generator=g) * 8
    target = torch.randint(VOCAB, leading, generator=g)
    target.view(-1)[1] = -100
    return logits.to(dtype).to(device), target.to(device)


def make_hidden(
    dtype: torch.dtype, device: torch.device, *leading: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(4)
    hidden = torch.randn(*leading, WIDTH, generator=g).to(dtype)
    weight = (torch.randn(VOCAB, WIDTH, generator=g) * 4 / WIDTH**0.5).to(dtype)
    bias = torch.randn(VOCAB, generator=g).to(dtype)
    target = torch.randint(VOCAB, leading, generator=g)
    target.view(-1)[1] = -100
    return hidden.to(device), weight.to(device), bias.to(device), target.to(device)


def weighting(name: str, device: torch.device) -> dict[str, object]:
    """Return the arguments of one feature, or those of all of them."""
    g = torch.Generator().manual_seed(5)
    found = {
        "class_weight": torch.rand(VOCAB, generator=g).to(device),
        "label_smoothing": 0.1,
        "logit_scale": 0.3,
        "z_loss": 1e-2,
    }
    return found if name == "all" else {name: found[name]}


def formula(
    logits: Tensor, target: Tensor, cap: float | None, *, reduction: str = "mean", **options: object
) -> Tensor:
    """The published formula, of F.cross_entropy, with the penalty weighted as the loss is."""
    z = logits.flatten(0, -2) * options.get("logit_scale", 1.0)
    z, y = (z if cap is None else cap * torch.tanh(z / cap)), target.flatten().long()
    w, s = options.get("class_weight"), options.get("label_smoothing", 0.0)
    w = torch.ones(VOCAB, dtype=z.dtype, device=z.device) if w is None else w.to(z.dtype)
    rows = F.cross_entropy(z, y, w, reduction="none", label_smoothing=s)
    own = torch.where(y == -100, 0.0, w[y.clamp(0)])
    every = torch.where(y == -100, 0.0, (1 - s) * own + s * w.mean())
    rows = rows + options.get("z_loss", 0.0) * every * torch.logsumexp(z, 1) ** 2
    if reduction == "none":
        return rows.reshape(target.shape)
    return rows.sum() / (own.sum() if reduction == "mean" else 1.0)


def gradients(f: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the loss of detached tensors, and their gradients for different upstream gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    loss = f(*leaves)
    upstream = torch.linspace(-1.0, 2.0, max(loss.numel(), 2), dtype=torch.float64)[-loss.numel() :]
    total = (loss * upstream.reshape(loss.shape).to(loss.device)).sum()
    return loss.detach(), *torch.autograd.grad(total, leaves)


def assert_near(got: tuple[Tensor, ...], want: tuple[Tensor, ...], rtol: float) -> None:
    for ours, truth in zip(got, want, strict=True):
        error, size = (ours.double() - truth).norm().item(), truth.norm().item()
        assert error <= rtol * size + 1e-12, f"{error} of {size}"


@pytest.mark.parametrize("dtype", list(RTOL))
@pytest.mark.parametrize("cap", [30.0, 2.0, None])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_from_logits_is_torchs_cross_entropy(
    name: str, cap: float | None, dtype: torch.dtype, device
) -> None:
    logits, target = make_logits(dtype, device, 3, 5)
    options = weighting(name, device)
    for reduction in REDUCTIONS:
        got = gradients(
            lambda x, r=reduction: softcap_ce(x, target.int(), cap, reduction=r, **options), logits
        )
        want = gradients(
            lambda x, r=reduction: formula(x, target, cap, reduction=r, **options), logits.double()
        )
        assert (got[0].dtype, got[0].shape) == (torch.float32, want[0].shape)
        assert (got[1].dtype, got[1].shape) == (dtype, logits.shape)
        assert_near(got, want, RTOL[dtype])


@pytest.mark.parametrize(("memory", "reduction"), list(itertools.product(["fast", "low"], REDUCTIONS)))
@pytest.mark.parametrize("cap", [30.0, 2.0, None])
@pytest.mark.parametrize("name", [*WEIGHTINGS, "bias"])
def test_from_hidden_states_is_torchs_cross_entropy(
    name: str, cap, memory: str, reduction: str, device
) -> None:
    *tensors, target = make_hidden(torch.float32, device, 3, 5)
    options = weighting(name, device) if name != "bias" else {}

    def exact(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return formula(F.linear(x, w, b), target, cap, reduction=reduction, **options)

    def fused(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_softcap_ce(
            x, w, target.int(), cap, bias=b, memory=memory, reduction=reduction, **options
        )

    got, want = gradients(fused, *tensors), gradients(exact, *(t.double() for t in tensors))
    # On a GPU, torch's setting may let float32 products round to TF32.
    assert_near(got, want, 1e-5 if device.type == "cpu" else 2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("name", [*WEIGHTINGS, "bias"])
def test_16_bit_hidden_states_are_at_most_twice_eager(name: str, master: bool, dtype, device) -> None:
    hidden, *others, target = make_hidden(dtype, device, 3, 5)
    tensors = [hidden, *(t.float() if master else t for t in others)]
    options = weighting(name, device) if name != "bias" else {}
    for memory, reduction in itertools.product(["fast", "low"], ["mean", "none"]):
        call = {"reduction": reduction, **options}
        fused = partial(linear_softcap_ce, memory=memory, **call)
        eager = partial(linear_softcap_ce_ref, **call)
        ours, theirs = (
            gradients(lambda x, w, b, f=f: f(x, w, target, bias=b), *tensors) for f in (fused, eager)
        )
        want = gradients(lambda x, w, b, f=eager: f(x, w, target, bias=b), *(t.double() for t in tensors))
        assert [t.dtype for t in ours[1:]] == [t.dtype for t in tensors]
        for got, base, truth in zip(ours, theirs, want, strict=True):
            error, bound = ((t.double() - truth).norm().item() for t in (got, base))
            assert error <= 2 * bound + torch.finfo(dtype).eps * truth.norm().item()


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_several_chunks_are_one(name: str, device, monkeypatch) -> None:
    *tensors, target = make_hidden(torch.float32, device, 33)
    logits, options = F.linear(*tensors).detach(), weighting(name, device)

    def both() -> tuple[Tensor, ...]:
        one = gradients(lambda x: softcap_ce(x, target, 30.0, **options), logits)
        return one + gradients(lambda x, w, b: linear_softcap_ce(x, w, target, bias=b, **options), *tensors)

    want = both()
    monkeypatch.setattr(smoothed, "_CHUNK_BYTES", dict.fromkeys(("cpu", "cuda"), 3 * VOCAB * 4))
    monkeypatch.setattr(smoothed, "_PRODUCT_BYTES", dict.fromkeys(("cpu", "cuda"), 1))
    monkeypatch.setattr(smoothed, "_PRODUCT_ROWS", dict.fromkeys(("cpu", "cuda"), 7))
    for ours, truth in zip(both(), want, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5 if device.type == "cpu" else 2e-3, atol=1e-6)


def test_smoothing_keeps_no_logits(device) -> None:
    if device.type != "cpu":
        pytest.skip("the profile is of the CPU")
    hidden, weight = torch.randn(4096, 8, requires_grad=True), torch.randn(8192, 8, requires_grad=True)
    target = torch.randint(8192, (4096,))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=activities) as prof:
        linear_softcap_ce(hidden, weight, target, label_smoothing=0.1).backward()
    assert max(e.self_cpu_memory_usage for e in prof.events()) <= 16 << 20  # all logits are 128 MiB


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_and_nan_stay_in_their_rows(name: str, reduction: str, device) -> None:
    logits, target = make_logits(torch.float32, device, 6)
    logits[1], options = math.nan, weighting(name, device)  # row 1 is ignored
    loss, grad = gradients(lambda x: softcap_ce(x, target, reduction=reduction, **options), logits)
    assert loss.isfinite().all() and (grad[1] == 0).all() and grad.isfinite().all()
    logits[2, 0] = math.nan
    loss, grad = gradients(lambda x: softcap_ce(x, target, reduction="none", **options), logits)
    assert loss.isnan().nonzero().tolist() == [[2]] == grad.isnan().any(dim=1).nonzero().tolist()
    target[:] = -100
    loss, grad = gradients(lambda x: softcap_ce(x, target, reduction=reduction, **options), logits)
    assert (loss == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_an_empty_batch_has_no_loss(name: str, device) -> None:
    *tensors, target = make_hidden(torch.float32, device, 2)
    tensors[0], target, options = tensors[0][:0], target[:0], weighting(name, device)
    got = gradients(lambda x, w, b: linear_softcap_ce(x, w, target, bias=b, **options), *tensors)
    assert all((t == 0).all() for t in got) and got[2].shape == (VOCAB, WIDTH)


def test_float64_on_the_cpu_has_every_derivative() -> None:
    cpu, options = torch.device("cpu"), weighting("all", torch.device("cpu"))
    logits, y = make_logits(torch.float64, cpu, 3)
    *tensors, target = make_hidden(torch.float64, cpu, 2, 2)
    leaves = [t.requires_grad_() for t in tensors]
    for reduction in ("mean", "none"):

        def dense(x: Tensor, r: str = reduction) -> Tensor:
            return softcap_ce(x, y.int(), 5.0, reduction=r, **options)

        def fused(x: Tensor, w: Tensor, b: Tensor, r: str = reduction) -> Tensor:
            return linear_softcap_ce(x, w, target, 5.0, bias=b, reduction=r, **options)

        assert dense(logits).dtype == torch.float64
        x = logits.clone().requires_grad_()
        assert torch.autograd.gradcheck(dense, x, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(dense, x, fast_mode=True)
        assert torch.autograd.gradcheck(fused, leaves, check_forward_ad=True, fast_mode=True)
    torch.testing.assert_close(
        torch.func.grad(lambda x: softcap_ce(x, y))(logits),
        torch.func.grad(lambda x: F.cross_entropy(30 * torch.tanh(x / 30), y))(logits),
    )
    with pytest.raises(ValueError, match=r"softcap_ce: target must be in \[0, vocab\) or ignore_index"):
        softcap_ce(logits, torch.full_like(y, VOCAB))


class Calls(TorchDispatchMode):
    """Lists the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_defaults_call_the_fused_operators_and_little_else(memory: str, device) -> None:
    hidden, weight, _, target = make_hidden(torch.float32, device, 15)
    logits = F.linear(hidden, weight)
    with Calls() as calls:
        softcap_ce(logits.requires_grad_(), target, reduction="sum")
    assert set(calls.names) <= {
        "pgolf::softcap_ce_gradient", "aten::ones", "aten::new_empty", "aten::sum", "aten::mul.Tensor",
        "aten::detach",
    }  # fmt: skip
    with Calls() as calls:
        linear_softcap_ce(hidden, weight.requires_grad_(), target, reduction="sum", memory=memory)
    ours = "linear_softcap_ce" if memory == "fast" else "linear_softcap_ce_gradients"
    allowed = {f"pgolf::{ours}", "aten::ones", "aten::new_empty", "aten::sum", "aten::detach", "aten::view"}
    assert set(calls.names) <= allowed, calls.names


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", [*WEIGHTINGS, "bias", "int32"])
def test_compile_in_one_graph_matches_eager(name: str, reduction: str, device) -> None:
    *tensors, target = make_hidden(torch.float32, device, 3, 5)
    options = weighting(name, device) if name in WEIGHTINGS else {}
    torch.compiler.reset()
    for memory in ("fast", "low"):

        def fused(x: Tensor, w: Tensor, b: Tensor, m: str = memory) -> Tensor:
            call = {"memory": m, "reduction": reduction, "bias": b if name == "bias" else None, **options}
            return linear_softcap_ce(x * 2, w, target.int(), **call) + b.sum()

        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        for got, want in zip(gradients(compiled, *tensors), gradients(fused, *tensors), strict=True):
            torch.testing.assert_close(got, want)
    logits, y = make_logits(torch.float32, device, 3, 5)
    dense = partial(softcap_ce, target=y.int(), reduction=reduction, **options)
    compiled = torch.compile(lambda x: dense(x), fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled, logits), gradients(dense, logits), strict=True):
        torch.testing.assert_close(got, want)


class Head(torch.nn.Module):
    """A loss as a module, for torch.export and torch.jit.trace."""

    def __init__(self, weight: Tensor, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.loss = torch.nn.Parameter(weight), loss

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return self.loss(hidden, self.weight, target)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "fast": linear_softcap_ce,
    "low": partial(linear_softcap_ce, memory="low"),
    "none": partial(linear_softcap_ce, reduction="none"),
    "smoothed": partial(linear_softcap_ce, label_smoothing=0.1),
    "logits": lambda x, w, y: softcap_ce(F.linear(x, w), y),
    "scaled logits": lambda x, w, y: softcap_ce(F.linear(x, w), y, logit_scale=0.5),
}


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.filterwarnings("ignore")
def test_recorded_programs_compute_no_gradient_before_it_is_asked_for(name: str, device) -> None:
    hidden, weight, _, target = make_hidden(torch.float32, device, 15)
    head = Head(weight, LOSSES[name])
    hidden.requires_grad_()
    want = head(hidden, target)
    inputs = (hidden, head.weight)
    grads = torch.autograd.grad(want.sum(), inputs)
    exported = torch.export.export(head, (hidden, target))
    fused = [str(n.target) for n in exported.graph.nodes if "pgolf" in str(n.target)]
    assert len(fused) == 1 and "gradient" not in fused[0]
    if "linear_softcap_ce." in fused[0]:
        (node,) = (n for n in exported.graph.nodes if "pgolf" in str(n.target))
        assert node.args[-2] is False, "the program keeps a matrix of the size of the logits"
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(hidden, target), want)
    traced = torch.jit.trace(head, (hidden, target))
    for _ in range(3):  # the interpreter optimizes at its second run
        got = traced(hidden, target)
        torch.testing.assert_close(got, want)
        for ours, theirs in zip(torch.autograd.grad(got.sum(), inputs), grads, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", [*WEIGHTINGS, "bias"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_derivatives_that_are_missing_are_named_and_vmap_is_right(name: str, device) -> None:
    hidden, weight, bias, target = make_hidden(torch.float32, device, 5)
    options = weighting(name, device) if name != "bias" else {"bias": bias}
    losses = {"linear_softcap_ce": lambda x: linear_softcap_ce(x, weight, target, **options)}
    if name != "bias":
        losses["softcap_ce"] = lambda x: softcap_ce(x @ weight.t(), target, **options)
    for op, f in losses.items():
        x = hidden.clone().requires_grad_()
        (grad,) = torch.autograd.grad(f(x), x, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{op}: second derivatives are not implemented"):
            grad.sum().backward()
        for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
            with pytest.raises(RuntimeError, match=f"{op}: forward-mode derivatives and those of torch.func"):
                transform(f)(hidden)
        stack = torch.stack([hidden, 2 * hidden])
        torch.testing.assert_close(torch.func.vmap(f)(stack), torch.stack([f(x) for x in stack]))


def test_a_derivative_by_a_bias_in_torch_func_is_refused(device) -> None:
    hidden, weight, bias, target = make_hidden(torch.float32, device, 5)
    with pytest.raises(RuntimeError, match="linear_softcap_ce: forward-mode derivatives"):
        torch.func.grad(lambda b: linear_softcap_ce(hidden, weight, target, bias=b))(bias)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_operators_satisfy_opcheck(name: str, device) -> None:
    hidden, weight, _, target = make_hidden(torch.float32, device, 5)
    given = weighting(name, device)
    rule = (given.get("class_weight"), 30.0, -100, 1e-3, given.get("label_smoothing", 0.0))
    ops, rows = torch.ops.pgolf, torch.ones(5, device=device)
    logits = F.linear(hidden, weight)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    torch.library.opcheck(ops._smoothed_ce, (logits.clone().requires_grad_(), target, *rule, 0.3, False))
    torch.library.opcheck(ops._smoothed_ce_backward, (rows, logits, target, *rule, 0.3))
    torch.library.opcheck(ops._smoothed_linear_ce, (x, w, target, *rule, False))
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops._smoothed_linear_ce_backward, (rows, hidden, weight, target, *rule, *needs))
    # A compiled program relies on the strides that the fake kernel promises.
    across = hidden.t().contiguous().t()
    torch.library.opcheck(ops._smoothed_linear_ce_backward, (rows, across, weight, target, *rule, True, True))


def test_autocast_does_not_round_what_is_float32(device) -> None:
    logits, target = make_logits(torch.float32, device, 5)
    *tensors, y = make_hidden(torch.bfloat16, device, 5)
    options = weighting("all", device)
    want = gradients(lambda x: softcap_ce(x, target, **options), logits)
    fused = lambda x, w, b: linear_softcap_ce(x, w, y, bias=b, **options)  # noqa: E731
    others = gradients(fused, *tensors)
    with torch.autocast(device.type, torch.bfloat16):
        got = gradients(lambda x: softcap_ce(x, target, **options), logits)
        again = gradients(fused, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(got + again, want + others, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be from 0 to 1, got 1.5"),
        ({"label_smoothing": math.nan}, ValueError, "label_smoothing must be from 0 to 1, got nan"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be finite and > 0, got 0.0"),
        ({"logit_scale": math.inf}, ValueError, "logit_scale must be finite and > 0, got inf"),
        ({"logit_scale": torch.ones(())}, TypeError, "logit_scale must be a Python number; multiply"),
        ({"class_weight": torch.ones(4)}, ValueError, r"class_weight must be \(vocab,\)=\(5,\), got \(4,\)"),
        ({"class_weight": torch.ones(5).long()}, TypeError, "class_weight must be of a floating-point dtype"),
        (
            {"class_weight": torch.ones(5, requires_grad=True)},
            RuntimeError,
            r"class_weight has no derivative; pass class_weight.detach\(\)",
        ),
        ({"label_smoothing": 0.1, "cap": 0.0}, ValueError, "cap must be finite and > 0"),
        ({"label_smoothing": 0.1, "z_loss": -1.0}, ValueError, "z_loss must be finite and >= 0"),
        ({"label_smoothing": 0.1, "target": torch.tensor([0, 5])}, ValueError, "got 5 at row 1"),
        (
            {"label_smoothing": 0.1, "logits": torch.zeros(2, 5).int()},
            TypeError,
            "must be float32, .* got Int",
        ),
        ({"logits": torch.zeros(2, 5, 3), "target": torch.zeros(2, 3).long()}, ValueError, r"be \(2, 5\), "),
    ],
)
def test_bad_arguments_are_named(options: dict, error, message: str) -> None:
    call = {"logits": torch.zeros(2, 5), "target": torch.zeros(2).long(), **options}
    with pytest.raises(error, match=f"softcap_ce: .*{message}"):
        softcap_ce(**call)
    hidden = call.pop("logits")
    with pytest.raises(error, match=f"linear_softcap_ce: .*{message}"):
        linear_softcap_ce(hidden, torch.zeros(5, hidden.shape[-1]), **call)


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.zeros(4), ValueError, r"bias must be \(vocab,\)=\(5,\), got \(4,\)"),
        (torch.zeros(5).long(), TypeError, "bias must be of a floating-point dtype"),
    ],
)
def test_a_bad_bias_is_named(bias: Tensor, error, message: str) -> None:
    with pytest.raises(error, match=f"linear_softcap_ce: {message}"):
        linear_softcap_ce(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2).long(), bias=bias)


def test_inplace_works_with_leading_dimensions_and_refuses_strides(device) -> None:
    logits, target = make_logits(torch.float32, device, 3, 5)
    x = logits.clone().requires_grad_()
    y = x * 1.0
    softcap_ce(y, target, inplace=True).backward()
    assert torch.equal(y, x.grad) and not torch.equal(y, logits)
    with pytest.raises(ValueError, match="softcap_ce: logits must be contiguous to be overwritten"):
        softcap_ce((x * 1.0)[:, 1:], target[:, 1:], inplace=True)


@requires_gpu
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_cuda_target_out_of_range_makes_its_row_nan(name: str) -> None:
    device = torch.device("cuda")
    *tensors, target = make_hidden(torch.bfloat16, device, 6)
    target[3], options = VOCAB, {"reduction": "none", **weighting(name, device)}
    loss, grad, *_ = gradients(lambda x, w, b: linear_softcap_ce(x, w, target, bias=b, **options), *tensors)
    assert loss.isnan().nonzero().tolist() == [[3]]
    assert grad.isnan().all(dim=1).nonzero().tolist() == [[3]]


def test_references_take_the_same_arguments() -> None:
    logits, target = make_logits(torch.float64, torch.device("cpu"), 3, 5)
    options = weighting("all", torch.device("cpu"))
    for reduction in REDUCTIONS:
        got = softcap_ce_ref(logits, target.int(), 30.0, reduction=reduction, **options)
        torch.testing.assert_close(got, formula(logits, target, 30.0, reduction=reduction, **options))
