"""What is known of a training step, and when: from the device to the console and metrics.jsonl.

The host never waits for the step that it has just queued. It waits once per step, for the end of the last
forward pass, and queues the next step while the device runs the backward pass and the optimizer:

    device    forward 7 | backward 7, optimizer 7 | forward 8 | backward 8, optimizer 8 | ...
    host            ... | queue 8                 |       ... | queue 9                 |
                        ^ knows loss 7                        ^ knows loss 8
                          and norm 6                            and norm 7

(With several passes per step, the last one's.) So the device has tens of milliseconds of work when the host
begins a step, more than most interruptions of a host take, and the clock is read at the same point of each
step: one backward pass and the optimizer before its end.
The price is that what a step found arrives late: its loss and its end one step later, and what its optimizer
found (gradient norm, whether the step was skipped) two steps later. `DeviceNumbers` carries the numbers to
the host, and `StepLog` holds each step's line until all of it is known.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgolf.config import Config
from pgolf.errors import RanksFailed
from pgolf.log import RunLog
from pgolf.optim.schedule import lr_multipliers, muon_momentum
from pgolf.train.budget import Tick
from pgolf.train.position import TrainResult

MAX_SKIPPED_IN_A_ROW = 2
"""Steps with non-finite gradients, one after another, that end a run: a skipped step changes no weight, so
the next one starts from the weights that just failed, with other text."""

ADVICE = (
    "lower optim.muon.lr or optim.adam.embed_lr, or check the data with `pgolf data inspect`; nothing was "
    "quantized"
)


class Diverged(RanksFailed):
    """The loss or the gradients are not finite: on every rank, with the same words."""


class Known(NamedTuple):
    """What the host knows of the device at the end of a step's forward passes."""

    loss: float
    """Of that step."""
    grad_norm: float
    """Of the step before."""
    skipped: int
    """Steps before that step that were skipped."""


class DeviceNumbers:
    """Three numbers per step on their way from the device to the host, without a stop of the device."""

    def __init__(self, device: torch.device, before: Known) -> None:
        """`before` is what the first `wait` returns."""
        self._cuda = device.type == "cuda"
        # Pinned, or else the copy from the device would wait for everything that is queued.
        self._values = torch.tensor(before, dtype=torch.float32, pin_memory=self._cuda)
        self._event: Any = torch.cuda.Event(blocking=True) if self._cuda else None  # type: ignore[no-untyped-call]

    def send(self, loss: Tensor, grad_norm: Tensor, skipped: Tensor) -> None:
        """Queue the copy; `wait` returns it once the device has come this far."""
        # One copy of three numbers: each `.item()` would be a stop of its own.
        self._values.copy_(torch.stack((loss, grad_norm, skipped)), non_blocking=True)
        if self._event is not None:
            self._event.record()

    def wait(self) -> Known:
        """Wait until the device has finished everything queued before `send`, and return what was sent."""
        if self._event is not None:
            self._event.synchronize()
        loss, grad_norm, skipped = self._values.tolist()
        return Known(loss, grad_norm, int(skipped))


class StepLog:
    """The lines of steps: `begun`, `loss_arrived` one step later, `norm_arrived` another step later.

    Attributes:
        row: the line of metrics.jsonl that waits for its gradient norm; empty: none does.
    """

    def __init__(self, log: RunLog, config: Config, result: TrainResult, row: dict[str, Any]) -> None:
        """Go on with `row`, which an interrupted run left, and keep `result` up to date."""
        self._log, self._config, self._result = log, config, result
        self.row = row
        self._last: tuple[Tick, bool, float | None] | None = None
        self._skipped_in_a_row = 0

    def begun(self, tick: Tick, *, loop: bool, delta: float | None) -> None:
        """Note that step `tick` is queued; the step before took `delta` of the run, None = not known."""
        self._last = (tick, loop, delta)

    def loss_arrived(self, after: Tick) -> None:
        """Print the line of the last step, whose loss and end are known now that the clock shows `after`.

        Raises:
            Diverged: the loss is not finite (on every rank: rank 0's loss is shared).
        """
        if self._last is None:
            return
        (tick, loop, delta), loss = self._last, after.last_loss
        seconds = after.elapsed - tick.elapsed
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {tick.step} ({tick.elapsed:.1f} s); {ADVICE}")
        # From the end of one step's last forward pass to the end of the next one's, as the host saw them: a
        # whole step with its optimizer, without a validation in between.
        self._result.count_ms(tick.step, 1000 * seconds, loop=loop)
        self._result.losses.append(loss)
        self._result.last_loss = loss
        batch, lr = self._config.data.batch_tokens, lr_multipliers(tick.frac, self._config.optim).muon
        self.row = {
            "step": tick.step,
            "loss": loss,
            "elapsed": after.elapsed,
            "ms": 1000 * seconds,
            "frac": tick.frac,
            "lr": lr,
            "momentum": muon_momentum(tick.frac, self._config.optim.muon, delta),
            "loop": loop,
            "tokens": (tick.step + 1) * batch,
        }
        self._log.line(
            f"step {tick.step:5d}  loss {loss:7.4f}  {1000 * seconds:8.1f} ms  "
            f"{batch / seconds / 1e3:8.1f} ktok/s  lr x{lr:.3f}  {'loop  ' if loop else ''}"
            f"{self._to_go(tick, after)}"
        )

    def _to_go(self, tick: Tick, after: Tick) -> str:
        if math.isfinite(after.left):
            return f"{after.left:6.1f} s left"
        return f"{self._config.train.steps - tick.step - 1} steps left"

    def norm_arrived(self, grad_norm: float, skipped: int) -> None:
        """Write the line that waits, if any; say so if its step was skipped.

        Raises:
            Diverged: the last steps were all skipped (the same on every rank).
        """
        if not self.row:
            return
        # Taken before it is written: what raises below calls this once more, and must not write it twice.
        row, self.row = self.row, {}
        self._log.metric(**row, grad_norm=grad_norm, skipped=skipped)
        # The device counts skipped steps; one more than before means that this step was one.
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped > self._result.skipped else 0
        self._result.skipped = skipped
        if not self._skipped_in_a_row:
            return
        self._log.line(
            f"step {row['step']:5d}  the gradient's norm is {grad_norm}: step skipped, {skipped} so far"
        )
        if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise Diverged(
                f"the loss is {row['loss']:.4f} at step {row['step']}, but the gradient was not finite in "
                f"{self._skipped_in_a_row} steps in a row: the run has diverged; {ADVICE}"
            )
