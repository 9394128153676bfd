"""Where the training loop is, and what it has measured: plain data that checkpoints and summaries keep."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from pgolf.errors import UserError
from pgolf.report.summary import Training
from pgolf.train.origin import Origin


@dataclass(frozen=True)
class Position:
    """Where the loop is between two steps, as a checkpoint's index keeps it: plain JSON data.

    With the tensors of `Trainer.parts` it is all that the following steps depend on.
    """

    steps: int = 0
    tokens: int = 0
    loop_step: int | None = None
    """First step with depth recurrence on; None: there was none yet."""
    last_loss: float = math.nan
    """Of the last step, nats per token."""
    elapsed: float = 0.0
    """Seconds on the clock."""
    frac: float | None = None
    """Fraction of the run at the start of the last step; None: there was none."""
    skipped: int = 0
    """Steps that changed nothing, because their gradient was not finite."""
    snapshots: int = 0
    """Snapshots of the weights in the average, with optim.average=swa."""
    row: dict[str, Any] = field(default_factory=dict)
    """The line of metrics.jsonl that still waits for its gradient norm, see `StepLog`."""

    @classmethod
    def beginning(cls, origin: Origin) -> Position:
        """Return the position before the first step of a run that continues from `origin`."""
        return cls(frac=origin.last, snapshots=origin.taken)

    def to_facts(self) -> dict[str, Any]:
        """Return the fields as strict JSON data (a NaN becomes null)."""
        # Before the first step there is no loss, and JSON has no NaN.
        loss = self.last_loss if math.isfinite(self.last_loss) else None
        return {**vars(self), "last_loss": loss}

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Position:
        """Return the position in a checkpoint's facts.

        Raises:
            UserError: a field is missing or of the wrong type.
        """
        try:
            loss, loop_step, frac = facts["last_loss"], facts["loop_step"], facts["frac"]
            # A clock that ran backwards would give the resumed run time that it does not have.
            if not (math.isfinite(facts["elapsed"]) and facts["elapsed"] >= 0 and facts["steps"] >= 0):
                raise UserError(f"elapsed is {facts['elapsed']}, steps is {facts['steps']}")
            if frac is not None and not 0 <= frac <= 1:
                raise UserError(f"frac is {frac}")
            return cls(
                steps=int(facts["steps"]),
                tokens=int(facts["tokens"]),
                loop_step=None if loop_step is None else int(loop_step),
                last_loss=math.nan if loss is None else float(loss),
                elapsed=float(facts["elapsed"]),
                frac=None if frac is None else float(frac),
                skipped=int(facts["skipped"]),
                snapshots=int(facts.get("snapshots", 0)),  # checkpoints before it was a field have none
                row=dict(facts["row"]),
            )
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"the checkpoint does not say where training was: {type(e).__name__} {e}") from e


@dataclass
class TrainResult:
    """What the loop has measured so far."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """On the clock when the loop ended."""
    loop_step: int | None = None
    """First step with depth recurrence on; None: there was none yet."""
    last_loss: float = math.nan
    """Of the last step, nats per token."""
    step_ms: dict[str, list[float]] = field(default_factory=lambda: {"loop_off": [], "loop_on": []})
    """Milliseconds of every step, by loop mode, without the first step of a mode."""
    optimizer_ms: list[float] = field(default_factory=list)
    """Milliseconds of every optimizer step on rank 0's device, from the end of its backward passes. With
    several ranks this includes the averaging of gradients, none of which is hidden, and the wait for the
    slowest rank."""
    losses: list[float] = field(default_factory=list)
    """Rank 0's loss of every step, nats per token."""
    skipped: int = 0
    """Steps that changed nothing, because their gradient was not finite."""
    snapshots: int = 0
    """Snapshots of the weights in the average, with optim.average=swa."""

    def take_up(self, position: Position, rows: list[dict[str, Any]]) -> None:
        """Become the result of a run that was interrupted at `position`, whose metrics are `rows`."""
        self.steps, self.tokens, self.seconds = position.steps, position.tokens, position.elapsed
        self.loop_step, self.last_loss, self.skipped = (
            position.loop_step,
            position.last_loss,
            position.skipped,
        )
        self.snapshots = position.snapshots
        # The medians of the summary are of all steps, so those of earlier processes are read back.
        for row in [*rows, *([position.row] if position.row else [])]:
            if row.get("loss") is not None and row.get("ms") is not None:
                self.losses.append(row["loss"])
                self.count_ms(int(row["step"]), float(row["ms"]), loop=bool(row["loop"]))

    def count_ms(self, step: int, ms: float, *, loop: bool) -> None:
        """Count the milliseconds of a step, unless it is the first of its mode."""
        # The first step fills caches, and the first one with the loop on replays other graphs: both are
        # slower than the steps whose median is wanted.
        if step and step != self.loop_step:
            self.step_ms["loop_on" if loop else "loop_off"].append(ms)

    def training(self) -> Training:
        """Return what a summary keeps of this."""
        return Training(
            steps=self.steps,
            tokens=self.tokens,
            loop_step=self.loop_step,
            last_loss=self.last_loss if math.isfinite(self.last_loss) else None,
            skipped_steps=self.skipped,
            ms_loop_off=_median(self.step_ms["loop_off"]),
            ms_loop_on=_median(self.step_ms["loop_on"]),
            ms_optimizer=_median(self.optimizer_ms),
            tokens_per_s=self.tokens / max(self.seconds, 1e-9),
        )


def _median(values: list[float]) -> float | None:
    return float(torch.tensor(values).median()) if values else None
