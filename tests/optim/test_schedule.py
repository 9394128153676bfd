"""Schedules at their corners, by hand-computed values."""

import math

import pytest

from pgolf.config import MuonConfig, OptimConfig
from pgolf.optim.schedule import ema_decay, loop_on, lr_multiplier, muon_momentum

RECORD = OptimConfig()


@pytest.mark.parametrize(
    ("frac", "expected"),
    # warmdown 0.85, floor 0.1: decay starts at 0.15 and reaches the floor at 0.915.
    [
        (0, 1),
        (0.15, 1),
        (0.575, 0.5),
        (0.9, 0.1 / 0.85),
        (0.915, 0.1),
        (0.96, 0.1),
        (1, 0.1),
        (1.2, 0.1),
        (-0.1, 1),
    ],
)
def test_lr_multiplier_matches_hand_values(frac, expected):
    assert lr_multiplier(frac, RECORD) == pytest.approx(expected, abs=1e-12)


def test_lr_multiplier_without_warmdown_is_one_to_the_end():
    config = OptimConfig(warmdown=0.0, min_lr=0.0)
    assert [lr_multiplier(f, config) for f in (0, 0.5, 1)] == [1, 1, 1]


def test_lr_multiplier_without_floor_reaches_zero():
    assert lr_multiplier(1.0, OptimConfig(warmdown=1.0, min_lr=0.0)) == 0
    assert lr_multiplier(0.25, OptimConfig(warmdown=1.0, min_lr=0.0)) == 0.75


@pytest.mark.parametrize(
    ("frac", "expected"), [(0, 0.92), (0.15, 0.945), (0.3, 0.97), (0.31, 0.97), (1, 0.97)]
)
def test_momentum_rises_linearly_then_stays(frac, expected):
    assert muon_momentum(frac, MuonConfig()) == pytest.approx(expected, abs=1e-12)


def test_momentum_without_warmup_is_constant():
    assert muon_momentum(0.0, MuonConfig(momentum_warmup=0.0)) == 0.97


def test_loop_switches_at_its_fraction():
    assert [loop_on(f, RECORD) for f in (0, 0.3499, 0.35, 1)] == [False, False, True, True]
    assert loop_on(0.0, OptimConfig(recurrence_at=0.0))


def test_ema_decay_gives_the_records_value_for_its_step():
    assert ema_decay(1 / 4931, RECORD) == pytest.approx(0.9965, abs=2e-5)


def test_ema_decay_depends_on_the_time_passed_not_on_the_number_of_steps():
    assert ema_decay(0.01, RECORD) ** 3 == pytest.approx(ema_decay(0.03, RECORD), rel=1e-12)
    assert ema_decay(0.0, RECORD) == 1
    assert ema_decay(0.058, RECORD) == pytest.approx(math.exp(-1))


def test_ema_decay_without_horizon_copies_the_weights():
    assert ema_decay(0.01, OptimConfig(ema_horizon=0.0)) == 0


def test_bad_fractions_are_refused():
    with pytest.raises(ValueError, match="frac must be a number in \\[0, 1\\], got nan"):
        lr_multiplier(math.nan, RECORD)
    for bad in (-0.1, math.nan):
        with pytest.raises(ValueError, match=f"delta_frac must be >= 0, got {bad}"):
            ema_decay(bad, RECORD)
