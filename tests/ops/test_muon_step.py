"""muon_step and muon_apply compared with their references, with zero and non-finite gradients, and errors."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from pgolf.ops import MuonBank, MuonRule, muon_apply, muon_apply_ref, muon_step, muon_step_ref
from pgolf.ops.muon_step import (
    AVERAGE_WEIGHT,
    GRAD_SCALE,
    LR,
    MOMENTUM,
    SHIFT,
    VELOCITY_WEIGHT,
    WEIGHT_DECAY,
)
from tests.conftest import requires_gpu, requires_hopper
from tests.ops.checks import no_waiting

JORDAN = (3.4445, -4.7750, 2.0315)
LR_SCALE = 2.0
# One element; odd sides; a row of one vector, of one warp and one past it; more columns than a warp holds in
# registers (2048); an empty bank; wide, square and tall.
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 7, 8), (1, 9, 256), (2, 3, 257), (1, 2, 2056), (0, 4, 4), (2, 33, 12)]
STATE = [torch.float32, torch.bfloat16]
SCALARS = {
    "lr": 0.05,
    "momentum": 0.9,
    "weight_decay": 0.1,
    "grad_scale": 0.5,
    "average_weight": 0.25,
    "velocity_weight": 0.125,
    "shift": 0.5,
}


def make_scalars(device: torch.device, **changes: float) -> Tensor:
    return torch.tensor(list((SCALARS | changes).values()), device=device)


def make_banks(
    device: torch.device,
    *,
    grad: torch.dtype = torch.float32,
    momentum: torch.dtype = torch.float32,
    update: torch.dtype = torch.float32,
    shapes: list[tuple[int, ...]] = SHAPES,
    ahead: bool = False,
) -> list[MuonBank]:
    """Random banks; with `ahead` EMA-Nesterov keeps their parameters ahead of random weights."""
    rng = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=rng).to(device, dtype)

    return [
        MuonBank(
            grad=random(s, grad),
            momentum=random(s, momentum),
            update=random(s, update),
            param=random(s, torch.float32),
            average=random(s, torch.float32),
            lr_scale=LR_SCALE,
            base=random(s, torch.float32) if ahead else None,
            velocity=random(s, torch.float32) if ahead else None,
        )
        for s in shapes
    ]


def clone(banks: list[MuonBank]) -> list[MuonBank]:
    return [MuonBank(*(t.clone() if isinstance(t, Tensor) else t for t in bank)) for bank in banks]


def assert_banks_close(got: list[MuonBank], want: list[MuonBank], rounding: float, polar: float) -> None:
    """`rounding` is the tolerance of values with one rounding, `polar` that of outputs of the iteration."""
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        for name, bound in (
            ("grad", 0.0),
            ("momentum", rounding),
            ("update", polar),
            ("param", polar),
            ("average", polar),
            ("base", polar),
            ("velocity", polar),
        ):
            if getattr(b, name) is None:
                continue
            error = (getattr(a, name).double() - getattr(b, name).double()).abs()
            assert not error.numel() or error.max() <= bound, f"bank {index} {name}: {error.max():.2e}"


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    ("nesterov", "lerp", "row_normalize"), list(itertools.product((True, False), repeat=3))
)
def test_step_equals_the_reference(nesterov, lerp, row_normalize, ahead, device) -> None:
    rule = MuonRule([JORDAN] * 2, nesterov=nesterov, lerp=lerp, row_normalize=row_normalize)
    banks, hyper = make_banks(device, ahead=ahead), make_scalars(device)
    expected = clone(banks)
    muon_step_ref(expected, hyper, rule)
    muon_step(banks, hyper, rule)
    # CUDA iterates in bfloat16: 3e-2 of values up to 1; the parameter takes 0.1 of it.
    assert_banks_close(banks, expected, 2e-6, 2e-5 if device.type == "cpu" else 6e-2)


@pytest.mark.parametrize("row_normalize", [True, False])
@pytest.mark.parametrize("update", [pytest.param(dtype, marks=requires_hopper) for dtype in STATE])
def test_hopper_iteration_of_all_banks_equals_the_reference(update, row_normalize) -> None:
    device = torch.device("cuda")
    # More banks than one launch takes; rows that a warp takes several at a time, one at a time, and in two
    # passes; matrices with fewer rows than that; many matrices.
    shapes = [
        (3, 64, 128),
        (2, 256, 64),
        (0, 8, 8),
        (1, 8, 8),
        (2, 136, 136),
        (1, 16, 2056),
        (9, 8, 16),
        (1, 72, 40),
        (2, 48, 264),
        (1, 40, 768),
        (2, 24, 1024),
        (1, 56, 2048),
        (48, 24, 64),
    ]
    rule = MuonRule([JORDAN] * 2, row_normalize=row_normalize, algorithm="gram")
    banks = make_banks(device, momentum=torch.bfloat16, update=update, shapes=shapes)
    expected = clone(banks)
    muon_step_ref(expected, make_scalars(device), rule)
    muon_step(banks, make_scalars(device), rule)
    assert_banks_close(banks, expected, 2.0**-6, 6e-2)


@pytest.mark.parametrize(("grad", "momentum", "update"), list(itertools.product(STATE, repeat=3)))
def test_every_dtype_rounds_once(grad, momentum, update, device) -> None:
    rule = MuonRule([(1.0, 0.0, 0.0)], row_normalize=True)  # an iteration that only divides by the norm
    banks = make_banks(device, grad=grad, momentum=momentum, update=update)
    hyper = make_scalars(device)
    expected = clone(banks)
    muon_step_ref(expected, hyper, rule)
    muon_step(banks, hyper, rule)
    half = torch.bfloat16 in (momentum, update)
    # A value that float32 rounding moves across a midpoint lands on the next bfloat16: 2^-7 of up to 4, of 1.
    # CUDA rounds the normalised direction and the product to bfloat16 too.
    polar = 2.0**-6 if device.type == "cuda" else 2.0**-7 if half else 2e-5
    assert_banks_close(banks, expected, 2.0**-6 if momentum == torch.bfloat16 else 2e-6, polar)


def test_step_equals_its_formula_in_float64() -> None:
    # One matrix, written out without the reference.
    banks = make_banks(torch.device("cpu"), shapes=[(1, 4, 6)])
    bank = clone(banks)[0]
    muon_step(banks, make_scalars(torch.device("cpu")), MuonRule([JORDAN], row_normalize=True))
    g, m, p, average = (t[0].double() for t in (bank.grad, bank.momentum, bank.param, bank.average))
    m = 0.9 * m + 0.5 * g
    u = 0.5 * g + 0.9 * m
    u = torch.stack([row / row.norm() for row in u])
    x = u / u.norm()
    a = x @ x.T
    o = JORDAN[0] * x + (JORDAN[1] * a + JORDAN[2] * a @ a) @ x
    p = p * (1 - 0.05 * 0.1) - 0.05 * LR_SCALE * o
    average = average + 0.25 * (p - average)
    for got, want in ((banks[0].momentum, m), (banks[0].update, o), (banks[0].param, p)):
        torch.testing.assert_close(got[0].double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(banks[0].average[0].double(), average, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_step_without_a_finite_scale_changes_nothing(scale, device) -> None:
    banks, rule = make_banks(device), MuonRule([JORDAN], row_normalize=True)
    banks[1].grad[0, 0, 0] = math.nan
    before = clone(banks)
    muon_step(banks, make_scalars(device, grad_scale=scale), rule)
    muon_apply(
        [b.param for b in banks],
        [b.update for b in banks],
        make_scalars(device, grad_scale=scale),
        lr_scales=[1.0] * len(banks),
        averages=[b.average for b in banks],
    )
    for bank, old in zip(banks, before, strict=True):
        for name in ("momentum", "param", "average"):
            assert torch.equal(getattr(bank, name), getattr(old, name)), name
        assert not bank.update.any()


def test_zero_rows_and_matrices_stay_zero(device) -> None:
    banks = make_banks(device, shapes=[(3, 6, 9)])
    banks[0].grad[0], banks[0].momentum[0] = 0, 0
    banks[0].grad[1, 2], banks[0].momentum[1, 2] = 0, 0
    before = clone(banks)[0]
    muon_step(banks, make_scalars(device), MuonRule([JORDAN], row_normalize=True))
    assert not banks[0].update[0].any() and not banks[0].update[1, 2].any()
    assert banks[0].update[2].all() and banks[0].update.isfinite().all()
    torch.testing.assert_close(banks[0].param[0], before.param[0] * (1 - 0.05 * 0.1))


def test_updates_alone_leave_the_parameters_to_apply(device) -> None:
    rule, hyper = MuonRule([JORDAN] * 2), make_scalars(device)
    whole = make_banks(device, ahead=True)
    split = clone(whole)
    muon_step(whole, hyper, rule)
    alone = {"param": None, "average": None, "base": None, "velocity": None}
    muon_step([bank._replace(**alone) for bank in split], hyper, rule)
    muon_apply(
        [bank.param for bank in split],
        [bank.update for bank in split],
        hyper,
        lr_scales=[LR_SCALE] * len(split),
        averages=[bank.average for bank in split],
        bases=[bank.base for bank in split],
        velocities=[bank.velocity for bank in split],
    )
    for a, b in zip(whole, split, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in alone)


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_apply_takes_many_tensors_of_any_shape(weight: float, cautious: bool, device) -> None:
    # More tensors than one launch takes; the ends of the average's weight must be exact.
    rng = torch.Generator().manual_seed(1)
    shapes = [(), (7,), (3, 5), (0,), (4099,)] * 20
    params, updates, averages = ([torch.randn(s, generator=rng).to(device) for s in shapes] for _ in range(3))
    want = [[t.clone() for t in tensors] for tensors in (params, averages)]
    hyper, scales = make_scalars(device, average_weight=weight), [0.5] * len(shapes)
    muon_apply_ref(want[0], updates, hyper, lr_scales=scales, averages=want[1], cautious=cautious)
    muon_apply(params, updates, hyper, lr_scales=scales, averages=averages, cautious=cautious)
    torch.testing.assert_close(params, want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(averages, want[1], rtol=1e-6, atol=1e-6)
    if weight == 1.0:
        assert all(torch.equal(a, p) for a, p in zip(averages, params, strict=True))


@pytest.mark.parametrize("update", [torch.float32, torch.bfloat16])
def test_only_what_the_update_moves_towards_zero_decays(update: torch.dtype, device) -> None:
    # Twelve elements, so that eight are loaded at once and four one by one.
    param = torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0, 0.0] * 2, device=device)
    moved = torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0, 1.0] * 2, dtype=update, device=device)
    muon_apply([param], [moved], make_scalars(device), lr_scales=[2.0], cautious=True)
    kept = 1 - 0.05 * 0.1
    want = torch.tensor([kept - 0.1, 0.1 - kept, 2.1, -2.1, 3.0, -0.1] * 2, device=device)
    torch.testing.assert_close(param, want, rtol=0, atol=1e-6)


def test_a_cautious_step_is_a_step_and_a_cautious_update(device) -> None:
    rule, hyper = MuonRule([JORDAN] * 2, cautious=True), make_scalars(device)
    whole = make_banks(device)
    split = clone(whole)
    muon_step(whole, hyper, rule)
    muon_step([bank._replace(param=None, average=None) for bank in split], hyper, rule)
    for bank in split:
        decay = hyper[0] * hyper[2] * (bank.param * bank.update.float() > 0)
        bank.param.mul_(1 - decay).sub_(hyper[0] * LR_SCALE * bank.update.float())
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a.param, b.param, rtol=1e-6, atol=1e-6)


def test_misaligned_views_are_served(device) -> None:
    # Views that start in the middle of a buffer cannot be loaded 16 bytes at a time.
    def shifted(t: Tensor) -> Tensor:
        return torch.cat((t.new_zeros(3), t.flatten()))[3:].view(t.shape)

    rule, hyper = MuonRule([JORDAN], row_normalize=True), make_scalars(device)
    banks = make_banks(device, momentum=torch.bfloat16, shapes=[(2, 16, 24), (1, 5, 9)])
    moved = [MuonBank(*(shifted(t) if isinstance(t, Tensor) else t for t in bank)) for bank in banks]
    muon_step(banks, hyper, rule)
    muon_step(moved, hyper, rule)
    for a, b in zip(banks, moved, strict=True):
        assert torch.equal(a.momentum, b.momentum)
        # The iteration may take another kernel for an update that is not aligned.
        exact = device.type == "cpu"
        torch.testing.assert_close(a.param, b.param, rtol=0, atol=0 if exact else 6e-3)


def test_step_is_the_same_on_every_call(device) -> None:
    rule, hyper = MuonRule([JORDAN] * 3, row_normalize=True), make_scalars(device)
    first, second = (make_banks(device, momentum=torch.bfloat16, update=torch.bfloat16) for _ in range(2))
    for banks in (first, second):
        for _ in range(3):
            muon_step(banks, hyper, rule)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.momentum, b.momentum) and torch.equal(a.param, b.param)


def test_no_banks_is_no_work(device) -> None:
    muon_step([], make_scalars(device), MuonRule([JORDAN]))
    muon_apply([], [], make_scalars(device), lr_scales=[])


def op_arguments(device: torch.device) -> tuple[object, ...]:
    banks = make_banks(device, shapes=[(2, 5, 7), (1, 8, 4)], ahead=True)
    names = ("param", "grad", "momentum", "update", "average", "base", "velocity")
    lists = [[getattr(bank, name) for bank in banks] for name in names]
    return (*lists, make_scalars(device), [1.0, 2.0], [*JORDAN], 1e-7, True, False, True, True, 0)


def test_opcheck_accepts_both_operators(device) -> None:
    torch.library.opcheck(torch.ops.pgolf.muon_step, op_arguments(device))
    params, _, _, updates, *kept, hyper, scales = op_arguments(device)[:9]
    torch.library.opcheck(torch.ops.pgolf.muon_apply, (params, updates, *kept, hyper, scales, True))
    torch.library.opcheck(torch.ops.pgolf.muon_apply, (params, updates, [], [], [], hyper, scales, False))


def test_a_backward_pass_notices_changed_parameters(device) -> None:
    hyper, rule = make_scalars(device), MuonRule([JORDAN])
    for apply_only in (False, True):
        bank = make_banks(device, shapes=[(1, 4, 8)])[0]
        loss = (bank.param.requires_grad_() ** 2).sum()
        bank = bank._replace(param=bank.param.detach())
        if apply_only:
            muon_apply([bank.param], [bank.update], hyper, lr_scales=[1.0])
        else:
            muon_step([bank], hyper, rule)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_compile_in_one_graph_matches_eager(device) -> None:
    rule, hyper = MuonRule([JORDAN] * 2, row_normalize=True), make_scalars(device)
    eager = make_banks(device, shapes=[(2, 5, 7), (1, 8, 4)], ahead=True)
    compiled = clone(eager)

    def step(banks: list[MuonBank], hyper: Tensor) -> Tensor:
        muon_step(banks, hyper * 1.0, rule)
        return banks[0].param * 2

    want = step(eager, hyper)
    got = torch.compile(step, fullgraph=True)(compiled, hyper)
    torch.testing.assert_close(got, want)
    assert_banks_close(compiled, eager, 0.0, 0.0)


@requires_gpu
def test_captured_step_follows_the_scalars() -> None:
    device = torch.device("cuda")
    rule = MuonRule([JORDAN] * 2, row_normalize=True)
    banks, hyper = make_banks(device, ahead=True), make_scalars(device)
    expected = clone(banks)
    graph = torch.cuda.CUDAGraph()
    muon_step(clone(banks), hyper, rule)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        muon_step(banks, hyper, rule)
    for lr, momentum, shift in ((0.1, 0.8, 0.25), (0.01, 0.95, 0.0)):
        scalars = make_scalars(device, lr=lr, momentum=momentum, shift=shift, velocity_weight=lr)
        hyper.copy_(scalars)
        graph.replay()
        muon_step(expected, scalars, rule)
    assert_banks_close(banks, expected, 0.0, 0.0)


@requires_gpu
def test_step_does_not_wait_for_the_gpu() -> None:
    device = torch.device("cuda")
    banks, hyper, rule = make_banks(device), make_scalars(device), MuonRule([JORDAN])
    muon_step(banks, hyper, rule)
    with no_waiting():
        muon_step(banks, hyper, rule)


def change(index: int, **fields: object):
    """Return a function that replaces fields of one bank."""
    return lambda banks: [b._replace(**fields) if i == index else b for i, b in enumerate(banks)]


@pytest.mark.parametrize(
    ("banks", "rule", "error", "message"),
    [
        (change(0, grad=torch.zeros(5, 7)), {}, ValueError, r"grad 0 must be a bank .*, got \[5, 7\]"),
        (change(1, momentum=torch.zeros(1, 4, 8)), {}, ValueError, r"momentum 1 must have shape \[1, 8, 4\]"),
        (
            change(0, update=torch.zeros(2, 7, 5)),
            {},
            ValueError,
            r"update 0 must have shape \[2, 5, 7\], got",
        ),
        (change(0, param=torch.zeros(2, 5, 8)), {}, ValueError, "update 0 must have shape"),
        (change(1, average=torch.zeros(1, 4, 8)), {}, ValueError, r"average 1 must have shape \[1, 8, 4\]"),
        (change(1, grad=torch.zeros(1, 8, 4).half()), {}, TypeError, "grad 1 must be Float, got Half"),
        (change(0, grad=torch.zeros(2, 5, 7).double()), {}, TypeError, "grad 1 must be Double, got Float"),
        (
            change(0, param=torch.zeros(2, 5, 7).bfloat16()),
            {},
            TypeError,
            "param 0 must be Float, got BFloat",
        ),
        (change(0, momentum=torch.zeros(2, 7, 5).mT), {}, ValueError, "momentum 0 must be contiguous"),
        (change(0, param=None), {}, ValueError, "param must be given in all banks or in none, got 1 of 2"),
        (
            lambda banks: [b._replace(param=None) for b in banks],
            {},
            ValueError,
            "average needs param",
        ),
        (
            lambda banks: [b._replace(param=None, average=None, base=b.grad) for b in banks],
            {},
            ValueError,
            "base needs param",
        ),
        (change(0, base=torch.zeros(2, 5, 7)), {}, ValueError, "base must be given in all banks or in none"),
        (
            lambda banks: [b._replace(base=b.param.clone()) for b in banks],
            {},
            ValueError,
            "expected 2 velocities, one per tensor, got 0",
        ),
        (list, {"coefficients": []}, ValueError, "must be 1 to 10 triples .* got 0 numbers"),
        (list, {"coefficients": [JORDAN] * 11}, ValueError, "must be 1 to 10 triples .* got 33 numbers"),
        (list, {"coefficients": [(1.0, 2.0)]}, ValueError, r"must be triples \(a, b, c\), got \(1.0, 2.0\)"),
        (list, {"coefficients": [(1.0, 0.0, math.nan)]}, ValueError, "must be finite, got nan in triple 0"),
        (list, {"eps": -1.0}, ValueError, "eps must be >= 0, got -1"),
        (list, {"algorithm": "fast"}, ValueError, "must be 'auto', 'standard' or 'gram', got 'fast'"),
        (list, {"algorithm": "gram"}, RuntimeError, "'gram' needs a Hopper GPU, got CPU tensors"),
    ],
)
def test_bad_banks_are_named_and_nothing_is_changed(banks, rule, error, message) -> None:
    cpu = torch.device("cpu")
    good = make_banks(cpu, shapes=[(2, 5, 7), (1, 8, 4)])
    bad = banks(good)
    before = clone(good)
    with pytest.raises(error, match=message):
        muon_step(bad, make_scalars(cpu), MuonRule([JORDAN])._replace(**rule))
    for bank, old in zip(good, before, strict=True):
        assert torch.equal(bank.param, old.param) and torch.equal(bank.momentum, old.momentum)


@requires_gpu
def test_tensors_on_two_devices_are_refused() -> None:
    banks = make_banks(torch.device("cpu"), shapes=[(2, 5, 7)])
    with pytest.raises(ValueError, match="must be on cuda:0 like the hyper, got cpu"):
        muon_step(banks, make_scalars(torch.device("cuda:0")), MuonRule([JORDAN]))


@pytest.mark.parametrize(
    ("hyper", "error", "message"),
    [
        (torch.zeros(5), ValueError, r"hyper must be \(7,\) contiguous, got \[5\]"),
        (torch.zeros(7).double(), TypeError, "hyper must be float32, got Double"),
    ],
)
def test_bad_scalars_are_named(hyper, error, message) -> None:
    with pytest.raises(error, match=message):
        muon_step([], hyper, MuonRule([JORDAN]))
    with pytest.raises(error, match=message):
        muon_apply([], [], hyper, lr_scales=[])


def test_apply_names_lists_that_do_not_fit() -> None:
    hyper, p = make_scalars(torch.device("cpu")), torch.zeros(3)
    with pytest.raises(ValueError, match="expected 2 updates, one per tensor, got 1"):
        muon_apply([p, p], [p], hyper, lr_scales=[1.0])
    with pytest.raises(ValueError, match="expected 1 lr_scales, one per tensor, got 0"):
        muon_apply([p], [p], hyper, lr_scales=[])
    with pytest.raises(ValueError, match="expected 1 averages, one per tensor, got 2"):
        muon_apply([p], [p], hyper, lr_scales=[1.0], averages=[p, p])
    with pytest.raises(ValueError, match="expected 1 bases, one per tensor, got 0"):
        muon_apply([p], [p], hyper, lr_scales=[1.0], velocities=[p])
    with pytest.raises(ValueError, match=r"velocity 0 must have shape \[3\], got \[4\]"):
        muon_apply([p], [p], hyper, lr_scales=[1.0], bases=[p], velocities=[torch.zeros(4)])
    with pytest.raises(TypeError, match="base 0 must be Float, got Double"):
        muon_apply([p], [p], hyper, lr_scales=[1.0], bases=[p.double()], velocities=[p])


def test_places_of_the_scalars_are_those_of_the_kernels() -> None:
    # Each scalar moves what it should and nothing else.
    places = (LR, MOMENTUM, WEIGHT_DECAY, GRAD_SCALE, AVERAGE_WEIGHT, VELOCITY_WEIGHT, SHIFT)
    assert places == (0, 1, 2, 3, 4, 5, 6)
    cpu, rule = torch.device("cpu"), MuonRule([JORDAN])
    for name in SCALARS:
        banks = make_banks(cpu, shapes=[(1, 3, 4)], ahead=True)
        old = clone(banks)[0]
        only = dict.fromkeys(SCALARS, 0.0)
        hyper = make_scalars(cpu, **(only | {name: 0.5} | ({"lr": 0.5} if name == "weight_decay" else {})))
        muon_step(banks, hyper, rule)
        bank = banks[0]
        keep = {"momentum": 0.5 * old.momentum, "grad_scale": 0.5 * old.grad}
        torch.testing.assert_close(bank.momentum, keep.get(name, torch.zeros_like(old.momentum)))
        x = 0.75 * old.param if name == "weight_decay" else old.param
        torch.testing.assert_close(bank.base, x, rtol=1e-6, atol=1e-6)
        moved = 0.5 * (old.average + x) if name == "average_weight" else old.average
        torch.testing.assert_close(bank.average, moved)
        turned = 0.5 * (old.velocity + x - old.base) if name == "velocity_weight" else old.velocity
        torch.testing.assert_close(bank.velocity, turned)
        ahead = x + 0.5 * old.velocity if name == "shift" else x
        torch.testing.assert_close(bank.param, ahead, rtol=1e-6, atol=1e-6)
