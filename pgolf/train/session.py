"""One process of a run, from taking the run's folder to its end: lock, log, progress, and why it ended.

Whatever ends the process, be it a signal, an error or a lost rank, the reason becomes one line of log.txt and
one entry of progress.json, and every rank learns it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from pgolf.config import Config, to_dict
from pgolf.dist import Dist
from pgolf.errors import RanksFailed, brief, is_checked, told
from pgolf.files import write_json
from pgolf.log import RunLog
from pgolf.report.summary import SUMMARY, Summary, device_name
from pgolf.track import start_tracker
from pgolf.train.budget import Clock
from pgolf.train.guard import held
from pgolf.train.progress import ClockFile, Past, Progress, Stage
from pgolf.train.signals import Signals, Stopped
from pgolf.train.steplog import Diverged


class Around(NamedTuple):
    """What is there in every process before the run is."""

    dist: Dist
    signals: Signals
    notes: tuple[str, ...]
    """Lines for the beginning of the log."""
    files: contextlib.ExitStack
    """Closed when the run ends; its lock on the folder of a run that goes on is in here already."""


class Session:
    """Opens the folder and the log, watches the ranks and keeps the progress. Every rank makes one.

    Attributes:
        folder, log: of the run. stage: what is on disk. clock: the run's. clock_runs: whether its time is
            kept on disk.
    Raises:
        RanksFailed: the folder cannot be made, is in use, or is not there on every host.
    """

    def __init__(
        self,
        config: Config,
        around: Around,
        folder: Path,
        summary: Summary,
        *,
        past: Past | None,
        steps: Callable[[], int],
        keep_weights: Callable[[], object],
    ) -> None:
        """Begin in a new folder, or in that of `past`.

        Args:
            steps: says how many training steps are done.
            keep_weights: saves the present weights, without a collective.
        """
        dist, self._signals, _, self._files = around
        self._config, self._dist, self._summary = config, dist, summary
        self._past, self._steps, self._keep_weights = past, steps, keep_weights
        self.folder = folder
        if past is None:
            # The folder of a run that goes on was taken before anything in it was read.
            self.folder = make_folder(folder, dist)
            take_folder(self.folder, dist, self._files)
        self.stage: Stage = past.stage if past is not None else "training"
        self.clock, self.clock_runs = Clock(config.train, dist), False
        self._ending = threading.Lock()
        """Taken, and never given back, by the thread that ends the process after a failure."""
        self.log = RunLog(self.folder, is_main=dist.is_main)
        self._progress: Progress | None = None
        self._beats: ClockFile | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="pgolf-clock")
        self._writing: Future[None] | None = None
        if dist.is_main:
            write_json(self.folder / "config.json", to_dict(config))
            self._progress = Progress(
                self.folder,
                world_size=dist.world_size,
                past=past,
                device=device_name(dist.device),
                commit=summary.commit,
            )
            self._progress.write(self.stage, summary, past.clock if past is not None else 0.0)
            self._beats = ClockFile(self.folder)
            self._files.callback(self._beats.close)
            self._files.callback(self._writer.shutdown)
            self._track(past)
        # From here on the watching thread writes the clock to disk, and ends this process if a rank is lost.
        dist.watch.attend(beat=self._beat, on_lost=self._end_without_main_thread)
        self._files.callback(dist.watch.leave)
        if past is not None:
            self._tell_past(past)

    def _track(self, past: Past | None) -> None:
        """Hand what is written to metrics.jsonl to TensorBoard or Weights & Biases too, if asked for."""
        steps = past.checkpoint.step if past is not None and past.checkpoint is not None else 0
        tracker = start_tracker(
            self._config.train.track,
            self.folder,
            to_dict(self._config),
            first_step=max(0, steps - 1),  # the line of the last step waits in the checkpoint
            warn=self.log.line,
        )
        if tracker is not None:
            self.log.follow = tracker.metric
            self._files.callback(lambda: tracker.close(self._summary.to_dict()))

    def _tell_past(self, past: Past) -> None:
        """Say what an earlier process left, and at what this one goes on."""
        for text in past.complaints:
            self.log.line(f"warning: a checkpoint is not used: {text}")
        number, clock = len(past.sessions) + 1, f"{past.clock:.1f} s are on the clock"
        if past.stage != "training":
            self.log.line(f"process {number} of this run: training is done, {clock}")
        elif past.checkpoint is None:
            self.log.line(f"process {number} of this run: there is no checkpoint yet, {clock}")
        else:
            self.log.line(
                f"process {number} of this run: goes on after {past.checkpoint.step} steps, {clock}, "
                f"{past.lost:.1f} s of them for work that is lost"
            )

    def _beat(self) -> None:
        # In a thread of its own: while a disk lets this write wait, the watching thread must give signs of
        # life, or the other ranks take this one for lost. A beat that comes meanwhile is left out.
        waits = self._writing is not None and not self._writing.done()
        if self._beats is not None and self.clock_runs and not waits:
            with contextlib.suppress(RuntimeError):  # the session is closed, or Python ends
                self._writing = self._writer.submit(self._beats.beat, self.clock.elapsed)

    def start_clock(self, clock: Clock, *, at: float) -> None:
        """Let the run's clock run from `at` seconds, and keep its time on disk."""
        self.clock = clock
        clock.start(at=at)
        self.clock_runs = True

    def stop_clock(self) -> float:
        """Read the clock for the last time: seconds."""
        self.clock_runs = False
        return self.clock.elapsed

    def reach(self, stage: Stage, clock: float) -> None:
        """Put on disk how far the run is, with `clock` seconds used."""
        self.stage = stage
        if self._progress is not None:
            self._progress.write(stage, self._summary, clock, reached=True)

    @property
    def identity(self) -> str:
        """What marks this run's checkpoints; on the main rank, which writes it, and empty on the others."""
        return self._progress.identity if self._progress is not None else ""

    def leave_if_asked(self) -> None:
        """Raise `Stopped` if a signal came while the last phase only took note of it."""
        if self._signals.requested:
            raise Stopped(self._signals.requested)

    def write_summary(self) -> None:
        """Write summary.json, on the main rank."""
        if self._progress is not None:
            self._summary.sessions = self._progress.sessions
            self._summary.save(self.folder / SUMMARY)

    def finish(self) -> None:
        """Write the last summary, and remove the progress of the run, which is done."""
        # The files that say that the run is not done go last: a process that ends before is resumed.
        self._signals.close()
        if self._progress is not None:
            self._progress.end("finished", step=self._steps(), clock=self._summary.clock or 0.0)
            self.write_summary()
            self._progress.remove()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Close the session; after an error, keep what can be kept and say why.

        Raises:
            RanksFailed: instead of the error, where what ended the run is known to every rank.
        """
        with self._files:
            reason = None if error is None else self._ended(error)
            if reason is None or isinstance(error, RanksFailed):
                return
        raise RanksFailed(reason) from None  # the collective that broke says nothing more

    def _ended(self, error: BaseException) -> str | None:
        """Say in log.txt why the run ends, keep what can be kept, tell the other ranks.

        Returns:
            The reason, if every rank knows it; None if this rank alone does.
        """
        # Everything below is short, and a second signal in the middle of it would lose the weights.
        self._signals.close()
        # On a slow disk it is longer than the watching thread's grace, and two threads would write the same
        # files. Where the watching thread came first, it ends the process while this one waits here.
        self._ending.acquire()
        known = str(error) if isinstance(error, RanksFailed) else None
        if known is None and self._dist.world_size > 1:
            # A lost rank shows here as a broken collective, or as the signal with which torchrun ends the
            # other ranks. The watch knows the true reason; it may take a moment to learn it.
            known = self._dist.watch.reason(wait_s=0.5 if isinstance(error, Stopped) else 1.5)
        if isinstance(error, Stopped) and known is None:
            how = str(error).removeprefix("stopped by ")
            text = f"{error} during {self._summary.under_way}; go on with: pgolf train --resume {self.folder}"
        else:
            reason = known or brief(error)
            how = f"failed: {reason}"
            text = f"failed during {self._summary.under_way}: {reason}"
            # A fault of the program is written with its traceback: log.txt may be all that is left.
            if known is None and not is_checked(error):
                text += f"\n{told(error)}"
            # The weights of a run that diverged are worth nothing. What fails here must not hide the error.
            if self._summary.under_way == "train" and not isinstance(error, Diverged):
                with contextlib.suppress(Exception):
                    self._keep_weights()
        with contextlib.suppress(Exception):
            self._close(how, text, lost_main=(known or "").startswith("rank 0 "))
        self._dist.watch.leave("" if known is not None else brief(error))
        return known

    def _close(self, how: str, text: str, *, lost_main: bool) -> None:
        if lost_main and self._dist.rank == 1:  # rank 0, which writes the log, is gone
            self.log = RunLog(self.folder, is_main=True)
        self.log.line(text)
        if self._progress is not None:
            clock = self.clock.elapsed if self.clock_runs else self._summary.clock or 0.0
            # An error before the clock was started must not set it back.
            clock = max(clock, self._past.clock if self._past is not None else 0.0)
            self._progress.end(how, step=self._steps(), clock=clock)
            self._progress.write(self.stage, self._summary, clock)

    def _end_without_main_thread(self, reason: str) -> None:
        """End the process from the watching thread: a rank is lost and the main thread waits for it."""
        if not self._ending.acquire(blocking=False):
            return  # the main thread is not waiting: it is at `_ended`
        # The main thread hangs in a collective that no exception reaches, so nothing is unwound: what can be
        # kept is kept here, and the process ends at once.
        try:
            if self._summary.under_way == "train":
                with contextlib.suppress(Exception):
                    self._keep_weights()
            text = f"failed during {self._summary.under_way}: {reason}"
            self._close(f"failed: {reason}", text, lost_main=reason.startswith("rank 0 "))
        finally:
            os._exit(2)


def take_folder(folder: Path, dist: Dist, files: contextlib.ExitStack) -> None:
    """Hold `folder` for this run until `files` are closed; every rank calls it.

    Raises:
        RanksFailed: another process holds it, or it is not there on every host.
    """
    # Rank 0 alone takes the lock, which is one per folder; that the others see the folder is checked, too.
    error: Exception | str | None = None
    if dist.is_main:
        try:
            files.enter_context(held(folder))
        except (OSError, RuntimeError) as e:
            error = e
    elif not folder.is_dir():
        error = f"there is no {folder} here; all hosts must share the folder of runs (--train.out)"
    dist.check(error)


def make_folder(wanted: Path, dist: Dist) -> Path:
    """Make the folder `wanted` and return it; where another run has it, `wanted-2`, `wanted-3`, ...

    Every rank calls it and gets the path that rank 0 made.

    Raises:
        RanksFailed: the folder cannot be made (on every rank).
    """
    number, error = 1, None
    if dist.is_main:
        try:
            while not _make_new(_numbered(wanted, number)):
                number += 1
        except OSError as e:
            error = f"cannot make {wanted}: {e.strerror}; choose another --train.out"
    dist.check(error)
    return _numbered(wanted, int(dist.share([number])[0]))


def _numbered(path: Path, number: int) -> Path:
    return path if number == 1 else path.with_name(f"{path.name}-{number}")


def _make_new(path: Path) -> bool:
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    return True
