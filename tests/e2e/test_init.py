"""Runs that start from a checkpoint (train.init), and arms that start from a trunk."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from pgolf.ablate import run as ablate
from pgolf.ablate.plan import Cell, read_plan
from pgolf.ablate.results import gather
from pgolf.cli.main import main
from pgolf.cli.overrides import load_base
from pgolf.config import to_dict
from pgolf.data.text import sample_paths
from pgolf.files import write_json
from pgolf.report.plots import read_metrics
from pgolf.train.weights import load_weights, save_weights
from tests.ablate.ablate_helpers import FakeProcess, small_overrides
from tests.e2e.conftest import SMALL
from tests.e2e.test_run import summary, two_ranks

STILL = ["--optim.muon.lr=0", "--optim.adam.embed-lr=0", "--optim.adam.scalar-lr=0"]
"""Learning rates of 0, with which training changes nothing."""


def train(folder: Path, shards: Path, *words: str) -> Path:
    """Train a small run in `folder` and return its own folder."""
    assert main(["train", "tiny", "--data", str(shards), "--out", str(folder), *SMALL, *words]) == 0
    (made,) = folder.iterdir()
    return made


def same(one: Path, other: Path) -> bool:
    """Return whether two checkpoints hold the same bits."""
    a, b = load_weights(one)[0], load_weights(other)[0]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["raw", "ema"])
def test_weights_and_average_start_from_the_checkpoint(run, shards, tmp_path, name):
    start = run / f"{name}.safetensors"
    still = train(tmp_path, shards, f"--train.init={start}", "--train.no-quantize", "--steps=2", *STILL)
    assert same(start, still / "raw.safetensors") and same(start, still / "ema.safetensors")
    assert f"starts from the weights of {start}" in (still / "log.txt").read_text()
    assert summary(still).scores["raw"].bpb == pytest.approx(summary(run).scores[name].bpb)


def test_training_goes_on_from_the_checkpoint_and_warm_up_leaves_no_trace(run, shards, tmp_path):
    words = [f"--train.init={run / 'raw.safetensors'}", "--train.no-quantize"]
    warm = train(tmp_path / "warm", shards, *words)
    cold = train(tmp_path / "cold", shards, *words, "--train.warmup-steps=0")
    assert all(same(warm / name, cold / name) for name in ("raw.safetensors", "ema.safetensors"))
    again, first = (read_metrics(folder / "metrics.jsonl") for folder in (warm, run))
    assert again[0]["loss"] < first[0]["loss"] - 0.1 and again[0]["lr"] == 1.0


def test_every_rank_starts_from_the_checkpoint(run, shards, tmp_path):
    words = ["train", "tiny", "--data", str(shards), *SMALL, "--steps=2", *STILL, "--train.no-quantize"]
    start = run / "raw.safetensors"
    done = two_ranks([*words, "--out", str(tmp_path / "out"), f"--train.init={start}"])
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = (tmp_path / "out").iterdir()
    assert same(start, folder / "raw.safetensors")
    done = two_ranks([*words, "--out", str(tmp_path / "none"), f"--train.init={tmp_path / 'no'}"])
    assert done.returncode != 0 and "no checkpoint at" in done.stderr and not (tmp_path / "none").exists()


def other_names(run: Path, path: Path) -> None:
    """Write the checkpoint of `run` to `path` with one tensor under another name."""
    tensors, config, facts = load_weights(run / "raw.safetensors")
    name = min(tensors)
    save_weights(
        path, {**{k: v for k, v in tensors.items() if k != name}, "old": tensors[name]}, config, **facts
    )


def test_a_checkpoint_that_does_not_fit_is_refused_before_the_run(run, shards, tmp_path, capsys):
    start, out = run / "raw.safetensors", tmp_path / "out"
    words = ["train", "tiny", "--data", str(shards), "--out", str(out), *SMALL]

    def refused(message: str, *changes: str) -> None:
        assert main([*words, f"--train.init={start}", *changes]) == 2
        assert re.search(message, capsys.readouterr().err)
        assert not out.exists(), "a run that cannot start leaves no folder"

    wide = (
        r"train\.init=.*raw\.safetensors is of another model: model\.width is 32 there and 48 here; give this"
    )
    refused(wide, "--model.width=48", "--model.heads=2")
    refused(r"model\.softcap is 30\.0 there and 20\.0 here", "--model.softcap=20")
    model, other = str(tmp_path / "other.model"), tmp_path / "other"
    text = str(sample_paths().train)
    assert main(["data", "tokenizer", "--inputs", text, "--vocab-size", "512", "--out", model]) == 0
    capsys.readouterr()
    other.mkdir()
    for path in shards.iterdir():
        shutil.copy(model if path.name == "tokenizer.model" else path, other / path.name)
    # Manifest and sidecar would say before that the tokenizer is another.
    (other / "manifest.json").unlink()
    (other / "text_val_bytes_000000.bin").unlink()
    refused("was trained with another tokenizer", f"--data={other}")
    start = tmp_path / "renamed.safetensors"
    other_names(run, start)
    refused(r"train\.init=.*renamed.*do not fit the model: .*old.* on one side only; start from a checkpoint")
    start = tmp_path / "none.safetensors"
    refused(r"no checkpoint at .*none\.safetensors; a run writes raw\.safetensors")
    start = tmp_path / "torn.safetensors"
    start.write_bytes((run / "raw.safetensors").read_bytes()[:1000])
    refused(r"torn\.safetensors is not a readable safetensors file")


def train_here(cell: Cell, gpu: int | None, **_: object) -> FakeProcess:
    """Train a cell in this process, for what is tested is what it writes."""
    config = cell.folder / "config.json"
    write_json(config, to_dict(cell.config))
    return FakeProcess(main(["train", str(config)]))


@pytest.mark.slow
def test_arms_start_from_their_trunk_and_the_report_needs_no_weights(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablate, "start_process", train_here)
    path, out, moved = tmp_path / "plan.json", tmp_path / "out", tmp_path / "moved"
    plan = {
        "name": "trunk",
        "base": "tiny",
        "data": str(shards),
        "out": str(out),
        "steps": 10,
        "trunk": {"steps": 4, "overrides": {"optim.warmdown": 0.0, "train.quantize": False}},
        "overrides": {**small_overrides(), "train.device": "cpu", "train.warmup_steps": 0},
        "baseline": "base",
        "arms": {"base": {}, "jordan": {"optim.muon.coefficients": "jordan"}},
        "seeds": [1, 2],
        "metric": "ema",
    }
    path.write_text(json.dumps(plan))
    assert main(["ablate", str(path)]) == 0
    assert "[1/6] trunk seed 1" in capsys.readouterr().out
    result = gather(read_plan(path, load_base), path)
    assert result.trunk is not None and result.complete
    last = [cell.values["last_loss"] for cell in result.trunk.cells]
    for seed in (1, 2):
        one, two = (read_metrics(result.of(arm)[seed].metrics) for arm in ("base", "jordan"))
        assert one[0]["loss"] == two[0]["loss"] and one[-1]["loss"] != two[-1]["loss"]
        assert abs(one[0]["loss"] - last[seed - 1]) < 0.5
    report = (out / "report.md").read_text()
    assert "trunk of 4 steps of base with optim.warmdown = 0.0, train.quantize = False" in report
    assert f"seed 1 {last[0]:.4f}, seed 2 {last[1]:.4f}" in report
    gap = next(line for line in report.splitlines() if line.startswith("| jordan | 2 | +0.0000 "))
    assert gap.count("|") == 13
    for weights in out.rglob("*.safetensors"):
        weights.unlink()
    out.rename(moved)
    assert main(["ablate", str(path), "--report-only", "--out", str(moved)]) == 0
    assert (moved / "report.md").read_text() == report
