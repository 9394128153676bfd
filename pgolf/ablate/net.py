"""What an arm brings at equal seconds and equal bytes: its difference at equal steps, less what it costs.

    net = difference + rate of time * percent of time + rate of bytes * percent of bytes

in bits per byte, negative is better. The percentages are those above the baseline, the rates those of the
plan; both count as known, so the interval of the net difference is that of the difference, moved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pgolf.ablate.compare import Comparison, compare_arms
from pgolf.ablate.results import Ablation, CostTable
from pgolf.stats import MIN_PAIRS

Decision = Literal["adopt", "drop", "park", "none"]

DROP = 0.0003
"""A gain that is too small to be worth a place in the recipe, bits per byte: an arm is dropped where its
interval leaves no room for it."""


@dataclass(frozen=True)
class Net:
    """One arm with its costs."""

    compared: Comparison
    ms: float
    """Milliseconds per step; NaN: not known."""
    time_percent: float
    """Above the baseline's; NaN: not known."""
    bytes: float
    bytes_percent: float
    charge: float
    """What time and bytes cost, bits per byte, as far as they are charged."""
    decision: Decision

    @property
    def mean(self) -> float:
        """Net difference, bits per byte."""
        return self.compared.pairs.mean + self.charge

    @property
    def low(self) -> float:
        """Lower end of its 95 % interval."""
        return self.compared.pairs.low + self.charge

    @property
    def high(self) -> float:
        """Upper end."""
        return self.compared.pairs.high + self.charge


def net_of_costs(ablation: Ablation) -> list[Net]:
    """Return every arm with its costs, in the plan's order.

    adopt: better at equal steps (Holm-corrected), and by more than it costs. drop: the interval of the net
    difference leaves no gain of `DROP`. park: neither; more pairs would tell. none: too few pairs, or nothing
    is known of the costs.
    """
    costs = ablation.costs
    return [] if costs is None else [_net(c, ablation.baseline, costs) for c in compare_arms(ablation)]


def _net(compared: Comparison, baseline: str, costs: CostTable) -> Net:
    arm = compared.arm
    ms = costs.ms.get(arm, math.nan)
    time_percent = _percent(ms, costs.ms.get(baseline, math.nan))
    size = costs.bytes[arm]
    bytes_percent = _percent(size, costs.bytes[baseline])
    charge = costs.rates.bytes * bytes_percent if costs.charges_bytes else 0.0
    if costs.charges_time:
        # An arm whose time is not known gets no net difference: it would look free.
        charge += costs.rates.time * time_percent
    return Net(compared, ms, time_percent, size, bytes_percent, charge, _decide(compared, charge))


def _percent(value: float, base: float) -> float:
    return 0.0 if value == base else 100 * (value / base - 1)


def _decide(compared: Comparison, charge: float) -> Decision:
    pairs = compared.pairs
    if pairs.n < MIN_PAIRS or math.isnan(charge):
        return "none"
    if compared.verdict == "better" and pairs.mean + charge < 0:
        return "adopt"
    return "drop" if pairs.low + charge > -DROP else "park"
