"""Schedules as functions of `frac`, the fraction of the run: 0 at its start and 1 at its end.

The fraction is that of the budget, not of a number of steps, because a run that the clock stops does not know
its number of steps. All ranks must pass the same `frac` (see `Dist.share`). A clock can give a `frac` a
little outside [0, 1], which is replaced by the nearer end.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pgolf.config import MuonConfig, OptimConfig, TrainConfig

EMBED_START = 0.1
"""Factor with which the warm-up of the embedding's learning rate begins: the first of ten steps."""


class Multipliers(NamedTuple):
    """Factors on the learning rates."""

    muon: float
    embed: float
    scalar: float


def lr_multiplier(frac: float, config: OptimConfig, warmdown: float = -1.0) -> float:
    """Return the factor on the learning rate of the banks, or of another group with its own `warmdown`.

    It is 1 until the warm-down starts at 1 - warmdown, then max(((1 - frac) / warmdown)^warmdown_power,
    min_lr). There is no warm-up of this learning rate.

    Args:
        warmdown: of the group; -1: that of `config`.
    """
    frac, last = _clamp(frac), config.warmdown if warmdown < 0 else warmdown
    if last == 0 or frac < 1 - last:
        return 1.0
    return max(math.pow((1 - frac) / last, config.warmdown_power), config.min_lr)


def lr_multipliers(frac: float, config: OptimConfig) -> Multipliers:
    """Return the factors on the learning rates of all groups.

    Embedding and scalars have the warm-down of the banks unless they have their own. The factor of the
    embedding is also multiplied by min(1, 0.1 + 0.9 frac / embed_warmup), that of the banks by a line from 1
    at late_from to late_lr at the end of the run.
    """
    adam, muon, rise = config.adam, config.muon, 1.0
    late = max(0.0, _clamp(frac) - muon.late_from) / (1 - muon.late_from) if muon.late_from < 1 else 0.0
    if adam.embed_warmup:
        rise = min(1.0, EMBED_START + (1 - EMBED_START) * _clamp(frac) / adam.embed_warmup)
    return Multipliers(
        (1 + late * (muon.late_lr - 1)) * lr_multiplier(frac, config),
        rise * lr_multiplier(frac, config, adam.embed_warmdown),
        lr_multiplier(frac, config, adam.scalar_warmdown),
    )


def ema_nesterov_shift(frac: float, config: OptimConfig) -> float:
    """Return how many velocities ahead of the weights the step after one at `frac` is made.

    It is ema_nesterov times the multiplier of the banks at `frac`, within the window, and 0 outside.
    """
    inside = config.ema_nesterov_from <= _clamp(frac) < config.ema_nesterov_until
    return config.ema_nesterov * lr_multiplier(frac, config) if inside else 0.0


def muon_momentum(frac: float, config: MuonConfig, delta: float | None = None) -> float:
    """Return Muon's momentum.

    It is linear from momentum_start to momentum over momentum_warmup, then constant, then linear to
    momentum_end over momentum_cooldown. Where the two overlap, the cool-down holds. With momentum_age,
    momentum is 1 - 1 / (1 + age N) = age / (age + delta) instead: gradients in a sum with the decay mu have a
    mean age of mu / (1 - mu) steps, and N = 1 / delta steps of the present length are a whole run.

    Args:
        delta: fraction of the run that the step before took; None (or 0) if it is not known, as in the first
            step, where the momentum has no effect: then momentum itself.
    """
    frac, momentum = _clamp(frac), config.momentum
    if config.momentum_age and delta:
        momentum = config.momentum_age / (config.momentum_age + delta)
    if config.momentum_cooldown and frac > 1 - config.momentum_cooldown:
        fall = (frac - 1 + config.momentum_cooldown) / config.momentum_cooldown
        return momentum + (config.momentum_end - momentum) * fall
    if frac >= config.momentum_warmup:
        return momentum
    rise = frac / config.momentum_warmup
    return config.momentum_start + (momentum - config.momentum_start) * rise


def slow_decay(config: MuonConfig, delta: float | None) -> float:
    """Return the decay of the slow average of the gradients: age / (age + delta), as in `muon_momentum`.

    Args:
        delta: fraction of the run that the step before took; None (or 0) if it is not known: then 1, which
            leaves the average as it is.
    """
    return config.slow_age / (config.slow_age + delta) if delta else 1.0


def loop_on(frac: float, config: OptimConfig) -> bool:
    """Return whether depth recurrence is on: frac >= recurrence_at."""
    return _clamp(frac) >= config.recurrence_at


def context_at(frac: float, config: TrainConfig) -> int | None:
    """Return the longest segment of a step by context_stages; None: model.max_context."""
    return next((length for length, end in config.stages if _clamp(frac) < end), None)


def fake_quant_on(frac: float, config: TrainConfig) -> bool:
    """Return whether forward passes round the matrices: frac >= fake_quant_from > 0."""
    return 0 < config.fake_quant_from <= _clamp(frac)


def swa_decay(frac: float, step: int, taken: int, config: OptimConfig) -> float | None:
    """Return the decay of the weight average in a step of average=swa; None: the average stays.

    A step takes a snapshot if swa_every divides the number of steps that are then done, from swa_from on.
    After n snapshots the average is their mean, so the next one has the decay n / (n + 1). Until there is
    one, the average is the weights: a run that ends before has lost nothing.

    Args:
        frac: fraction of the run at the start of the step.
        step: number of steps before it.
        taken: snapshots before it.
    """
    if took_snapshot(frac, step, config):
        return taken / (taken + 1)
    return None if taken else 0.0


def took_snapshot(frac: float, step: int, config: OptimConfig) -> bool:
    """Return whether a step of average=swa takes a snapshot; arguments as `swa_decay`."""
    return config.average == "swa" and _clamp(frac) >= config.swa_from and (step + 1) % config.swa_every == 0


def ema_decay(delta_frac: float, config: OptimConfig) -> float:
    """Return the decay of the weight average for a step that took `delta_frac` of the run.

    It is exp(-delta_frac / ema_horizon), so that the average covers the same fraction of a short and of a
    long run; steps of 1 / 4,931 of the run and the horizon 0.058 give the 0.9965 of PR #1855. If ema_horizon
    is 0, the decay is 0 and the average equals the weights.

    Raises:
        ValueError: delta_frac is negative or NaN.
    """
    if not delta_frac >= 0:
        raise ValueError(f"ema_decay: delta_frac must be >= 0, got {delta_frac}")
    return math.exp(-delta_frac / config.ema_horizon) if config.ema_horizon > 0 else 0.0


def _clamp(frac: float) -> float:
    if math.isnan(frac):
        raise ValueError("schedule: frac must be a number in [0, 1], got nan")
    return min(max(frac, 0.0), 1.0)
