"""The 8-bit momentum of `pgolf.optim.Muon`: the code, the steps, and states that are converted."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import pgolf.optim
from pgolf.ops import newton_schulz
from pgolf.optim import momentum
from pgolf.optim.momentum import decode, encode, scales_shape
from pgolf.optim.muon_settings import matrices
from pgolf.optim.polar import JORDAN
from pgolf.optim.ranks import fingerprint
from pgolf.optim.split_weights import float32_weights
from tests.conftest import DEVICES, requires_gpu
from tests.optim.test_step import WithoutHost

LR, DECAY, MU = 0.05, 0.1, 0.9
SHAPES = [(5, 300), (3, 7, 4), (6, 2, 3, 3), (12, 8), (12, 8), (1, 3)]


def tensors(shapes, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) for shape in shapes]


def parameters(shapes=SHAPES, dtype=torch.float32):
    return [nn.Parameter(t.to(dtype)) for t in tensors(shapes)]


def take_steps(params, optimizer, first, last):
    for step in range(first, last):
        for p, grad in zip(params, tensors([p.shape for p in params], 10 + step), strict=True):
            p.grad = grad.to(p)
        optimizer.step()


def muon(params, **settings):
    return pgolf.optim.Muon(params, lr=LR, weight_decay=DECAY, momentum=MU, **settings)


def by_hand(row):
    """Return codes and scales of a row, element by element, in Python's numbers."""
    row = row.tolist()
    count = (len(row) + 255) // 256
    width = (len(row) + count - 1) // count
    codes, scales = [], []
    for block in (row[i : i + width] for i in range(0, len(row), width)):
        scales.append(max(map(abs, block)))
        for x in block:
            root = (abs(x) / scales[-1]) ** 0.5 if scales[-1] else 0.0
            codes.append(round(127 * root) * (-1 if x < 0 else 1))
    return codes, scales


