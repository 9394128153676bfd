"""The clock of a run: one budget, read by rank 0 and shared, so that all ranks see the same fraction.

Training may use `seconds - quantize_reserve`; learning rate, momentum, loop switch and stop are functions
of the fraction of that which is gone. With `seconds = 0` the fraction counts steps instead (deterministic
comparisons).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from pgolf.config import TrainConfig
from pgolf.dist import Dist
from pgolf.errors import UserError


@dataclass(frozen=True)
class Tick:
    """What every rank agrees on before a step."""

    step: int
    elapsed: float
    """Seconds since the clock started, on rank 0."""
    frac: float
    """Fraction of the run that is gone, in [0, 1]."""
    stop: bool
    """Do not start this step."""
    last_loss: float
    """Rank 0's loss of the previous step, nats per token; NaN before the first."""

    left: float = math.nan
    """Seconds of training time left; NaN without a clock."""
    signal: int = 0
    """A signal that asked some rank to stop; 0: none did."""
    writers: tuple[int, int] = (0, 0)
    """Lowest and highest state of the ranks' checkpoint writers."""


def training_seconds(config: TrainConfig) -> float:
    """Return the seconds that training itself may use.

    Raises:
        ValueError: the reserve is not known yet (`Run` measures it), or leaves no time.
    """
    if config.quantize_reserve is None:
        raise UserError("train.quantize_reserve is not set; measure it before the clock starts")
    left = config.seconds - config.quantize_reserve
    if config.seconds and left <= 0:
        raise UserError(
            f"calibration and quantization need {config.quantize_reserve:.1f} s, no time is left to train "
            f"in train.seconds={config.seconds:g}; raise it or lower quant.calibration_batches"
        )
    return left


class Clock:
    """Counts from `start` and decides, on rank 0, when the run is over."""

    def __init__(
        self, config: TrainConfig, dist: Dist, *, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._config, self._dist, self._now = config, dist, now
        self._begun = self._previous = 0.0
        self._longest_recent = 0.0

    def start(self, at: float = 0.0) -> None:
        """Set the clock to `at` seconds: 0, or what an interrupted run had used."""
        self._previous = self._now()
        self._begun = self._previous - at

    @property
    def elapsed(self) -> float:
        """Seconds since `start`, this rank's own reading."""
        return self._now() - self._begun

    def leave_out(self, seconds: float) -> None:
        """Do not count these seconds, which were spent since the last tick, as part of a step's time."""
        self._previous += seconds

    def tick(self, step: int, *, last_loss: float, signal: int = 0, writer: int = 0) -> Tick:
        """Return the decision for `step`; every rank calls it and gets rank 0's values.

        `signal` and `writer` are this rank's own; all ranks learn the highest signal, and the lowest and
        highest state of the writers. The run stops when the next step, taken to last as long as the previous
        one, would end after the budget.
        """
        config, now = self._config, self._now()
        elapsed, duration = now - self._begun, now - self._previous
        self._previous = now
        frac, stop = 0.0, False
        if config.steps:
            frac, stop = step / config.steps, step >= config.steps
        if config.seconds:
            budget = training_seconds(config)
            frac = max(frac, elapsed / budget)
            stop = stop or elapsed + (duration if step else 0.0) > budget
        rows = self._dist.gather([elapsed, min(frac, 1.0), float(stop), last_loss, signal, writer])
        shared = rows[0]
        left = training_seconds(config) - shared[0] if config.seconds else math.nan
        states = [int(row[5]) for row in rows]
        return Tick(
            step,
            elapsed=shared[0],
            frac=shared[1],
            stop=bool(shared[2]),
            last_loss=shared[3],
            left=left,
            signal=int(max(row[4] for row in rows)),
            writers=(min(states), max(states)),
        )
