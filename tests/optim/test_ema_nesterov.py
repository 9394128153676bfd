"""EMA-Nesterov against its formula in float64, and inside the whole optimizer."""

import math
from dataclasses import replace

import pytest
import torch

from pgolf.dist import Dist
from pgolf.optim.ema import Ema
from pgolf.optim.ema_nesterov import EmaNesterov
from pgolf.optim.schedule import lr_multiplier
from pgolf.optim.step import Optimizer
from tests.conftest import DEVICES
from tests.optim.test_step import CONFIG, Toy, assert_same_bits, backward, snapshot

STEPS = 40
AHEAD = replace(CONFIG, ema_nesterov=0.6, ema_nesterov_horizon=0.2, ema_nesterov_from=0.2)
ONE = torch.ones(())


def test_velocity_and_weights_follow_the_formula_in_float64():
    """The inner step is one of gradient descent on a quadratic, taken at the shifted point."""
    rng = torch.Generator().manual_seed(0)
    curvature = torch.rand(7, 3, generator=rng, dtype=torch.float64)
    x = torch.randn(7, 3, generator=rng, dtype=torch.float64)
    live = x.float()
    nesterov, v, shift = EmaNesterov({"a": live}), torch.zeros_like(x), 0.0
    for step in range(60):
        gamma, following = 1 - 1 / (step + 2), 0.5 * math.exp(-step / 30)
        ahead = x + shift * v
        new = ahead - 0.3 * curvature * ahead
        v = gamma * v + (1 - gamma) * (new - x)
        x, shift = new, following
        live -= 0.3 * curvature.float() * live
        nesterov.after_step(ONE, gamma=gamma, shift=following)
        torch.testing.assert_close(nesterov.base["a"].double(), x, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(nesterov.velocity["a"].double(), v, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(live.double(), x + shift * v, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("s", [0.3, 0.6])
def test_a_steady_displacement_grows_to_one_over_one_minus_s(s):
    live, u = torch.zeros(4, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    nesterov = EmaNesterov({"a": live})
    for _ in range(800):
        live += u
        nesterov.after_step(ONE.double(), gamma=0.9, shift=s)
    torch.testing.assert_close(nesterov.velocity["a"], u / (1 - s), rtol=1e-9, atol=0)


def run(model, config, steps, *, ema=None, optimizer=None, first=0):
    """Take steps of 1 / STEPS of a run, with gradients that depend on the step alone."""
    optimizer = optimizer or Optimizer(model, config, Dist.start(model.emb.device.type), ema=ema)
    for step in range(first, first + steps):
        backward(model, step)
        delta = None if step == 0 else 1 / STEPS
        decay = 0.9 if ema is not None and step else None
        optimizer.step(step / STEPS, ema_decay=decay, delta=delta)
    return optimizer


@pytest.mark.parametrize("device", DEVICES)
def test_the_optimizer_with_it_equals_one_that_keeps_both_points_apart(device):
    model, twin = Toy(device), Toy(device)
    ema, average = Ema(dict(model.named_parameters())), None
    optimizer = run(model, AHEAD, STEPS, ema=ema)
    inner = Optimizer(twin, CONFIG, Dist.start(device))
    x = {n: p.double() for n, p in snapshot(twin).items()}
    v, shift = {n: torch.zeros_like(t) for n, t in x.items()}, 0.0
    average = {n: t.clone() for n, t in x.items()}
    for step in range(STEPS):
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.copy_(x[name] + shift * v[name])
        backward(twin, step)
        inner.step(step / STEPS)
        gamma = math.exp(-(1 / STEPS) / 0.2) if step else 1.0
        for name, p in twin.named_parameters():
            new = p.detach().double()
            v[name] = gamma * v[name] + (1 - gamma) * (new - x[name])
            x[name] = new
            if step:
                average[name] += 0.1 * (new - average[name])
        inside = 0.2 <= step / STEPS < 0.76
        shift = 0.6 * lr_multiplier(step / STEPS, CONFIG) if inside else 0.0
    close = {"rtol": 1e-3, "atol": 1e-4} if device == "cpu" else {"rtol": 3e-2, "atol": 1e-2}
    for name, weight in optimizer.weights().items():
        torch.testing.assert_close(weight.double(), x[name], **close, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(ema.tensors[name].double(), average[name], **close)


def test_outside_of_its_window_it_changes_nothing():
    model, twin = Toy(), Toy()
    run(model, replace(AHEAD, ema_nesterov_from=0.5, ema_nesterov_until=0.5), STEPS)
    run(twin, CONFIG, STEPS)
    assert_same_bits(model, twin)


def test_parameters_are_ahead_inside_the_window_and_settle_on_the_weights():
    model = Toy()
    optimizer = run(model, AHEAD, 20)
    ahead, weights = snapshot(model), {n: t.clone() for n, t in optimizer.weights().items()}
    assert all(not torch.equal(ahead[n], weights[n]) for n in ahead)
    with optimizer.at_weights():
        assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(torch.equal(p, ahead[n]) for n, p in model.named_parameters())
    optimizer.settle()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_a_skipped_step_changes_neither_weights_nor_velocity():
    model = Toy()
    optimizer = run(model, AHEAD, 20)
    before = {n: t.clone() for n, t in optimizer.state_dict().items() if "nesterov" in n}
    backward(model, 99, math.inf)
    optimizer.step(0.7, delta=1 / STEPS)
    assert optimizer.skipped == 1
    after = optimizer.state_dict()
    assert [n for n, t in before.items() if not torch.equal(t, after[n])] == []
    for name, p in model.named_parameters():
        shift = 0.6 * lr_multiplier(0.7, CONFIG)
        expected = before[f"nesterov.base.{name}"] + shift * before[f"nesterov.velocity.{name}"]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)


def test_state_and_parameters_go_on_bit_for_bit():
    model, twin = Toy(), Toy()
    whole = run(model, AHEAD, 30)
    first = run(twin, AHEAD, 17)
    third = Toy()
    with torch.no_grad():
        for name, p in third.named_parameters():
            p.copy_(dict(twin.named_parameters())[name])
    second = Optimizer(third, AHEAD, Dist.start("cpu"))
    second.load_state_dict(first.state_dict())
    run(third, AHEAD, 13, optimizer=second, first=17)
    assert_same_bits(model, third)
    assert all(torch.equal(t, second.state_dict()[n]) for n, t in whole.state_dict().items())


def test_reset_begins_again_at_the_present_weights():
    model = Toy()
    optimizer = run(model, AHEAD, 20)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    optimizer.reset()
    state = optimizer.state_dict()
    for name, _ in model.named_parameters():
        assert (state[f"nesterov.base.{name}"] == 0.5).all()
        assert not state[f"nesterov.velocity.{name}"].any()
