"""Runs that continue from a snapshot (train.start): equal to the run that was never cut, or refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from pgolf.cli.main import main
from pgolf.config import TrainConfig
from pgolf.report.plots import read_metrics
from pgolf.train.checkpoint import INDEX, read_checkpoint
from pgolf.train.weights import load_weights
from tests.conftest import requires_gpu
from tests.e2e.conftest import SMALL
from tests.e2e.test_run import summary, two_ranks

STEPS, BATCH = 12, 1024
SAVED = "--train.snapshots=0.25,0.5,1.0"
WARM, HALVES = "--train.warmup-steps=1", f"--data.micro-tokens={BATCH // 2}"
AHEAD = ["--optim.ema-nesterov=0.6", "--optim.ema-nesterov-horizon=0.2"]


def words(shards: Path, *more: str) -> list[str]:
    small = [*SMALL, f"--data.batch-tokens={BATCH}", f"--data.micro-tokens={BATCH}", f"--steps={STEPS}"]
    quick = ["--train.no-quantize", "--train.warmup-steps=0", "--evaluate.no-raw"]
    return ["train", "tiny", "--data", str(shards), *small, *quick, *more]


def train(folder: Path, shards: Path, *more: str) -> Path:
    assert main([*words(shards, *more), "--out", str(folder)]) == 0
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps after a warm-up, with snapshots after 3 and 6 steps, and at its end."""
    return train(tmp_path_factory.mktemp("whole"), shards, SAVED, WARM)


def state(run: Path, name: str = "1.0") -> dict[str, torch.Tensor]:
    return read_checkpoint(run / "snapshots" / name).load()


def assert_same_state(one: Path, other: Path) -> None:
    """Weights, averages, momentum, moments and counts are the same, bit for bit."""
    a, b = state(one), state(other)
    assert a.keys() == b.keys() and len(a) > 40
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def same_rows(one: Path, other: Path, after: int) -> bool:
    first, second = (read_metrics(run / "metrics.jsonl") for run in (one, other))
    keys = ("loss", "frac", "lr", "momentum", "loop", "grad_norm")
    return [[r[k] for k in keys] for r in first[after:]] == [[r[k] for k in keys] for r in second]


@pytest.mark.parametrize(("name", "left"), [("0.25", 9), ("0.5", 6)])
def test_a_branch_with_unchanged_settings_is_the_trunks_own_continuation(shards, whole, tmp_path, name, left):
    start = f"--train.start={whole}/snapshots/{name}"
    branch = train(tmp_path, shards, start, f"--steps={left}", "--train.snapshots=1.0", WARM)
    assert_same_state(whole, branch)
    assert same_rows(whole, branch, STEPS - left)
    for file in ("raw", "ema"):
        a, b = (load_weights(run / f"{file}.safetensors")[0] for run in (whole, branch))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert summary(branch).scores["ema"].nats == summary(whole).scores["ema"].nats
    s = summary(branch)
    assert s.trained.steps == left and s.trained.tokens == left * BATCH
    assert (s.origin["steps"], s.origin["tokens"]) == (STEPS - left, (STEPS - left) * BATCH)
    text = (branch / "log.txt").read_text()
    assert f"snapshots/{name}: {STEPS - left} steps and" in text and "differs from" not in text


@requires_gpu
def test_a_branch_on_a_gpu_is_near_its_trunk(shards, tmp_path):
    """Nearer than two runs whose first step is not the same: sums on a GPU have no fixed order."""
    whole = train(tmp_path / "a", shards, *AHEAD, "--train.snapshots=0.5")
    start = f"--train.start={whole}/snapshots/0.5"
    branch = train(tmp_path / "b", shards, *AHEAD, start, "--steps=6")
    first, second = (read_metrics(folder / "metrics.jsonl") for folder in (whole, branch))
    assert second[0]["loss"] == pytest.approx(first[6]["loss"], abs=2e-3)
    assert [r["loss"] for r in second] == pytest.approx([r["loss"] for r in first[6:]], abs=0.02)


def test_a_trunk_that_ends_early_and_its_branch_are_one_run(shards, whole, tmp_path):
    trunk = train(tmp_path / "a", shards, "--steps=6", "--train.until=0.5", "--train.snapshots=0.5")
    start = f"--train.start={trunk}/snapshots/0.5"
    assert_same_state(whole, train(tmp_path / "b", shards, start, "--steps=6", "--train.snapshots=1.0"))
    assert read_metrics(trunk / "metrics.jsonl")[-1]["frac"] == 5 / 12


