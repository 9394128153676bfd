"""The clock: fractions, stopping before the budget is overrun, one decision for all ranks."""

from dataclasses import replace

import pytest

from pgolf.config import TrainConfig
from pgolf.train.budget import Clock, training_seconds


class FakeDist:
    """Rank 0's values reach everybody; `override` plays the part of another rank listening."""

    def __init__(self, override: list[float] | None = None) -> None:
        self.override = override

    def gather(self, values: list[float]) -> list[list[float]]:
        return [(self.override or values[:4]) + values[4:], values]


class FakeTime:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def clock_at(config: TrainConfig) -> tuple[Clock, FakeTime]:
    time = FakeTime()
    clock = Clock(config, FakeDist(), now=time)
    clock.start()
    return clock, time


def test_fraction_counts_training_time_without_the_quantization_reserve():
    config = TrainConfig(seconds=110.0, quantize_reserve=10.0)
    clock, time = clock_at(config)
    assert clock.tick(0, last_loss=1.0).frac == 0.0
    time.now += 25.0
    tick = clock.tick(1, last_loss=1.0)
    assert tick.frac == 0.25 and tick.elapsed == 25.0 and not tick.stop
    assert tick.left == 75.0


def test_run_stops_before_a_step_that_would_overrun_the_budget():
    config = TrainConfig(seconds=100.0, quantize_reserve=0.0)
    clock, time = clock_at(config)
    steps = 0
    while not clock.tick(steps, last_loss=1.0).stop:
        time.now += 9.0
        steps += 1
    assert steps == 11 and clock.elapsed <= training_seconds(config)


def test_work_that_is_queued_counts_when_a_step_is_begun():
    """The clock is read 3 s before each step of 9 s ends."""
    config = TrainConfig(seconds=100.0, quantize_reserve=0.0)
    clock, time = clock_at(config)
    steps = 0
    while not clock.tick(steps, last_loss=1.0, ahead=1 / 3).stop:
        time.now += 9.0 if steps else 6.0
        steps += 1
    assert steps == 11 and clock.elapsed + 3.0 == 99.0


def test_fixed_steps_count_steps_and_ignore_the_time():
    clock, time = clock_at(TrainConfig(seconds=0.0, steps=4))
    fractions = []
    for step in range(5):
        time.now += 1e6
        tick = clock.tick(step, last_loss=1.0)
        fractions.append(tick.frac)
        assert tick.stop == (step == 4)
    assert fractions == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_every_rank_obeys_the_values_of_rank_0():
    clock = Clock(TrainConfig(quantize_reserve=7.0), FakeDist([17.0, 0.5, 1.0, 2.5]), now=FakeTime())
    clock.start()
    tick = clock.tick(3, last_loss=99.0)
    assert (tick.elapsed, tick.frac, tick.stop, tick.last_loss) == (17.0, 0.5, True, 2.5)


def test_a_run_without_an_end_is_refused():
    with pytest.raises(ValueError, match="the run would never stop"):
        replace(TrainConfig(), seconds=0.0)
    with pytest.raises(ValueError, match="leaves no time to train"):
        TrainConfig(seconds=10.0, quantize_reserve=10.0)
