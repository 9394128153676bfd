"""Runs the cells of a plan, one process each, and gathers what they wrote.

The state is in the files, never in this process: a cell is finished when a run folder in its folder holds a
summary.json and a config.json of the same configuration, and diverged when cell.json says so of the same
configuration. Everything else is run (again). So a plan may be stopped at any time, gain seeds or arms, or
move to another folder.

The configuration of a cell with a trunk names the trunk's finished run. So a trunk that is run again, because
its configuration changed or its weights are gone and cells are missing, has all its cells run again: pairs
always start from the same weights.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pgolf.config import Config, from_dict, read_json, to_dict
from pgolf.env import with_parent
from pgolf.errors import RunError, UserError
from pgolf.files import write_json
from pgolf.report.ablation import WEIGHTS, Ablation, CellResult, Status, TrunkResult
from pgolf.report.summary import SUMMARY, Summary
from pgolf.train.guard import Process, end, held
from pgolf.train.plan import Cell, Plan, run_key
from pgolf.train.signals import Signals, Stopped

OUTPUT = "output.txt"
CELL = "cell.json"
START = "raw.safetensors"
"""Weights of a trunk that its cells start from: those that training had reached, not their average."""
DONE = ("finished", "diverged")
MAX_CRASHES = 3
"""This many crashes in a row stop the plan: the next cells would not do better."""
DIVERGED = re.compile(
    r"the loss is (?:nan|-?inf) at step \d+[^\n;]*|the loss is \S+ at step \d+, but the gradient [^\n;]*"
)
"""What `Trainer.run` raises; a test runs into it."""


Start = Callable[[Cell, int | None], Process]
"""Starts a cell on a GPU (None: wherever its configuration says)."""


def start_process(cell: Cell, gpu: int | None, *, environment: dict[str, str] | None = None) -> Process:
    """Start `python -m pgolf train config.json` with its output in the cell's folder.

    A GPU is chosen the way torchrun does it, as local rank of a world of one: `gpu` counts the visible ones.
    `environment` replaces this process's, see `share_of_cores`. The child ends when this process does.
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
        commit: of the code, written beside every result.
        say: takes the progress lines.
        poll_seconds: pause between looks at the processes.
    Raises:
        ValueError: per_gpu < 1, or above 1 in a plan of fixed seconds.
        RuntimeError: three cells in a row crashed. HeldError: another process runs a plan in this folder.
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
    with held(plan.out), Signals() as signals:
        _run(plan, start, gpus, per_gpu, commit, say, poll_seconds, signals)


def _run(
    plan: Plan,
    start: Start,
    gpus: int,
    per_gpu: int,
    commit: str,
    say: Callable[[str], None],
    poll_seconds: float,
    signals: Signals,
) -> None:
    """Run the open cells of a plan that this process holds."""
    queue, running = open_cells(plan), list[_Running]()
    total = len(plan.cells()) + len(plan.trunks())
    if done := total - len(queue):
        say(f"{done} of {total} cells are there already")
    free: list[int | None] = [*range(gpus)] * per_gpu if gpus else [None] * per_gpu
    progress = _Progress(total, done, len(free), say)
    try:
        while queue or running:
            while free and (cell := _take_ready(queue, running)):
                rooted = start_from_trunk(cell)
                if rooted is None or not _has_weights(rooted.trunk):
                    progress.skip(cell)
                else:
                    running.append(_begin(rooted, free.pop(0), start))
            ended = [r for r in running if r.process.poll() is not None]
            for r in ended:
                running.remove(r)
                free.append(r.gpu)
                progress.report(_finish(r, commit), plan.metric, time.monotonic() - r.began)
            if not ended:
                time.sleep(poll_seconds)
    except KeyboardInterrupt as e:
        signals.close()  # another one would cut short what follows
        why = str(e) if isinstance(e, Stopped) else "interrupted"
        say(f"{why}: ending {len(running)} runs under way; {progress.done} of {total} cells are kept")
        raise
    finally:
        if stubborn := end([r.process for r in running]):
            say(f"{stubborn} runs did not end when asked and were killed")


def open_cells(plan: Plan) -> list[Cell]:
    """Return the cells to run, in the plan's order; trunks that have to run come before their arms."""
    cells = plan.cells()
    opened = [cell for cell in cells if read_cell(cell).status not in DONE]
    trunks = [cell.trunk for cell in opened if not _has_weights(cell.trunk)]
    queue: list[Cell] = []
    for cell in cells:
        if cell.trunk is not None and cell.trunk in trunks and cell.trunk not in queue:
            queue.append(cell.trunk)
        if cell.trunk in trunks or cell in opened:
            queue.append(cell)
    return queue


def _has_weights(trunk: Cell | None) -> bool:
    """Return whether the weights of `trunk` are there; without a trunk none are needed."""
    if trunk is None:
        return True
    run = finished_run(trunk)
    return run is not None and (run / START).is_file()


def start_from_trunk(cell: Cell) -> Cell | None:
    """Return `cell` with the weights of its trunk as train.init; None where the trunk did not finish."""
    if cell.trunk is None:
        return cell
    run = finished_run(cell.trunk)
    if run is None:
        return None
    return replace(cell, config=replace(cell.config, train=replace(cell.config.train, init=run / START)))


def _take_ready(queue: list[Cell], running: list[_Running]) -> Cell | None:
    """Take the first cell whose trunk is not still to come out of the queue, if there is one."""
    to_come = [*queue, *(r.cell for r in running)]
    ready = next((cell for cell in queue if cell.trunk not in to_come), None)
    if ready is not None:
        queue.remove(ready)
    return ready