def test_a_branch_of_a_branch_is_one_run_too(shards, whole, tmp_path):
    parts = [f"--train.start={whole}/snapshots/0.25", "--steps=3", "--train.until=0.5"]
    first = train(tmp_path / "a", shards, *parts, "--train.snapshots=0.5")
    start = f"--train.start={first}/snapshots/0.5"
    second = train(tmp_path / "b", shards, start, "--steps=6", "--train.snapshots=1.0")
    assert_same_state(whole, second)
    assert summary(second).origin["steps"] == 6


def test_the_mean_of_snapshots_goes_on_too(shards, tmp_path):
    swa = ["--optim.average=swa", "--optim.swa-from=0.2", "--optim.swa-every=2"]
    whole = train(tmp_path / "a", shards, *swa, SAVED)
    start = f"--train.start={whole}/snapshots/0.5"
    assert_same_state(whole, train(tmp_path / "b", shards, *swa, start, "--steps=6", SAVED[:-11] + "1.0"))


def test_a_shorter_branch_runs_through_the_rest_of_the_schedules(shards, whole, tmp_path):
    branch = train(tmp_path, shards, f"--train.start={whole}/snapshots/0.25", "--steps=3")
    assert [row["frac"] for row in read_metrics(branch / "metrics.jsonl")] == [0.25, 0.5, 0.75]


def test_a_branch_of_seconds_goes_on_from_the_fraction(shards, whole, tmp_path):
    start = [f"--train.start={whole}/snapshots/0.5", "--steps=0", "--seconds=303"]
    # Training takes 3 s; all the rest is for a slow disk, on which the weights must be before the clock ends.
    start += ["--train.quantize-reserve=300", "--train.snapshots=1.0"]
    run = train(tmp_path, shards, *start)
    rows = read_metrics(run / "metrics.jsonl")
    fractions = [row["frac"] for row in rows]
    assert 0.5 <= fractions[0] < 0.75 and fractions == sorted(fractions) and fractions[-1] <= 1.0
    end = read_checkpoint(run / "snapshots" / "1.0").facts
    assert end["steps"] == len(rows), "the clock stops before 1, and the last state is the snapshot"
    place = end["snapshot"]["origin"]["frac"]
    assert fractions[-1] < place[0] / place[1] <= 1.0


def test_a_branch_that_is_killed_goes_on_with_its_origin(shards, whole, tmp_path, monkeypatch, saved_at_once):
    from pgolf.train.trainer import Trainer

    start = [f"--train.start={whole}/snapshots/0.5", "--steps=6", "--train.snapshots=0.75,1.0"]
    begun = Trainer._accumulate

    def killed(self, mode, *rest, **more):
        killed.left -= 1
        if not killed.left:
            raise KeyboardInterrupt
        return begun(self, mode, *rest, **more)

    killed.left = 6
    monkeypatch.setattr(Trainer, "_accumulate", killed)
    more = [*start, "--train.checkpoint-every=0.000001", "--train.warmup-steps=0", "--out", str(tmp_path)]
    assert main(words(shards, *more)) != 0
    (folder,) = tmp_path.iterdir()
    assert (folder / "snapshots" / "0.75" / INDEX).is_file() and (folder / "progress.json").is_file()
    monkeypatch.undo()
    assert main(["train", "--resume", str(folder)]) == 0
    assert_same_state(whole, folder)
    assert summary(folder).sessions[1].from_step == 5 and summary(folder).origin["steps"] == 6


def test_snapshots_after_the_checkpoint_are_written_again(shards, whole, tmp_path):
    """What a killed process had reached is not what the run reaches again, on a GPU or with a clock."""
    from pgolf.train.snapshot import discard_later

    for name in ("0.25", "0.5"):
        shutil.copytree(whole / "snapshots" / name, tmp_path / "snapshots" / name)
    (tmp_path / "snapshots" / "0.9").mkdir()
    discard_later(tmp_path, 5)
    assert [p.name for p in (tmp_path / "snapshots").iterdir()] == ["0.25"]


def test_two_ranks_continue_what_one_wrote_and_the_other_way_round(shards, whole, tmp_path):
    """Any number of ranks reads the snapshot of any other; the state that they begin with is the same."""
    start = [f"--train.start={whole}/snapshots/0.5", "--steps=6", "--train.snapshots=1.0", HALVES]
    done = two_ranks([*words(shards, *start), "--train.device=cpu", "--out", str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr[-3000:]
    (two,) = (tmp_path / "two").iterdir()
    a, b = state(whole), state(two)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], atol=2e-3, rtol=2e-2, msg=lambda m, n=name: f"{n}: {m}")


