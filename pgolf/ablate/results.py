"""What is known of a plan's cells: the state of the files in their folders, and nothing else.

A cell is finished when a run folder in its folder holds a summary.json, and a config.json of the same
configuration. It has diverged when its cell.json says so of the same configuration. Everything else is run
(again). So a plan may be stopped at any time, gain seeds or arms, or move to another folder.

The configuration of a cell with a trunk names the trunk's finished run. So a trunk that is run again, because
its configuration changed or its weights are gone and cells are missing, has all its cells run again: the arms
of a pair always start from the same weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from pgolf.ablate.costs import Rates, file_bytes, measured, work_key
from pgolf.ablate.ladder_plan import Ladders
from pgolf.ablate.plan import Cell, Plan, is_continued, run_key
from pgolf.config import Config, from_dict, read_json
from pgolf.data.held_out import NAME as HELD_OUT
from pgolf.data.shards import list_files
from pgolf.errors import UserError
from pgolf.report.summary import SUMMARY, Summary
from pgolf.train.checkpoint import INDEX, SNAPSHOTS

Status = Literal["finished", "diverged", "crashed", "missing"]
DONE: tuple[Status, ...] = ("finished", "diverged")
"""States of a cell that is not run again: a run that diverged would diverge again."""
CELL = "cell.json"
START = "raw.safetensors"
"""Weights of a trunk that its cells start from anew: those that training had reached, not their average."""
WEIGHTS = ("raw", "ema", "quantized")
"""Scores that a plan may be decided by."""


@dataclass(frozen=True)
class CellResult:
    """What became of one cell."""

    arm: str
    seed: int
    status: Status
    values: dict[str, float] = field(default_factory=dict)
    """raw, ema and quantized (bits per byte), bytes, steps, ms (per step, mean), ms_loop_off and ms_loop_on
    (medians), last_loss (nats per token); empty unless finished, and without what the run did not make."""
    metrics: Path | None = None
    """metrics.jsonl of the run."""
    message: str = ""
    """Why it did not finish."""
    commit: str = ""
    """Commit of the code that ran it."""
    device: str = ""
    """Where it ran."""
    manifest: str | None = ""
    """SHA-256 of the manifest of its data, None for data without one; "" where it has no summary."""
    shared: bool = True
    """Whether other runs used its GPU, or that is not known, so that its milliseconds mean nothing."""


@dataclass(frozen=True)
class TrunkResult:
    """The runs whose raw weights the arms start from, one per seed. They are no arm and enter no mean."""

    steps: int
    overrides: dict[str, object]
    """What they change in the baseline."""
    cells: tuple[CellResult, ...]
    until: float = 1.0
    """Fraction of the schedules at which the arms continue from its snapshot; 1: they start anew."""


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A plan with the results that are there."""

    name: str
    comment: str
    base: str
    length: str
    plan_file: str
    metric: str
    """The weights that decide: raw, ema or quantized."""
    effect: float
    """Smallest difference worth seeing, bits per byte."""
    baseline: str
    arms: dict[str, dict[str, object]]
    """Overrides of every arm in addition to the common ones, by name, in the plan's order."""
    seeds: tuple[int, ...]
    cells: tuple[CellResult, ...]
    common: dict[str, object] = field(default_factory=dict)
    """Overrides of all arms."""
    warnings: tuple[str, ...] = ()
    trunk: TrunkResult | None = None
    """None: the arms start from random weights, or from what train.init or train.start names."""
    costs: CostTable | None = None
    """None: nothing is known of them."""
    ladders: Ladders | None = None
    held_out: bool | None = None
    """Whether the scored text is the end of the training text, see `pgolf data held-out`; None: not known."""

    def of(self, arm: str, status: Status = "finished") -> dict[int, CellResult]:
        """Return the cells of `arm` in this state, by seed."""
        return {c.seed: c for c in self.cells if c.arm == arm and c.status == status}

    @property
    def complete(self) -> bool:
        """Whether every cell has finished or diverged."""
        return all(c.status in DONE for c in self.cells)


@dataclass(frozen=True)
class CostTable:
    """What the arms cost, and what that is worth."""

    rates: Rates
    ms: dict[str, float]
    """Milliseconds per step by arm, timed on an idle device or of unshared runs; empty: not known."""
    ms_from: str
    """Where the milliseconds are from, in words."""
    bytes: dict[str, float]
    """Bytes of the file by arm; all the same where no arm changes them."""
    bytes_from: str
    charges_time: bool
    """False where runs have equal seconds, and the score holds the cost of time already."""
    charges_bytes: bool
    """False where every file fills the limit, and the score holds the cost of bytes already."""


def gather(plan: Plan, plan_file: Path) -> Ablation:
    """Return the plan with the results that are in its folder."""
    cells = tuple(read_cell(cell) for cell in plan.cells())
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
        cells=cells,
        warnings=plan.warnings,
        trunk=_gather_trunk(plan),
        costs=_gather_costs(plan, cells),
        ladders=plan.ladders,
        held_out=_held_out(plan),
    )


def _gather_costs(plan: Plan, cells: tuple[CellResult, ...]) -> CostTable:
    """Return the costs of the arms: timed ones where there are any, else those of the runs."""
    done = [c for c in cells if c.status == "finished"]
    by_arm = {arm: [c.values for c in done if c.arm == arm] for arm in plan.arms}
    whole = all(by_arm.values())
    timed = measured(plan.out, plan.costs)
    ms, ms_from = {arm: time.ms for arm, time in timed.items()}, "timed one at a time on an idle device"
    if not timed and whole and not any(c.shared for c in done):
        # Arms that compute the same take the same time, whatever the scatter of their runs.
        first: dict[str, str] = {}
        same = {arm: first.setdefault(work_key(config), arm) for arm, config in plan.arms.items()}
        ms, ms_from = {arm: mean(v["ms"] for v in by_arm[same[arm]]) for arm in by_arm}, "of the runs"
    fills = plan.metric == "quantized" and all(c.artifact.fit for c in plan.arms.values())
    if plan.metric == "quantized" and whole:
        size, size_from = {a: mean(v["bytes"] for v in rows) for a, rows in by_arm.items()}, "of the files"
    else:
        predicted = file_bytes(plan.costs, plan.baseline)
        size, size_from = {arm: float(b) for arm, b in predicted.items()}, "predicted from the shapes"
    return CostTable(plan.rates, ms, ms_from, size, size_from, plan.fixed_steps, not fills)


def _held_out(plan: Plan) -> bool | None:
    """Return whether the plan's data folder is one of `pgolf data held-out`; None if it is not there."""
    folder = plan.arms[plan.baseline].data.dir
    if folder is None or not folder.is_dir():
        return None
    return all(path.name.startswith(f"{HELD_OUT}_") for path in list_files(folder, "val"))


def _gather_trunk(plan: Plan) -> TrunkResult | None:
    if plan.trunk is None:
        return None
    cells = tuple(read_cell(cell) for cell in plan.trunks().values())
    train = plan.trunk.config.train
    return TrunkResult(train.steps, dict(plan.trunk.overrides), cells, train.until)


def read_cell(cell: Cell) -> CellResult:
    """Return what the cell's folder says of exactly this configuration, with the run of its trunk in it.

    Raises:
        UserError: a summary.json is not what a run writes.
    """
    rooted = start_from_trunk(cell)
    if rooted is None:
        assert cell.trunk is not None
        trunk = read_cell(cell.trunk)
        status: Status = "diverged" if trunk.status == "diverged" else "missing"
        return CellResult(cell.arm, cell.seed, status, message=f"trunk {trunk.status}: {trunk.message}")
    # cell.json of another configuration is of a cell that had this folder before the plan was changed.
    noted = _read_json(cell.folder / CELL)
    noted = noted if noted.get("key") == rooted.key else {}
    result = CellResult(cell.arm, cell.seed, "missing", commit=str(noted.get("commit", "")))
    # Results of earlier versions do not say whether the GPU was shared.
    result = replace(result, shared=bool(noted.get("shared", True)))
    run = _run_of(rooted)
    if run is not None:
        return _read_run(run, result)
    if noted.get("status") in ("diverged", "crashed"):
        return replace(result, status=noted["status"], message=str(noted.get("message", "")))
    return replace(result, commit="")


def _read_run(run: Path, result: CellResult) -> CellResult:
    """Return `result` with what a run folder holds; a score that is not finite counts as diverged."""
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


def open_cells(plan: Plan) -> list[Cell]:
    """Return the cells to run, in the plan's order; trunks that have to run come before their arms."""
    cells = plan.cells()
    opened = [cell for cell in cells if read_cell(cell).status not in DONE]
    # A trunk is needed for its weights alone: with all its arms done, it need not be there any more.
    trunks = [cell.trunk for cell in opened if not has_weights(cell.trunk)]
    queue: list[Cell] = []
    for cell in cells:
        if cell.trunk is not None and cell.trunk in trunks and cell.trunk not in queue:
            queue.append(cell.trunk)
        if cell.trunk in trunks or cell in opened:
            queue.append(cell)
    return queue


def has_weights(trunk: Cell | None) -> bool:
    """Return whether the weights of `trunk` are there; without a trunk none are needed."""
    if trunk is None:
        return True
    run = finished_run(trunk)
    if run is None:
        return False
    start = _start(trunk, run)
    return (start / INDEX if _continued(trunk) else start).is_file()


def _continued(trunk: Cell) -> bool:
    return is_continued(trunk.config)


def _start(trunk: Cell, run: Path) -> Path:
    """Return what the arms of `trunk` start from, in its run folder."""
    return run / SNAPSHOTS / trunk.config.train.snapshots if _continued(trunk) else run / START


def start_from_trunk(cell: Cell) -> Cell | None:
    """Return `cell` with its trunk's snapshot as train.start, or the trunk's weights as train.init.

    None where the trunk did not finish.
    """
    if cell.trunk is None:
        return cell
    run = finished_run(cell.trunk)
    if run is None:
        return None
    start = _start(cell.trunk, run)
    if _continued(cell.trunk):
        train = replace(cell.config.train, start=start)
    else:
        train = replace(cell.config.train, init=start)
    return replace(cell, config=replace(cell.config, train=train))


def finished_run(cell: Cell) -> Path | None:
    """Return the run folder of a finished cell; None if it is not finished."""
    return _run_of(cell) if read_cell(cell).status == "finished" else None


def _run_of(cell: Cell) -> Path | None:
    """Return the newest run in the cell's folder that has a summary and the cell's configuration."""
    # Names begin with the time of the run, so the last name is the newest. A torn summary is no summary.
    for run in sorted((p.parent for p in cell.folder.glob(f"*/{SUMMARY}")), reverse=True):
        if _read_json(run / SUMMARY) and _key(run / "config.json") == cell.key:
            return run
    return None


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
