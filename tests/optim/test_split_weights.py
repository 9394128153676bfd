"""Float32 weights as bfloat16 parameters and 16-bit rests: exact numbers, exact steps of the optimizer."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.func import functional_call

import pgolf.optim
from pgolf.optim.split_weights import float32_weights, join_float32, split_float32
from tests.conftest import DEVICES, requires_gpu

SPLIT = {"master_weights": "split"}


def floats(bits):
    """Return the float32 numbers with these bits, given as numbers from 0 to 2^32 - 1."""
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def neighbourhoods(device="cpu"):
    """Return the bits of all bfloat16 numbers with 15 rests each, and of 64 of them with all 65,536."""
    high = torch.arange(1 << 16, device=device)
    edges = torch.tensor([0, 1, 2, 3, 0x3FFF, 0x4000, 0x7FFD, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xC000])
    low = torch.cat([edges, 0xFFFF - edges[:2]]).to(device)
    few = torch.cat([torch.arange(0, 1 << 16, 1 << 11), torch.arange(0x7F, 1 << 16, 1 << 11)]).to(device)
    every = ((high[:, None] << 16) + low).flatten()
    return torch.cat([every, ((few[:, None] << 16) + torch.arange(1 << 16, device=device)).flatten()])


@pytest.mark.parametrize("device", DEVICES)
def test_every_number_is_exact_and_every_parameter_the_nearest(device):
    bits = neighbourhoods(device)
    w = floats(bits)
    p, rest = split_float32(w)
    assert (p.dtype, rest.dtype) == (torch.bfloat16, torch.int16)
    again, number = join_float32(p, rest), ~w.isnan()
    assert torch.equal(again[number].view(torch.int32), w[number].view(torch.int32))
    assert p[~number].isnan().all() and again[~number].isnan().all()
    tie = (bits & 0xFFFF) == 0x8000
    plain = w.bfloat16()
    assert torch.equal(p[number & ~tie].view(torch.int16), plain[number & ~tie].view(torch.int16))
    # A tie goes away from zero: to the next larger magnitude, which has the next larger bits.
    larger = ((bits >> 16) + 1)[number & tie]
    assert torch.equal(p[number & tie].view(torch.int16).long() & 0xFFFF, larger)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFF8000, 0x7FFFFFFF])
@pytest.mark.parametrize("sign", [0, 1 << 31])
def test_no_nan_becomes_a_number(bits, sign):
    p, rest = split_float32(floats(torch.tensor([bits + sign])))
    assert p.isnan().all() and join_float32(p, rest).isnan().all()


def test_a_parameter_that_a_program_changes_moves_its_weight_with_it():
    w = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    _, rest = split_float32(w)
    new = torch.randn(1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert ((join_float32(new, rest) - new.float()).abs() <= new.float().abs() * 2**-8).all()


class Net(nn.Module):
    """A convolution, attention-like and plain matrices, a stack, and vectors."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        rng = torch.Generator().manual_seed(3)
        shapes = {"conv": (6, 3, 2, 2), "heads": (12, 24), "stack": (2, 12, 12), "out": (3, 12), "bias": (3,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(0.3 * torch.randn(shape, generator=rng).to(dtype)))

    def forward(self, x):
        x = torch.tanh(torch.nn.functional.conv2d(x, self.conv)).flatten(1)
        for weight in (self.heads, *self.stack):
            x = torch.tanh(x @ weight.T)
        return x @ self.out.T + self.bias


def optimizer_of(params, **settings):
    """Return an optimizer of the parameters of `Net`, in the order of the shapes."""
    conv, heads, stack, out, bias = params
    groups = [
        {"params": [conv, stack]},
        {"params": [heads], "num_heads": 3, "heads_along": "columns"},
        {"params": [out, bias], "use_muon": False, "lr": 1e-3},
    ]
    return pgolf.optim.Muon(groups, lr=0.02, weight_decay=0.1, **settings)


def batch(step):
    rng = torch.Generator().manual_seed(100 + step)
    x = torch.randn(32, 3, 3, 3, generator=rng).bfloat16()
    return x, torch.sin(2 * x.sum((1, 2)))


def give_gradients(net, weights, step):
    """Give float32 weights the gradients of the network with these weights rounded to bfloat16."""
    rounded = [split_float32(w.detach())[0].requires_grad_() for w in weights]
    x, y = batch(step)
    names = [name for name, _ in net.named_parameters()]
    loss = (functional_call(net, dict(zip(names, rounded, strict=True)), (x,)) - y).square().mean()
    for w, grad in zip(weights, torch.autograd.grad(loss, rounded), strict=True):
        w.grad = grad.float()


def train(net, optimizer, first, last):
    for step in range(first, last):
        optimizer.zero_grad()
        x, y = batch(step)
        (net(x) - y).square().mean().backward()
        optimizer.step()


def exact(net, optimizer):
    """Return the float32 weights of a network."""
    return [float32_weights(p, optimizer.state[p]) for p in net.parameters()]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum_bits": 8},
        {"nesterov": False, "row_normalize": True, "adjust_lr_fn": "match_rms_adamw"},
        {"normalize": 0.9, "cautious": True},
        {"foreach": False},
        {"fused": True},
    ],
    ids=str,
)
@pytest.mark.usefixtures("one_thread")
def test_the_trajectory_is_that_of_float32_weights_bit_for_bit(settings):
    net = Net()
    start = [p.detach().clone() for p in net.parameters()]
    optimizer = optimizer_of(list(net.parameters()), **SPLIT, **settings)
    weights = [nn.Parameter(p.float()) for p in start]
    wanted = optimizer_of(weights, **settings)
    for step in range(12):
        give_gradients(net, weights, step)
        wanted.step()
        train(net, optimizer, step, step + 1)
        for got, w in zip(exact(net, optimizer), weights, strict=True):
            assert torch.equal(got.view(torch.int32), w.detach().view(torch.int32)), step
    for p, w in zip(net.parameters(), weights, strict=True):
        for name, value in wanted.state[w].items():
            assert (
                torch.equal(optimizer.state[p][name], value) and optimizer.state[p][name].dtype == value.dtype
            )
    assert any((w.bfloat16().float() != w).any() for w in weights)