def test_velocities_are_part_of_the_state_that_goes_on(shards, tmp_path):
    whole = train(tmp_path / "a", shards, *AHEAD, SAVED)
    start = f"--train.start={whole}/snapshots/0.5"
    branch = train(tmp_path / "b", shards, *AHEAD, start, "--steps=6", "--train.snapshots=1.0")
    assert_same_state(whole, branch)
    middle = state(whole, "0.5")
    ahead = {n: t for n, t in middle.items() if n.startswith("weights.")}
    base = {n: middle[f"optim.nesterov.base.{n.removeprefix('weights.')}"] for n in ahead}
    assert not torch.equal(ahead["weights.tok_emb"], base["weights.tok_emb"]), "inside of its window"
    # Without it, a branch that changes nothing keeps the weights, not the points ahead of them.
    still = ["--optim.muon.lr=0", "--optim.adam.embed-lr=0", "--optim.adam.scalar-lr=0"]
    off = train(tmp_path / "c", shards, *still, start, "--steps=1")
    raw = load_weights(off / "raw.safetensors")[0]
    assert all(torch.equal(raw[n.removeprefix("weights.")], t) for n, t in base.items())
    assert "state that this run has no use for: optim.nesterov" in (off / "log.txt").read_text()


def test_candidates_of_muon_go_on_bit_for_bit_and_join_a_trunk_without_them(shards, whole, tmp_path):
    muon = ["--optim.muon.normalize=0.9", "--optim.muon.cautious", "--optim.muon.momentum-age=0.3"]
    muon += ["--optim.muon.slow-age=0.2"]
    uncut = train(tmp_path / "a", shards, *muon, SAVED)
    last = ["--steps=6", "--train.snapshots=1.0"]
    branch = train(tmp_path / "b", shards, *muon, f"--train.start={uncut}/snapshots/0.5", *last)
    assert_same_state(uncut, branch)
    assert same_rows(uncut, branch, 6)
    shapes = {n: t.shape for n, t in state(uncut).items()}
    for name in ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"):
        count, *sides = shapes[f"optim.muon.momentum.{name}"]
        assert shapes[f"optim.muon.square.{name}"] == (count, max(sides))
        assert shapes[f"optim.muon.slow.{name}"] == (count, *sides)
    # Halfway through the run, past the rise of the momentum.
    row = read_metrics(branch / "metrics.jsonl")[3]
    assert row["momentum"] == pytest.approx(0.3 / (0.3 + 1 / STEPS))
    arm = train(tmp_path / "c", shards, *muon, f"--train.start={whole}/snapshots/0.5", "--steps=6")
    assert re.search(r"starts at 0: optim\.muon\.slow\.", (arm / "log.txt").read_text())


def test_weights_of_a_run_that_was_stopped_or_ends_early_are_not_those_ahead(shards, tmp_path):
    short = train(tmp_path, shards, *AHEAD, "--steps=6", "--train.until=0.5", "--train.snapshots=0.5")
    end, raw = state(short, "0.5"), load_weights(short / "raw.safetensors")[0]
    assert all(torch.equal(raw[n], end[f"optim.nesterov.base.{n}"]) for n in raw)
    assert not torch.equal(raw["tok_emb"], end["weights.tok_emb"])


def test_ranks_with_velocities_stay_equal(shards, tmp_path):
    """The run itself compares the weights of its ranks at the end, bit for bit."""
    done = two_ranks([*words(shards, *AHEAD, HALVES), "--train.device=cpu", "--out", str(tmp_path)])
    assert done.returncode == 0, done.stderr[-3000:]


def test_an_arm_with_velocities_begins_where_its_trunk_ended(shards, whole, tmp_path):
    start = [f"--train.start={whole}/snapshots/0.5", "--steps=6"]
    one, two = (train(tmp_path / n, shards, *start, *more) for n, more in (("a", []), ("b", AHEAD)))
    first, second = (read_metrics(folder / "metrics.jsonl") for folder in (one, two))
    # One step later there is a velocity.
    assert [r["loss"] for r in first[:1]] == [r["loss"] for r in second[:1]]
    assert first[1]["loss"] != second[1]["loss"]
    assert re.search(r"starts at 0: optim\.nesterov\.velocity\.", (two / "log.txt").read_text())


WITHOUT = ["--model.no-smear-gate", "--model.head-gate=none"]
ADDITIONS = {
    "smear": (["--model.smear-gate"], ["smear_lambda"]),
    "values": (["--model.value-embed-layers=2"], ["value_table"]),
    "sparse": (["--model.head-gate=sparse"], ["head_gate"]),
    "mudd": (["--model.mudd=4"], ["mudd_out", "mudd_bias"]),
}
"""What is added to a network without gates, and the parameters of it that move after its neutral start."""


