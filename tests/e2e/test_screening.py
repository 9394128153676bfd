"""The plans that screen candidates, run as they are on a CPU with a tiny network."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from pgolf.ablate.costs import measure, measured
from pgolf.ablate.ladder import compare_ladders
from pgolf.ablate.net import net_of_costs
from pgolf.ablate.plan import read_plan
from pgolf.ablate.results import gather
from pgolf.ablate.run import run_plan
from pgolf.ablate.tables import markdown
from pgolf.cli.main import main
from pgolf.cli.overrides import load_base
from pgolf.config import to_dict
from pgolf.data.text import iterate_documents, sample_paths
from pgolf.report.plots import read_metrics
from tests import forks
from tests.ablate.ablate_helpers import FakeProcess, small_overrides

FOLDER = Path(__file__).parents[2] / "bench" / "ablations"
NAMES = ("rates", "ema_nesterov", "muon_rate_late", "embed_warmup", "late", "mudd")
MUON = ("normuon", "cautious", "momentum_age", "head_pairs")
"""Plans that are run as one. Only ema_nesterov is run with the ends of ladders, to show that they work."""
TIMED = ("s0", "normuon", "cautious", "qk", "kv", "two", "mudd", "xsa")
"""How the names of arms begin that take more time than the baseline."""


@pytest.fixture(scope="module")
def held_out(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The end of a text of short documents, because every arm scores it twice or three times."""
    folder = tmp_path_factory.mktemp("held_out")
    train, short = folder / "train.jsonl", folder / "short"
    documents = [d.text[:1000] for d in iterate_documents(sample_paths().train)]
    train.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    words = ["--train", str(train), "--val", str(sample_paths().val), "--out", str(short)]
    assert main(["data", "shards", *words, "--tokenizer", str(shards / "tokenizer.model")]) == 0
    assert main(["data", "held-out", str(short), "--out", str(folder / "text"), "--tokens", "1500"]) == 0
    return folder / "text"


def tiny(name: str, folder: Path, **changes: object) -> Path:
    """Write the plan with the network of the end-to-end tests, few steps and one seed."""
    plans = [json.loads((FOLDER / f"{n}.json").read_text()) for n in (MUON if name == "muon" else [name])]
    plan, small = plans[0], small_overrides() | {"data.batch_tokens": 512}  # one micro-batch a step
    if name == "muon":
        small |= {"model.heads": 4, "model.kv_heads": 4}  # two pairs of each
    if name != "ema_nesterov":
        arms = {arm: change for each in plans for arm, change in each["arms"].items()}
        plan["arms"] = {arm: c for arm, c in arms.items() if not arm.endswith(("_08", "_125"))}
    if name in ("muon", "mudd"):
        del plan["ladders"]
    kept = {k: v for k, v in plan["overrides"].items() if k.startswith(("train.", "optim."))}
    quick = {"train.device": "cpu", "train.warmup_steps": 0, "optim.ema_nesterov_from": 0.0}
    plan |= {"base": "tiny", "overrides": {**small, **kept, **quick}, "seeds": [1]}
    plan["steps"] = 20 if name == "late" else 5  # so that a step begins below each floor of the rates
    if "trunk" in plan:
        plan["trunk"]["steps"] = 3
    if "costs" in plan:
        plan["costs"] = {"steps": 1, "rounds": 1, "overrides": {**small, "train.device": "cpu"}}
    for change in plan["arms"].values():
        if "optim.adam.embed_warmup" in change:  # a step here is as long as ten of the plan's
            change["optim.adam.embed_warmup"] *= 10
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**plan, **changes}))
    return path


def start(cell, gpu):
    """Run a cell in this process, where Python and PyTorch are loaded already."""
    config = cell.folder / "config.json"
    config.write_text(json.dumps(to_dict(cell.config)))
    return FakeProcess(main(["train", str(config)]))


@pytest.mark.parametrize("name", (*NAMES, "muon"))
def test_every_arm_of_a_plan_runs_and_the_report_says_what_it_brings(name, held_out, tmp_path):
    path = tiny(name, tmp_path)
    plan = read_plan(path, load_base, out=tmp_path / "out", data=held_out)
    run_plan(plan, start, gpus=0, commit="abc", say=print, poll_seconds=0.0)
    if plan.costs.steps:
        measure(plan.out, plan.costs, commit="abc", say=print)
        assert measured(plan.out, plan.costs)
    result = gather(plan, path)
    assert result.complete and result.held_out
    report = markdown(result)
    assert "Scored on the end of the training text" in report and "WARNING: scored on" not in report
    assert len(net_of_costs(result)) == len(plan.arms) - 1
    # Arms that differ from the baseline in numbers alone cost nothing.
    free = {n.compared.arm for n in net_of_costs(result) if n.charge == 0.0}
    assert free == {arm for arm in plan.arms if not arm.startswith(TIMED) and arm != "base"}
    losses = {arm: read_metrics(result.of(arm)[1].metrics) for arm in plan.arms}
    if plan.trunk is not None:
        first = {rows[0]["loss"] for rows in losses.values()}
        assert len(first) == 1, "all arms begin with the weights and the batch of the trunk's next step"
        assert {rows[0]["frac"] for rows in losses.values()} == {plan.trunk.config.train.until}
    scores = {arm: (result.of(arm)[1].values["raw"], result.of(arm)[1].values["ema"]) for arm in plan.arms}
    assert len(set(scores.values())) == len(scores), "every change reaches its run"
    if plan.ladders is not None:
        assert [r.pairs.n for r in compare_ladders(result, plan.ladders)] == [1] * len(plan.ladders.rungs)


@pytest.mark.slow
def test_one_command_cuts_the_text_runs_the_plan_and_goes_on(shards, tmp_path):
    path = tiny("embed_warmup", tmp_path, arms={"base": {}, "warm": {"optim.adam.embed_warmup": 0.5}})
    script = Path(__file__).parents[2] / "bench" / "screen.sh"
    words = [str(script), str(shards), str(tmp_path / "out"), "1", str(path)]
    place = {
        **os.environ,
        "PYTHON": str(forks.interpreter(tmp_path)),
        "HELD_OUT_TOKENS": "5000",
        "OMP_NUM_THREADS": "1",
    }
    for expected in ("[2/2]", "2 of 2 cells are there already"):
        done = subprocess.run(words, capture_output=True, text=True, env=place, timeout=300)
        assert done.returncode == 0 and expected in done.stdout, done.stderr[-2000:]
    assert (tmp_path / "out" / "embed_warmup" / "report.md").is_file()
    usage = subprocess.run([str(script)], capture_output=True, text=True)
    assert usage.returncode == 2 and usage.stdout.startswith("Screens candidates")