@pytest.mark.parametrize("n", [1, 2, 7, 255, 256, 257, 300, 511, 513, 1025])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e-40, 1e38])
def test_codes_and_scales_are_those_of_the_formula(n, size):
    x = torch.cat(tensors([(3, n)])) * (size / 5)
    x[1, ::2] = 0
    codes, scales = encode(x)
    assert (codes.shape, codes.dtype, scales.dtype) == (x.shape, torch.int8, torch.float32)
    assert scales.shape == scales_shape(x.shape)
    for i, row in enumerate(x):
        wanted, largest = by_hand(row)
        assert scales[i].tolist() == largest
        # Python computes in float64, so an element may round to the other side of a half.
        assert (codes[i].int() - torch.tensor(wanted)).abs().max() <= (1 if size < 1e-38 or n > 200 else 0)
    values = decode(codes, scales)
    assert (values[x == 0] == 0).all()
    spread = scales.repeat_interleave(-(-n // scales.shape[1]), 1)[:, :n]
    assert torch.equal(values[x.abs() == spread], x[x.abs() == spread])
    # Half a step of the root is 1/254, and a little more for the roundings of what is subnormal.
    bound = spread * (2 * (x.abs() / spread).sqrt().nan_to_num() / 254 + 1 / 254**2)
    assert ((values - x).abs() <= 1.001 * bound + 1e-44).all()


def test_a_zero_row_is_exact_and_leading_dimensions_are_rows():
    x = torch.stack([torch.zeros(2, 5, 300), *tensors([(2, 5, 300)])])
    codes, scales = encode(x)
    values = decode(codes, scales)
    assert (values[0] == 0).all() and (codes[0] == 0).all() and (scales[0] == 0).all()
    assert torch.equal(values[1, 1, 3], decode(*encode(x[1, 1, 3:4]))[0])
    again, same = encode(values)
    assert torch.equal(again, codes) and torch.equal(same, scales)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_block_with_an_element_that_is_not_finite_becomes_nan_and_no_other(bad):
    (x,) = tensors([(4, 600)])
    good = decode(*encode(x))
    x[2, 250] = bad
    values = decode(*encode(x))
    assert values[2, 200:400].isnan().all()
    values[2, 200:400] = good[2, 200:400]
    assert torch.equal(values, good)


@requires_gpu
def test_codes_on_cuda_are_those_of_the_cpu():
    x = torch.cat(tensors([(64, 1000)]))
    x[3] = 0
    codes, scales = encode(x.cuda())
    assert torch.equal(scales.cpu(), encode(x)[1])
    assert (codes.cpu().int() - encode(x)[0].int()).abs().max() <= 1
    torch.testing.assert_close(
        decode(codes, scales).cpu(), decode(codes.cpu(), scales.cpu()), rtol=1e-6, atol=0
    )


class Simple:
    """Muon with an 8-bit momentum as documented, one matrix at a time."""

    def __init__(self, params, group):
        self.group = {"num_heads": None, "heads_along": "rows", "split_sizes": None, **group}
        self.momenta = [encode(self.rows(torch.zeros(p.shape))) for p in params]

    @staticmethod
    def rows(x):
        return x if x.dim() == 3 else x.flatten(1)

    def step(self, params):
        for i, p in enumerate(params):
            now = decode(*self.momenta[i]).lerp(self.rows(p.grad), 1 - MU)
            u = self.rows(p.grad).lerp(now, MU) if self.group.get("nesterov", True) else now
            self.momenta[i] = encode(now)
            for target, piece in zip(
                matrices(p.detach(), self.group), matrices(u.view(p.shape), self.group), strict=True
            ):
                matrix = piece.flatten(1)
                o = newton_schulz(matrix[None], (JORDAN,) * 5)[0].view(target.shape)
                r = max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
                target.mul_(1 - LR * DECAY).sub_(LR * r * o)


@pytest.mark.parametrize(
    ("shapes", "group"),
    [
        (SHAPES, {}),
        (SHAPES, {"nesterov": False}),
        ([(9, 5), (9, 300)], {"split_sizes": (5, 2, 2)}),
        ([(12, 8), (2, 12, 5)], {"num_heads": 3}),
        ([(12, 600)], {"num_heads": 3, "heads_along": "columns"}),
    ],
    ids=str,
)
def test_steps_are_those_of_a_simple_optimizer(shapes, group):
    params, others = parameters(shapes), parameters(shapes)
    optimizer, simple = muon([{"params": params, **group}], momentum_bits=8), Simple(others, group)
    for step in range(4):
        take_steps(params, optimizer, step, step + 1)
        for p, q in zip(params, others, strict=True):
            q.grad = p.grad.clone()
        with torch.no_grad():
            simple.step(others)
    for p, q, (codes, scales) in zip(params, others, simple.momenta, strict=True):
        state = optimizer.state[p]
        assert state.keys() == {"momentum_codes", "momentum_scales"}
        assert torch.equal(state["momentum_codes"], codes.view(p.shape))
        assert torch.equal(state["momentum_scales"], scales)
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_the_first_step_is_that_of_a_momentum_in_float32_and_later_ones_are_close():
    found = []
    for bits in (8, None):
        params = parameters()
        optimizer = muon(params, momentum_bits=bits)
        take_steps(params, optimizer, 0, 1)
        first = [p.detach().clone() for p in params]
        take_steps(params, optimizer, 1, 6)
        found.append((first, [p.detach() for p in params]))
    for p, q in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(p, q)
    for start, p, q in zip(tensors(SHAPES), found[0][1], found[1][1], strict=True):
        assert 0 < (p - q).norm() < 0.1 * (q - start).norm()


def test_channels_last_convolutions_and_limited_batches_change_nothing(monkeypatch):
    found = []
    for layout, limit in ((torch.contiguous_format, 1 << 26), (torch.channels_last, 1)):
        monkeypatch.setattr(momentum, "AT_ONCE", limit)
        params = [nn.Parameter(t.to(memory_format=layout)) for t in tensors([(6, 2, 3, 3)] * 3)]
        optimizer = muon(params, momentum_bits=8)
        take_steps(params, optimizer, 0, 3)
        found.append([(p.detach(), *optimizer.state[p].values()) for p in params])
    for ours, theirs in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_state_takes_a_byte_per_weight_and_four_per_block():
    params = parameters([(64, 1024), (3, 16, 300)])
    optimizer = muon(params, momentum_bits=8)
    take_steps(params, optimizer, 0, 1)
    sizes = [sum(t.numel() * t.element_size() for t in optimizer.state[p].values()) for p in params]
    assert sizes == [64 * (1024 + 4 * 4), 3 * 16 * (300 + 4 * 2)]


def test_zero_gradients_leave_zeros_and_tiny_ones_make_the_same_direction():
    ends = []
    for size in (0.0, 1.0, 1e-30):
        (p,) = parameters([(6, 40)])
        optimizer = muon([p], momentum_bits=8, eps=0.0 if size else 1e-7)
        for grad in tensors([(6, 40)] * 3, seed=5):
            p.grad = grad * size
            optimizer.step()
        ends.append(p.detach())
        if not size:
            assert not optimizer.state[p]["momentum_codes"].any()
    torch.testing.assert_close(ends[1], ends[2], rtol=0.05, atol=0.05)
    torch.testing.assert_close(ends[0], parameters([(6, 40)])[0] * (1 - LR * DECAY) ** 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stays_visible_in_its_own_matrix(bad):
    params = parameters([(4, 5), (2, 4, 5)])
    optimizer = muon(params, momentum_bits=8)
    take_steps(params, optimizer, 0, 1)
    for p, grad in zip(params, tensors([p.shape for p in params], 3), strict=True):
        p.grad = grad
    params[1].grad[1, 2, 3] = bad
    optimizer.step()
    assert not params[1][1].isfinite().any()
    assert not optimizer.state[params[1]]["momentum_scales"][1, 2].isfinite()
    take_steps(params, optimizer, 2, 3)
    assert not params[1][1].isfinite().any()
    assert params[0].isfinite().all() and params[1][0].isfinite().all()


def bits(state):
    return {name: t.clone() for name, t in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_saved_state_continues_bit_for_bit(dtype):
    params, others = parameters(dtype=dtype), parameters(dtype=dtype)
    first, second = muon(params, momentum_bits=8), muon(others, momentum_bits=8)
    take_steps(params, first, 0, 3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    second.load_state_dict(torch.load(file, weights_only=True))
    take_steps(params, first, 3, 5)
    take_steps(others, second, 3, 5)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        for name, value in first.state[p].items():
            other = second.state[q][name]
            assert torch.equal(value, other) and value.dtype == other.dtype


@pytest.mark.parametrize("make", [muon, lambda p: torch.optim.Muon(p, lr=LR)], ids=["pgolf", "torch"])
def test_a_float_momentum_is_encoded_when_it_is_loaded(make):
    params = parameters([(5, 300), (12, 8)])
    first, second = make(params), muon(params, momentum_bits=8)
    take_steps(params, first, 0, 2)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["momentum_bits"] == 8
    for p in params:
        codes, scales = encode(first.state[p]["momentum_buffer"])
        assert second.state[p].keys() == {"momentum_codes", "momentum_scales"}
        assert torch.equal(second.state[p]["momentum_codes"], codes)
        assert torch.equal(second.state[p]["momentum_scales"], scales)
    take_steps(params, second, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_decoded_when_they_are_loaded_without_the_option(dtype):
    params = parameters(dtype=dtype)
    first, second = muon(params, momentum_bits=8, nesterov=False), muon(params)
    take_steps(params, first, 0, 2)
    second.load_state_dict(first.state_dict())
    group = second.param_groups[0]
    assert group["momentum_bits"] is None and group["nesterov"] is False
    for p in params:
        state = first.state[p]
        wanted = (
            decode(Simple.rows(state["momentum_codes"]), state["momentum_scales"]).view(p.shape).to(dtype)
        )
        assert second.state[p].keys() == {"momentum_buffer"}
        assert torch.equal(second.state[p]["momentum_buffer"], wanted)
        assert second.state[p]["momentum_buffer"].dtype == dtype
    torch.optim.Muon(parameters()[:1]).load_state_dict(muon(parameters()[:1]).state_dict())
    take_steps(params, second, 2, 3)


def test_the_option_can_be_changed_between_steps():
    params = parameters()
    optimizer = muon(params)
    for step, option in enumerate((None, 8, 8, None)):
        optimizer.param_groups[0]["momentum_bits"] = option
        take_steps(params, optimizer, step, step + 1)
        assert ("momentum_codes" in optimizer.state[params[0]]) == (option == 8)
        assert ("momentum_buffer" in optimizer.state[params[0]]) == (option is None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("momentum_scales"), r"has the entries \['momentum_codes'\], expected those of Muon"),
        (
            lambda s: s.update(momentum_scales=torch.ones(5, 3)),
            r"momentum_scales is \(5, 3\) torch.float32, expected floats of shape \(5, 2\)",
        ),
        (
            lambda s: s.update(momentum_codes=torch.ones(5, 300)),
            r"momentum_codes is \(5, 300\) torch.float32, expected torch.int8 of shape \(5, 300\)",
        ),
        (
            lambda s: s.update(weight_rest=torch.zeros(5, 300, dtype=torch.int8)),
            r"weight_rest is \(5, 300\) torch.int8, expected torch.int8 of shape \(5, 300, 2\)",
        ),
    ],
)
def test_damaged_codes_are_refused(change, message):
    params = parameters(SHAPES[:1])
    optimizer = muon(params, momentum_bits=8)
    take_steps(params, optimizer, 0, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved["state"][0])
    before = bits(optimizer.state[params[0]])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert all(torch.equal(before[name], t) for name, t in optimizer.state[params[0]].items())


@pytest.mark.parametrize("settings", [{"momentum_bits": 4}, {"momentum_bits": "8"}, {"momentum_bits": 32}])
def test_other_numbers_of_bits_are_refused(settings):
    with pytest.raises(ValueError, match="momentum_bits must be 8 or None, got"):
        muon(parameters(), **settings)


def test_an_optimizer_that_was_pickled_before_the_options_existed_steps():
    params = parameters()
    optimizer = muon(params)
    for settings in (optimizer.defaults, *optimizer.param_groups):
        del settings["momentum_bits"], settings["master_weights"]
    again = pickle.loads(pickle.dumps(optimizer))
    group = again.param_groups[0]
    assert (group["momentum_bits"], group["master_weights"]) == (None, None)
    take_steps(group["params"], again, 0, 1)


def test_fingerprints_of_codes_see_one_that_differs():
    codes = encode(torch.cat(tensors([(5, 40)])))[0]
    other = codes.clone()
    other[3, 7] -= 1
    assert not torch.equal(fingerprint([codes]), fingerprint([other]))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(0.3 * t) for t in tensors([(24, 10), (24, 24), (3, 24)]))

    def forward(self, x):
        for weight in self.layers[:-1]:
            x = torch.tanh(x @ weight.T)
        return x @ self.layers[-1].T


def test_the_loss_falls_as_with_a_momentum_in_float32():
    (x,) = tensors([(96, 10)], 4)
    y, losses = torch.sin(2 * x[:, :3] + x[:, 3:6]), []
    for option in (None, 8):
        net = Net()
        optimizer = pgolf.optim.Muon(net.parameters(), lr=0.02, weight_decay=0.0, momentum_bits=option)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 60)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (net(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


BOTH = {"momentum_bits": 8, "master_weights": "split"}


def mixed(params, **settings):
    """Return an optimizer whose last parameter is in an AdamW group."""
    return muon([{"params": params[:-1]}, {"params": params[-1:], "use_muon": False}], **settings)


@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.bfloat16, BOTH), (torch.float32, {"momentum_bits": 8, "nesterov": False})]
)
def test_a_compiled_step_is_one_graph(dtype, options):
    torch._dynamo.reset()
    compiled = CompileCounterWithBackend("aot_eager")
    found = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, backend=compiled, fullgraph=True)):
        params = parameters([*SHAPES, (7,)], dtype)
        optimizer = mixed(params, **options)
        step = wrap(optimizer.step)
        for i in range(3):
            for p, grad in zip(params, tensors([p.shape for p in params], i), strict=True):
                p.grad = grad.to(p)
            step()
        found.append([(float32_weights(p, optimizer.state[p]), optimizer.state[p]) for p in params])
    # One for the first step, which makes the state, and one for all later steps.
    assert compiled.frame_count == 2
    for (p, ours), (q, theirs) in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"weight_rest"}:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [BOTH, {"momentum_bits": 8}, {"master_weights": "split"}], ids=str)
