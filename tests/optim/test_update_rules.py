"""The parts of Muon's update that torch computes, compared with float64, and inside the whole optimizer."""

from dataclasses import replace

import pytest
import torch

from pgolf.config import MuonConfig
from pgolf.dist import Dist
from pgolf.optim.ema import Ema
from pgolf.optim.step import Optimizer
from pgolf.optim.update_rules import (
    cautious_decay_,
    lr_scale,
    normalize_update_,
    row_normalize_,
    square_size,
)
from tests.conftest import DEVICES
from tests.optim.test_step import CONFIG, Toy, WithoutHost, assert_same_bits, backward, snapshot

NORMUON = MuonConfig(lr=0.05, normalize=0.9)
CAUTIOUS = MuonConfig(lr=0.05, cautious=True)
CONFIGS = {"normalize": NORMUON, "cautious": CAUTIOUS, "both": replace(NORMUON, cautious=True)}
CONFIGS |= {"slow": MuonConfig(lr=0.05, slow_age=0.02), "all": replace(CONFIGS["both"], slow_age=0.02)}


def normalized_ref(update, square, decay):
    """Return update and mean squares after one step, in float64, one matrix at a time."""
    updates, squares = [], []
    for o, v in zip(update.double(), square.double(), strict=True):
        rows, cols = o.shape
        if rows < cols:
            o = o.T
        v = decay * v + (1 - decay) * torch.stack([row.square().mean() for row in o])
        new = o / v.clamp(min=1e-10).sqrt()[:, None]
        norm = new.norm()
        new = new * (o.norm() / norm) if norm else new
        updates.append(new if rows >= cols else new.T)
        squares.append(v)
    return torch.stack(updates), torch.stack(squares)


def orthogonal(shape, seed, device="cpu"):
    rng = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=rng), full_matrices=False)
    return (u @ v).to(device)


# Tall, wide, square, a row, a column, one element; no size is a multiple of another.
@pytest.mark.parametrize("shape", [(3, 13, 5), (2, 5, 12), (2, 7, 7), (1, 1, 9), (1, 9, 1), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_normalized_updates_follow_the_formula_in_float64(device, dtype, shape):
    square = torch.zeros(shape[0], square_size(*shape[1:]), device=device)
    expected = square.cpu().double()
    for step in range(4):
        update = orthogonal(shape, step, device).to(dtype)
        wanted, expected = normalized_ref(update.cpu(), expected, 0.9)
        address, version = update.data_ptr(), update._version
        got = normalize_update_(update, square, 0.9)
        assert got is update and update.data_ptr() == address and update._version > version
        close = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 4e-3, "atol": 1e-6}
        torch.testing.assert_close(update.cpu().double(), wanted, **close)
        torch.testing.assert_close(square.cpu().double(), expected, rtol=1e-5, atol=1e-10)


def test_steady_updates_get_rows_of_one_size_and_keep_their_norm():
    update, square = orthogonal((2, 13, 5), 0), torch.zeros(2, 13)
    spread = update.norm(dim=-1).std() / update.norm(dim=-1).mean()
    assert spread > 0.1
    got = normalize_update_(update.clone(), square, 0.95)
    torch.testing.assert_close(got.norm(dim=-1), torch.full((2, 13), (5 / 13) ** 0.5))
    torch.testing.assert_close(got.norm(dim=(1, 2)), update.norm(dim=(1, 2)))


def test_of_square_and_of_zero_updates_nothing_changes():
    update, square = orthogonal((2, 7, 7), 0), torch.zeros(2, 7)
    torch.testing.assert_close(normalize_update_(update.clone(), square, 0.9), update)
    before = square.clone()
    zero = normalize_update_(torch.zeros_like(update), square, 0.9)
    assert not zero.any(), "a zero matrix, such as padding, stays zero"
    torch.testing.assert_close(square, 0.9 * before)
    first = normalize_update_(torch.zeros(1, 3, 2), torch.zeros(1, 3), 0.9)
    assert not first.any()


def test_a_skipped_step_leaves_the_mean_squares():
    square = torch.rand(2, 13)
    before = square.clone()
    normalize_update_(torch.zeros(2, 13, 5), square, 0.9, torch.zeros(()))
    assert torch.equal(square, before)
    taken = square.clone()
    update = orthogonal((2, 13, 5), 0)
    normalize_update_(update.clone(), square, 0.9)
    normalize_update_(update, taken, 0.9, torch.ones(()))
    assert torch.equal(square, taken)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_only_weights_that_the_update_moves_towards_0_decay(device, dtype):
    w = torch.tensor([2.0, 2.0, -2.0, -2.0, 0.0, 2.0, -0.5, 0.5], dtype=dtype, device=device)
    o = torch.tensor([0.1, -0.1, 0.1, -0.1, 0.1, 0.0, -1e-3, 1e-3], device=device)
    expected = [1.5, 2.0, -2.0, -1.5, 0.0, 2.0, -0.375, 0.375]
    for decay in (0.25, torch.tensor(0.25, device=device)):
        got = cautious_decay_(w.clone(), o.to(torch.bfloat16), decay)
        assert got.tolist() == expected and got.dtype == dtype
    # A decay that is small against the precision of the weight is rounded once, in the weight.
    small, exact = cautious_decay_(w.clone(), o, 0.005), w.double()
    wanted = torch.where(o.double() * exact > 0, 0.995 * exact, exact).to(dtype)
    torch.testing.assert_close(small, wanted, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_cautious_steps_move_weights_and_averages_as_the_plain_ones_do_without_decay(device):
    """And with decay, the difference is the decay of the chosen weights, which the averages take in."""
    rates = {"still": 0.0, "decayed": 2.0}
    pairs = {n: build(replace(CAUTIOUS, weight_decay=wd), device) for n, wd in rates.items()}
    plain = build(MuonConfig(lr=0.05, weight_decay=0.0), device)
    start = snapshot(plain[0])
    for model, optimizer in (*pairs.values(), plain):
        backward(model, 1)
        optimizer.step(0.0, ema_decay=0.5, delta=0.1)
    assert_same_bits(pairs["still"][0], plain[0])
    model, optimizer = pairs["decayed"]
    for name in Toy.bank_names:
        w, moved = start[name], plain[0].get_parameter(name)
        towards = ((w - moved) * w > 0).to(w.dtype)
        assert 0.2 < towards.mean() < 0.8
        expected = moved - 0.05 * 2.0 * w * towards
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            optimizer._ema.tensors[name], (w + model.get_parameter(name)) / 2, rtol=1e-5, atol=1e-6
        )
    assert all(torch.equal(model.get_parameter(n), plain[0].get_parameter(n)) for n in ("emb", "gain"))


def test_row_normalize_survives_extreme_rows():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-9, 0.0], [1e18, 0.0]])
    got = row_normalize_(x.clone())
    torch.testing.assert_close(got, torch.tensor([[0.6, 0.8], [0.0, 0.0], [1e-2, 0.0], [1.0, 0.0]]))
    # One rounding: the quotient of float32 norms, not a norm rounded first.
    half = x.bfloat16()
    expected = row_normalize_(half.float()).bfloat16()
    assert torch.equal(row_normalize_(half), expected)


