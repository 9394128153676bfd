"""AdamW over many tensors in one pass, and the gradient norm and clip that precede it.

This is the Python interface of `torch.ops.pgolf.square_sums`, `clip_scale` and `adam_step`. The numbers that
change from step to step are read from the tensor `hyper` on the device, which is the same as `muon_step`'s;
`clip_scale` writes the factor of the clip into it. Kernels: csrc/kernels/adam_step.h.

The references do not synchronize the host either: the counted `train_gpt.py` takes its steps with them, and
captures them in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

import pgolf.ops._extension  # noqa: F401  (registers the operators)
from pgolf.ops._derivatives import no_derivative_error, refuse_recording, refuse_transforms
from pgolf.ops.muon_step import AVERAGE_WEIGHT, GRAD_SCALE, move_ahead_ref

NORM, STEPS, SKIPPED = range(3)
"""Indices into the state of `clip_scale`, which is `(CLIP_STATE,)` float32."""
CLIP_STATE = 3
CLIP_EPS = 1e-6


class AdamTensor(NamedTuple):
    """One parameter and its state: float32, contiguous, all of one shape on one device, updated in place."""

    param: Tensor
    grad: Tensor
    mean: Tensor
    square: Tensor
    average: Tensor | None = None
    """Moving average of the parameter. Either all tensors of a call have one, or none has."""
    base: Tensor | None = None
    """The weights of which EMA-Nesterov keeps the parameter ahead. Either all have one, or none has, and so
    for the velocity, which belongs to it."""
    velocity: Tensor | None = None
    """Average of the displacements of the weights."""


class AdamRule(NamedTuple):
    """The settings that stay the same from step to step."""

    weight_decay: float
    beta1: float
    beta2: float
    eps: float


def square_sums(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares of each of n tensors, float32 or bfloat16, as `(n,)` float32.

    On CUDA one launch measures up to 64 tensors. The order of summation is fixed, so the result is bitwise
    deterministic.

    Raises:
        TypeError: the tensors have another dtype, or different dtypes.
        ValueError: the list is empty, a tensor is not contiguous, or they are on different devices.
        RuntimeError: a tensor is being differentiated.
    """
    if not tensors:
        raise ValueError("square_sums: expected at least one tensor, got none")
    refuse_transforms("square_sums", *tensors)
    # Checked here: registering an autograd formula that raises costs 10 us per call (measured), even when
    # nothing is differentiated.
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise no_derivative_error("square_sums")
    result: Tensor = torch.ops.pgolf.square_sums(list(tensors))
    return result


def square_sums_ref(tensors: Sequence[Tensor]) -> Tensor:
    """Compute `square_sums` with PyTorch operators, in float64."""
    return torch.stack([t.double().square().sum() for t in tensors]).float()


def clip_scale(
    sums: Tensor,
    state: Tensor,
    hyper: Tensor,
    corrections: Tensor,
    *,
    clip: float,
    beta1: float,
    beta2: float,
) -> None:
    """Compute the clip factor of this step's gradients from their squared norms, and count the step.

        norm = sqrt(sum(sums))
        grad_scale = min(1, clip / (norm + 1e-6)), or 1 if clip is 0
        corrections = 1 / (1 - beta^t) for both betas, t being the number of steps including this one

    If the norm is not finite, grad_scale becomes NaN and the step is counted as skipped. Everything happens
    on the device, without synchronization.

    Args:
        sums: `(n,)` float32, from `square_sums`.
        state: `(3,)` float32: norm, steps taken, steps skipped; updated.
        hyper: as in `muon_step`; its grad_scale is written.
        corrections: `(2,)` float32; written.
        clip: largest norm that the gradients may have after scaling, >= 0; 0 switches clipping off.

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit, clip < 0, or a beta is outside [0, 1).
    """
    refuse_recording("clip_scale", (sums, state, hyper, corrections))
    torch.ops.pgolf.clip_scale(sums, state, hyper, corrections, clip, beta1, beta2)


def clip_scale_ref(
    sums: Tensor,
    state: Tensor,
    hyper: Tensor,
    corrections: Tensor,
    *,
    clip: float,
    beta1: float,
    beta2: float,
) -> None:
    """Compute `clip_scale` with PyTorch operators."""
    norm = sums.sum().sqrt()
    finite = norm.isfinite()
    factor = (clip / (norm + CLIP_EPS)).clamp(max=1.0) if clip > 0 else torch.ones_like(norm)
    hyper[GRAD_SCALE] = factor.masked_fill(~finite, torch.nan)
    state[NORM] = norm
    state[STEPS] += finite
    state[SKIPPED] += ~finite
    steps = state[STEPS].double().clamp(min=1.0)
    corrections.copy_(torch.stack([1 / (1 - beta1**steps), 1 / (1 - beta2**steps)]))


