"""What arms cost, and what they bring after their costs."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from pgolf.ablate.costs import COSTS, Rates, StepTime, file_bytes, measured, work_key
from pgolf.ablate.net import DROP, net_of_costs
from pgolf.ablate.results import CostTable, gather
from pgolf.ablate.tables import markdown
from pgolf.files import write_json
from tests.ablate.ablate_helpers import FakeCells, make_plan, run_all
from tests.ablate.test_tables import make_ablation

ARMS = {
    "base": {},
    "slow": {"optim.muon.lr": 0.01},
    "short": {"optim.muon.ns_steps": 4},
    "pairs": {"model.bigram_buckets": 64},
}


def table(**changes) -> CostTable:
    """`good` takes 2 % more time and 1 % more bytes, `same` nothing."""
    ms = {"base": 100.0, "good": 102.0, "same": 100.0, "twin": 100.0}
    size = {"base": 1000.0, "good": 1010.0, "same": 1000.0, "twin": 1000.0}
    made = CostTable(Rates(time=0.0004, bytes=0.0003), ms, "timed", size, "predicted", True, True)
    return replace(made, **changes)


def test_net_is_the_difference_and_what_time_and_bytes_are_worth(tmp_path):
    ablation = make_ablation(tmp_path, costs=table())
    good, same, twin = net_of_costs(ablation)
    assert good.time_percent == pytest.approx(2.0) and good.bytes_percent == pytest.approx(1.0)
    assert good.charge == pytest.approx(2 * 0.0004 + 1 * 0.0003)
    assert good.mean == pytest.approx(good.compared.pairs.mean + 0.0011)
    assert good.low == pytest.approx(good.compared.pairs.low + 0.0011)
    assert (good.decision, same.charge, twin.decision) == ("adopt", 0.0, "drop")
    assert same.decision == ("drop" if same.low > -DROP else "park")


@pytest.mark.parametrize(
    ("changes", "charge"),
    [
        ({"charges_time": False}, 0.0003),
        ({"charges_bytes": False}, 0.0008),
        ({"rates": Rates(time=0.0, bytes=0.0)}, 0.0),
        ({"rates": Rates(time=0.006, bytes=0.0)}, 0.012),
    ],
)
def test_costs_that_the_score_has_paid_already_are_not_charged(tmp_path, changes, charge):
    (good, *_) = net_of_costs(make_ablation(tmp_path, costs=table(**changes)))
    assert good.charge == pytest.approx(charge)
    assert good.decision == ("adopt" if charge < 0.01 else "drop"), "it gains 0.01 at equal steps"


def test_an_arm_whose_time_is_not_known_gets_no_decision(tmp_path):
    ablation = make_ablation(tmp_path, costs=table(ms={}))
    (good, *_) = net_of_costs(ablation)
    assert good.decision == "none" and math.isnan(good.mean)
    report = markdown(ablation)
    assert "Milliseconds: not known: no arm was timed, and the runs shared a GPU" in report


def test_the_report_shows_costs_rates_and_decisions(tmp_path):
    report = markdown(make_ablation(tmp_path, costs=table()))
    assert "1 % of time counts 0.0004 bpb; 1 % of bytes 0.0003 bpb" in report
    row = next(line for line in report.splitlines() if line.startswith("| good | -0.0099"))
    assert "| 102.00 | +2.00 | 1,010 | +1.00 | +0.00110 |" in row and row.endswith("| adopt |")
    assert "## Net" not in markdown(make_ablation(tmp_path))


def test_arms_that_differ_in_numbers_alone_do_the_same_work(tmp_path):
    plan = make_plan(tmp_path, arms=ARMS)
    keys = {arm: work_key(config) for arm, config in plan.arms.items()}
    assert keys["base"] == keys["slow"] and len(set(keys.values())) == 3
    base = plan.arms["base"]
    without = replace(base, optim=replace(base.optim, ema_horizon=0.0))
    assert work_key(without) != work_key(base)

    def key(**changes):
        muon = replace(base.optim.muon, **changes)
        return work_key(replace(base, optim=replace(base.optim, muon=muon)))

    assert key(momentum_age=0.01) == work_key(base)
    assert key(normalize=0.9) == key(normalize=0.95) != work_key(base) != key(cautious=True)
    assert key(slow_age=0.01) == key(slow_age=0.02, slow_weight=0.3) != work_key(base)
    assert len({key(head_pairs=pairs) for pairs in ("off", "qk", "kv", "qkv")}) == 4


def test_measured_times_are_read_by_what_is_computed(tmp_path):
    plan = make_plan(tmp_path, arms=ARMS, costs={"steps": 2})
    ms = {
        work_key(plan.arms[arm]): [off, on] for arm, off, on in (("base", 10.0, 20.0), ("short", 8.0, 16.0))
    }
    plan.out.mkdir()
    write_json(plan.out / COSTS, {"ms": ms})
    assert measured(plan.out, plan.costs) == {}, "an arm is missing"
    ms[work_key(plan.arms["pairs"])] = [11.0, None]
    write_json(plan.out / COSTS, {"ms": ms})
    found = measured(plan.out, plan.costs)
    assert found["slow"] == found["base"] == StepTime(10.0, 20.0, 0.65)
    assert found["base"].ms == pytest.approx(0.35 * 10 + 0.65 * 20) and found["pairs"].ms == 11.0
    write_json(plan.out / COSTS, {"ms": {key: ["fast", None] for key in ms}})
    assert measured(plan.out, plan.costs) == {}


def test_costs_are_found_at_the_size_that_the_plan_says(tmp_path):
    plan = make_plan(tmp_path, arms=ARMS, costs={"overrides": {"model.layers": 7}})
    assert {c.model.layers for c in plan.costs.arms.values()} == {7}
    assert plan.costs.arms["pairs"].model.bigram_buckets == 64 and plan.costs.steps == 20
    assert plan.arms["base"].model.layers != 7
    assert make_plan(tmp_path, arms=ARMS).costs.steps == 0, "without the section nothing is timed"


def test_bytes_are_predicted_where_an_arm_changes_them(tmp_path):
    plan = make_plan(tmp_path, arms=ARMS)
    sizes = file_bytes(plan.costs, "base")
    assert sizes["base"] == sizes["slow"] == sizes["short"] > 0
    # 64 rows of 128 codes and a matrix of as many columns as the width, of 3.5 to 9 bits each.
    codes = 128 * (64 + plan.arms["base"].model.width)
    assert 0.4 * codes < sizes["pairs"] - sizes["base"] < 1.3 * codes
    same = make_plan(tmp_path, arms={"base": {}, "slow": ARMS["slow"]})
    assert file_bytes(same.costs, "base") == {"base": 0, "slow": 0}


@pytest.mark.parametrize("per_gpu", [1, 2])
def test_milliseconds_of_runs_count_only_if_none_shared_the_gpu(tmp_path, per_gpu):
    plan = make_plan(tmp_path)
    run_all(plan, FakeCells(), per_gpu=per_gpu)
    costs = gather(plan, Path("p")).costs
    assert (set(costs.ms) == {"base", "jordan"}) == (per_gpu == 1)
    assert costs.charges_time and costs.bytes["base"] == 777.0, "of the files, which hold 700 and 77 bytes"


BAD = [
    ({"costs": [1]}, TypeError, r"costs: expected an object of steps and overrides, got list"),
    ({"costs": {"step": 1}}, ValueError, r"costs: unknown key 'step'; did you mean 'steps'"),
    ({"costs": {"steps": 0}}, ValueError, r"costs: steps and rounds must be >= 1, got 0 and 3"),
    ({"costs": {"overrides": {"model.layer": 3}}}, ValueError, r"costs: overrides.*'layer'; did you mean"),
    ({"rates": {"time": -1.0}}, ValueError, r"rates are bits per byte for one percent, in \[0, 1\)"),
    ({"rates": 3}, TypeError, r"rates: expected an object, got int"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_costs_say_what_is_wrong(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        make_plan(tmp_path, **change)
