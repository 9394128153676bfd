"""Plans of ablations: what they resolve to, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from pgolf.ablate.plan import read_plan
from pgolf.cli.overrides import load_base
from tests.ablate.ablate_helpers import make_plan


def test_plan_resolves_arms_and_interleaves_seeds(tmp_path):
    plan = make_plan(tmp_path)
    assert not plan.warnings
    assert plan.arms["jordan"].optim.muon.coefficients == "jordan"
    cells = plan.cells()
    assert [(c.seed, c.arm) for c in cells] == [
        *[(1, "base"), (1, "jordan")],
        *[(2, "jordan"), (2, "base")],  # every seed starts one arm further on
        *[(3, "base"), (3, "jordan")],
    ]
    one, two = cells[0].config, cells[1].config
    assert (one.train.seed, one.train.steps, one.train.seconds) == (1, 5, 0.0)
    assert one.data.micro_tokens == two.data.micro_tokens == 512 and one.data.dir == Path("shards")
    assert replace(two, name=one.name, train=one.train, optim=one.optim) == one
    assert len({c.folder for c in cells}) == len({c.key for c in cells}) == 6


BAD_PLANS = [
    ({"arm": {}}, ValueError, r"unknown key 'arm'; did you mean 'arms'"),
    ({"steps": 5, "seconds": 60}, ValueError, r"either steps or seconds.*got steps=5, seconds=60"),
    ({"steps": 0}, ValueError, r"either steps or seconds"),
    ({"steps": -1}, ValueError, r"either steps or seconds"),
    ({"seeds": [1, 2, 1]}, ValueError, r"seeds \[1\] are given twice"),
    ({"seeds": []}, ValueError, r"at least one whole number"),
    ({"seeds": [1, True]}, ValueError, r"whole numbers in .* got \[True\]"),
    ({"baseline": "bas"}, ValueError, r"baseline must be one of the arms \['base', 'jordan'\], got 'bas'"),
    ({"baseline": ""}, ValueError, r"baseline is missing"),
    ({"arms": {"base": {}}}, ValueError, r"at least two arms"),
    ({"arms": {"base": {}, "Base": {}}}, ValueError, r"is named twice: folders may not tell capitals apart"),
    ({"arms": {"base": {}, "../x": {}}}, ValueError, r"names a folder"),
    ({"arms": {"base": {}, "a": []}}, TypeError, r"arm 'a': expected an object of dotted settings, got list"),
    ({"arms": {"base": {}, "a": {"optim.muon.lrr": 1.0}}}, ValueError, r"arm 'a'.*'lrr'; did you mean 'lr'"),
    ({"arms": {"base": {}, "a": {"optm.muon.lr": 1.0}}}, ValueError, r"'optm'; did you mean 'optim'"),
    ({"arms": {"base": {}, "a": {"optim.muon": {"lr": 1}}}}, TypeError, r"one dotted key for each setting"),
    ({"arms": {"base": {}, "a": {"optim.muon": 1}}}, ValueError, r"is a section; name one of lr,"),
    ({"arms": {"base": {}, "a": {"optim.muon.lr.x": 1}}}, ValueError, r"'lr' is a setting, not a section"),
    ({"arms": {"base": {}, "a": {"optim.muon.ns_steps": 11}}}, ValueError, r"arm 'a'.*in \[1, 10\], got 11"),
    ({"arms": {"base": {}, "a": {"optim.muon.lr": "big"}}}, TypeError, r"expected float, got str 'big'"),
    ({"arms": {"base": {}, "a": {"optim.muon.coefficients": "jordn"}}}, ValueError, r"got 'jordn'"),
    ({"arms": {"base": {}, "a": {"train.seed": 3}}}, ValueError, r"train.seed is given by the plan's seeds"),
    ({"overrides": {"train.steps": 3}}, ValueError, r"train.steps is given by the plan's steps or seconds"),
    ({"metric": "ttt"}, ValueError, r"metric must be one of \('raw', 'ema', 'quantized'\)"),
    ({"overrides": {"train.quantize": False}}, ValueError, r"quantized needs train.quantize in every arm"),
    (
        {"overrides": {"evaluate.raw": False}},
        ValueError,
        r"evaluate\.raw is false in arm 'base'.* it must be true; take evaluate\.raw out of the overrides",
    ),
    (
        {"arms": {"base": {}, "a": {"evaluate.raw": False}}, "metric": "ema"},
        ValueError,
        r"evaluate\.raw is false in arm 'a'",
    ),
    ({"overrides": {"evaluate.ema": False}}, ValueError, r"evaluate\.ema is false in arm 'base'"),
    (
        {"trunk": {"steps": 5, "overrides": {"evaluate.raw": False}}},
        ValueError,
        r"evaluate\.raw is false in the trunk",
    ),
    ({"effect": 0}, ValueError, r"effect is in bits per byte"),
    ({"base": "recrod"}, ValueError, r"'recrod' is neither a preset"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_PLANS, ids=lambda v: str(v)[:40])
def test_bad_plan_says_what_is_wrong(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        make_plan(tmp_path, **change)


def test_scores_of_averages_are_asked_for_only_where_there_is_an_average(tmp_path):
    make_plan(tmp_path, overrides={"optim.ema_horizon": 0.0, "evaluate.ema": False})
    make_plan(tmp_path, trunk={"steps": 5, "overrides": {"evaluate.ema": False}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"arms": {"a": {}, "a": {}}}', r"given twice: 'a'"),
        ('{"seeds": [1,]}', r"is not a plan"),
    ],
)
def test_duplicate_arm_or_broken_json_is_an_error(tmp_path, text, message):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_plan(tmp_path / "plan.json", load_base)


def test_missing_plan_names_the_example():
    with pytest.raises(FileNotFoundError, match=r"no plan file nowhere.json; bench/ablations/example.json"):
        read_plan(Path("nowhere.json"), load_base)


def test_override_that_changes_nothing_is_named(tmp_path):
    arms = {"base": {}, "clip": {"quant.mlp_clip": 11.5}, "lr": {"optim.muon.lr": 0.04}}
    first, second = make_plan(tmp_path, arms=arms).warnings
    assert "arm 'clip': quant.mlp_clip = 11.5 changes nothing" in first
    assert second == "arms 'base' and 'clip' are the same run: their difference is noise only"


PLANS = {
    "example": 32,
    "polar_proxy": 64,
    "polar_noloop": 40,
    "polar_small": 64,
    "polar_trunk": 64,
    "polar_full": 32,
    "rates": 88,
    "ema_nesterov": 72,
    "muon_rate_late": 16,
    "embed_warmup": 12,
    "late": 36,
    "normuon": 54,
    "cautious": 54,
    "momentum_age": 90,
    "head_pairs": 24,
    "mudd": 80,
    "mudd_full": 9,
}


@pytest.mark.parametrize(("name", "cells"), PLANS.items())
def test_plans_of_the_bench_are_valid(name, cells):
    plan = read_plan(Path(__file__).parents[2] / "bench" / "ablations" / f"{name}.json", load_base)
    assert len(plan.cells()) == cells and not plan.warnings
