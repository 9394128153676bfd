"""Ladders of learning rates: the best rate, and differences there."""

import math
from pathlib import Path

import numpy as np
import pytest

from pgolf.ablate.ladder import best_point, compare_ladders, weights_at
from pgolf.ablate.results import gather
from pgolf.ablate.tables import markdown
from tests.ablate.ablate_helpers import FakeProcess, make_plan, run_all, write_summary

RATES = {"slow": 0.02, "base": 0.025, "fast": 0.03125}
ARMS = {name: {"optim.muon.lr": rate} for name, rate in RATES.items()}
ARMS |= {f"ahead_{name}": {"optim.muon.lr": rate, "optim.ema_nesterov": 0.5} for name, rate in RATES.items()}
LADDERS = {"baseline": "plain", "arms": {"plain": list(RATES), "ahead": [f"ahead_{name}" for name in RATES]}}


def score(arm: str, seed: int) -> float:
    """A parabola in ln rate with its lowest point at 0.025 (ahead: 0.0225, and 0.001 lower), and noise."""
    ahead = arm.startswith("ahead_")
    x = math.log(RATES[arm.removeprefix("ahead_")] / (0.0225 if ahead else 0.025))
    return 1.1 + 0.01 * seed + 0.05 * x * x + ahead * (-0.001 + 0.0001 * (seed % 3))


def run(tmp_path: Path):
    import json

    from pgolf.config import to_dict

    def start(cell, gpu):
        folder = cell.folder / "run"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(to_dict(cell.config)))
        write_summary(folder, cell, raw=1.0, quantized=score(cell.arm, cell.seed))
        return FakeProcess(0)

    plan = make_plan(tmp_path, arms=ARMS, seeds=[1, 2, 3, 4, 5, 6], ladders=LADDERS)
    run_all(plan, start)
    return plan, gather(plan, Path("p"))


def test_ladders_are_compared_at_their_own_best_rates(tmp_path):
    plan, ablation = run(tmp_path)
    plain, ahead = compare_ladders(ablation, plan.ladders)
    assert plain.best == pytest.approx(0.025) and ahead.best == pytest.approx(0.0225)
    assert plain.pairs.mean == 0 and not (plain.at_end or ahead.at_end)
    # At one rate the difference is another one: 0.05 ln(0.025 / 0.0225)^2 is 0.00056 worse.
    assert ahead.pairs.mean == pytest.approx(-0.0009, abs=1e-9) and ahead.verdict == "better"
    assert math.isnan(plain.p_adjusted) and ahead.p_adjusted == pytest.approx(ahead.pairs.p_t)
    report = markdown(ablation)
    row = next(line for line in report.splitlines() if line.startswith("| ahead | 0.0225 "))
    assert "| better | 6 | -0.00090 |" in row


def test_best_point_is_that_of_the_parabola_or_an_end():
    x = np.log([1.0, 2.0, 4.0])
    assert best_point(x, (x - 0.5) ** 2) == pytest.approx(0.5)
    assert best_point(x, (x + 3.0) ** 2) == x[0] and best_point(x, (x - 9.0) ** 2) == x[-1]
    assert best_point(x, -((x - 0.6) ** 2)) == x[-1], "open downwards: the lower end"
    four = np.log([1.0, 2.0, 3.0, 4.0])
    assert best_point(four, 7 + 2 * (four - 1.1) ** 2) == pytest.approx(1.1)


@pytest.mark.parametrize("count", [3, 5])
def test_weights_read_the_parabola_of_least_squares(count):
    x = np.linspace(-1.0, 1.5, count)
    y = np.random.default_rng(count).normal(size=count)
    for point in (-1.0, 0.3, 1.5):
        expected = np.polyval(np.polyfit(x, y, 2), point)
        assert weights_at(x, point) @ y == pytest.approx(expected, abs=1e-12)


BAD = [
    ({"baseline": "plain", "arms": {"other": ["slow"]}}, r"the baseline one of them"),
    ({"baseline": "a", "arms": {"a": ["slow", "base"]}}, r"ladders: a must list at least 3 of the arms"),
    ({"baseline": "a", "arms": {"a": ["slow", "base", "none"]}}, r"a must list at least 3 of the arms"),
    (
        {"baseline": "a", "arms": {"a": ["slow", "base", "ahead_base"]}},
        r"two of its arms have the same optim",
    ),
    (
        {"setting": "optim.muon.rate", "baseline": "a", "arms": {"a": list(RATES)}},
        r"must be a number above 0",
    ),
    ({"base": "a"}, r"ladders: unknown key 'base'; did you mean 'baseline'"),
]


@pytest.mark.parametrize(("ladders", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_ladders_say_what_is_wrong(tmp_path, ladders, message):
    with pytest.raises(ValueError, match=message):
        make_plan(tmp_path, arms=ARMS, ladders=ladders)
