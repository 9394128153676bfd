"""What the results of an ablation say: each arm against the baseline, pair by pair.

A pair is one seed that the arm and the baseline both finished. Only finished cells enter a mean. Negative
differences are better (bits per byte).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from statistics import mean

from pgolf.ablate.results import Ablation
from pgolf.report.plots import read_metrics
from pgolf.stats import (
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

PARTS = 10
"""Pieces of a run in the table of gaps."""


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
        # In pairs only: what the seed does to both runs cancels in their difference.
        mine = ablation.of(arm)
        seeds = tuple(s for s in ablation.seeds if s in mine and s in base)
        ours = [mine[s].values[ablation.metric] for s in seeds]
        theirs = [base[s].values[ablation.metric] for s in seeds]
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        rows.append((arm, seeds, differences, compare_paired(ours, theirs)))
    # An arm with too few pairs is not tested, so it takes no share of the error rate of the others.
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


@dataclass(frozen=True)
class Gaps:
    """Where in the run pairs part, by `PARTS` consecutive pieces of the run, nats per token."""

    means: dict[str, list[float]]
    """Mean gap of the training loss to the baseline's, by arm."""
    pairs: dict[str, int]
    """Pairs of each arm."""
    scatter: list[float]
    """Standard deviation of a pair's gap about its arm's mean; empty without an arm of two pairs."""
    freedom: int
    """Degrees of freedom of the scatter: pairs less arms."""


def training_gaps(ablation: Ablation) -> Gaps:
    """Return the gaps of the training loss, over the pairs of runs of equal length.

    Where the scatter is large, the runs of one seed are at different places of a fall of the loss, and what a
    single pair shows is not the effect of what the arm changes.
    """
    curves = {
        (c.arm, c.seed): [row["loss"] for row in read_metrics(c.metrics) if row.get("loss") is not None]
        for c in ablation.cells
        if c.status == "finished" and c.metrics is not None and c.metrics.is_file()
    }
    found: dict[str, list[list[float]]] = {}
    for (arm, seed), losses in curves.items():
        # Runs of fixed seconds have different numbers of steps, and so no parts in common.
        base = curves.get((ablation.baseline, seed), [])
        if arm != ablation.baseline and len(base) == len(losses) >= PARTS:
            found.setdefault(arm, []).append(_by_part([a - b for a, b in zip(losses, base, strict=True)]))
    means = {arm: [mean(part) for part in zip(*pairs, strict=True)] for arm, pairs in found.items()}
    freedom = sum(len(pairs) - 1 for pairs in found.values())
    squares = [
        sum((pair[i] - means[arm][i]) ** 2 for arm, pairs in found.items() for pair in pairs)
        for i in range(PARTS)
    ]
    scatter = [math.sqrt(total / freedom) for total in squares] if freedom else []
    return Gaps(means, {arm: len(pairs) for arm, pairs in found.items()}, scatter, freedom)


def _by_part(values: list[float]) -> list[float]:
    """Return the means of PARTS consecutive pieces of nearly equal length."""
    ends = [len(values) * i // PARTS for i in range(PARTS + 1)]
    return [mean(values[a:b]) for a, b in itertools.pairwise(ends)]
