"""EMA-Nesterov inside the whole optimizer; tests/ops/test_ahead.py compares its formula."""

import math
from dataclasses import replace

import pytest
import torch

from pgolf.dist import Dist
from pgolf.optim.ema import Ema
from pgolf.optim.schedule import lr_multiplier
from pgolf.optim.step import Optimizer
from tests.conftest import DEVICES
from tests.optim.test_step import CONFIG, Toy, assert_same_bits, backward, snapshot

STEPS = 40
SKIPPED = (3, 15, 16, 31)
"""Steps whose gradients are not finite: before, inside (two in a row) and after the window."""
AHEAD = replace(CONFIG, ema_nesterov=0.6, ema_nesterov_horizon=0.2, ema_nesterov_from=0.2)
VARIANTS = {
    "record": {},
    "cautious": {"cautious": True},
    "normalize": {"normalize": 0.9},
    "slow": {"slow_age": 0.1, "normalize": 0.9, "cautious": True},
}


def run(model, config, steps, *, ema=None, optimizer=None, first=0):
    """Take steps of 1 / STEPS of a run, with gradients that depend on the step alone."""
    optimizer = optimizer or Optimizer(model, config, Dist.start(model.emb.device.type), ema=ema)
    for step in range(first, first + steps):
        backward(model, step)
        delta = None if step == 0 else 1 / STEPS
        decay = 0.9 if ema is not None and step else None
        optimizer.step(step / STEPS, ema_decay=decay, delta=delta)
    return optimizer


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("device", DEVICES)
def test_the_optimizer_with_it_equals_one_that_keeps_both_points_apart(device, variant, averaged):
    muon = replace(CONFIG.muon, **VARIANTS[variant])
    model, twin = Toy(device), Toy(device)
    ema = Ema(dict(model.named_parameters())) if averaged else None
    optimizer = Optimizer(model, replace(AHEAD, muon=muon), Dist.start(device), ema=ema)
    inner = Optimizer(twin, replace(CONFIG, muon=muon), Dist.start(device))
    x = {n: p.double() for n, p in snapshot(twin).items()}
    v, shift = {n: torch.zeros_like(t) for n, t in x.items()}, 0.0
    average = {n: t.clone() for n, t in x.items()}
    for step in range(STEPS):
        factor, delta = math.inf if step in SKIPPED else 1.0, 1 / STEPS if step else None
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.copy_(x[name] + shift * v[name])
        for each in (model, twin):
            backward(each, step, factor)
        optimizer.step(step / STEPS, ema_decay=0.9 if averaged and step else None, delta=delta)
        inner.step(step / STEPS, delta=delta)
        gamma = math.exp(-(1 / STEPS) / 0.2) if step else 1.0
        inside = 0.2 <= step / STEPS < 0.76
        shift = 0.6 * lr_multiplier(step / STEPS, CONFIG) if inside else 0.0
        if step in SKIPPED:
            continue
        for name, p in twin.named_parameters():
            new = p.detach().double()
            v[name] = gamma * v[name] + (1 - gamma) * (new - x[name])
            x[name] = new
            if step:
                average[name] += 0.1 * (new - average[name])
    assert optimizer.skipped == len(SKIPPED)
    close = {"rtol": 1e-3, "atol": 1e-4} if device == "cpu" else {"rtol": 3e-2, "atol": 1e-2}
    for name, weight in optimizer.weights().items():
        torch.testing.assert_close(weight.double(), x[name], **close, msg=lambda m, n=name: f"{n}: {m}")
        if averaged:
            torch.testing.assert_close(ema.tensors[name].double(), average[name], **close)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_captured_step_equals_launched_ones(device):
    models = [Toy(device) for _ in range(2)]
    optimizers = [
        Optimizer(m, AHEAD, Dist.start(device), capture=capture)
        for m, capture in zip(models, (True, False), strict=True)
    ]
    for step in range(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            backward(model, step, math.inf if step in SKIPPED else 1.0)
            optimizer.step(step / STEPS, delta=1 / STEPS)
    assert optimizers[0]._replay is not None and optimizers[0].skipped == len(SKIPPED)
    assert_same_bits(*models)
    states = [optimizer.state_dict() for optimizer in optimizers]
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())


def test_the_state_has_base_and_velocity_of_every_parameter():
    """Under these names checkpoints hold them, also those that were written before the fused form."""
    state = run(Toy(), AHEAD, 1).state_dict()
    names = {f"nesterov.{kind}.{n}" for kind in ("base", "velocity") for n, _ in Toy().named_parameters()}
    assert {name for name in state if name.startswith("nesterov.")} == names


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
