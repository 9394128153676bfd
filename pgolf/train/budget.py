"""The clock of a run: rank 0 reads it and shares what it reads, so that all ranks see the same fraction.

The budget of training is `seconds - quantize_reserve`. Learning rate, momentum, the switch of depth
recurrence and the end of training are functions of the fraction of the budget that is gone. With
`seconds = 0` the fraction counts steps instead, so that a run can be repeated exactly. A run that continues
another one, or that ends before its schedules do, has a part of the fractions (`Origin`, train.until).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from pgolf.config import TrainConfig
from pgolf.dist import Dist
from pgolf.errors import UserError
from pgolf.train.origin import Origin


@dataclass(frozen=True)
class Tick:
    """What all ranks know before a step, the same on each of them."""

    step: int
    elapsed: float
    """Seconds since the clock started, on rank 0."""
    frac: float
    """Fraction of the schedules that is gone, in [0, 1]."""
    stop: bool
    """Whether training ends before this step."""
    last_loss: float
    """Rank 0's loss of the previous step, nats per token; NaN before the first."""

    left: float = math.nan
    """Seconds of training time that are left; NaN without a clock."""
    signal: int = 0
    """Number of a signal that asked some rank to stop; 0: none did."""
    writers: tuple[int, int] = (0, 0)
    """Lowest and highest state of the ranks' checkpoint writers."""


def training_seconds(config: TrainConfig) -> float:
    """Return the seconds that training itself may use.

    Raises:
        UserError: the reserve is not known yet (`Run` measures it), or leaves no time.
    """
    if config.quantize_reserve is None:
        # The run measures it before it makes a clock; this is for programs that make one by themselves.
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
        self,
        config: TrainConfig,
        dist: Dist,
        *,
        origin: Origin = Origin(),  # noqa: B008 - frozen
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config, self._dist, self._origin, self._now = config, dist, origin, now
        self._begun = self._previous = 0.0
        self._longest_recent = 0.0

    def start(self, at: float = 0.0) -> None:
        """Set the clock to `at` seconds: 0, or what an interrupted run had used."""
        # The first tick measures from here, but no step has ended yet: `tick` knows that by the step number.
        self._previous = self._now()
        self._begun = self._previous - at

    @property
    def elapsed(self) -> float:
        """Seconds since `start`, this rank's own reading."""
        return self._now() - self._begun

    def leave_out(self, seconds: float) -> None:
        """Do not count these seconds, which were spent since the last tick, as part of a step's time."""
        self._previous += seconds

    def tick(
        self, step: int, *, last_loss: float, ahead: float = 0.0, signal: int = 0, writer: int = 0
    ) -> Tick:
        """Return the decision for `step`; every rank calls it and gets rank 0's values.

        Args:
            ahead: how much of the step before is queued on the device and not done, as a fraction of a step.
            signal: the signal that this rank got, 0: none. All ranks learn the highest.
            writer: state of this rank's checkpoint writer. All ranks learn the lowest and the highest.
        """
        config, now = self._config, self._now()
        elapsed, duration = now - self._begun, now - self._previous
        self._previous = now
        done, stop = Fraction(0), False
        if config.steps:
            done, stop = Fraction(step, config.steps), step >= config.steps
        if config.seconds:
            budget = training_seconds(config)
            # Where both are limited, the limit that comes first counts: the learning rate must have fallen
            # by then.
            done = max(done, Fraction(elapsed / budget))
            # The next step is taken to last as long as the one before. One that would end after the budget
            # is not begun, so that the seconds of the reserve are whole.
            stop = stop or elapsed + (duration * (1 + ahead) if step else 0.0) > budget
        # One collective for everything. The clocks of two hosts differ; only rank 0's decides, or one rank
        # would stop a step before another one, which would wait for it in that step's collectives.
        frac = float(self._origin.at(min(done, Fraction(1)), config.until))
        rows = self._dist.gather([elapsed, frac, float(stop), last_loss, signal, writer])
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
