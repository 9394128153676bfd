"""adam_step, clip_scale and square_sums compared with their references, and their errors."""

import math

import pytest
import torch
from torch import Tensor

from pgolf.ops import (
    AdamRule,
    AdamTensor,
    adam_step,
    adam_step_ref,
    clip_scale,
    clip_scale_ref,
    square_sums,
    square_sums_ref,
)
from pgolf.ops.adam_step import CLIP_STATE, NORM, SKIPPED, STEPS
from pgolf.ops.muon_step import AVERAGE_WEIGHT, GRAD_SCALE, HYPER, SHIFT, VELOCITY_WEIGHT

RULE = AdamRule(weight_decay=0.1, beta1=0.9, beta2=0.99, eps=1e-8)
# A scalar, nothing, one vector of eight and one more, one block and one more element, a matrix, and more
# tensors than one launch takes.
SHAPES = [(), (0,), (8,), (9,), (4096,), (4097,), (129, 65), *[(3,)] * 60]


def make_tensors(
    device: torch.device, *, averages: bool = True, ahead: bool = False, offset: int = 0
) -> list[AdamTensor]:
    """Random tensors; with `offset` they start between 16-byte boundaries."""
    rng = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        return torch.randn(count + offset, generator=rng).to(device)[offset:].view(shape)

    return [
        AdamTensor(
            param=random(shape),
            grad=random(shape),
            mean=random(shape),
            square=random(shape).square_(),
            average=random(shape) if averages else None,
            base=random(shape) if ahead else None,
            velocity=random(shape) if ahead else None,
        )
        for shape in SHAPES
    ]


def clone(tensors: list[AdamTensor]) -> list[AdamTensor]:
    return [AdamTensor(*(None if t is None else t.clone() for t in tensor)) for tensor in tensors]


def numbers(device: torch.device, grad_scale: float = 0.5, weight: float = 0.25) -> tuple[Tensor, ...]:
    hyper = torch.zeros(HYPER, device=device)
    hyper[GRAD_SCALE], hyper[AVERAGE_WEIGHT] = grad_scale, weight
    hyper[VELOCITY_WEIGHT], hyper[SHIFT] = 0.125, 0.5
    return torch.tensor(0.03, device=device), hyper, torch.tensor([2.5, 30.0], device=device)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("averages", "weight"), [(True, 0.25), (True, 0.75), (True, 1.0), (False, 0.25)])
def test_step_equals_the_reference(averages, weight, offset, ahead, device) -> None:
    tensors = make_tensors(device, averages=averages, ahead=ahead, offset=offset)
    given = numbers(device, weight=weight)
    want = clone(tensors)
    adam_step_ref(want, *given, RULE)
    adam_step(tensors, *given, RULE)
    for got, expected in zip(tensors, want, strict=True):
        assert not got.grad.any()
        for a, b in zip(got, expected, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, rtol=4e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_skipped_step_only_zeroes_the_gradients(bad, device) -> None:
    tensors = make_tensors(device)
    before = clone(tensors)
    adam_step(tensors, *numbers(device, grad_scale=bad), RULE)
    for got, was in zip(tensors, before, strict=True):
        assert not got.grad.any()
        kept = [(got.param, was.param), (got.mean, was.mean), (got.square, was.square)]
        assert all(torch.equal(a, b) for a, b in kept) and torch.equal(got.average, was.average)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_square_sums_equal_the_reference_and_repeat(dtype, device) -> None:
    rng = torch.Generator().manual_seed(0)
    sizes = [1, 0, 7, 4096, 3_000_001, *range(1, 66)]
    flat = [torch.randn(n + 1, generator=rng).to(device, dtype)[n % 2 :][:n] for n in sizes]
    got = square_sums(flat)
    torch.testing.assert_close(got, square_sums_ref(flat), rtol=2e-6, atol=0)
    assert torch.equal(square_sums(flat), got)
    assert square_sums([torch.full((3,), 1e20, device=device)]).isinf().all()
    assert square_sums([torch.tensor([1.0, math.nan], device=device)]).isnan().all()


@pytest.mark.parametrize("clip", [0.0, 0.3, 1e6])
def test_clip_scale_equals_the_reference_over_steps(clip, device) -> None:
    got, want = ([torch.zeros(n, device=device) for n in (CLIP_STATE, HYPER, 2)] for _ in range(2))
    for sums in ([4.0, 5.0], [0.0, 0.0], [math.inf, 1.0], [1.0, math.nan], [0.01, 0.0]):
        squares = torch.tensor(sums, device=device)
        clip_scale(squares, *got, clip=clip, beta1=0.9, beta2=0.99)
        clip_scale_ref(squares, *want, clip=clip, beta1=0.9, beta2=0.99)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0, equal_nan=True)
    assert [got[0][i].item() for i in (STEPS, SKIPPED)] == [3, 2]
    assert got[0][NORM].item() == pytest.approx(0.1)