def adam_step(
    tensors: Sequence[AdamTensor], lr: Tensor, hyper: Tensor, corrections: Tensor, rule: AdamRule
) -> None:
    """Take one AdamW step, move the averages and zero the gradients, all in place.

        g = grad_scale grad
        mean <- beta1 mean + (1 - beta1) g;   square <- beta2 square + (1 - beta2) g^2
        param <- param (1 - lr wd) - lr c1 mean / (sqrt(c2 square) + eps)
        average <- average + average_weight (param - average)
        with a base, EMA-Nesterov, where x is param:
        velocity <- velocity + velocity_weight (x - base - velocity)
        base <- x;   param <- x + shift velocity
        grad <- 0

    Equals `torch.optim.AdamW` (decoupled weight decay, no AMSGrad). If grad_scale is not finite, the
    gradients are zeroed and, with a base, param <- base + shift velocity; all else keeps its values. Each
    tensor is read once and written once: 40 bytes per element with averages, 56 if there is a base, too. On
    CUDA one launch updates up to 56 tensors.

    Args:
        tensors: see `AdamTensor`; an empty list does nothing.
        lr: learning rate, one float32 element on the device.
        hyper: as in `muon_step`; grad_scale, average_weight, velocity_weight and shift are read from it.
        corrections: `(2,)` float32, c1 and c2, from `clip_scale`.

    Raises:
        ValueError, TypeError: a shape, device, stride or dtype does not fit, some tensors have an average, a
            base or a velocity and others have none, a beta is outside [0, 1), or eps or the weight decay is
            negative.
    """
    refuse_recording("adam_step", (x for t in tensors for x in t))
    torch.ops.pgolf.adam_step(
        [t.param for t in tensors],
        [t.grad for t in tensors],
        [t.mean for t in tensors],
        [t.square for t in tensors],
        [t.average for t in tensors if t.average is not None],
        [t.base for t in tensors if t.base is not None],
        [t.velocity for t in tensors if t.velocity is not None],
        lr,
        hyper,
        corrections,
        *rule,
    )
    increment_version([t for tensor in tensors for t in tensor if t is not None])


def adam_step_ref(
    tensors: Sequence[AdamTensor], lr: Tensor, hyper: Tensor, corrections: Tensor, rule: AdamRule
) -> None:
    """Compute `adam_step` with PyTorch operators; a step that is skipped has rates and weights of 0."""
    taken = hyper[GRAD_SCALE].isfinite()
    lr, weight = lr * taken, hyper[AVERAGE_WEIGHT] * taken
    for t in tensors:
        g = (t.grad * hyper[GRAD_SCALE]).masked_fill_(~taken, 0.0)
        t.mean.lerp_(g, taken.to(g) * (1 - rule.beta1))
        t.square.lerp_(g * g, taken.to(g) * (1 - rule.beta2))
        denominator = (corrections[1] * t.square).sqrt_().add_(rule.eps)
        t.param.mul_(1 - lr * rule.weight_decay).sub_(lr * corrections[0] * t.mean / denominator)
        if t.average is not None:
            t.average.lerp_(t.param, weight.to(g))
        if t.base is not None and t.velocity is not None:
            move_ahead_ref(t.param, t.base, t.velocity, hyper)
        t.grad.zero_()


def _fake_square_sums(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(len(tensors), dtype=torch.float32)


def _fake_clip_scale(
    _sums: Tensor,
    _state: Tensor,
    _hyper: Tensor,
    _corrections: Tensor,
    _clip: float,
    _beta1: float,
    _beta2: float,
) -> None:
    return None


def _fake_adam_step(
    _params: list[Tensor],
    _grads: list[Tensor],
    _means: list[Tensor],
    _squares: list[Tensor],
    _averages: list[Tensor],
    _bases: list[Tensor],
    _velocities: list[Tensor],
    _lr: Tensor,
    _hyper: Tensor,
    _corrections: Tensor,
    _weight_decay: float,
    _beta1: float,
    _beta2: float,
    _eps: float,
) -> None:
    return None


torch.library.register_fake("pgolf::square_sums", _fake_square_sums)
torch.library.register_fake("pgolf::clip_scale", _fake_clip_scale)
torch.library.register_fake("pgolf::adam_step", _fake_adam_step)