@pytest.fixture(scope="module")
def plain(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The settings with which an arm goes on from a trunk without gates, and the arm that adds nothing."""
    folder = tmp_path_factory.mktemp("plain")
    short = ["--steps=4", "--train.until=0.5", "--train.snapshots=0.5"]
    trunk = train(folder / "trunk", shards, *WITHOUT, *short)
    start = [f"--train.start={trunk}/snapshots/0.5", "--steps=2", "--train.snapshots=1.0"]
    return start, train(folder / "same", shards, *WITHOUT, *start)


@pytest.mark.parametrize("case", ADDITIONS)
def test_an_arm_with_more_parameters_starts_with_the_trunks_function(shards, tmp_path, plain, case):
    """The loss at its first step is the trunk's, bit for bit, and then the new parameters move."""
    added, moving = ADDITIONS[case]
    start, same = plain
    arm = train(tmp_path, shards, *WITHOUT, *added, *start)
    first, second = (read_metrics(run / "metrics.jsonl") for run in (same, arm))
    assert first[0]["loss"] == second[0]["loss"] and first[1]["loss"] != second[1]["loss"]
    text = (arm / "log.txt").read_text()
    assert re.search(rf"{moving[0]}.* new and start so that the function is the same", text)
    assert re.search(rf"new state of the optimizer, which starts at 0: .*{moving[0]}", text)
    assert ("attn_scale is multiplied by 2" in text) == (case == "sparse")
    end = state(arm)
    for name in moving:
        assert end[f"weights.{name}"].any() and end[f"ema.{name}"].any()


def test_weights_come_from_one_place():
    with pytest.raises(
        ValueError, match=r"train\.init and train\.start both say where the weights come from"
    ):
        TrainConfig(init=Path("a"), start=Path("b"))
    with pytest.raises(ValueError, match=r"train\.snapshots: fractions must rise within \(0, 0\.5\]"):
        TrainConfig(until=0.5, snapshots="0.4,0.6")
    with pytest.raises(ValueError, match=r"train\.snapshots must look like 0\.7,0\.75, got 'half'"):
        TrainConfig(snapshots="half")
    with pytest.raises(ValueError, match=r"train\.until is a fraction in \(0, 1\], got 0"):
        TrainConfig(until=0.0)


def test_a_snapshot_that_does_not_fit_is_refused_before_the_run(shards, whole, tmp_path, capsys):
    start, out = whole / "snapshots" / "0.5", tmp_path / "out"

    def refused(message: str, *changes: str, data: Path = shards) -> None:
        assert main([*words(data, f"--train.start={start}", *changes), "--out", str(out)]) == 2
        assert re.search(message, capsys.readouterr().err)
        assert not out.exists(), "a run that cannot start leaves no folder"

    refused(
        r"train\.start=.*0\.5 is of another model: model\.width is 32 there and 48 here", "--model.width=48"
    )
    refused(r"model\.softcap is 30\.0 there and 20\.0 here; give this", "--model.softcap=20")
    refused(r"is at 0\.5 of the schedules, so nothing is left .* train\.until=0\.5", "--train.until=0.5")
    refused(r"train\.snapshots=0\.3 is not after", "--train.snapshots=0.3,0.7")
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest, indent=3))
    refused(r"was trained on other text than is in .*other: its training shards", data=other)
    start = whole
    refused(r"is not a snapshot; name one of .*snapshots/0\.25, .*snapshots/0\.5, .*snapshots/1\.0")
    start = tmp_path / "none"
    refused(r"no snapshot at .*none: it has no index\.json; a run with --train\.snapshots=0\.75")
    start = tmp_path / "torn"
    shutil.copytree(whole / "snapshots" / "0.5", start)
    shard = next(start.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(r"does not have the length and SHA-256 of the index; it is damaged")
    start = tmp_path / "tokenizer"
    shutil.copytree(whole / "snapshots" / "0.5", start)
    edit_index(start, tokenizer_sha256="0" * 64)
    refused(r"was trained with another tokenizer than the data folder holds")
    edit_index(start, drop=True)
    refused(r"is a checkpoint of an unfinished run; continue that one with `pgolf train --resume`")


def edit_index(folder: Path, *, drop: bool = False, **changes: str) -> None:
    """Write an index that says something else of its snapshot, with a valid SHA-256."""
    from pgolf.train.checkpoint import _digest

    index = json.loads((folder / INDEX).read_text())
    del index["sha256"]
    index["facts"]["snapshot"].update(changes)
    if drop:
        del index["facts"]["snapshot"]
    (folder / INDEX).write_text(json.dumps({**index, "sha256": _digest(index)}))
