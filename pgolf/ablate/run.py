"""Runs the cells of a plan, each in a process of its own, and writes down what became of them.

The state of a plan is in its files (`results.py`), never in this process, so it may end at any moment.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pgolf.ablate.plan import Cell, Plan
from pgolf.ablate.results import CELL, CellResult, has_weights, open_cells, read_cell, start_from_trunk
from pgolf.config import to_dict
from pgolf.env import with_parent
from pgolf.errors import RunError, UserError
from pgolf.files import write_json
from pgolf.train.guard import held
from pgolf.train.signals import Signals, Stopped

OUTPUT = "output.txt"
MAX_CRASHES = 3
"""This many crashes in a row stop the plan: the next cells would not do better."""
GRACE_SECONDS = 20.0
"""Between asking a child to end and killing it."""
TAIL_CHARACTERS = 20_000
"""Of a cell's output, in which the reason of its end is looked for."""
DIVERGED = re.compile(
    r"the loss is (?:nan|-?inf) at step \d+[^\n;]*|the loss is \S+ at step \d+, but the gradient [^\n;]*"
)
"""What `Trainer.run` raises (a test trains a run that diverges, so that the two stay in step)."""


class Process(Protocol):
    """A child under way: what `subprocess.Popen` has of it."""

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """


Start = Callable[[Cell, int | None], Process]
"""Starts a cell on a GPU (None: wherever its configuration says)."""


def start_process(cell: Cell, gpu: int | None, *, environment: dict[str, str] | None = None) -> Process:
    """Start `python -m pgolf train config.json` with its output in the cell's folder.

    Args:
        gpu: index among the visible GPUs. It is chosen the way torchrun does it, as local rank of a world of
            one process.
        environment: replaces this process's, see `share_of_cores`. The child ends when this process does.
    """
    config = cell.folder / "config.json"
    write_json(config, to_dict(cell.config))
    command = [sys.executable, "-m", "pgolf", "train", str(config)]
    if gpu is not None:
        command = ["env", "RANK=0", "WORLD_SIZE=1", f"LOCAL_RANK={gpu}", *command]
    with (cell.folder / OUTPUT).open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=with_parent(environment),
        )


@dataclass
class _Running:
    """A cell under way and the place that it takes."""

    cell: Cell
    gpu: int | None
    process: Process
    began: float


def run_plan(
    plan: Plan,
    start: Start,
    *,
    gpus: int,
    per_gpu: int = 1,
    commit: str,
    say: Callable[[str], None],
    poll_seconds: float = 0.2,
) -> None:
    """Run every cell that is not done, in the plan's order, `gpus * per_gpu` at once.

    A cell waits for its trunk, which is run just before the cells of its seed; other seeds' go on meanwhile.

    Args:
        plan: what to run.
        start: starts one cell; `start_process` outside of tests.
        gpus: GPUs to use; 0 runs wherever the configuration says.
        per_gpu: processes that share a GPU (with gpus 0: run at once). Small models leave most of it idle;
            the scores are the same, the milliseconds mean nothing, so only for plans of fixed steps.
        commit: of the code, written next to every result.
        say: takes the progress lines.
        poll_seconds: pause between looks at the processes.
    Raises:
        UserError: per_gpu < 1, or above 1 in a plan of fixed seconds.
        RunError: three cells in a row crashed. HeldError: another process runs a plan in this folder.
        KeyboardInterrupt: passed on after the cells under way were ended; finished ones are untouched. It is
            a `Stopped` for SIGINT, SIGTERM and SIGHUP.
    """
    if per_gpu < 1:
        raise UserError(f"per_gpu must be >= 1, got {per_gpu}")
    if per_gpu > 1 and not plan.fixed_steps:
        raise UserError(
            f"per_gpu {per_gpu} in a plan of {plan.length}: runs that share a GPU slow each other; "
            "give the plan steps instead of seconds, or per_gpu 1"
        )
    places: list[int | None] = [*range(gpus)] * per_gpu if gpus else [None] * per_gpu
    with held(plan.out), Signals() as signals:
        _Runner(plan, start, places, commit, say, shared=per_gpu > 1).run(poll_seconds, signals)


class _Runner:
    """Runs the open cells of a plan whose folder this process holds."""

    def __init__(
        self,
        plan: Plan,
        start: Start,
        places: list[int | None],
        commit: str,
        say: Callable[[str], None],
        *,
        shared: bool,
    ) -> None:
        """`shared`: more than one run uses a place's GPU."""
        self._plan, self._start, self._say = plan, start, say
        self._facts: dict[str, object] = {"commit": commit, "shared": shared}
        self._free = places
        self._queue, self._running = open_cells(plan), list[_Running]()
        self._total = len(plan.cells()) + len(plan.trunks())
        done = self._total - len(self._queue)
        self._progress = _Progress(self._total, done, len(places), say)
        if done:
            say(f"{done} of {self._total} cells are there already")

    def run(self, poll_seconds: float, signals: Signals) -> None:
        """Run until nothing is left, or until a signal comes; then end what is under way."""
        try:
            while self._queue or self._running:
                self._fill_places()
                if not self._collect():
                    time.sleep(poll_seconds)
        except KeyboardInterrupt as e:
            signals.close()  # another one would cut short what follows
            why = str(e) if isinstance(e, Stopped) else "interrupted"
            self._say(
                f"{why}: ending {len(self._running)} runs under way; {self._progress.done} of {self._total} "
                "cells are kept"
            )
            raise
        finally:
            if stubborn := end([r.process for r in self._running]):
                self._say(f"{stubborn} runs did not end when asked and were killed")

    def _fill_places(self) -> None:
        """Start cells that are ready while a place is free."""
        while self._free and (cell := self._take_ready()):
            rooted = start_from_trunk(cell)
            if rooted is None or not has_weights(rooted.trunk):
                self._progress.skip(cell)
                continue
            rooted.folder.mkdir(parents=True, exist_ok=True)
            # What an earlier attempt noted must not be taken for this one's, whatever happens now.
            (rooted.folder / CELL).unlink(missing_ok=True)
            gpu = self._free.pop(0)
            self._running.append(_Running(rooted, gpu, self._start(rooted, gpu), time.monotonic()))

    def _take_ready(self) -> Cell | None:
        """Take the first cell whose trunk is not still to come out of the queue, if there is one."""
        to_come = [*self._queue, *(r.cell for r in self._running)]
        ready = next((cell for cell in self._queue if cell.trunk not in to_come), None)
        if ready is not None:
            self._queue.remove(ready)
        return ready

    def _collect(self) -> bool:
        """Note what became of cells that ended and free their places; tell whether any did."""
        ended = [r for r in self._running if r.process.poll() is not None]
        for r in ended:
            self._running.remove(r)
            self._free.append(r.gpu)
            self._progress.report(_finish(r, self._facts), self._plan.metric, time.monotonic() - r.began)
        return bool(ended)


