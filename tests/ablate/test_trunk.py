"""Arms that start from a trunk: the plan, the order of the runner, and what is run again when."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pgolf.ablate.plan import TRUNK_SEEDS
from pgolf.ablate.results import gather, read_cell
from pgolf.ablate.tables import markdown
from pgolf.config import to_dict
from pgolf.presets import tiny
from tests.ablate.ablate_helpers import DIVERGED, FakeCells, FakeProcess, make_plan, run_all

TRUNK = {"steps": 7, "overrides": {"optim.warmdown": 0.0, "train.quantize": False}}


class FakeTrunks(FakeCells):
    """As FakeCells; finished cells leave weights, and note what they started from."""

    def __init__(self, **fates):
        super().__init__(**fates)
        self.inits, self.starts = {}, {}

    def __call__(self, cell, gpu):
        process = super().__call__(cell, gpu)
        self.inits[cell.arm, cell.seed] = cell.config.train.init
        run = max(cell.folder.glob("run*"))
        self.starts[cell.arm, cell.seed] = cell.config.train.start
        if (run / "summary.json").is_file():
            (run / "raw.safetensors").touch()
            for name in filter(None, cell.config.train.snapshots.split(",")):
                (run / "snapshots" / name).mkdir(parents=True)
                (run / "snapshots" / name / "index.json").touch()
        return process

    @property
    def names(self):
        return [f"{arm}{seed}" for arm, seed, _ in self.started]


def plan_with_trunk(folder, **changes):
    return make_plan(folder, trunk=TRUNK, seeds=[1, 2], **changes)


def run(plan, **fates):
    """Run the plan and return the names of the cells that were started."""
    cells = FakeTrunks(**fates)
    run_all(plan, cells)
    return cells.names


WHOLE = ["trunk1", "base1", "jordan1", "trunk2", "jordan2", "base2"]


def test_trunk_is_the_baseline_with_its_own_length_seed_and_overrides(tmp_path):
    plan = plan_with_trunk(tmp_path, arms={"base": {"optim.muon.lr": 0.01}, "other": {}})
    assert not plan.warnings and "trunk" not in {cell.arm for cell in plan.cells()}
    one = plan.trunks()[1].config
    assert (one.train.steps, one.train.seconds, one.train.seed) == (7, 0.0, 1 + TRUNK_SEEDS)
    assert (one.optim.warmdown, one.optim.muon.lr, one.train.quantize) == (0.0, 0.01, False)
    assert {cell.trunk for cell in plan.cells() if cell.seed == 1} == {plan.trunks()[1]}
    assert all(c.config.train.quantize and c.config.train.seed == c.seed for c in plan.cells())
    assert make_plan(tmp_path).trunks() == {}


BAD = [
    ({"trunk": {"steps": 0}}, ValueError, r"trunk: steps must be >= 1, got 0"),
    ({"trunk": [7]}, TypeError, r"trunk: expected an object of steps and overrides, got list"),
    ({"trunk": {"step": 7}}, ValueError, r"trunk: unknown key 'step'; did you mean 'steps'"),
    ({"trunk": {"steps": 7, "overrides": {"train.sed": 1}}}, ValueError, r"'sed'; did you mean 'seed'"),
    (
        {"trunk": TRUNK, "overrides": {"train.init": "a"}},
        ValueError,
        r"train.init of the arms is given by the plan's trunk",
    ),
    (
        {"trunk": TRUNK, "arms": {"base": {}, "wide": {"model.mlp_mult": 5}}},
        ValueError,
        r"arm 'wide' cannot start from the trunk: the trunk is of another model: model\.mlp_mult is 3 there",
    ),
    ({"trunk": {"steps": 7, "until": 1.0}}, ValueError, r"until is a fraction of the schedules below 1"),
    (
        {"trunk": {"steps": 7, "until": 0.5}, "overrides": {"train.until": 0.7}},
        ValueError,
        r"train.until of the arms is given by the plan's trunk",
    ),
    (
        {"trunk": {"steps": 7, "until": 0.5, "overrides": {"train.until": 0.7}}},
        ValueError,
        r"trunk: train\.until is given by the trunk's until",
    ),
    (
        {"trunk": {"steps": 7, "overrides": {"train.until": 0.7}}},
        ValueError,
        r"trunk: train\.until is given by the trunk's until",
    ),
    (
        {"trunk": {"steps": 7, "until": 0.5, "overrides": {"train.snapshots": "0.1"}}},
        ValueError,
        r"trunk: train\.snapshots is given by the trunk's until",
    ),
    (
        {"trunk": {"steps": 7, "until": 0.5}, "overrides": {"train.snapshots": "0.3,0.8"}},
        ValueError,
        r"arm 'base': train\.snapshots=0\.3 is not after the trunk's end, 0\.5",
    ),
    ({"trunk": TRUNK, "arms": {"base": {}, "Trunk": {}}}, ValueError, r"arm 'trunk' would share its folder"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_trunk_says_what_is_wrong(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        make_plan(tmp_path, **change)


@pytest.mark.parametrize("until", [0.0, 0.3, 0.7])
@pytest.mark.parametrize(
    "setting", [{"until": 0.5}, {"start": "run/snapshots/0.2"}, {"init": "raw.safetensors"}]
)
def test_a_base_that_is_a_part_of_a_training_is_refused_before_the_trunk_is_trained(tmp_path, setting, until):
    base = to_dict(tiny())
    base["train"] |= setting
    (tmp_path / "base.json").write_text(json.dumps(base))
    trunk = {"steps": 7, **({"until": until} if until else {})}
    (key,) = setting
    with pytest.raises(ValueError, match=rf"train\.{key} of the arms is given by the plan's trunk"):
        make_plan(tmp_path, base=str(tmp_path / "base.json"), trunk=trunk)


def test_every_seed_has_its_trunk_first_and_its_arms_start_from_it(tmp_path):
    plan, cells = plan_with_trunk(tmp_path), FakeTrunks()
    lines = run_all(plan, cells)
    assert cells.names == WHOLE and "[6/6]" in lines[-1] and "[1/6] trunk seed 1: 1.2" in lines[0]
    for (arm, seed), init in cells.inits.items():
        expected = (
            None
            if arm == "trunk"
            else Path(plan.out, "cells", "trunk", f"seed{seed}", "run0", "raw.safetensors")
        )
        assert init == expected
    assert gather(plan, Path("p")).complete and run(plan) == []


def test_arms_wait_for_their_trunk_while_other_seeds_run(tmp_path):
    class Slow(FakeProcess):
        left = 3

        def poll(self):
            self.left -= 1
            return None if self.left > 0 else 0

    cells = FakeTrunks()

    def start(cell, gpu):
        done = cells(cell, gpu)
        return Slow(0) if (cell.arm, cell.seed) == ("trunk", 1) else done

    run_all(plan_with_trunk(tmp_path), start, gpus=3)
    assert cells.names == ["trunk1", "trunk2", "jordan2", "base2", "base1", "jordan1"]


def test_stopped_plan_goes_on_from_the_trunks_that_are_there(tmp_path):
    plan = plan_with_trunk(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(plan, jordan1="interrupt")
    assert run(plan) == ["jordan1", *WHOLE[3:]]


def test_arms_of_a_changed_trunk_run_again(tmp_path):
    run(plan_with_trunk(tmp_path))
    changed = make_plan(tmp_path, trunk={**TRUNK, "steps": 8}, seeds=[1, 2])
    assert {read_cell(cell).status for cell in changed.cells()} == {"missing"}
    assert run(changed) == WHOLE and gather(changed, Path("p")).complete
    assert run(make_plan(tmp_path, seeds=[1, 2])) == ["base1", "jordan1", "jordan2", "base2"]


def test_pairs_of_a_seed_never_start_from_two_trunks(tmp_path):
    """Weights that are gone are trained again only for cells to come, and then for all of their seed."""
    plan = plan_with_trunk(tmp_path)
    run(plan)
    for weights in plan.out.rglob("raw.safetensors"):
        weights.unlink()
    assert run(plan) == []
    longer = replace(plan, seeds=(1, 2, 3))
    assert run(longer) == ["trunk3", "base3", "jordan3"]
    next(iter((plan.out / "cells" / "base" / "seed2").glob("*/summary.json"))).unlink()
    assert run(longer, trunk2="no space") == ["trunk2"]
    assert run(longer) == WHOLE[3:]
    assert run(longer) == []


def test_results_move_without_the_weights_and_trunks_are_no_arms(tmp_path):
    plan = plan_with_trunk(tmp_path)
    run(plan)
    for weights in plan.out.rglob("raw.safetensors"):
        weights.unlink()
    before = markdown(gather(plan, Path("p")))
    plan.out.rename(tmp_path / "moved")
    result = gather(replace(plan, out=tmp_path / "moved"), Path("p"))
    assert markdown(result) == before and result.complete and list(result.arms) == ["base", "jordan"]
    assert "a trunk of 7 steps of base with optim.warmdown = 0.0, train.quantize = False" in before
    assert "INTERIM" not in before and "2 pairs" in before
    assert "| 1 | finished | 5 | " in before.split("## Trunks")[1]


@pytest.mark.parametrize("fate", [DIVERGED, "out of memory"])
def test_arms_of_a_trunk_that_failed_do_not_run(tmp_path, fate):
    plan, cells = plan_with_trunk(tmp_path), FakeTrunks(trunk1=fate)
    lines = run_all(plan, cells)
    status = "diverged" if fate == DIVERGED else "crashed"
    assert cells.names == ["trunk1", *WHOLE[3:]]
    assert lines[1] == "[2/6] base seed 1: not run, its trunk failed"
    assert f"trunk {status}: " in gather(plan, Path("p")).cells[0].message
    assert gather(plan, Path("p")).complete == (status == "diverged")
    again = run(plan)
    assert again == ([] if status == "diverged" else WHOLE[:3])


CONTINUED = {"steps": 7, "until": 0.25, "overrides": {"train.quantize": False}}


def test_arms_continue_from_the_snapshot_of_a_trunk_that_ends_early(tmp_path):
    plan, cells = make_plan(tmp_path, trunk=CONTINUED, seeds=[1, 2]), FakeTrunks()
    run_all(plan, cells)
    one = plan.trunks()[1].config.train
    assert (one.steps, one.until, one.snapshots, one.seed) == (7, 0.25, "0.25", 1), "the text goes on"
    assert cells.names == WHOLE and set(cells.inits.values()) == {None}
    for (arm, seed), start in cells.starts.items():
        where = Path(plan.out, "cells", "trunk", f"seed{seed}", "run0", "snapshots", "0.25")
        assert start == (None if arm == "trunk" else where)
    assert gather(plan, Path("p")).complete and run(plan) == []
    report = markdown(gather(plan, Path("p")))
    assert "continue one trunk, with its optimizer's state" in report and "the first 25 %" in report
    assert "## Trunks, from whose snapshot the arms continue" in report


def test_a_snapshot_that_is_gone_is_trained_again_with_its_arms(tmp_path):
    plan = make_plan(tmp_path, trunk=CONTINUED, seeds=[1, 2])
    run(plan)
    for index in plan.out.rglob("index.json"):
        index.unlink()
    assert run(plan) == []
    next((plan.out / "cells" / "base" / "seed2").glob("*/summary.json")).unlink()
    assert run(plan) == WHOLE[3:]
    plan.out.rename(tmp_path / "moved")
    assert gather(replace(plan, out=tmp_path / "moved"), Path("p")).complete


def test_an_arm_may_add_a_part_with_a_neutral_start(tmp_path):
    arms = {"base": {}, "pairs": {"model.bigram_buckets": 64}}
    plan = make_plan(tmp_path, trunk=CONTINUED, arms=arms)
    assert plan.arms["pairs"].model.bigram_buckets == 64 and not plan.trunks()[1].config.model.bigram_buckets
