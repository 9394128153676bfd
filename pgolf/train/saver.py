"""When checkpoints are taken: every so many seconds of the clock, when a signal asks the run to stop, and, as
snapshots that stay, at chosen fractions of the schedules.
"""

from __future__ import annotations

import math

from pgolf.log import RunLog
from pgolf.train.budget import Tick
from pgolf.train.checkpoint import FAILED, IDLE, SNAPSHOTS, WRITTEN, Checkpointer
from pgolf.train.position import Position
from pgolf.train.signals import Signals
from pgolf.train.snapshot import Snapshots


class Saver:
    """Decides on checkpoints from what all ranks know (`Tick`), so that all take the same ones.

    Attributes:
        signals: asked before each step.
    """

    def __init__(
        self,
        writer: Checkpointer,
        signals: Signals,
        log: RunLog,
        *,
        every_s: float,
        began: float = 0.0,
        snapshots: Snapshots | None = None,
    ) -> None:
        """Take one every `every_s` seconds of the clock, which shows `began`; 0: only on a signal."""
        self.signals = signals
        self._writer, self._log, self._every_s, self._last = writer, log, every_s, began
        self._snapshots, self._keeping = snapshots, False
        if every_s or (snapshots is not None and snapshots.left):
            writer.prepare()

    @property
    def state(self) -> int:
        """How far this rank's writer is, for `Clock.tick`."""
        return self._writer.state

    def attend(self, tick: Tick, place: Position) -> None:
        """Complete, start or skip a checkpoint between two steps; every rank calls it with one `tick`."""
        kept = self._keep(tick, place)
        lowest, highest = tick.writers
        # By the state of the slowest and the fastest writer, which are in the tick: a rank that went by its
        # own writer would enter `settle`, which is a collective, while another one still trains.
        if kept:
            pass  # what the tick says of the writers is no longer so
        elif lowest >= WRITTEN:
            self._settle()
        elif highest == IDLE and self._due(tick) and not tick.signal:
            self._last = tick.elapsed
            self._writer.start(place.steps, place.to_facts())
        if tick.signal:
            # The last step is saved whatever is under way: first that one, then this one, each completed.
            self.finish()
            self._writer.start(place.steps, place.to_facts())
            self.finish()
        if tick.stop and self._keeping:
            self.finish()  # unlike a checkpoint, it is of use after the run
        self._tell(self._writer.problem)

    def _keep(self, tick: Tick, place: Position) -> bool:
        """Start the snapshots that are due before this step; tell whether there was one."""
        # A clock stops before a step that would end too late, so a little before the last fraction.
        frac = math.inf if tick.stop else tick.frac
        due = self._snapshots.due(frac) if self._snapshots is not None else []
        for name in due:
            assert self._snapshots is not None
            # Of this very step, so what is under way is completed first, on every rank.
            self.finish()
            self._writer.start(place.steps, self._snapshots.facts(place, tick.frac), keep=name)
            self._log.line(f"snapshot {SNAPSHOTS}/{name} after {place.steps} steps")
            self._keeping = True
        return bool(due)

    def _due(self, tick: Tick) -> bool:
        return bool(self._every_s) and tick.elapsed - self._last >= self._every_s and not tick.stop

    def finish(self) -> None:
        """Wait for the checkpoint under way and complete it; every rank calls it."""
        self._writer.wait()
        if self._writer.state in (WRITTEN, FAILED):
            self._settle()
            self._writer.wait()

    def _settle(self) -> None:
        self._tell(self._writer.settle())

    def _tell(self, problem: str | None) -> None:
        self._writer.problem = None
        if problem is not None:
            self._log.line(f"warning: {problem}")
