"""The combined optimizer on one process: gradients in place, clip, groups, schedules, state."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pgolf.ops
from pgolf.config import AdamConfig, MuonConfig, OptimConfig
from pgolf.dist import Dist
from pgolf.ops.adam_step import STEPS
from pgolf.optim import adam, bank_muon
from pgolf.optim import step as step_module
from pgolf.optim.bank_muon import BankMuon
from pgolf.optim.ema import Ema
from pgolf.optim.flat import flat_views
from pgolf.optim.step import Optimizer
from tests.conftest import DEVICES
from tests.ops.checks import no_waiting

CONFIG = OptimConfig(muon=MuonConfig(lr=0.05), adam=AdamConfig(embed_lr=0.04), grad_clip=0.3)


class Toy(nn.Module):
    """Banks of odd sizes, an embedding, and small parameters of several shapes."""

    bank_names = ("up", "down")
    embed_names = ("emb",)

    def __init__(self, device="cpu"):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        shapes = {"gain": (3,), "emb": (11, 6), "down": (3, 6, 8), "up": (5, 8, 6), "scale": ()}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=rng).to(device)))


def backward(model, seed, factor=1.0):
    """Accumulate a gradient that depends on `seed` only, by a real backward pass; return it."""
    rng = torch.Generator().manual_seed(seed)
    grads = {
        n: factor * torch.randn(p.shape, generator=rng).to(p.device) for n, p in model.named_parameters()
    }
    sum((p * grads[n]).sum() for n, p in model.named_parameters()).backward()
    return grads


def snapshot(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_same_bits(model, other):
    twins = dict(other.named_parameters())
    assert [n for n, p in model.named_parameters() if not torch.equal(p, twins[n])] == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("factor", [1e-3, 10.0])
def test_step_equals_its_parts_on_the_clipped_gradient(device, factor):
    model = Toy(device)
    optimizer = Optimizer(model, CONFIG, Dist.start(device))
    twin = Toy(device)
    banks = {n: getattr(twin, n).detach() for n in twin.bank_names}
    flat, grads = flat_views(
        {n: tuple(p.shape) for n, p in banks.items()}, dtype=torch.float32, device=twin.up.device
    )
    muon = BankMuon(banks, flat, grads, CONFIG.muon, Dist.start(device))
    common = {"betas": (0.9, 0.99), "eps": 1e-8}
    adam = torch.optim.AdamW(
        [
            {"params": [twin.emb], "weight_decay": 0.085, "base": 0.04},
            {"params": [twin.gain, twin.scale], "weight_decay": 0.02, "base": 0.02},
        ],
        **common,
    )
    # (frac, lr multiplier, momentum): start, mid rise of momentum, mid warm-down, floor.
    for step, (frac, lr, mu) in enumerate(
        [(0, 1, 0.92), (0.15, 1, 0.945), (0.575, 0.5, 0.97), (1, 0.1, 0.97)]
    ):
        parts = [backward(model, 10 * step + k, factor) for k in range(2)]
        total = {n: parts[0][n] + parts[1][n] for n in parts[0]}
        norm = torch.cat([g.flatten() for g in total.values()]).norm()
        for name, p in twin.named_parameters():
            p.grad = total[name] * (0.3 / (norm + 1e-6)).clamp(max=1)
            if name in grads:
                grads[name].copy_(p.grad)
        for group in adam.param_groups:
            group["lr"] = group["base"] * lr
        adam.step()
        muon.reduce()
        numbers = [0.05 * lr, mu, CONFIG.muon.weight_decay, 1.0, 0.0, 0.0, 0.0]
        muon.step(torch.tensor(numbers, device=device))
        optimizer.step(frac)
        # CUDA measures the gradient after rounding it to bfloat16.
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-5 if device == "cpu" else 1e-3, atol=0)
    for name, p in twin.named_parameters():
        # The clip's rounding is amplified by up to 990, the slope of the polar map at 0; CUDA adds bfloat16.
        close = {"rtol": 1e-4, "atol": 1e-4} if device == "cpu" else {"rtol": 1e-2, "atol": 1e-2}
        torch.testing.assert_close(getattr(model, name), p, **close, msg=lambda m, n=name: f"{n}: {m}")


def test_clip_off_leaves_the_gradient_and_still_reports_the_norm():
    model, twin = Toy(), Toy()
    big = replace(CONFIG, grad_clip=0.0)
    norms = []
    for m, config in ((model, big), (twin, replace(CONFIG, grad_clip=1e6))):
        optimizer = Optimizer(m, config, Dist.start("cpu"))
        backward(m, 1, 100.0)
        optimizer.step(0.0)
        norms.append(optimizer.grad_norm)
    assert norms[0] == norms[1]
    assert norms[0] > 100
    assert_same_bits(model, twin)


def test_gradients_are_zeroed_in_place_and_never_reallocated():
    model = Toy()
    optimizer = Optimizer(model, CONFIG, Dist.start("cpu"))
    addresses = {n: p.grad.data_ptr() for n, p in model.named_parameters()}
    for step in range(2):
        backward(model, step)
        optimizer.step(0.5)
        for name, p in model.named_parameters():
            assert p.grad.data_ptr() == addresses[name]
            assert not p.grad.any()


def test_replaced_gradient_is_an_error_that_names_it():
    model = Toy()
    optimizer = Optimizer(model, CONFIG, Dist.start("cpu"))
    model.gain.grad = torch.ones(3)
    with pytest.raises(
        RuntimeError, match="the gradient of gain was replaced; step\\(\\) zeroes gradients itself"
    ):
        optimizer.step(0.0)


def test_reset_makes_the_next_run_the_first_again():
    model = Toy()
    start = snapshot(model)
    optimizer = Optimizer(model, CONFIG, Dist.start("cpu"))

    def run():
        for step in range(3):
            backward(model, step)
            optimizer.step(0.1 * step)
        return snapshot(model)

    first = run()
    backward(model, 99)
    optimizer.reset()
    assert not any(t.any() for t in optimizer.state_dict().values())
    assert not any(p.grad.any() for p in model.parameters())
    assert optimizer.grad_norm == 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start[name])
    second = run()
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_state_round_trip_continues_bit_for_bit():
    model, twin = Toy(), Toy()
    ours, theirs = (Optimizer(m, CONFIG, Dist.start("cpu")) for m in (model, twin))
    for step in range(2):
        backward(model, step)
        ours.step(0.2)
    state = ours.state_dict()
    twin.load_state_dict(model.state_dict())
    backward(model, 5)
    ours.step(0.3)
    theirs.load_state_dict(state)
    backward(twin, 5)
    theirs.step(0.3)
    assert_same_bits(model, twin)


def test_load_rejects_foreign_state():
    optimizer = Optimizer(Toy(), CONFIG, Dist.start("cpu"))
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"missing \['muon.momentum.up'\], unknown \['x'\]"):
        optimizer.load_state_dict({k if k != "muon.momentum.up" else "x": v for k, v in state.items()})
    with pytest.raises(ValueError, match=r"muon.momentum.up must have shape \(5, 8, 6\), got \(4, 8, 6\)"):
        optimizer.load_state_dict(state | {"muon.momentum.up": torch.zeros(4, 8, 6)})


def test_model_on_another_device_is_refused():
    with pytest.raises(ValueError, match="parameter up must be on cpu, got meta; move the model first"):
        Optimizer(Toy("meta"), CONFIG, Dist.start("cpu"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["up", "emb", "scale"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_gradient_that_is_not_finite_skips_and_counts_the_step(device, name, bad):
    model, twin = Toy(device), Toy(device)
    emas = [Ema(dict(m.named_parameters())) for m in (model, twin)]
    optimizer, other = (
        Optimizer(m, CONFIG, Dist.start(device), ema=e) for m, e in zip((model, twin), emas, strict=True)
    )
    for step in range(4):
        backward(model, step)
        if step == 2:  # one element of one parameter; 1e30 is finite, its square is not
            getattr(model, name).grad.view(-1)[0] = bad
        else:
            backward(twin, step)
            other.step(0.1 * step, ema_decay=0.5)
        optimizer.step(0.1 * step, ema_decay=0.5)
        assert not any(p.grad.any() for p in model.parameters())
        assert optimizer.grad_norm.isfinite() == (step != 2)
    assert (optimizer.skipped, other.skipped) == (1, 0)
    assert_same_bits(model, twin)
    for a, b in zip(emas[0].tensors.values(), emas[1].tensors.values(), strict=True):
        assert torch.equal(a, b)
    state, want = optimizer.state_dict(), other.state_dict()
    assert state.pop("counts")[STEPS] == want.pop("counts")[STEPS]  # the rest is norm and skipped steps
    assert [key for key in want if not torch.equal(state[key], want[key])] == []


def test_first_step_may_be_the_skipped_one():
    model = Toy()
    start = snapshot(model)
    optimizer = Optimizer(model, CONFIG, Dist.start("cpu"))
    for p in model.parameters():
        p.grad.fill_(float("nan"))
    optimizer.step(0.0)
    assert all(torch.equal(p, start[n]) for n, p in model.named_parameters())
    state = optimizer.state_dict()
    assert state.pop("counts")[STEPS] == 0
    assert not any(t.any() for t in state.values())
    optimizer.reset()
    assert optimizer.skipped == 0


@pytest.mark.parametrize("device", DEVICES)
def test_step_moves_the_averages_as_update_does(device):
    model, twin = Toy(device), Toy(device)
    ema, other_ema = (Ema(dict(m.named_parameters())) for m in (model, twin))
    optimizer, other = (
        Optimizer(model, CONFIG, Dist.start(device), ema=ema),
        Optimizer(twin, CONFIG, Dist.start(device)),
    )
    for step, decay in enumerate((None, 0.9, 0.3, 0.0)):
        for m in (model, twin):
            backward(m, step)
        optimizer.step(0.1 * step, ema_decay=decay)
        other.step(0.1 * step)
        if decay is not None:
            other_ema.update(decay)
        for name, average in ema.tensors.items():
            torch.testing.assert_close(average, other_ema.tensors[name], rtol=1e-6, atol=1e-6)
    assert_same_bits(model, twin)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 1.5"):
        optimizer.step(0.5, ema_decay=1.5)
    with pytest.raises(ValueError, match="ema_decay needs averages"):
        other.step(0.5, ema_decay=0.5)


def test_average_of_other_parameters_is_refused():
    ema = Ema({"up": torch.zeros(5, 8, 6)})
    with pytest.raises(ValueError, match="parameter down has no average"):
        Optimizer(Toy(), CONFIG, Dist.start("cpu"), ema=ema)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_replayed_steps_equal_launched_ones(device):
    models = [Toy(device) for _ in range(2)]
    emas = [Ema(dict(m.named_parameters())) for m in models]
    optimizers = [
        Optimizer(m, CONFIG, Dist.start(device), ema=e, capture=capture)
        for m, e, capture in zip(models, emas, (True, False), strict=True)
    ]
    for step in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            backward(model, step)
            optimizer.step(0.2 * step, ema_decay=None if step == 0 else 0.9)
        assert torch.equal(optimizers[0].grad_norm, optimizers[1].grad_norm)
        assert_same_bits(*models)
    for a, b in zip(emas[0].tensors.values(), emas[1].tensors.values(), strict=True):
        assert torch.equal(a, b)


def test_training_lowers_a_loss():
    model = Toy()
    fast = OptimConfig(muon=MuonConfig(lr=0.1), adam=AdamConfig(embed_lr=0.1, scalar_lr=0.1))
    optimizer = Optimizer(model, fast, Dist.start("cpu"))

    def loss():
        return sum(p.square().mean() for p in model.parameters())

    first = loss().item()
    for step in range(60):
        loss().backward()
        optimizer.step(step / 60)
    assert loss().item() < 0.05 * first


@pytest.mark.parametrize("device", DEVICES[1:])
def test_step_and_average_do_not_wait_for_the_gpu(device):
    model = Toy(device)
    optimizer, ema = Optimizer(model, CONFIG, Dist.start(device)), Ema(dict(model.named_parameters()))
    backward(model, 0)
    optimizer.step(0.0)  # first call loads kernels
    ema.update(0.5)
    with no_waiting():
        optimizer.step(0.5)
        ema.update(0.5)


@pytest.fixture
def references(monkeypatch):
    """Replace the operators by their references, as in the counted train_gpt.py."""
    for module, names in (
        (adam, ["adam_step"]),
        (bank_muon, ["muon_step", "muon_apply"]),
        (step_module, ["clip_scale", "square_sums"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, getattr(pgolf.ops, f"{name}_ref"))


class WithoutHost(TorchDispatchMode):
    """Refuse what waits for the device or sends it numbers, which no CUDA graph can hold."""

    REFUSED = ("_local_scalar_dense", "lift_fresh", "equal", "nonzero", "is_nonzero", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.REFUSED, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ahead", [0.0, 0.5])
def test_references_leave_the_host_alone_and_take_the_same_steps(ahead, references, monkeypatch):
    models = [Toy(), Toy()]
    emas = [Ema(dict(m.named_parameters())) for m in models]
    config = replace(CONFIG, ema_nesterov=ahead, ema_nesterov_from=0.0)
    optimizers = [Optimizer(m, config, Dist.start("cpu"), ema=e) for m, e in zip(models, emas, strict=True)]
    for number in range(4):
        if number == 2:  # the device skips this step
            before = optimizers[0].state_dict()
            models[0].up.grad[0, 0, 0] = float("nan")
            weights = snapshot(models[0])
        else:
            for model in models:
                backward(model, number)
        # The skipped step has the shift of the one before, so that it puts the parameters where they are.
        optimizers[0]._set(0.2 * (1 if number == 2 else number), 0.5, 0.1)
        with WithoutHost():
            optimizers[0]._launch()
        if number == 2:
            assert optimizers[0].skipped == 1
            assert all(torch.equal(p, weights[n]) for n, p in models[0].named_parameters())
            after = optimizers[0].state_dict()
            assert [k for k in after if k != "counts" and not torch.equal(after[k], before[k])] == []
            continue
        with monkeypatch.context() as undo:
            for name in ("clip_scale", "square_sums"):
                undo.setattr(step_module, name, getattr(pgolf.ops, name))
            undo.setattr(adam, "adam_step", pgolf.ops.adam_step)
            undo.setattr(bank_muon, "muon_step", pgolf.ops.muon_step)
            optimizers[1].step(0.2 * number, ema_decay=0.5, delta=0.1)
    for name, p in models[0].named_parameters():
        torch.testing.assert_close(p, models[1].get_parameter(name), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(emas[0].tensors[name], emas[1].tensors[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), WithoutHost():
        bool(torch.ones(1).isfinite())
    with pytest.raises(AssertionError, match="lift_fresh"), WithoutHost():
        torch.tensor([1.0])


@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_captured_step_of_the_references_equals_launched_ones(references, device):
    models = [Toy(device) for _ in range(2)]
    optimizers = [
        Optimizer(m, CONFIG, Dist.start(device), capture=capture)
        for m, capture in zip(models, (True, False), strict=True)
    ]
    for number in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            backward(model, number)
            if number == 2:
                model.up.grad[0, 0, 0] = float("nan")
            optimizer.step(0.2 * number)
        assert_same_bits(*models)
    assert optimizers[0]._replay is not None and optimizers[0].skipped == 1
