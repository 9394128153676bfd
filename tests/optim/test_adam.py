"""AdamW compared with torch.optim.AdamW."""

import pytest
import torch

from pgolf.config import AdamConfig
from pgolf.ops.muon_step import GRAD_SCALE, HYPER
from pgolf.optim.adam import AdamW
from tests.conftest import DEVICES


def parameters(device):
    rng = torch.Generator().manual_seed(0)
    # A scalar, an odd vector, a matrix larger than one block of the fused kernel.
    return {name: torch.randn(shape, generator=rng).to(device) for name, shape in SHAPES.items()}


SHAPES = {"lambda": (), "gain": (7,), "emb": (129, 65)}


def gradients(step, device):
    rng = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=rng).to(device) for name, shape in SHAPES.items()}


def take_step(adam, t, lr, config, device="cpu"):
    """Step `t`, counted from 1."""
    hyper = torch.zeros(HYPER, device=device)
    hyper[GRAD_SCALE] = 1.0
    corrections = torch.tensor([1 / (1 - b**t) for b in (config.beta1, config.beta2)], device=device)
    adam.step(torch.tensor(lr, device=device), hyper, corrections)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.085])
def test_steps_equal_torch_adamw_under_a_changing_rate(device, weight_decay):
    config = AdamConfig(beta1=0.8, beta2=0.97, eps=1e-6)
    params, grads = parameters(device), gradients(0, device)
    twins = [p.clone().requires_grad_() for p in params.values()]
    ours = AdamW(params, grads, config, weight_decay=weight_decay)
    theirs = torch.optim.AdamW(twins, betas=(0.8, 0.97), eps=1e-6, weight_decay=weight_decay)
    for step, lr in enumerate((0.03, 0.03, 0.01, 0.2)):
        for name, value in gradients(step, device).items():
            grads[name].copy_(value)
        for twin, grad in zip(twins, grads.values(), strict=True):
            twin.grad = grad.clone()
        theirs.param_groups[0]["lr"] = lr
        take_step(ours, step + 1, lr, config, device)
        theirs.step()
    for name, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(
            params[name], twin.detach(), rtol=2e-6, atol=2e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_reset_gives_the_first_step_again():
    params, grads = parameters("cpu"), gradients(0, "cpu")
    config = AdamConfig()
    adam = AdamW(params, grads, config, weight_decay=0.1)
    take_step(adam, 1, 0.1, config)
    assert not any(g.any() for g in grads.values())
    first = {name: p.clone() for name, p in params.items()}
    take_step(adam, 2, 0.1, config)
    adam.reset()
    assert all(not t.any() for t in adam.state().values())
    for name, value in parameters("cpu").items():
        params[name].copy_(value)
        grads[name].copy_(gradients(0, "cpu")[name])
    take_step(adam, 1, 0.1, config)
    assert all(torch.equal(params[name], first[name]) for name in params)


def test_no_parameters_is_no_work():
    adam = AdamW({}, {}, AdamConfig(), weight_decay=0.1)
    take_step(adam, 1, 0.1, AdamConfig())
    assert not adam.state()
