"""Schedules at their corners, compared with values computed by hand."""

import math

import pytest

from pgolf.config import AdamConfig, Config, MuonConfig, OptimConfig, TrainConfig
from pgolf.optim.schedule import (
    context_at,
    ema_decay,
    ema_nesterov_shift,
    fake_quant_on,
    loop_on,
    lr_multiplier,
    lr_multipliers,
    muon_momentum,
    slow_decay,
    swa_decay,
    took_snapshot,
)

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


def test_swa_is_the_mean_of_the_snapshots_and_before_them_the_weights():
    config = OptimConfig(average="swa", swa_from=0.5, swa_every=4)
    steps, average, taken, kept = 40, -1.0, 0, []
    for step in range(steps):
        weight = math.sin(step)  # after this step
        decay = swa_decay(step / steps, step, taken, config)
        if decay is not None:
            average = decay * average + (1 - decay) * weight
        if took_snapshot(step / steps, step, config):
            taken += 1
            kept.append(weight)
        assert average == pytest.approx(sum(kept) / len(kept) if kept else weight)
    assert kept == [math.sin(step) for step in (23, 27, 31, 35, 39)]  # 24, 28, ... steps are then done
    assert not took_snapshot(1.0, 3, OptimConfig())  # the EMA takes none


def test_fake_quantization_begins_at_its_fraction():
    half, never = TrainConfig(fake_quant_from=0.5), TrainConfig()
    assert [fake_quant_on(f, half) for f in (0.0, 0.49, 0.5, 1.0, 1.2)] == [False, False, True, True, True]
    assert not fake_quant_on(1.0, never)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"swa_every": 0}, r"optim\.swa_every must be >= 1 steps, got 0"),
        ({"swa_from": 1.5}, r"optim\.swa_from is a fraction in \[0, 1\], got 1\.5"),
    ],
)
def test_settings_of_averaging_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**change)
    with pytest.raises(ValueError, match=r"train\.fake_quant_from is a fraction in \[0, 1\], got 1\.1"):
        TrainConfig(fake_quant_from=1.1)


def test_the_context_follows_its_stages():
    config = TrainConfig(context_stages="1024@0.1,2048@0.7")
    assert [context_at(f, config) for f in (0.0, 0.09)] == [1024, 1024]
    assert [context_at(f, config) for f in (0.1, 0.69)] == [2048, 2048]
    assert [context_at(f, config) for f in (0.7, 1.0, 1.3)] == [None, None, None]
    assert context_at(0.0, TrainConfig()) is None
    # The end of a run may come a little late: the last stage then goes on.
    assert context_at(0.999, TrainConfig(context_stages="64@1")) == 64


@pytest.mark.parametrize(
    "text", ["1024", "1024@x", "@0.5", "1024@0.1,", "8@0.5,4@0.5", "8@0", "8@1.1", "0@0.5", "8@nan"]
)
def test_stages_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match=r"train\.context_stages"):
        TrainConfig(context_stages=text)
    Config(train=TrainConfig(context_stages="2048@0.5"))
    with pytest.raises(ValueError, match=r"must not be above model\.max_context=2048, got \[2049\]"):
        Config(train=TrainConfig(context_stages="2049@0.5"))


@pytest.mark.parametrize(
    ("frac", "muon", "embed", "scalar"),
    # Banks 0.8 from 0.2 on, embedding 0.4 from 0.6 on, scalars as the banks; floor 0.05 for all.
    [(0.0, 1, 1, 1), (0.2, 1, 1, 1), (0.6, 0.5, 1, 0.5), (0.8, 0.25, 0.5, 0.25), (0.99, 0.05, 0.05, 0.05)],
)
def test_groups_may_have_warmdowns_of_their_own(frac, muon, embed, scalar):
    config = OptimConfig(warmdown=0.8, min_lr=0.05, adam=AdamConfig(embed_warmdown=0.4))
    assert lr_multipliers(frac, config) == pytest.approx((muon, embed, scalar), abs=1e-12)
    scalars = OptimConfig(warmdown=0.8, min_lr=0.05, adam=AdamConfig(scalar_warmdown=0.4))
    assert lr_multipliers(frac, scalars).scalar == pytest.approx(embed, abs=1e-12)
    none = OptimConfig(warmdown=0.8, min_lr=0.05, adam=AdamConfig(embed_warmdown=0.0))
    assert lr_multipliers(frac, none).embed == 1.0


