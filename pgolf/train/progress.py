"""What a run keeps in its folder in addition to its results, so that another process can go on.

    lock             held while a process works in the folder (`pgolf.train.guard.held`)
    clock.txt        seconds on the run's clock, written four times per second while it runs
    progress.json    how far the run is, its summary so far, its sessions (processes); gone when it is done
    checkpoints/     see `pgolf.train.checkpoint`

The clock counts what was computed. Time in which no process ran is not on it. Work that was lost with a
killed process and done again is on it twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pgolf.errors import UserError
from pgolf.files import atomic_file, write_json
from pgolf.report.plots import read_metrics
from pgolf.report.summary import SUMMARY, SessionEntry, Summary
from pgolf.train.checkpoint import Checkpoint, newest_checkpoint

CLOCK = "clock.txt"
PROGRESS = "progress.json"

Stage = Literal["training", "trained", "written"]
"""What is on disk: checkpoints only; the trained weights; the artifact and its code in addition."""
STAGES: tuple[Stage, ...] = ("training", "trained", "written")


class ClockFile:
    """The seconds of the run's clock on disk, so that they are known after the process was killed."""

    def __init__(self, folder: Path) -> None:
        """Open the file; where that fails (a full disk), beats are not kept."""
        self._file = -1
        with contextlib.suppress(OSError):
            self._file = os.open(folder / CLOCK, os.O_RDWR | os.O_CREAT, 0o644)

    def beat(self, seconds: float) -> None:
        """Write the time over the last one, in one system call."""
        # Of fixed length and in one call, so the file holds a whole number whenever the process ends. Not
        # atomic_file, whose fsync four times per second would slow whatever else uses the disk.
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.pwrite(self._file, f"{seconds:20.3f}\n".encode(), 0)

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_clock(folder: Path) -> float:
    """Return the seconds in the clock file; 0 without one, or where it is damaged."""
    try:
        seconds = float((folder / CLOCK).read_text())
    except (OSError, ValueError):
        return 0.0
    return seconds if math.isfinite(seconds) and seconds >= 0 else 0.0


@dataclass(frozen=True)
class Past:
    """What an unfinished run left in its folder."""

    folder: Path
    stage: Stage
    checkpoint: Checkpoint | None
    clock: float
    """Seconds that its processes had used, on the run's clock."""
    summary: Summary
    """What was known of it."""
    sessions: list[SessionEntry]
    """Its processes so far, the first first."""
    complaints: tuple[str, ...]
    """Checkpoints that are newer but not valid, and why."""
    identity: str = ""
    """Random, made when the run began; its checkpoints carry it."""
    stage_clock: float = 0.0
    """Seconds on the clock when the stage was reached."""

    @property
    def steps(self) -> int:
        """Training steps that are on disk."""
        if self.stage != "training":
            return self.summary.train.steps if self.summary.train is not None else 0
        return self.checkpoint.step if self.checkpoint is not None else 0

    @property
    def lost(self) -> float:
        """Seconds of work after what is on disk, which are on the clock and will be done again."""
        # With the artifact written nothing is done again that is on the clock.
        saved = self.stage_clock
        if self.stage == "training":
            saved = float(self.checkpoint.facts["elapsed"]) if self.checkpoint is not None else 0.0
        return max(0.0, self.clock - saved) if self.stage != "written" else 0.0

    def check_data(self, folder: Path, facts: dict[str, Any]) -> None:
        """Check that `folder`, of these facts, is the data that the run began with.

        Raises:
            UserError: it is not; names what differs.
        """
        before = self.summary.data
        if before and before != facts:
            keys = [k for k in {**before, **facts} if before.get(k) != facts.get(k)]
            told = ", ".join(f"{k} was {before.get(k)}, is {facts.get(k)}" for k in keys)
            raise UserError(
                f"{folder} is not the data that the run in {self.folder} began with: {told}; "
                "pass --data with the folder of that text"
            )