class _Progress:
    """Counts the cells and estimates the time that is left; raises when only crashes come."""

    def __init__(self, total: int, done: int, places: int, say: Callable[[str], None]) -> None:
        self.done = done
        self._total, self._places, self._say = total, places, say
        self._seconds: list[float] = []
        self._crashes = 0

    def report(self, result: CellResult, metric: str, seconds: float) -> None:
        """Say what became of a cell.

        Raises:
            RunError: it is the last of `MAX_CRASHES` crashes in a row.
        """
        self.done += 1
        self._seconds.append(seconds)
        left = (self._total - self.done) * sum(self._seconds) / len(self._seconds) / self._places
        score = result.values.get(metric, result.values.get("raw"))
        what = f"{score:.5f} bpb" if score is not None else f"{result.status}: {result.message}"
        self._say(
            f"[{self.done}/{self._total}] {result.arm} seed {result.seed}: {what}, {seconds:.0f} s; "
            f"about {left / 60:.1f} min to go"
        )
        self._crashes = self._crashes + 1 if result.status == "crashed" else 0
        if self._crashes == MAX_CRASHES:
            raise RunError(
                f"{MAX_CRASHES} cells in a row crashed, the last with: {result.message}; mend it and start "
                "again (finished cells are kept)"
            )

    def skip(self, cell: Cell) -> None:
        """Count a cell whose trunk left no weights."""
        self.done += 1
        self._say(f"[{self.done}/{self._total}] {cell.arm} seed {cell.seed}: not run, its trunk failed")


def _finish(running: _Running, facts: dict[str, object]) -> CellResult:
    """Decide what became of a cell that ended, and write it down as cell.json, with `facts`."""
    cell = running.cell
    result = read_cell(cell)
    status, message = result.status, result.message
    if status == "missing":
        # No summary: the process ended early. Only its output says whether the run diverged or crashed.
        text = _tail(cell.folder / OUTPUT)
        found = DIVERGED.search(text)
        status = "diverged" if found else "crashed"
        message = found.group() if found else f"exit code {running.process.poll()}: {_last_word(text)}"
    known = {"arm": cell.arm, "seed": cell.seed, "status": status, "message": message, "key": cell.key}
    facts = {**facts, "gpu": running.gpu, "seconds": time.monotonic() - running.began}
    write_json(cell.folder / CELL, {**known, **facts})
    return read_cell(cell)


def _tail(path: Path) -> str:
    """Return the end of a text file, nothing if it is not there."""
    return path.read_text(errors="replace")[-TAIL_CHARACTERS:] if path.is_file() else ""


def _last_word(text: str) -> str:
    """Return the line of a cell's output that says why it ended: what the command said, else the last one."""
    lines = text.strip().splitlines() or ["no output"]
    said = [line for line in lines if line.startswith("pgolf train: ")]
    return said[-1] if said else lines[-1]


def end(processes: Sequence[Process], grace: float = GRACE_SECONDS) -> int:
    """Ask children to end, kill those that do not within `grace` seconds, and return how many these were."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + grace
    stubborn = 0
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            stubborn += 1
            process.kill()
            process.wait()
    return stubborn