def test_small_updates_add_up_that_bfloat16_alone_would_lose():
    ends = {}
    for option in (None, "split"):
        p = nn.Parameter(torch.full((8, 8), 1.0, dtype=torch.bfloat16))
        optimizer = pgolf.optim.Muon([p], lr=1e-4, weight_decay=1.0, master_weights=option)
        for _ in range(100):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        ends[option] = p.detach().float()
    assert (ends[None] == 1).all()
    torch.testing.assert_close(ends["split"], torch.full((8, 8), 0.99), rtol=2**-8, atol=0)


def test_a_rest_takes_two_bytes_and_moments_are_float32():
    net = Net()
    optimizer = optimizer_of(list(net.parameters()), **SPLIT, momentum_bits=8)
    train(net, optimizer, 0, 1)
    found = {
        name: {key: t.element_size() * t.numel() for key, t in optimizer.state[p].items()}
        for name, p in net.named_parameters()
    }
    assert found["heads"] == {"momentum_codes": 288, "momentum_scales": 48, "weight_rest": 576}
    assert found["bias"] == {"step": 4, "exp_avg": 12, "exp_avg_sq": 12, "weight_rest": 6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_parameters_are_not_split(dtype):
    found = []
    for option in ("split", None):
        net = Net(dtype)
        optimizer = optimizer_of(list(net.parameters()), master_weights=option)
        for step in range(3):
            x, y = (t.to(dtype) for t in batch(step))
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            optimizer.step()
        assert not any("weight_rest" in state for state in optimizer.state.values())
        found.append(list(net.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


def test_both_dtypes_in_one_group_step():
    params = [nn.Parameter(torch.ones(4, 4, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    params += [nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    groups = [{"params": params[:2]}, {"params": params[2:], "use_muon": False}]
    optimizer = pgolf.optim.Muon(groups, lr=0.02, **SPLIT)
    for p in params:
        p.grad = torch.arange(p.numel(), dtype=p.dtype).view_as(p)
    optimizer.step()
    assert ["weight_rest" in optimizer.state[p] for p in params] == [True, False, True, False]
    for narrow, wide in ((params[0], params[1]), (params[2], params[3])):
        assert torch.equal(float32_weights(narrow, optimizer.state[narrow]), wide)


@requires_gpu
def test_a_group_may_have_parameters_on_several_devices():
    found = []
    for devices in (("cpu", "cuda"), ("cpu", "cpu")):
        params = [
            nn.Parameter(torch.ones(s, dtype=torch.bfloat16, device=d))
            for s in ((4, 4), (4,))
            for d in devices
        ]
        groups = [{"params": params[:2]}, {"params": params[2:], "use_muon": False}]
        optimizer = pgolf.optim.Muon(groups, lr=0.02, **SPLIT, momentum_bits=8)
        for p in params:
            p.grad = torch.eye(4).to(p) if p.dim() == 2 else torch.ones_like(p)
        optimizer.step()
        found.append([float32_weights(p, optimizer.state[p]).cpu() for p in params])
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)  # the iteration is in bfloat16 on CUDA


def test_moments_of_complex_parameters_load_exactly():
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    p.grad = torch.full_like(p, 1 + 2j)
    first, second = (
        pgolf.optim.Muon([{"params": [p], "use_muon": False}], momentum_bits=8, **SPLIT) for _ in range(2)
    )
    first.step()
    second.load_state_dict(first.state_dict())
    for name, value in first.state[p].items():
        assert torch.equal(second.state[p][name], value)


@pytest.mark.parametrize("settings", [{}, {"momentum_bits": 8}], ids=str)
def test_a_saved_state_continues_bit_for_bit(settings):
    net, again = Net(), Net()
    optimizer = optimizer_of(list(net.parameters()), **SPLIT, **settings)
    train(net, optimizer, 0, 3)
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again.load_state_dict(weights)
    second = optimizer_of(list(again.parameters()), **SPLIT, **settings)
    second.load_state_dict(state)
    train(net, optimizer, 3, 6)
    train(again, second, 3, 6)
    assert all(torch.equal(p, q) for p, q in zip(exact(net, optimizer), exact(again, second), strict=True))


def test_states_with_and_without_rests_load_into_each_other():
    net = Net()
    split, plain = (optimizer_of(list(net.parameters()), master_weights=option) for option in ("split", None))
    train(net, split, 0, 2)
    plain.load_state_dict(copy.deepcopy(split.state_dict()))
    for p in net.parameters():
        assert "weight_rest" not in plain.state[p]
        for name in plain.state[p].keys() - {"step"}:
            assert torch.equal(plain.state[p][name], split.state[p][name].bfloat16())
    train(net, plain, 2, 3)
    again = optimizer_of(list(net.parameters()), **SPLIT)
    again.load_state_dict(plain.state_dict())
    for p in net.parameters():
        for name in again.state[p].keys() - {"step"}:
            assert again.state[p][name].dtype == torch.float32
    train(net, again, 3, 4)
    assert all("weight_rest" in again.state[p] for p in net.parameters())


def test_the_option_can_be_changed_between_steps():
    net = Net()
    optimizer = optimizer_of(list(net.parameters()))
    for step, option in enumerate((None, "split", "split", None)):
        for group in optimizer.param_groups:
            group["master_weights"] = option
        train(net, optimizer, step, step + 1)
        assert all(("weight_rest" in optimizer.state[p]) == (option == "split") for p in net.parameters())


@pytest.mark.parametrize("use_muon", [True, False])
def test_what_cannot_be_split_is_refused(use_muon):
    p = nn.Parameter(torch.ones(4, 4, dtype=torch.float16))
    with pytest.raises(
        ValueError, match=r"parameter 0 of shape \(4, 4\) is torch\.float16, and master_weights"
    ):
        pgolf.optim.Muon([{"params": [p], "use_muon": use_muon}], **SPLIT)
    with pytest.raises(ValueError, match="master_weights must be 'split' or None, got True"):
        pgolf.optim.Muon([{"params": [p], "use_muon": use_muon}], master_weights=True)
