"""Ladders: a change and the baseline, each at several learning rates, compared at their own best rates.

A change that moves the best learning rate looks good or bad at any one rate: five percent of rate are worth
more than most changes. So a parabola in the logarithm of the rate is laid through a ladder's mean scores. Its
lowest point within the rates that were run is the ladder's best rate. The score of a seed there is what the
parabola through the seed's own scores says, a fixed weighted sum of them. So the differences of ladders are
paired by seed like those of single arms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pgolf.ablate.ladder_plan import Ladders
from pgolf.ablate.results import Ablation
from pgolf.stats import MIN_PAIRS, Paired, Verdict, compare_paired, holm, verdict


@dataclass(frozen=True)
class LadderResult:
    """A ladder at its best rate."""

    ladder: str
    best: float
    """Value of the setting there; NaN: too few seeds have all rungs."""
    at_end: bool
    """Whether that is the first or the last rung, so that the ladder has to be extended."""
    pairs: Paired
    """Against the baseline's ladder at its own best rate."""
    p_adjusted: float
    verdict: Verdict


def compare_ladders(ablation: Ablation, ladders: Ladders) -> list[LadderResult]:
    """Return every ladder, the baseline's first, at its best rate and against the baseline's."""
    order = [ladders.baseline, *(name for name in ladders.rungs if name != ladders.baseline)]
    scores = {name: _at_best(ablation, ladders.rungs[name]) for name in order}
    base = scores[ladders.baseline][2]
    rows: list[tuple[str, float, bool, Paired]] = []
    for name in order:
        best, at_end, mine = scores[name]
        seeds = [s for s in ablation.seeds if s in mine and s in base]
        pairs = compare_paired([mine[s] for s in seeds], [base[s] for s in seeds])
        rows.append((name, best, at_end, pairs))
    tested = [row[0] for row in rows[1:] if row[3].n >= MIN_PAIRS]
    adjusted = dict(zip(tested, holm([r[3].p_t for r in rows if r[0] in tested]), strict=True))
    return [
        LadderResult(*row, adjusted.get(row[0], math.nan), verdict(row[3], adjusted.get(row[0], math.nan)))
        for row in rows
    ]


def _at_best(ablation: Ablation, rungs: Mapping[str, float]) -> tuple[float, bool, dict[int, float]]:
    """Return the best rate of a ladder, whether that is at its end, and each seed's score there."""
    by_arm = {arm: ablation.of(arm) for arm in rungs}
    seeds = [s for s in ablation.seeds if all(s in cells for cells in by_arm.values())]
    if not seeds:
        return math.nan, False, {}
    x = np.log(np.array(list(rungs.values())))
    table = np.array([[by_arm[arm][s].values[ablation.metric] for arm in rungs] for s in seeds])
    best = best_point(x, table.mean(axis=0))
    at_end = bool(np.isclose(best, x[0]) or np.isclose(best, x[-1]))
    found = table @ weights_at(x, best)
    return math.exp(best), at_end, dict(zip(seeds, map(float, found), strict=True))


def best_point(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Return where the parabola of least squares through `y` `(n,)` at `x` `(n,)` is lowest in [x_1, x_n].

    With n = 3 the parabola meets all points. One that is not open upwards is lowest at an end.
    """
    square, slope, _ = np.polyfit(x, y, 2)
    lowest = -slope / (2 * square) if square > 0 else math.nan
    if x[0] <= lowest <= x[-1]:
        return float(lowest)
    return float(
        x[0] if np.polyval([square, slope, 0], x[0]) <= np.polyval([square, slope, 0], x[-1]) else x[-1]
    )


def weights_at(x: NDArray[np.float64], point: float) -> NDArray[np.float64]:
    """Return the weights `(n,)` with which scores at `x` sum to the value of their parabola at `point`."""
    basis = np.vander(x - point, 3)  # (n, 3); the last coefficient is the value at `point`
    return np.asarray(np.linalg.pinv(basis)[2])