def read_past(folder: Path) -> Past:
    """Return how far the run in `folder` is.

    Raises:
        FileNotFoundError: it is no run's folder. UserError: the run is finished, its progress file is
            damaged, or it was made by a version that kept no progress.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no run at {folder}: it holds no config.json, which `pgolf train` writes first"
        )
    path = folder / PROGRESS
    if not path.is_file():
        if (folder / SUMMARY).is_file():
            raise UserError(f"{folder} is finished: it has its {SUMMARY}; start a new run to train more")
        raise UserError(
            f"{folder} holds no {PROGRESS}: an older version wrote it, or it stopped before it began; "
            f"start again with `pgolf train {folder / 'config.json'}`"
        )
    try:
        data = json.loads(path.read_bytes())
        stage, summary = data["stage"], Summary.from_dict(data["summary"], "summary")
        sessions = [SessionEntry.from_dict(s, "each of sessions") for s in data["sessions"]]
        if stage not in STAGES:
            raise UserError(f"unknown stage {stage!r}")
        clock, stage_clock, identity = data["clock"], data["stage_clock"], str(data["run"])
        for seconds in (clock, stage_clock):
            if not (isinstance(seconds, float | int) and math.isfinite(seconds) and seconds >= 0):
                raise UserError(f"the clock must be seconds >= 0, got {seconds!r}")
    except UserError as e:
        raise UserError(f"{path} is damaged: {e}; start the run again") from e
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({type(e).__name__}: {e}); start the run again") from e
    checkpoint, complaints = (
        newest_checkpoint(folder, identity=identity) if stage == "training" else (None, [])
    )
    # Three places know the time: the last write of the progress, the newest checkpoint, and the file that is
    # written four times per second. None can be ahead of the clock, so the latest is nearest to it.
    if checkpoint is not None:
        clock = max(clock, float(checkpoint.facts["elapsed"]))
    if stage != "written":  # then the clock has stopped
        clock = max(clock, read_clock(folder))
    return Past(folder, stage, checkpoint, clock, summary, sessions, tuple(complaints), identity, stage_clock)


class Progress:
    """Writes progress.json: the stage, the summary so far, and one entry per process of the run."""

    def __init__(
        self, folder: Path, *, world_size: int, past: Past | None, device: str = "", commit: str = ""
    ) -> None:
        """Open a session; what a killed process could not say of itself is completed from its traces."""
        self._folder = folder
        self.identity = past.identity if past is not None else secrets.token_hex(8)
        self._stage_clock = past.stage_clock if past is not None else 0.0
        # All processes of the run, not only this one: the list goes into the summary as it stands.
        self.sessions = list(past.sessions) if past is not None else []
        if past is not None and self.sessions and self.sessions[-1].end is None:
            # It did not write its end, so it was killed. What it left says its last step and second.
            last = self.sessions[-1]
            rows = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
            steps = [int(row["step"]) + 1 for row in rows if "step" in row]
            last.end, last.clock_to = "killed", past.clock
            last.to_step = max(steps, default=last.from_step)
        self.session = SessionEntry(
            started=utc(),
            world_size=world_size,
            from_step=past.steps if past is not None else 0,
            clock_from=past.clock if past is not None else 0.0,
            lost_seconds=past.lost if past is not None else 0.0,
            device=device,
            commit=commit,
        )
        self.sessions.append(self.session)

    def write(self, stage: Stage, summary: Summary, clock: float, *, reached: bool = False) -> None:
        """Keep the stage, which was `reached` just now or before."""
        # The clock of the stage says from which second on work will be lost if the process is killed now.
        if reached:
            self._stage_clock = clock
        data: dict[str, Any] = {
            "stage": stage,
            "clock": clock,
            "stage_clock": self._stage_clock,
            "run": self.identity,
        }
        data |= {"summary": summary.to_dict(), "sessions": [entry.to_dict() for entry in self.sessions]}
        write_json(self._folder / PROGRESS, data)

    def end(self, how: str, *, step: int, clock: float) -> None:
        """Close the session."""
        self.session.ended, self.session.end = utc(), how
        self.session.to_step, self.session.clock_to = step, clock

    def remove(self) -> None:
        """Remove the files of a run that is done."""
        for name in (PROGRESS, CLOCK):
            (self._folder / name).unlink(missing_ok=True)


def utc() -> str:
    """Return the present time, UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def keep_metrics(path: Path, steps: int) -> list[dict[str, Any]]:
    """Cut metrics.jsonl down to the rows of the first `steps` steps, atomically, and return them."""
    # The steps after that are done again and write their lines again; a line twice would be drawn twice.
    rows = [row for row in read_metrics(path) if int(row.get("step", 0)) < steps] if path.is_file() else []
    with atomic_file(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows
