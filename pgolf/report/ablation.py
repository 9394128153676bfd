"""Results of an ablation: what was run, what the statistics say of it, and the tables in Markdown.

`Ablation` is the plain type between the runner and the report. A cell is one run (arm and seed). Only
finished cells enter a mean; a comparison uses the seeds that both the arm and the baseline finished.
Negative differences are better (bits per byte).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Literal

from pgolf.data.manifest import NO_MANIFEST
from pgolf.report.page import Table
from pgolf.report.plots import read_metrics
from pgolf.report.stats import (
    ALPHA,
    MIN_PAIRS,
    Mean,
    Paired,
    Verdict,
    compare_paired,
    holm,
    mean_and_error,
    pairs_needed,
    verdict,
)

Status = Literal["finished", "diverged", "crashed", "missing"]
WEIGHTS = ("raw", "ema", "quantized")
PARTS = 10
"""Pieces of a run in the table of gaps."""
TRUNK_FIGURES = (("steps", 0), ("last_loss", 4), ("raw", 5))
"""Values of a trunk that the report shows, with their digits."""


@dataclass(frozen=True)
class CellResult:
    """What became of one cell."""

    arm: str
    seed: int
    status: Status
    values: dict[str, float] = field(default_factory=dict)
    """raw, ema, quantized (bits per byte), bytes, steps, ms (a step, mean), ms_loop_off and ms_loop_on
    (medians), last_loss (nats per token); empty unless finished, without what the run did not make."""
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


@dataclass(frozen=True)
class TrunkResult:
    """The runs whose raw weights the arms start from, one a seed; no arm, and in no mean."""

    steps: int
    overrides: dict[str, object]
    """What they change in the baseline."""
    cells: tuple[CellResult, ...]


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
    """Overrides of every arm, by name, in the plan's order, beside the common ones."""
    seeds: tuple[int, ...]
    cells: tuple[CellResult, ...]
    common: dict[str, object] = field(default_factory=dict)
    """Overrides of all arms."""
    warnings: tuple[str, ...] = ()
    trunk: TrunkResult | None = None
    """None: arms start from random weights, or from a checkpoint that train.init names."""

    def of(self, arm: str, status: Status = "finished") -> dict[int, CellResult]:
        """Return the cells of `arm` in this state, by seed."""
        return {c.seed: c for c in self.cells if c.arm == arm and c.status == status}

    @property
    def complete(self) -> bool:
        """Whether every cell has finished or diverged."""
        return all(c.status in ("finished", "diverged") for c in self.cells)


@dataclass(frozen=True)
class Comparison:
    """One arm against the baseline."""

    arm: str
    seeds: tuple[int, ...]
    """Seeds that both finished."""
    differences: tuple[float, ...]
    """Arm minus baseline, bits per byte, in the order of `seeds`."""
    pairs: Paired
    p_adjusted: float
    """Holm's p over the arms with enough pairs; NaN for the others."""
    verdict: Verdict
    needed: int | None
    """Pairs to see the plan's effect at 80 % power, from this spread; None below MIN_PAIRS."""
    note: str


def compare_arms(ablation: Ablation) -> list[Comparison]:
    """Compare every arm with the baseline on the plan's metric, Holm-corrected over the arms.

    An arm that diverged where the baseline did not is never called better (and the other way round never
    worse): the seeds that are left are not a fair sample of what the arm does.
    """
    base = ablation.of(ablation.baseline)
    rows: list[tuple[str, tuple[int, ...], list[float], Paired]] = []
    for arm in (a for a in ablation.arms if a != ablation.baseline):
        mine = ablation.of(arm)
        seeds = tuple(s for s in ablation.seeds if s in mine and s in base)
        ours = [mine[s].values[ablation.metric] for s in seeds]
        theirs = [base[s].values[ablation.metric] for s in seeds]
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        rows.append((arm, seeds, differences, compare_paired(ours, theirs)))
    tested = [row[0] for row in rows if row[3].n >= MIN_PAIRS]
    adjusted = dict(zip(tested, holm([r[3].p_t for r in rows if r[0] in tested]), strict=True))
    return [_compare(ablation, *row, p=adjusted.get(row[0], float("nan"))) for row in rows]


def _compare(
    ablation: Ablation, arm: str, seeds: tuple[int, ...], differences: list[float], pairs: Paired, *, p: float
) -> Comparison:
    word = verdict(pairs, p)
    notes = []
    lost = [s for s in ablation.of(arm, "diverged") if s in ablation.of(ablation.baseline)]
    kept = [s for s in ablation.of(ablation.baseline, "diverged") if s in ablation.of(arm)]
    if lost:
        notes.append(f"diverged at seeds {lost} where the baseline did not")
        word = "not separable" if word == "better" else word
    if kept:
        notes.append(f"the baseline diverged at seeds {kept}")
        word = "not separable" if word == "worse" else word
    if pairs.n < MIN_PAIRS:
        notes.append(f"{pairs.n} pairs: no claim below {MIN_PAIRS}")
    elif not any(differences):
        notes.append("every pair has the same score: does the change reach the run?")
    elif 2.0 ** (1 - pairs.n) > ALPHA:
        notes.append(f"with {pairs.n} pairs the permutation test cannot go below {2.0 ** (1 - pairs.n):g}")
    needed = pairs_needed(pairs.sd, ablation.effect) if pairs.n >= MIN_PAIRS else None
    return Comparison(arm, seeds, tuple(differences), pairs, p, word, needed, "; ".join(notes))


def arm_mean(ablation: Ablation, arm: str, value: str) -> Mean:
    """Return mean and standard error of one value over the finished cells of `arm` that have it."""
    cells = ablation.of(arm).values()
    return mean_and_error([c.values[value] for c in cells if value in c.values])


def tables(ablation: Ablation) -> list[Table]:
    """Return the verdicts, the arms' means, what each arm changes, and the cells that did not finish."""
    head: tuple[str, ...] = ("arm", "verdict", "pairs", "mean difference", "95 % interval", "p (t, Holm)")
    head += ("p (t)", "p (sign flip)", "sd of differences", f"pairs to see {ablation.effect:g}", "note")
    title = f"Difference from {ablation.baseline} by seed, bpb {ablation.metric} (negative is better)"
    compared = compare_arms(ablation)
    found = [
        Table("Verdicts", ("arm", "verdict", "in words"), [_words(c, ablation) for c in compared]),
        Table(title, head, [_comparison_row(c) for c in compared]),
        _means(ablation),
        *_gaps(ablation),
        Table("What each arm sets", ("arm", "overrides"), _changes(ablation)),
        *_trunks(ablation),
    ]
    open_cells = [c for c in ablation.cells if c.status != "finished"]
    if open_cells:
        rows: list[tuple[str, ...]] = [(c.arm, str(c.seed), c.status, c.message) for c in open_cells]
        found.append(Table("Cells without a result", ("arm", "seed", "state", "message"), rows))
    return found


def facts(ablation: Ablation) -> list[str]:
    """Return the lines above the tables: the plan, the code, what to be careful about."""
    done = [c for c in ablation.cells if c.status in ("finished", "diverged")]
    ran = [*done, *(ablation.trunk.cells if ablation.trunk else ())]
    commits = sorted({c.commit for c in ran if c.commit})
    devices = sorted({c.device for c in ran if c.device})
    lines = [ablation.comment] if ablation.comment else []
    lines += [
        f"Plan {ablation.plan_file}: base {ablation.base}, {ablation.length} a run, "
        f"{len(ablation.arms)} arms x seeds {', '.join(map(str, ablation.seeds))}, "
        f"baseline {ablation.baseline}.",
        *_start(ablation),
        f"Code: {', '.join(commits) or 'unknown'}. Device: {', '.join(devices) or 'unknown'}.",
        f"Decided by bpb {ablation.metric}, paired t test at {ALPHA:g}, Holm over the arms; intervals "
        "are each arm's own 95 %. Other columns are described, not tested.",
    ]
    if not ablation.complete:
        lines.append(
            f"INTERIM: {len(done)} of {len(ablation.cells)} cells are done. A verdict read before the end of "
            "the plan, or seeds added after a look at it, claim more than the error rate allows."
        )
    if len(commits) > 1 or any(c.endswith("-dirty") for c in commits):
        lines.append("WARNING: cells ran code of more than one commit, or code that is in no commit.")
    if len(devices) > 1:
        lines.append("WARNING: cells ran on different devices.")
    if bare := sum(c.manifest is None for c in ran):
        lines.append(f"WARNING: {bare} of {len(ran)} runs rested on data without a manifest: {NO_MANIFEST}.")
    if len({c.manifest for c in ran if c.manifest}) > 1:
        lines.append("WARNING: cells rested on data of different manifests.")
    return lines + [f"WARNING: {text}" for text in ablation.warnings]


def _start(ablation: Ablation) -> list[str]:
    """Say what the arms start from, where it is not random weights."""
    init = ablation.common.get("train.init")
    if init:
        return [f"Every run starts from the weights of {init}: seeds change the order of the data alone."]
    if ablation.trunk is None:
        return []
    losses = [f"seed {c.seed} {c.values['last_loss']:.4f}" for c in ablation.trunk.cells if c.values]
    return [
        f"The arms of a seed start from the same weights: a trunk of {ablation.trunk.steps:,} steps of "
        f"{ablation.baseline} with {_settings(ablation.trunk.overrides)}. Last loss of the trunks, nats per "
        f"token: {', '.join(losses) or 'none yet'}."
    ]


def markdown(ablation: Ablation) -> str:
    """Return the report as Markdown."""
    parts = [f"# Ablation {ablation.name}", "", *(f"- {line}" for line in facts(ablation))]
    for table in tables(ablation):
        parts += ["", f"## {table.title}", "", _row(table.head), _row(tuple("---" for _ in table.head))]
        parts += [_row(row) for row in table.rows]
    return "\n".join(parts) + "\n"


def _row(cells: tuple[str, ...]) -> str:
    safe = (" ".join(c.replace("|", "\\|").split()) for c in cells)
    return "| " + " | ".join(safe) + " |"


def _words(c: Comparison, ablation: Ablation) -> tuple[str, ...]:
    low, high, n = c.pairs.low, c.pairs.high, c.pairs.n
    if n < MIN_PAIRS:
        text = f"{n} pairs are no evidence; {MIN_PAIRS} are the least"
    elif c.verdict == "not separable":
        text = f"anything from {low:+.5f} to {high:+.5f} bpb remains possible"
        if c.needed is not None and c.needed > n:
            text += f"; about {c.needed} pairs would show {ablation.effect:g}"
    else:
        text = f"{c.verdict} by {abs(c.pairs.mean):.5f} bpb ({low:+.5f} to {high:+.5f}), {n} pairs"
    return c.arm, c.verdict, text


def _comparison_row(c: Comparison) -> tuple[str, ...]:
    p = c.pairs
    interval = f"{p.low:+.5f} to {p.high:+.5f}" if p.n >= 2 else "-"
    return (
        c.arm,
        c.verdict,
        str(p.n),
        _figure(p.mean, lambda v: f"{v:+.5f}"),
        interval,
        *(_figure(v, lambda v: f"{v:.4f}") for v in (c.p_adjusted, p.p_t, p.p_flip)),
        _figure(p.sd, lambda v: f"{v:.5f}"),
        "-" if c.needed is None else f"{c.needed:,}",
        c.note,
    )


def _means(ablation: Ablation) -> Table:
    head = ("arm", "n", *(f"bpb {w}" for w in WEIGHTS), "bytes", "steps", "ms a step", "loop off", "loop on")
    rows = []
    for arm in ablation.arms:
        cells = [_mean(arm_mean(ablation, arm, w), 5) for w in WEIGHTS]
        cells += [_mean(arm_mean(ablation, arm, v), 0) for v in ("bytes", "steps")]
        cells += [_mean(arm_mean(ablation, arm, v), 2) for v in ("ms", "ms_loop_off", "ms_loop_on")]
        rows.append((arm, str(len(ablation.of(arm))), *cells))
    return Table("Means over seeds, +- standard error", head, rows)


def _gaps(ablation: Ablation) -> list[Table]:
    """Return where in the run pairs part: mean gap of the training loss by arm, and the scatter of pairs.

    The scatter is the standard deviation of a pair's gap about its arm's mean, over the arms with two pairs
    or more. Where it is large, the runs of one seed are at different places of a fall of the loss, and the
    coefficients, or whatever the arms change, are not what a single pair shows.
    """
    curves = {
        (c.arm, c.seed): [row["loss"] for row in read_metrics(c.metrics) if row.get("loss") is not None]
        for c in ablation.cells
        if c.status == "finished" and c.metrics is not None and c.metrics.is_file()
    }
    gaps: dict[str, list[list[float]]] = {}
    for (arm, seed), losses in curves.items():
        base = curves.get((ablation.baseline, seed), [])
        if arm != ablation.baseline and len(base) == len(losses) >= PARTS:
            gaps.setdefault(arm, []).append(_by_part([a - b for a, b in zip(losses, base, strict=True)]))
    if not gaps:
        return []
    means = {arm: [mean(part) for part in zip(*pairs, strict=True)] for arm, pairs in gaps.items()}
    rows = [
        (arm, str(len(gaps[arm])), *(f"{v:+.4f}" for v in means[arm])) for arm in ablation.arms if arm in gaps
    ]
    free = sum(len(pairs) - 1 for pairs in gaps.values())
    if free:
        squares = (
            sum((pair[i] - means[arm][i]) ** 2 for arm, pairs in gaps.items() for pair in pairs)
            for i in range(PARTS)
        )
        rows.append(("scatter of pairs", f"{free} free", *(f"{math.sqrt(s / free):.4f}" for s in squares)))
    head = ("arm", "pairs", *(f"{100 * i // PARTS}-{100 * (i + 1) // PARTS} %" for i in range(PARTS)))
    title = f"Training loss less that of {ablation.baseline} by part of the run, nats per token"
    return [Table(title, head, rows)]


def _by_part(values: list[float]) -> list[float]:
    """Return the means of PARTS consecutive pieces of nearly equal length."""
    ends = [len(values) * i // PARTS for i in range(PARTS + 1)]
    return [mean(values[a:b]) for a, b in itertools.pairwise(ends)]


def _mean(m: Mean, digits: int) -> str:
    if not m.n:
        return "-"
    return f"{m.mean:,.{digits}f}" + (f" +- {m.se:,.{max(digits, 1)}f}" if m.n > 1 else "")


def _changes(ablation: Ablation) -> list[tuple[str, ...]]:
    sets = {"(all arms)": ablation.common, **ablation.arms}
    return [(arm, _settings(changes)) for arm, changes in sets.items()]


def _settings(changes: dict[str, object]) -> str:
    return ", ".join(f"{k} = {v}" for k, v in changes.items()) or "nothing"


def _trunks(ablation: Ablation) -> list[Table]:
    """Return the table of trunks, in a plan that has them."""
    if ablation.trunk is None:
        return []
    head = ("seed", "state", "steps", "last loss", "bpb raw", "message")
    rows = []
    for c in ablation.trunk.cells:
        figures = (f"{c.values[k]:,.{digits}f}" if k in c.values else "-" for k, digits in TRUNK_FIGURES)
        rows.append((str(c.seed), c.status, *figures, c.message))
    return [Table("Trunks, whose raw weights the arms start from", head, rows)]


def _figure(value: float, show: Callable[[float], str]) -> str:
    return "-" if value != value else show(value)
