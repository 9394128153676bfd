"""Every way to differentiate an operator gives the right derivative or an error, but not a wrong zero."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from pgolf.ops import (
    AdamRule,
    AdamTensor,
    MuonBank,
    MuonRule,
    adam_step,
    clip_scale,
    linear_softcap_ce,
    linear_softcap_ce_ref,
    muon_apply,
    muon_step,
    newton_schulz,
    newton_schulz_banks,
    quantize_pack,
    quantize_pack_sdclip,
    softcap_ce,
    softcap_ce_ref,
    square_sums,
    trellis_round,
    unpack_dequantize,
)
from pgolf.ops.muon_step import HYPER

Function = Callable[[Tensor], Tensor]
TABLE = [(3.4445, -4.7750, 2.0315)]
MESSAGE = "second derivatives|not differentiable|forward-mode derivatives"


def randn(*shape: int, seed: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def losses(device: torch.device) -> dict[str, tuple[Function, Function, Tensor]]:
    """By name: the operator as a scalar function, its reference, and where to differentiate."""
    target = torch.tensor([1, 4, 0], device=device)
    logits, hidden, weight = (
        randn(3, 5, seed=1, device=device),
        randn(3, 8, seed=2, device=device),
        randn(5, 8, seed=3, device=device),
    )
    found: dict[str, tuple[Function, Function, Tensor]] = {
        "softcap_ce inplace": (
            lambda x: softcap_ce(x * 1.0, target, inplace=True),
            lambda x: softcap_ce_ref(x, target),
            logits,
        )
    }
    for reduction in ("mean", "none"):
        found[f"softcap_ce {reduction}"] = (
            lambda x, r=reduction: softcap_ce(x, target, reduction=r).sum(),
            lambda x, r=reduction: softcap_ce_ref(x, target, reduction=r).sum(),
            logits,
        )
        for memory in ("fast", "low"):
            options = {"reduction": reduction, "memory": memory}
            found[f"linear_softcap_ce {reduction} {memory} hidden"] = (
                lambda x, o=options: linear_softcap_ce(x, weight, target, **o).sum(),
                lambda x, r=reduction: linear_softcap_ce_ref(x, weight, target, reduction=r).sum(),
                hidden,
            )
            found[f"linear_softcap_ce {reduction} {memory} weight"] = (
                lambda w, o=options: linear_softcap_ce(hidden, w, target, **o).sum(),
                lambda w, r=reduction: linear_softcap_ce_ref(hidden, w, target, reduction=r).sum(),
                weight,
            )
    return found


def without_derivative(device: torch.device) -> dict[str, tuple[Function, Tensor]]:
    """By name: an operator without a derivative, as a scalar function, and where to differentiate."""
    x = randn(4, 8, seed=4, device=device)
    packed = quantize_pack(x, torch.ones(4, dtype=torch.float16, device=device), 6)
    return {
        "newton_schulz": (lambda a: newton_schulz(a, TABLE).square().sum(), x),
        "newton_schulz_banks": (lambda a: newton_schulz_banks([x, a], TABLE)[1].square().sum(), x),
        "trellis_round": (lambda a: trellis_round(a).square().sum(), x),
        "quantize_pack_sdclip": (lambda a: quantize_pack_sdclip(a, 3.0, 6)[1].float().sum(), x),
        "unpack_dequantize": (lambda s: unpack_dequantize(packed, s, 8, 6).float().sum(), x[:, 0].half()),
        "square_sums": (lambda a: square_sums([a]).sum(), x),
    }


LOSSES = list(losses(torch.device("cpu")))
WITHOUT = list(without_derivative(torch.device("cpu")))


def tangent(f: Function, x: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def twice(f: Function, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), leaf, allow_unused=True)[0]


def twice_backward(f: Function, x: Tensor) -> Tensor | None:
    leaf = x.clone().requires_grad_()
    f(leaf).backward(create_graph=True)
    grad, leaf.grad = leaf.grad, None
    assert grad is not None
    grad.square().sum().backward()
    return leaf.grad


def through_upstream(f: Function, x: Tensor) -> Tensor:
    """Differentiate a gradient with respect to the upstream gradient, as the double-backward jvp does."""
    leaf, upstream = x.clone().requires_grad_(), torch.ones((), device=x.device, requires_grad=True)
    (grad,) = torch.autograd.grad(f(leaf), leaf, upstream, create_graph=True)
    return torch.autograd.grad(grad.sum(), upstream, allow_unused=True)[0]


AF, TF = torch.autograd.functional, torch.func
HIGHER: dict[str, Callable[[Function, Tensor], object]] = {
    "create_graph": twice,
    "backward(create_graph)": twice_backward,
    "by the upstream gradient": through_upstream,
    "forward_ad": tangent,
    "functional.hessian": AF.hessian,
    "functional.hessian vectorized": lambda f, x: AF.hessian(f, x, vectorize=True),
    "functional.hessian forward": lambda f, x: AF.hessian(
        f, x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "functional.jacobian forward": lambda f, x: AF.jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "functional.jvp": lambda f, x: AF.jvp(f, x, torch.ones_like(x)),
    "functional.hvp": lambda f, x: AF.hvp(f, x, torch.ones_like(x)),
    "functional.vhp": lambda f, x: AF.vhp(f, x, torch.ones_like(x)),
    "func.grad": lambda f, x: TF.grad(f)(x),
    "func.grad grad": lambda f, x: TF.grad(lambda y: TF.grad(f)(y).square().sum())(x),
    "func.vjp": lambda f, x: TF.vjp(f, x)[1](torch.ones((), device=x.device)),
    "func.jvp": lambda f, x: TF.jvp(f, (x,), (torch.ones_like(x),)),
    "func.jvp grad": lambda f, x: TF.jvp(TF.grad(f), (x,), (torch.ones_like(x),)),
    "func.jacrev": lambda f, x: TF.jacrev(f)(x),
    "func.jacfwd": lambda f, x: TF.jacfwd(f)(x),
    "func.hessian": lambda f, x: TF.hessian(f)(x),
    "func.linearize": lambda f, x: TF.linearize(f, x)[1](torch.ones_like(x)),
    "func.vmap grad": lambda f, x: TF.vmap(TF.grad(f))(torch.stack([x, x])),
    "func.grad vmap": lambda f, x: TF.grad(lambda y: TF.vmap(f)(y).sum())(torch.stack([x, x])),
    "func.jvp vmap": lambda f, x: TF.jvp(TF.vmap(f), (torch.stack([x, x]),), (torch.stack([x, x]),)),
}
FIRST: dict[str, Callable[[Function, Tensor], object]] = {
    "functional.jacobian": AF.jacobian,
    "functional.jacobian vectorized": lambda f, x: AF.jacobian(f, x, vectorize=True),
    "functional.vjp": lambda f, x: AF.vjp(f, x)[1],
    "functional.vjp create_graph": lambda f, x: AF.vjp(f, x, create_graph=True)[1].detach(),
    "batched": lambda f, x: torch.autograd.grad(
        f(leaf := x.clone().requires_grad_()),
        leaf,
        torch.tensor([1.0, -2.0], device=x.device),
        is_grads_batched=True,
    )[0],
}


@pytest.mark.parametrize("route", list(HIGHER))
@pytest.mark.parametrize("name", LOSSES)
def test_higher_and_forward_derivatives_of_a_loss_are_refused(name: str, route: str, device) -> None:
    loss, _, x = losses(device)[name]
    with pytest.raises(RuntimeError, match=f"{name.split()[0]}: .*({MESSAGE}).*use {name.split()[0]}_ref"):
        HIGHER[route](loss, x)


@pytest.mark.parametrize("route", list(FIRST))
@pytest.mark.parametrize("name", LOSSES)
def test_first_derivatives_of_a_loss_are_right(name: str, route: str, device) -> None:
    loss, reference, x = losses(device)[name]
    torch.testing.assert_close(
        FIRST[route](loss, x), FIRST[route](reference, x), rtol=1e-2, atol=5e-3 if x.is_cuda else 1e-5
    )


@pytest.mark.parametrize("route", [*HIGHER, *FIRST])
@pytest.mark.parametrize("name", WITHOUT)
def test_every_derivative_of_an_operator_without_one_is_refused(name: str, route: str, device) -> None:
    f, x = without_derivative(device)[name]
    with pytest.raises(RuntimeError, match=f"{name.removesuffix('_banks')}.*: ({MESSAGE})"):
        (HIGHER | FIRST)[route](f, x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_that_differentiate_nothing_pass(device) -> None:
    target, x = torch.tensor([1, 4, 0], device=device), randn(3, 5, seed=5, device=device)
    batched = TF.vmap(lambda y: softcap_ce(y, target))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(batched, torch.stack([softcap_ce(x, target), softcap_ce(2 * x, target)]))
    # Detached, without gradients, or another tensor than the one that is differentiated.
    for constant in (Tensor.detach, lambda _: x):
        grad = TF.grad(lambda y, c=constant: newton_schulz(c(y), TABLE).sum() + y.sum())(x)
        assert torch.equal(grad, torch.ones_like(x))
        out = TF.jvp(lambda y, c=constant: softcap_ce(c(y), target) + y.sum(), (x,), (x,))[1]
        torch.testing.assert_close(out, x.sum())
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(softcap_ce(x, target)).tangent is None


@pytest.mark.parametrize("name", ["softcap_ce mean", "linear_softcap_ce mean low hidden", "newton_schulz"])
@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_compiled_code_does_not_lose_tangents(name: str, fullgraph: bool, device) -> None:
    f, x = (without_derivative(device) | {n: (f, x) for n, (f, _, x) in losses(device).items()})[name]
    torch.compiler.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=fullgraph)
    torch.testing.assert_close(compiled(x), f(x))  # once without a tangent, so that a guard must notice it
    with pytest.raises((RuntimeError, torch._dynamo.exc.Unsupported), match=r"forward-mode derivatives"):
        tangent(compiled, x)
    with pytest.raises((RuntimeError, torch._dynamo.exc.Unsupported), match=r"forward-mode derivatives"):
        torch.compile(lambda y: TF.jvp(f, (y,), (y,))[1], backend="aot_eager", fullgraph=fullgraph)(x)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_may_be_scaled_in_place_before_backward(name: str, device) -> None:
    loss, reference, x = losses(device)[name]
    leaf, other = (x.clone().requires_grad_() for _ in range(2))
    value = loss(leaf)
    value /= 4
    value.backward()
    (reference(other) / 4).backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-2, atol=5e-3 if x.is_cuda else 1e-5)


def in_place(device: torch.device) -> dict[str, Callable[[Tensor], None]]:
    """By name: an operator that works in place, called with one tensor that may require grad."""
    one = torch.ones(1, 4, 4, device=device)
    hyper, rest = torch.ones(HYPER, device=device), torch.ones(3, device=device)
    return {
        "muon_step": lambda p: muon_step(
            [MuonBank(one.clone(), one.clone(), one.clone(), p)], hyper, MuonRule(TABLE)
        ),
        "muon_apply": lambda p: muon_apply([p], [one.clone()], hyper, lr_scales=[1.0]),
        "adam_step": lambda p: adam_step(
            [AdamTensor(p, one.clone(), one.clone(), one.clone())],
            hyper[:1],
            hyper,
            rest[:2],
            AdamRule(0.1, 0.9, 0.99, 1e-8),
        ),
        "clip_scale": lambda p: clip_scale(
            p.flatten(), rest.clone(), hyper.clone(), rest[:2].clone(), clip=1.0, beta1=0.9, beta2=0.99
        ),
    }


@pytest.mark.parametrize("name", list(in_place(torch.device("cpu"))))
def test_operators_in_place_refuse_tensors_that_are_differentiated(name: str, device) -> None:
    step, p = in_place(device)[name], torch.ones(1, 4, 4, device=device)
    with pytest.raises(RuntimeError, match=f"{name}: .* works in place .* requires grad; call it under"):
        step(p.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=f"{name}: forward-mode derivatives"), forward_ad.dual_level():
        step(forward_ad.make_dual(p.clone(), p))
    with torch.no_grad():
        step(p.clone().requires_grad_())
    step(p.clone())
