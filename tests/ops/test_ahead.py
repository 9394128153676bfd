"""EMA-Nesterov in the passes of muon_apply and adam_step, over several steps, compared with its formula."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pgolf.ops import (
    AdamRule,
    AdamTensor,
    adam_step,
    adam_step_ref,
    muon_apply,
    muon_apply_ref,
)
from pgolf.ops.muon_step import GRAD_SCALE, LR, SHIFT, VELOCITY_WEIGHT, move_ahead_ref

# A scalar, nothing, one vector of eight and one more, a matrix, one block and five more elements, and more
# tensors than one launch takes.
SHAPES = [(), (0,), (8,), (9,), (3, 5), (2053,)] * 12
RULE = AdamRule(weight_decay=0.1, beta1=0.9, beta2=0.99, eps=1e-8)

# 1 - gamma, shift, grad_scale: no velocity yet; steps of a run; one that is skipped, with another shift;
# both ends of both numbers; one more that is skipped, without a shift.
STEPS = [
    (0.0, 0.0, 0.5),
    (0.004, 0.6, 0.5),
    (0.25, 0.6, 1.0),
    (0.3, 0.4, math.nan),
    (0.75, 0.0, 0.5),
    (0.0, 0.5, 0.5),
    (1.0, 1.0, 0.5),
    (0.5, 0.0, math.inf),
    (0.25, 0.3, 0.5),
]


class State(NamedTuple):
    """What a step works on: lists of tensors of SHAPES."""

    params: list[Tensor]
    grads: list[Tensor]
    averages: list[Tensor]
    bases: list[Tensor]
    velocities: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]


def make_state(device: torch.device, offset: int) -> State:
    """Random weights and averages, the parameters at the weights; with `offset` not 16-byte aligned."""
    rng = torch.Generator().manual_seed(0)

    def random() -> list[Tensor]:
        flat = [torch.randn(math.prod(s) + offset, generator=rng).to(device) for s in SHAPES]
        return [t[offset:].view(s) for t, s in zip(flat, SHAPES, strict=True)]

    state = State(*(random() for _ in State._fields))
    for base, param in zip(state.bases, state.params, strict=True):
        base.copy_(param)
    for tensor in (*state.velocities, *state.means, *state.squares):
        tensor.zero_()
    return state


def copied(state: State, dtype: torch.dtype) -> State:
    return State(*([t.to(dtype, copy=True) for t in tensors] for tensors in state))


def adam_tensors(state: State, averages: bool) -> list[AdamTensor]:
    found = zip(
        state.params,
        state.grads,
        state.means,
        state.squares,
        state.averages if averages else [None] * len(SHAPES),
        state.bases,
        state.velocities,
        strict=True,
    )
    return [AdamTensor(*tensors) for tensors in found]


Step = Callable[[State, Tensor, bool], None]


def by_muon(apply: Callable[..., None], dtype: torch.dtype, *, cautious: bool = False) -> Step:
    """Return a step of `apply`, whose updates are the gradients in `dtype`."""

    def step(state: State, hyper: Tensor, averages: bool) -> None:
        updates = [g.to(dtype) for g in state.grads]
        apply(
            state.params,
            updates,
            hyper,
            lr_scales=[2.0] * len(SHAPES),
            averages=state.averages if averages else (),
            bases=state.bases,
            velocities=state.velocities,
            cautious=cautious,
        )

    return step


def by_adam(step: Callable[..., None]) -> Step:
    corrections = torch.tensor([2.5, 30.0])

    def adam(state: State, hyper: Tensor, averages: bool) -> None:
        step(adam_tensors(state, averages), hyper[LR], hyper, corrections.to(hyper.device), RULE)

    return adam


F32, BF16 = torch.float32, torch.bfloat16
# By name: a step and its reference.
OPERATORS = {
    "muon_apply": (by_muon(muon_apply, F32), by_muon(muon_apply_ref, F32)),
    "bfloat16": (by_muon(muon_apply, BF16, cautious=True), by_muon(muon_apply_ref, BF16, cautious=True)),
    "adam_step": (by_adam(adam_step), by_adam(adam_step_ref)),
}


def numbers(weight: float, shift: float, grad_scale: float, device: torch.device) -> Tensor:
    return torch.tensor([0.05, 0.9, 0.1, grad_scale, 0.25, weight, shift], device=device)


@pytest.mark.parametrize(("averages", "offset"), [(True, 0), (True, 1), (False, 0)])
@pytest.mark.parametrize("name", OPERATORS)
def test_steps_equal_the_reference_in_both_precisions(name, averages, offset, device) -> None:
    state = make_state(device, offset)
    single, double = copied(state, torch.float32), copied(state, torch.float64)
    step, reference = OPERATORS[name]
    for number, (weight, shift, scale) in enumerate(STEPS):
        hyper = numbers(weight, shift, scale, device)
        rng = torch.Generator().manual_seed(number)
        for i, shape in enumerate(SHAPES):
            grad = torch.randn(shape, generator=rng).to(device)
            for each in (state, single, double):
                each.grads[i].copy_(grad)
        before = copied(state, torch.float32)
        step(state, hyper, averages)
        for like in (single, double):
            reference(like, hyper, averages)
            for field in ("params", "averages", "bases", "velocities"):
                for got, want in zip(getattr(state, field), getattr(like, field), strict=True):
                    torch.testing.assert_close(got.to(want.dtype), want, rtol=2e-5, atol=1e-5)
        if not math.isfinite(scale):
            for field in ("averages", "bases", "velocities", "means", "squares"):
                pairs = zip(getattr(state, field), getattr(before, field), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs), field
        if weight == 0.0:
            assert all(torch.equal(a, b) for a, b in zip(state.velocities, before.velocities, strict=True))
        if shift == 0.0:
            assert all(torch.equal(a, b) for a, b in zip(state.params, state.bases, strict=True))


@pytest.mark.parametrize("name", OPERATORS)
def test_the_weights_are_those_of_the_step_without_it(name, device) -> None:
    """One step made from the shifted point, bit for bit, and v and the shift computed from it."""
    state, hyper = make_state(device, 0), numbers(0.25, 0.6, 0.5, device)
    for velocity, base in zip(state.velocities, state.bases, strict=True):
        velocity.normal_()
        base.normal_()
    start, twin = copied(state, torch.float32), copied(state, torch.float32)
    OPERATORS[name][0](state, hyper, True)
    if name == "adam_step":
        plain = [t._replace(base=None, velocity=None) for t in adam_tensors(twin, True)]
        adam_step(plain, hyper[LR], hyper, torch.tensor([2.5, 30.0], device=device), RULE)
    else:
        updates = [g.to(BF16 if name == "bfloat16" else F32) for g in twin.grads]
        scales = [2.0] * len(SHAPES)
        muon_apply(
            twin.params, updates, hyper, lr_scales=scales, averages=twin.averages, cautious=name == "bfloat16"
        )
    for i in range(len(SHAPES)):
        x = twin.params[i]
        assert torch.equal(state.bases[i], x) and torch.equal(state.averages[i], twin.averages[i])
        v = 0.75 * start.velocities[i] + 0.25 * (x - start.bases[i])
        torch.testing.assert_close(state.velocities[i], v, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state.params[i], x + 0.6 * v, rtol=1e-5, atol=1e-6)


def test_steps_on_a_quadratic_follow_the_formula_in_float64(device) -> None:
    """The step is one of gradient descent, taken at the shifted point."""
    rng = torch.Generator().manual_seed(0)
    curvature, x = (torch.rand(7, 3, generator=rng, dtype=torch.float64).to(device) for _ in range(2))
    live, v, shift = x.float(), torch.zeros_like(x), 0.0
    base, velocity = live.clone(), torch.zeros_like(live)
    for step in range(60):
        gamma, following = 1 - 1 / (step + 2), 0.5 * math.exp(-step / 30)
        ahead = x + shift * v
        new = ahead - 0.3 * curvature * ahead
        v = gamma * v + (1 - gamma) * (new - x)
        x, shift = new, following
        hyper = torch.tensor([0.3, 0.0, 0.0, 1.0, 0.0, 1 - gamma, following], device=device)
        gradient = curvature.float() * live
        muon_apply([live], [gradient], hyper, lr_scales=[1.0], bases=[base], velocities=[velocity])
        for got, want in ((base, x), (velocity, v), (live, x + shift * v)):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("s", [0.3, 0.6])
def test_a_steady_displacement_grows_to_one_over_one_minus_s(s) -> None:
    live, u = torch.zeros(4, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    base, velocity, hyper = live.clone(), live.clone(), torch.zeros(7, dtype=torch.float64)
    hyper[GRAD_SCALE], hyper[VELOCITY_WEIGHT], hyper[SHIFT] = 1.0, 0.1, s
    for _ in range(800):
        live += u
        move_ahead_ref(live, base, velocity, hyper)
    torch.testing.assert_close(velocity, u / (1 - s), rtol=1e-9, atol=0)