def test_without_their_own_settings_all_groups_have_one_factor():
    for frac in (0.0, 0.001, 0.3, 0.9, 1.0):
        assert set(lr_multipliers(frac, RECORD)) == {lr_multiplier(frac, RECORD)}


@pytest.mark.parametrize(("step", "expected"), [(0, 0.1), (1, 0.19), (5, 0.55), (9, 0.91), (10, 1), (11, 1)])
def test_the_embedding_warms_up_alone(step, expected):
    config = OptimConfig(adam=AdamConfig(embed_warmup=0.004))
    found = lr_multipliers(step / 2500, config)
    assert found.embed == pytest.approx(expected, abs=1e-12) and found.muon == found.scalar == 1


@pytest.mark.parametrize(
    ("frac", "expected"), [(0.1, 0), (0.16, 0.6 * 0.84 / 0.85), (0.575, 0.3), (0.76, 0), (1.0, 0)]
)
def test_shift_of_ema_nesterov_follows_the_rate_inside_its_window(frac, expected):
    assert ema_nesterov_shift(frac, OptimConfig(ema_nesterov=0.6)) == pytest.approx(expected, abs=1e-12)
    assert ema_nesterov_shift(frac, RECORD) == 0


@pytest.mark.parametrize(
    ("frac", "expected"), [(0.1, 1), (0.2, 1), (0.6, 0.5**1.2), (0.84, 0.2**1.2), (0.99, 0.1)]
)
def test_the_warmdown_has_a_power(frac, expected):
    config = OptimConfig(warmdown=0.8, warmdown_power=1.2)
    assert lr_multiplier(frac, config) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("frac", "factor"), [(0.0, 1), (0.6, 1), (0.8, 0.85), (1.0, 0.7), (1.2, 0.7)])
def test_only_the_rate_of_the_banks_has_a_late_factor(frac, factor):
    found = lr_multipliers(frac, OptimConfig(muon=MuonConfig(late_lr=0.7)))
    plain = lr_multiplier(frac, RECORD)
    assert found == pytest.approx((factor * plain, plain, plain), abs=1e-12)
    never = lr_multipliers(frac, OptimConfig(muon=MuonConfig(late_lr=0.7, late_from=1.0)))
    assert never.muon == plain


@pytest.mark.parametrize("steps", [10, 2425, 4931])
def test_momentum_by_age_remembers_the_same_fraction_of_any_run(steps):
    """Gradients k steps old have the weight mu^k: their mean age is the setting, whatever the steps."""
    config = MuonConfig(momentum_age=0.0065, momentum_warmup=0.0)
    mu = muon_momentum(0.5, config, 1 / steps)
    weights = [mu**k for k in range(4000)]
    mean = sum(k * w for k, w in enumerate(weights)) / sum(weights)
    assert mean / steps == pytest.approx(0.0065, rel=1e-6)
    assert muon_momentum(0.5, config) == muon_momentum(0.5, config, 0.0) == 0.97
    assert muon_momentum(0.5, MuonConfig(), 1 / steps) == 0.97


def test_the_decay_of_the_slow_average_has_its_mean_age():
    config = MuonConfig(slow_age=0.02)
    assert slow_decay(config, 0.001) == pytest.approx(20 / 21)  # a mean age of 20 steps of a thousandth
    assert slow_decay(config, None) == slow_decay(config, 0.0) == 1.0
    assert slow_decay(MuonConfig(), 0.001) == 0.0


def test_momentum_by_age_takes_the_place_of_momentum_in_its_schedule():
    config = MuonConfig(momentum_age=0.03, momentum_cooldown=0.2, momentum_end=0.5)
    assert muon_momentum(0.5, config, 0.01) == 0.75
    assert muon_momentum(0.15, config, 0.01) == pytest.approx((0.92 + 0.75) / 2)
    assert muon_momentum(0.9, config, 0.01) == pytest.approx((0.75 + 0.5) / 2)


@pytest.mark.parametrize(("frac", "expected"), [(0.15, 0.945), (0.92, 0.97), (0.965, 0.935), (1.0, 0.9)])
def test_momentum_falls_at_the_end(frac, expected):
    config = MuonConfig(momentum_cooldown=0.07, momentum_end=0.9)
    assert muon_momentum(frac, config) == pytest.approx(expected, abs=1e-12)