def test_a_captured_step_follows_its_numbers(device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    tensors, (lr, hyper, corrections) = make_tensors(device, ahead=True), numbers(device)
    want, state = clone(tensors), torch.zeros(CLIP_STATE, device=device)
    twin, state_twin = hyper.clone(), state.clone()

    def step(tensors: list[AdamTensor], hyper: Tensor, state: Tensor) -> None:
        sums = square_sums([t.grad for t in tensors])
        clip_scale(sums, state, hyper, corrections, clip=0.3, beta1=0.9, beta2=0.99)
        adam_step(tensors, lr, hyper, corrections, RULE)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(tensors, hyper, state)
    for rate in (0.1, 0.2):
        lr.fill_(rate)
        for got, other in zip(tensors, want, strict=True):
            other.grad.copy_(got.grad.normal_())
        graph.replay()
        step(want, twin, state_twin)
    assert torch.equal(state, state_twin)
    assert all(torch.equal(a.param, b.param) for a, b in zip(tensors, want, strict=True))


def test_operators_pass_opcheck(device) -> None:
    tensors, (lr, hyper, corrections) = make_tensors(device, ahead=True)[:8], numbers(device)
    lists = [list(column) for column in zip(*tensors, strict=True)]
    torch.library.opcheck(torch.ops.pgolf.square_sums, (lists[1],))
    state, sums = torch.zeros(CLIP_STATE, device=device), torch.ones(2, device=device)
    torch.library.opcheck(torch.ops.pgolf.clip_scale, (sums, state, hyper, corrections, 0.3, 0.9, 0.99))
    torch.library.opcheck(torch.ops.pgolf.adam_step, (*lists, lr, hyper, corrections, *RULE))
    lists[-3:] = [], [], []
    torch.library.opcheck(torch.ops.pgolf.adam_step, (*lists, lr, hyper, corrections, *RULE))


def test_a_backward_pass_notices_changed_parameters(device) -> None:
    tensors = make_tensors(device)[2:3]
    loss = (tensors[0].param.requires_grad_() ** 2).sum()
    with torch.no_grad():
        adam_step([tensors[0]._replace(param=tensors[0].param.detach())], *numbers(device), RULE)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bad_input_is_named(device) -> None:
    tensors, given = make_tensors(device)[:3], numbers(device)
    for change in ({"beta2": 1.0}, {"beta1": -0.1}, {"eps": -1e-8}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match=r"adam_step: .* must be"):
            adam_step(tensors, *given, RULE._replace(**change))
    with pytest.raises(ValueError, match="expected at least one tensor"):
        square_sums([])
    with pytest.raises(ValueError, match=r"grads 2 must have shape \[8\], got \[4\]"):
        adam_step([*tensors[:2], tensors[2]._replace(grad=tensors[2].grad[:4])], *given, RULE)
    with pytest.raises(TypeError, match="params must be float32, got Half"):
        adam_step([tensors[2]._replace(param=tensors[2].param.half())], *given, RULE)
    with pytest.raises(ValueError, match="expected 2 averages, one per parameter, got 1"):
        adam_step([tensors[2], tensors[2]._replace(average=None)], *given, RULE)
    with pytest.raises(ValueError, match="expected 1 velocities, one per parameter, got 0"):
        adam_step([tensors[2]._replace(base=tensors[2].param.clone())], *given, RULE)
    with pytest.raises(ValueError, match=r"bases 0 must have shape \[8\], got \[9\]"):
        wrong = torch.zeros(9, device=device)
        adam_step([tensors[2]._replace(base=wrong, velocity=wrong)], *given, RULE)
    with pytest.raises(ValueError, match="lr must have 1 contiguous elements"):
        adam_step(tensors, given[1], *given[1:], RULE)
    with pytest.raises(TypeError, match="one dtype"):
        square_sums([tensors[2].grad, tensors[2].grad.bfloat16()])
    with pytest.raises(TypeError, match="float32 or bfloat16, got Double"):
        square_sums([tensors[2].grad.double()])
    state, sums = torch.zeros(CLIP_STATE, device=device), torch.ones(2, device=device)
    with pytest.raises(ValueError, match="clip must be >= 0"):
        clip_scale(sums, state, given[1], given[2], clip=-1.0, beta1=0.9, beta2=0.99)
    with pytest.raises(ValueError, match=r"betas must be in \[0, 1\), got 1"):
        clip_scale(sums, state, given[1], given[2], clip=1.0, beta1=1.0, beta2=0.99)
    with pytest.raises(ValueError, match="state must have 3"):
        clip_scale(sums, sums, given[1], given[2], clip=1.0, beta1=0.9, beta2=0.99)