class _Progress:
    """Counts the cells and guesses the rest; raises when only crashes come."""

    def __init__(self, total: int, done: int, slots: int, say: Callable[[str], None]) -> None:
        self.done = done
        self._total, self._slots, self._say = total, slots, say
        self._seconds: list[float] = []
        self._crashes = 0

    def report(self, result: CellResult, metric: str, seconds: float) -> None:
        self.done += 1
        self._seconds.append(seconds)
        left = (self._total - self.done) * sum(self._seconds) / len(self._seconds) / self._slots
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


def _begin(cell: Cell, gpu: int | None, start: Start) -> _Running:
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / CELL).unlink(missing_ok=True)
    return _Running(cell, gpu, start(cell, gpu), time.monotonic())


def _finish(running: _Running, commit: str) -> CellResult:
    """Decide what became of a cell that ended, and write it down as cell.json."""
    cell = running.cell
    result = read_cell(cell)
    status, message = result.status, result.message
    if status == "missing":
        text = _tail(cell.folder / OUTPUT)
        found = DIVERGED.search(text)
        lines = text.strip().splitlines() or ["no output"]
        status = "diverged" if found else "crashed"
        message = found.group() if found else f"exit code {running.process.poll()}: {lines[-1]}"
    record = {"arm": cell.arm, "seed": cell.seed, "status": status, "message": message, "key": cell.key}
    facts = {"commit": commit, "gpu": running.gpu, "seconds": time.monotonic() - running.began}
    write_json(cell.folder / CELL, {**record, **facts})
    return read_cell(cell)


def _tail(path: Path) -> str:
    """Return the last 20,000 characters of a text file, nothing if it is not there."""
    return path.read_text(errors="replace")[-20_000:] if path.is_file() else ""


def read_cell(cell: Cell) -> CellResult:
    """Return what the cell's folder says of this very configuration, the run of its trunk included."""
    rooted = start_from_trunk(cell)
    if rooted is None:
        assert cell.trunk is not None
        trunk = read_cell(cell.trunk)
        status: Status = "diverged" if trunk.status == "diverged" else "missing"
        return CellResult(cell.arm, cell.seed, status, message=f"trunk {trunk.status}: {trunk.message}")
    record = _read_json(cell.folder / CELL)
    record = record if record.get("key") == rooted.key else {}
    result = CellResult(cell.arm, cell.seed, "missing", commit=str(record.get("commit", "")))
    run = _run_of(rooted)
    if run is not None:
        try:
            summary = Summary.load(run / SUMMARY)
            values = _values(summary)
        except UserError as e:
            raise UserError(f"{e}; or remove {run} to run it again") from e
        metrics = run / "metrics.jsonl"
        result = replace(result, metrics=metrics, device=summary.device, manifest=summary.manifest)
        wrong = [f"{k} is {v}" for k, v in values.items() if not math.isfinite(v)]
        if wrong:
            return replace(result, status="diverged", message=", ".join(wrong))
        return replace(result, status="finished", values=values)
    if record.get("status") in ("diverged", "crashed"):
        return replace(result, status=record["status"], message=str(record.get("message", "")))
    return replace(result, commit="")


def finished_run(cell: Cell) -> Path | None:
    """Return the run folder of a finished cell; None if it is not finished."""
    return _run_of(cell) if read_cell(cell).status == "finished" else None


def _run_of(cell: Cell) -> Path | None:
    """Return the newest run in the cell's folder that has a summary and the cell's configuration."""
    for run in sorted((p.parent for p in cell.folder.glob(f"*/{SUMMARY}")), reverse=True):
        if _read_json(run / SUMMARY) and _key(run / "config.json") == cell.key:
            return run
    return None


def _values(summary: Summary) -> dict[str, float]:
    """Pick the figures of a run's summary.

    Raises:
        UserError: the summary lacks the training or the score of the raw weights.
    """
    train, scores = summary.trained, summary.scores
    if "raw" not in scores or "train" not in summary.phases:
        raise UserError(f"the summary of {summary.name} has no seconds of training or no raw score")
    # Where averaging is off, the raw weights are what would be the average.
    bpb = {name: score.bpb for name, score in {"ema": scores["raw"], **scores}.items()}
    values = {name: bpb[name] for name in WEIGHTS if name in bpb}
    values |= {"steps": float(train.steps), "ms": summary.step_ms}
    optional = {
        "ms_loop_off": train.ms_loop_off,
        "ms_loop_on": train.ms_loop_on,
        "last_loss": train.last_loss,
        "bytes": None if summary.ledger is None else summary.ledger.total,
    }
    return values | {name: float(value) for name, value in optional.items() if value is not None}


def _key(path: Path) -> str | None:
    """Return the key of a saved configuration; None if it cannot be read (settings have changed since)."""
    try:
        return run_key(from_dict(Config, _read_json(path)))
    except (ValueError, TypeError):
        return None


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty when the file is missing or torn."""
    try:
        data = read_json(path)
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def gather(plan: Plan, plan_file: Path) -> Ablation:
    """Return the plan with the results that are in its folder."""
    return Ablation(
        name=plan.name,
        comment=plan.comment,
        base=plan.base,
        length=plan.length,
        plan_file=str(plan_file),
        metric=plan.metric,
        effect=plan.effect,
        baseline=plan.baseline,
        common=dict(plan.common),
        arms={arm: dict(changes) for arm, changes in plan.overrides.items()},
        seeds=plan.seeds,
        cells=tuple(read_cell(cell) for cell in plan.cells()),
        warnings=plan.warnings,
        trunk=_gather_trunk(plan),
    )


def _gather_trunk(plan: Plan) -> TrunkResult | None:
    if plan.trunk is None:
        return None
    cells = tuple(read_cell(cell) for cell in plan.trunks().values())
    return TrunkResult(plan.trunk.config.train.steps, dict(plan.trunk.overrides), cells)
