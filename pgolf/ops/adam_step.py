"""AdamW over many tensors in one pass, and the norm and clip before it.

Owns the Python face of `torch.ops.pgolf.square_sums`, `clip_scale` and `adam_step`. What changes from step to
step is read from memory on the device, like in `muon_step`, whose `hyper` these share: `clip_scale` writes
the clip's factor there. Kernels: csrc/kernels/adam_step.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

import pgolf.ops._extension  # noqa: F401  (registers the operators)
from pgolf.ops._derivatives import no_derivative_error, refuse_recording, refuse_transforms
from pgolf.ops.muon_step import AVERAGE_WEIGHT, GRAD_SCALE

NORM, STEPS, SKIPPED = range(3)
"""Places in the state of `clip_scale`, which is `(CLIP_STATE,)` float32."""
CLIP_STATE = 3
CLIP_EPS = 1e-6


class AdamTensor(NamedTuple):
    """One parameter with its state: float32, one shape, contiguous, on one device; all in place."""

    param: Tensor
    grad: Tensor
    mean: Tensor
    square: Tensor
    average: Tensor | None = None
    """Moving average of the parameter. None in every tensor of a call: no averages."""


class AdamRule(NamedTuple):
    """What stays the same from step to step."""

    weight_decay: float
    beta1: float
    beta2: float
    eps: float


def square_sums(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sums of squares of one or more float32 or bfloat16 tensors, `(n,)` float32.

    One launch for 64 tensors on CUDA; summed in a fixed order, so bitwise deterministic.

    Raises:
        TypeError: another dtype, or several.
        ValueError: no tensor, strides, or several devices.
        RuntimeError: a tensor that is being differentiated.
    """
    if not tensors:
        raise ValueError("square_sums: expected at least one tensor, got none")
    refuse_transforms("square_sums", *tensors)
    # Here, as a formula that raises costs 10 us a call (measured) even where nothing is differentiated.
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise no_derivative_error("square_sums")
    result: Tensor = torch.ops.pgolf.square_sums(list(tensors))
    return result


def square_sums_ref(tensors: Sequence[Tensor]) -> Tensor:
    """Do what `square_sums` does in plain torch, in float64."""
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
    """Turn squared norms into the factor of this step's gradients, and count the step; on the device.

        norm = sqrt(sum(sums))
        grad_scale = min(1, clip / (norm + 1e-6)), 1 where clip is 0
        corrections = 1 / (1 - beta^t) for both betas, with t the steps including this one

    Where the norm is not finite, grad_scale is NaN, and the step counts as skipped instead of taken.

    Args:
        sums: `(n,)` float32.
        state: `(3,)` float32: norm, steps taken and skipped; updated.
        hyper: as in `muon_step`; its grad_scale is written.
        corrections: `(2,)` float32; written.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit, clip < 0, a beta outside [0, 1).
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
    """Do what `clip_scale` does in plain torch."""
    norm = sums.sum().sqrt()
    finite = bool(norm.isfinite())
    factor = (clip / (norm + CLIP_EPS)).clamp(max=1.0) if clip > 0 else torch.ones_like(norm)
    hyper[GRAD_SCALE] = factor if finite else torch.nan
    state[NORM] = norm
    state[STEPS if finite else SKIPPED] += 1
    steps = max(float(state[STEPS]), 1.0)
    corrections.copy_(torch.tensor([1 / (1 - beta1**steps), 1 / (1 - beta2**steps)]))


def adam_step(
    tensors: Sequence[AdamTensor], lr: Tensor, hyper: Tensor, corrections: Tensor, rule: AdamRule
) -> None:
    """Take one AdamW step, move the averages and zero the gradients, in place; one launch for 56 tensors.

        g = grad_scale grad
        mean <- beta1 mean + (1 - beta1) g;   square <- beta2 square + (1 - beta2) g^2
        param <- param (1 - lr wd) - lr c1 mean / (sqrt(c2 square) + eps)
        average <- average + average_weight (param - average)
        grad <- 0

    Equals `torch.optim.AdamW` (decoupled decay, no AMSGrad). Where grad_scale is not finite only the
    gradients are zeroed. Reads and writes each tensor once: 40 bytes an element with averages.

    Args:
        tensors: see `AdamTensor`; none is no work.
        lr: one element, float32.
        hyper: `muon_step`'s, of which grad_scale and average_weight are read.
        corrections: `(2,)` float32, c1 and c2, from `clip_scale`.

    Raises:
        ValueError, TypeError: shapes, devices, strides or dtypes that do not fit, averages in some only; a
            beta outside [0, 1), a negative eps or decay.
    """
    refuse_recording("adam_step", (x for t in tensors for x in t))
    averages = [t.average for t in tensors if t.average is not None]
    torch.ops.pgolf.adam_step(
        [t.param for t in tensors],
        [t.grad for t in tensors],
        [t.mean for t in tensors],
        [t.square for t in tensors],
        averages,
        lr,
        hyper,
        corrections,
        *rule,
    )
    increment_version([t for tensor in tensors for t in tensor if t is not None])


def adam_step_ref(
    tensors: Sequence[AdamTensor], lr: Tensor, hyper: Tensor, corrections: Tensor, rule: AdamRule
) -> None:
    """Do what `adam_step` does in plain torch."""
    finite = bool(hyper[GRAD_SCALE].isfinite())
    for t in tensors:
        if finite:
            g = t.grad * hyper[GRAD_SCALE]
            t.mean.lerp_(g, 1 - rule.beta1)
            t.square.mul_(rule.beta2).addcmul_(g, g, value=1 - rule.beta2)
            denominator = (corrections[1] * t.square).sqrt_().add_(rule.eps)
            t.param.mul_(1 - lr * rule.weight_decay).sub_(lr * corrections[0] * t.mean / denominator)
            if t.average is not None:
                t.average.lerp_(t.param, hyper[AVERAGE_WEIGHT])
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