def test_lr_scale_follows_the_shape():
    assert (lr_scale(2048, 512), lr_scale(512, 2048), lr_scale(256, 512)) == (2, 1, 1)


def build(config, device="cpu", capture=True):
    model = Toy(device)
    ema = Ema(dict(model.named_parameters()))
    return model, Optimizer(model, replace(CONFIG, muon=config), Dist.start(device), ema=ema, capture=capture)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_that_is_not_finite_changes_no_state(name, device):
    model, optimizer = build(CONFIGS[name], device)
    for step in range(2):
        backward(model, step)
        optimizer.step(0.1, ema_decay=0.5, delta=0.1)
    weights, before = snapshot(model), optimizer.state_dict()
    backward(model, 2)
    model.up.grad[0, 0, 0] = float("nan")
    optimizer.step(0.2, ema_decay=0.5, delta=0.1)
    assert optimizer.skipped == 1
    after = optimizer.state_dict()
    assert [k for k in before if k != "counts" and not torch.equal(before[k], after[k])] == []
    assert [n for n, p in model.named_parameters() if not torch.equal(p, weights[n])] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_state_goes_on_bit_for_bit_and_is_refused_without_the_setting(name):
    (model, ours), (twin, theirs) = build(CONFIGS[name]), build(CONFIGS[name])
    for step in range(2):
        backward(model, step)
        ours.step(0.2, delta=0.1)
    state = ours.state_dict()
    twin.load_state_dict(model.state_dict())
    theirs.load_state_dict(state)
    for m, optimizer in ((model, ours), (twin, theirs)):
        backward(m, 5)
        optimizer.step(0.3, delta=0.1)
    assert_same_bits(model, twin)
    _, shards = ours.live_state()
    assert {k: t.shape for k, t in ours.state_dict().items() if k in shards} == {
        k: s.tensor.shape for k, s in shards.items()
    }
    if CONFIGS[name].normalize:
        assert {k: tuple(t.shape) for k, t in state.items() if "muon.square" in k} == {
            "muon.square.up": (5, 8),
            "muon.square.down": (3, 8),
        }
        with pytest.raises(ValueError, match=r"unknown \[.*'muon\.square\.down', 'muon\.square\.up'\]"):
            build(MuonConfig())[1].load_state_dict(state)
    ours.reset()
    assert not any(t.any() for t in ours.state_dict().values())


def test_the_momentum_follows_the_length_of_a_step():
    config = MuonConfig(lr=0.05, momentum_age=0.03, momentum_warmup=0.0)
    model, optimizer = build(config)
    twin, other = build(MuonConfig(lr=0.05, momentum=0.75, momentum_warmup=0.0))
    for step in range(3):
        for m, o in ((model, optimizer), (twin, other)):
            backward(m, step)
            o.step(0.01 * step, delta=0.01 if step else None)
        # The first step has no momentum yet; its direction is the same at any decay, up to rounding.
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, twin.get_parameter(name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_leaves_the_host_alone_so_that_a_graph_can_hold_it(name):
    model, optimizer = build(CONFIGS[name])
    backward(model, 0)
    optimizer._set(0.2, 0.5, 0.1)
    with WithoutHost():
        optimizer._launch()
    other, launched = build(CONFIGS[name])
    backward(other, 0)
    launched.step(0.2, ema_decay=0.5, delta=0.1)
    assert_same_bits(model, other)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("name", CONFIGS)
def test_replayed_steps_equal_launched_ones(name, device):
    pairs = [build(CONFIGS[name], device, capture) for capture in (True, False)]
    for step in range(5):
        for model, optimizer in pairs:
            backward(model, step)
            if step == 2:
                model.up.grad[0, 0, 0] = float("nan")
            optimizer.step(0.2 * step, ema_decay=None if step == 0 else 0.9, delta=0.2)
        assert_same_bits(pairs[0][0], pairs[1][0])
    assert pairs[0][1]._replay is not None and pairs[0][1].skipped == 1
