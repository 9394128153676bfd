"""What a run does at which fraction of itself: pure functions of `frac`, 0 at the start and 1 at the end.

Keyed on the fraction of the budget, not on the step: in a run that the clock stops, a schedule keyed on steps
never reaches its end. All ranks must pass the same `frac` (see `Dist.share`). A `frac` a little outside
[0, 1], which a clock can give, counts as the nearer end.
"""

from __future__ import annotations

import math

from pgolf.config import MuonConfig, OptimConfig


def lr_multiplier(frac: float, config: OptimConfig) -> float:
    """Return the factor on every learning rate.

    1 before the warm-down starts at 1 - warmdown, then max((1 - frac) / warmdown, min_lr). No warm-up.
    """
    frac = _clamp(frac)
    if config.warmdown == 0 or frac < 1 - config.warmdown:
        return 1.0
    return max((1 - frac) / config.warmdown, config.min_lr)


def muon_momentum(frac: float, config: MuonConfig) -> float:
    """Return Muon's momentum: linear from momentum_start to momentum over momentum_warmup, then constant."""
    frac = _clamp(frac)
    if frac >= config.momentum_warmup:
        return config.momentum
    rise = frac / config.momentum_warmup
    return config.momentum_start + (config.momentum - config.momentum_start) * rise


def loop_on(frac: float, config: OptimConfig) -> bool:
    """Return whether depth recurrence is on: frac >= recurrence_at."""
    return _clamp(frac) >= config.recurrence_at


def ema_decay(delta_frac: float, config: OptimConfig) -> float:
    """Return the decay of the weight average for a step that took `delta_frac` of the run.

    exp(-delta_frac / ema_horizon), so that the average spans the same part of a short and of a long run;
    steps of 1 / 4,931 and the horizon 0.058 give PR #1855's 0.9965. 0 (the average is the weights) if
    ema_horizon is 0.

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