def test_bfloat16_parameters_step_on_each_device(options, device):
    params = [nn.Parameter(p.detach().to(device)) for p in parameters([*SHAPES, (7,)], torch.bfloat16)]
    wide = [nn.Parameter(p.detach().float()) for p in params]
    optimizer, plain = mixed(params, **options), mixed(wide)
    start = [p.detach().clone() for p in wide]
    for step in range(3):
        for p, q, grad in zip(params, wide, tensors([p.shape for p in params], step), strict=True):
            p.grad = grad.to(p)
            q.grad = p.grad.float()
        optimizer.step()
        plain.step()
    # Weights that are not split are rounded to bfloat16 in each step.
    tolerance = 0.15 if "master_weights" in options else 0.3
    for p, q, was in zip(params, wide, start, strict=True):
        assert (float32_weights(p, optimizer.state[p]) - q).norm() < tolerance * (q - was).norm()


@pytest.mark.parametrize("options", [BOTH, {"momentum_bits": 8}, {"master_weights": "split"}], ids=str)
def test_a_step_leaves_the_host_alone_so_that_a_graph_can_hold_it(options):
    sets = [parameters(dtype=torch.bfloat16) for _ in "12"]
    lr = torch.tensor(LR)
    optimizers = [
        pgolf.optim.Muon(params, lr=lr, capturable=True, normalize=0.9, cautious=True, **options)
        for params in sets
    ]
    for step in range(3):
        for params in sets:
            for p, grad in zip(params, tensors([p.shape for p in params], step), strict=True):
                p.grad = grad.to(p)
        with WithoutHost():
            optimizers[0].step()
        optimizers[1].step()
    assert all(torch.equal(p, q) for p, q in zip(*sets, strict=True))


@requires_gpu
@pytest.mark.parametrize("options", [BOTH, {"momentum_bits": 8}, {"master_weights": "split"}], ids=str)
def test_a_captured_step_equals_launched_ones(options):
    sets = [
        [nn.Parameter(p.detach().cuda()) for p in parameters([*SHAPES, (7,)], torch.bfloat16)] for _ in "12"
    ]
    optimizers = [mixed(params, capturable=True, **options) for params in sets]
    for params in sets:
        for p in params:
            p.grad = torch.zeros_like(p)

    def give(step):
        for params in sets:
            for p, grad in zip(params, tensors([p.shape for p in params], step), strict=True):
                p.grad.copy_(grad)

    stream = torch.cuda.Stream()
    for step in range(3):
        give(step)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for optimizer in optimizers:
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for step in range(3, 6):
        give(step)
        graph.replay()
        optimizers[1].step()
    for p, q in zip(*sets, strict=True):
        assert torch.equal(p, q)
        for name, value in optimizers[0].state[p].items():
            assert torch.equal(value, optimizers[1].state[q][name]), name
