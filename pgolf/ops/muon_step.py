"""One Muon step over banks of matrices: momentum, row normalization, polar iteration, decay and update.

This is the Python interface of `torch.ops.pgolf.muon_step` and `muon_apply`, which work in place on lists of
tensors. The numbers that change from step to step (learning rate, momentum, weight decay, clip factor, weight
of the average, those of EMA-Nesterov) are read from one small tensor on the device, `hyper`. So a captured
CUDA graph follows a schedule, and the device itself skips a step whose gradients are not finite. Coefficient
tables are in `pgolf.optim.polar`, kernels in csrc/kernels/muon_step.h.

Legend: `B` matrices of a bank, `m` rows, `n` columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

import pgolf.ops._extension  # noqa: F401  (registers the operators)
from pgolf.ops._algorithm import Algorithm, algorithm_number
from pgolf.ops._derivatives import refuse_recording
from pgolf.ops.newton_schulz import newton_schulz_ref

HYPER = 7
LR, MOMENTUM, WEIGHT_DECAY, GRAD_SCALE, AVERAGE_WEIGHT, VELOCITY_WEIGHT, SHIFT = range(HYPER)
"""Indices into `hyper`, which is `(HYPER,)` float32."""

ROW_EPS = 1e-7


class MuonBank(NamedTuple):
    """The tensors of one bank, all `(B, m, n)`, contiguous and on one device.

    In a list of banks, each field has the same dtype in all banks.
    """

    grad: Tensor
    """float32 or bfloat16; read."""
    momentum: Tensor
    """float32 or bfloat16; updated."""
    update: Tensor
    """float32 or bfloat16; the orthogonalized direction is written here."""
    param: Tensor | None = None
    """float32 master weights; updated. Either all banks have one or none has; without them, the caller
    applies the updates with `muon_apply`."""
    average: Tensor | None = None
    """float32 moving average of the weights; updated. Either all banks have one or none has."""
    lr_scale: float = 1.0
    """Factor on the learning rate, for example sqrt(max(1, m / n))."""
    base: Tensor | None = None
    """float32 weights of which EMA-Nesterov keeps `param` ahead; updated. Either all banks have one or none
    has, and so for the velocity, which belongs to it."""
    velocity: Tensor | None = None
    """float32 average of the displacements of the weights; updated."""


class MuonRule(NamedTuple):
    """The settings that stay the same from step to step."""

    coefficients: Sequence[tuple[float, float, float]]
    """Coefficients of the polar iteration: 1 to 10 triples, one per iteration."""
    nesterov: bool = True
    """If true, the direction is g + mu * momentum, otherwise it is the momentum."""
    lerp: bool = False
    """If true, momentum becomes (1 - mu) g + mu * momentum, as in torch.optim.Muon, otherwise g + mu *
    momentum."""
    row_normalize: bool = False
    """Divide each row of the direction by its L2 norm (MuonEq-R)."""
    eps: float = 1e-7
    """Added to the Frobenius norm of a direction."""
    algorithm: Algorithm = "auto"
    """Implementation of the polar iteration: "gram" is the Hopper kernel for all banks at once (sides must be
    multiples of 8), "standard" the portable one; "auto" chooses the one that was measured to be faster."""
    cautious: bool = False
    """Decay only the parameters that the update moves towards 0 as well (cautious weight decay, arXiv
    2510.12402)."""


def muon_step(banks: Sequence[MuonBank], hyper: Tensor, rule: MuonRule) -> None:
    """Take one Muon step on all banks, in place.

        g' = grad_scale * g
        buf <- mu buf + g';   u = g' + mu buf (nesterov) or buf
        (lerp: buf <- mu buf + (1 - mu) g';   u = (1 - mu) g' + mu buf)
        u <- u / max(||u_row||, 1e-7) (row_normalize)
        update <- newton_schulz(u)
        param <- param (1 - lr wd) - lr lr_scale update (cautious: no decay where param update <= 0)
        average <- average + average_weight (param - average)
        with a base, EMA-Nesterov, where x is param:
        velocity <- velocity + velocity_weight (x - base - velocity)
        base <- x;   param <- x + shift velocity

    Equals `muon_step_ref` on the same tensors. The momentum is rounded to its own dtype and u to the dtype of
    the updates; everything between is computed in float32. CUDA launches one kernel for all banks before the
    iteration and one after it, allocates from torch's pool only, and does not synchronize. The result is
    deterministic.

    The update of a zero matrix is zero. An empty bank and an empty list are allowed and do nothing.

    Args:
        banks: see `MuonBank`. The gradients of matrices that are padding must be zero.
        hyper: `(7,)` float32 on the device: lr, momentum mu, weight decay wd, grad_scale, average_weight,
            velocity_weight, shift (that of the next step). If grad_scale is not finite, the step is skipped:
            momentum, parameters and averages keep their values, and the updates are zero; with a base,
            param <- base + shift velocity, and base and velocity keep their values. `clip_scale` writes such
            a grad_scale for gradients whose norm is not finite.

    Raises:
        ValueError: shapes, devices or strides do not fit, only some banks have a param, an average, a base
            or a velocity, the coefficients are none, too many or not finite, eps < 0, or the algorithm is
            unknown.
        RuntimeError: the algorithm is "gram", which cannot run on this device or for these shapes.
        TypeError: a dtype is neither float32 nor bfloat16, or differs between banks.

    Source: Muon, https://kellerjordan.github.io/posts/muon; MuonEq-R, arXiv 2603.28254; EMA-Nesterov, arXiv
    2605.25395.
    """
    for row in rule.coefficients:
        if len(row) != 3:
            raise ValueError(f"muon_step: coefficients must be triples (a, b, c), got {tuple(row)}")
    params = _all_or_none([bank.param for bank in banks], "param")
    averages = _all_or_none([bank.average for bank in banks], "average")
    bases = _all_or_none([bank.base for bank in banks], "base")
    velocities = _all_or_none([bank.velocity for bank in banks], "velocity")
    for what, tensors in (("average", averages), ("base", bases), ("velocity", velocities)):
        if tensors and not params:
            raise ValueError(f"muon_step: {what} needs param; without it, give it to muon_apply")
    momenta, updates = [bank.momentum for bank in banks], [bank.update for bank in banks]
    changed = [*params, *momenta, *updates, *averages, *bases, *velocities]
    refuse_recording("muon_step", [bank.grad for bank in banks] + changed)
    torch.ops.pgolf.muon_step(
        params,
        [bank.grad for bank in banks],
        momenta,
        updates,
        averages,
        bases,
        velocities,
        hyper,
        [float(bank.lr_scale) for bank in banks],
        [float(value) for row in rule.coefficients for value in row],
        rule.eps,
        rule.nesterov,
        rule.lerp,
        rule.row_normalize,
        rule.cautious,
        algorithm_number("muon_step", rule.algorithm),
    )
    # The operator changed these tensors in place. With a higher version, a backward pass that saved one of
    # them before raises an error instead of using the new values, as after torch's own in-place operators.
    increment_version(changed)


def muon_step_ref(banks: Sequence[MuonBank], hyper: Tensor, rule: MuonRule) -> None:
    """Compute `muon_step` with PyTorch operators, bank by bank, in float32 (float64 tensors in float64).

    It does not synchronize the host either, so a step that is skipped is computed and not used.
    """
    taken = hyper[GRAD_SCALE].isfinite()
    mu, scale = hyper[MOMENTUM], hyper[GRAD_SCALE]
    for bank in banks:
        wide = torch.float64 if bank.grad.dtype == torch.float64 else torch.float32
        g = bank.grad.to(wide) * scale
        if rule.lerp:
            g = g * (1 - mu)
        before = bank.momentum.to(wide)
        bank.momentum.copy_(torch.where(taken, mu * before + g, before))
        buffer = bank.momentum.to(wide)
        u = g + mu * buffer if rule.nesterov else buffer
        if rule.row_normalize:
            u = u / u.norm(dim=-1, keepdim=True).clamp(min=ROW_EPS)
        u = newton_schulz_ref(u.to(bank.update.dtype), rule.coefficients, eps=rule.eps)
        bank.update.copy_(u.masked_fill(~taken, 0.0))
        if bank.param is not None:
            muon_apply_ref(
                [bank.param],
                [bank.update],
                hyper,
                lr_scales=[bank.lr_scale],
                averages=[bank.average] if bank.average is not None else [],
                bases=[bank.base] if bank.base is not None else [],
                velocities=[bank.velocity] if bank.velocity is not None else [],
                cautious=rule.cautious,
            )


def muon_apply(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    hyper: Tensor,
    *,
    lr_scales: Sequence[float],
    averages: Sequence[Tensor] = (),
    bases: Sequence[Tensor] = (),
    velocities: Sequence[Tensor] = (),
    cautious: bool = False,
) -> None:
    """Decay and update parameters, move their averages, and with bases keep them ahead, all in place.

        param <- param (1 - lr wd) - lr lr_scale update (cautious: no decay where param update <= 0)
        average <- average + average_weight (param - average)
        with bases, EMA-Nesterov, where x is param:
        velocity <- velocity + velocity_weight (x - base - velocity)
        base <- x;   param <- x + shift velocity

    This is the second half of `muon_step`, for updates that were gathered from other ranks. If grad_scale is
    not finite, it does nothing but, with bases, param <- base + shift velocity. Equals `muon_apply_ref` on
    the same tensors. CUDA needs one launch for up to 80 tensors, 64 with bases.

    Args:
        params: float32, any shape, contiguous.
        updates: float32 or bfloat16, of the shapes of the parameters.
        hyper: as in `muon_step`.
        lr_scales: factor on the learning rate, one per parameter.
        averages: float32, of the shapes of the parameters; an empty sequence if there are no averages.
        bases, velocities: the same, either both or none.
        cautious: decay only the parameters that the update moves towards 0 as well.

    Raises:
        ValueError, TypeError: as in `muon_step`.
    """
    changed = [*params, *averages, *bases, *velocities]
    refuse_recording("muon_apply", [*changed, *updates])
    torch.ops.pgolf.muon_apply(
        list(params),
        list(updates),
        list(averages),
        list(bases),
        list(velocities),
        hyper,
        [float(s) for s in lr_scales],
        cautious,
    )
    increment_version(changed)


def muon_apply_ref(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    hyper: Tensor,
    *,
    lr_scales: Sequence[float],
    averages: Sequence[Tensor] = (),
    bases: Sequence[Tensor] = (),
    velocities: Sequence[Tensor] = (),
    cautious: bool = False,
) -> None:
    """Compute `muon_apply` with PyTorch operators; a step that is skipped has rates and weights of 0."""
    taken = hyper[GRAD_SCALE].isfinite()
    lr, weight = hyper[LR] * taken, hyper[AVERAGE_WEIGHT] * taken
    for i, param in enumerate(params):
        update = updates[i].to(param.dtype)
        change = (lr * lr_scales[i] * update).masked_fill_(~taken, 0.0)
        decay = lr * hyper[WEIGHT_DECAY]
        param.mul_(1 - (decay * (param * update > 0) if cautious else decay)).sub_(change)
        if averages:
            averages[i].lerp_(param, weight.to(param.dtype))
        if bases:
            move_ahead_ref(param, bases[i], velocities[i], hyper)


def move_ahead_ref(param: Tensor, base: Tensor, velocity: Tensor, hyper: Tensor) -> None:
    """Compute with PyTorch operators what `muon_apply` and `adam_step` do for EMA-Nesterov.

    `param` holds what the optimizer made of it, which is not used if the step is skipped.
    """
    taken = hyper[GRAD_SCALE].isfinite()
    x = torch.where(taken, param, base)
    velocity.lerp_(x - base, (hyper[VELOCITY_WEIGHT] * taken).to(x))
    base.copy_(x)
    param.copy_(x + hyper[SHIFT] * velocity)


def _all_or_none(tensors: list[Tensor | None], what: str) -> list[Tensor]:
    found = [t for t in tensors if t is not None]
    if found and len(found) != len(tensors):
        raise ValueError(
            f"muon_step: {what} must be given in all banks or in none, got {len(found)} of {len(tensors)}"
        )
    return found


def _fake_step(
    _params: list[Tensor],
    _grads: list[Tensor],
    _momenta: list[Tensor],
    _updates: list[Tensor],
    _averages: list[Tensor],
    _bases: list[Tensor],
    _velocities: list[Tensor],
    _hyper: Tensor,
    _lr_scales: list[float],
    _coefficients: list[float],
    _eps: float,
    _nesterov: bool,
    _lerp: bool,
    _row_normalize: bool,
    _cautious: bool,
    _algorithm: int,
) -> None:
    return None


def _fake_apply(
    _params: list[Tensor],
    _updates: list[Tensor],
    _averages: list[Tensor],
    _bases: list[Tensor],
    _velocities: list[Tensor],
    _hyper: Tensor,
    _lr_scales: list[float],
    _cautious: bool,
) -> None:
    return None


torch.library.register_fake("pgolf::muon_step", _fake_step)
torch.library.register_fake("pgolf::muon_apply", _fake_apply)
