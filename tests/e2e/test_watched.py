"""Reports of runs, their records in TensorBoard and Weights & Biases, and faults of these packages."""

import gzip
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pgolf.cli.main import main
from tests.e2e.conftest import SMALL
from tests.e2e.test_resume import stop_here
from tests.e2e.test_run import two_ranks
from tests.test_track import scalars, wait_for_wandb, wandb_records


def test_a_run_ends_with_its_report_and_a_plot_that_names_it(run):
    text = (run / "report.html").read_text()
    score = json.loads((run / "summary.json").read_text())["scores"]["quantized"]["bpb"]
    assert f"<h1>{run.name}: {score:.4f} bpb (quantized)</h1>" in text
    seen = " ".join(ET.fromstring(text).itertext())
    assert "finished" in seen and "not finished" not in seen and "Processes" in seen
    assert f"report: {run / 'report.html'}" in (run / "log.txt").read_text()


def one_folder(out: Path) -> Path:
    (folder,) = out.iterdir()
    return folder


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_is_stopped_and_goes_on_is_one_record_in_tensorboard(shards, tmp_path):
    pytest.importorskip("tensorboard")
    track = ["--train.track=tensorboard", "--train.checkpoint-every=0"]
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SMALL, *track]
    stop_here(words, 2)
    folder = one_folder(tmp_path)
    assert 2 <= scalars(folder)["training/loss"][-1][0] < 5
    assert main(["train", "--resume", str(folder)]) == 0
    found = scalars(folder)
    assert [step for step, _ in found["training/loss"]] == list(range(6))
    assert [v for _, v in found["training/loss"]] == pytest.approx([r["loss"] for r in rows(folder)])
    score = json.loads((folder / "summary.json").read_text())["scores"]["quantized"]["bpb"]
    assert found["score/quantized"][-1][1] == pytest.approx(score)
    assert "stopped by SIGTERM" not in (folder / "report.html").read_text()
    assert "SIGTERM" in (folder / "report.html").read_text()  # the first of the two processes


def test_a_profile_is_a_trace_of_three_steps_of_each_kind_and_changes_nothing_else(shards, tmp_path):
    words = ["train", "tiny", "--data", str(shards), *SMALL, "--steps=28", "--train.no-quantize"]
    words += ["--data.batch-tokens=1024"]
    assert main([*words, "--out", str(tmp_path / "plain")]) == 0
    assert main([*words, "--out", str(tmp_path / "traced"), "--profile"]) == 0
    plain, traced = (one_folder(tmp_path / name) for name in ("plain", "traced"))
    assert [r["loss"] for r in rows(plain)] == [r["loss"] for r in rows(traced)]
    assert not list(plain.glob("trace*"))
    for mode in ("off", "on"):
        path = traced / f"trace_recurrence_{mode}.json.gz"
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        # Three steps of two passes: the loss is computed once per pass.
        names = [e.get("name") for e in events]
        assert names.count("pgolf::linear_softcap_ce_backward") == 3 * 2, mode
        assert f"{path}; open it at" in (traced / "log.txt").read_text()


@pytest.mark.slow
def test_of_two_ranks_only_the_main_one_records_in_wandb(shards, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wait_for_wandb(monkeypatch)
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SMALL, "--train.track=wandb"]
    result = two_ranks(words)
    assert result.returncode == 0, result.stderr
    (record,) = one_folder(tmp_path).glob("wandb/offline-run-*/*.wandb")
    kinds = [r.WhichOneof("record_type") for r in wandb_records(record)]
    assert kinds.count("history") == 6 and "exit" in kinds


def test_a_broken_package_is_refused_before_there_is_a_folder(shards, tmp_path, monkeypatch, capsys):
    for name in [m for m in sys.modules if m.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "wandb.py").write_text("raise TypeError('built for another protobuf')")
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--data", str(shards), "--out", str(tmp_path / "runs"), *SMALL, "--train.track=wandb"]
    assert main(["train", "tiny", *words]) == 2
    assert "train.track=wandb: wandb is not usable: TypeError: built for another" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_record_that_fails_does_not_end_the_run(shards, tmp_path, monkeypatch):
    # A package that can be imported, but whose functions all fail.
    for name in [m for m in sys.modules if m.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "wandb.py").write_text(
        "class setup:\n    class settings:\n        project = None\n\nSettings = dict\n\n"
        "def init(**settings):\n    raise OSError('the network is unreachable')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--data", str(shards), "--out", str(tmp_path / "runs"), *SMALL, "--train.track=wandb"]
    assert main(["train", "tiny", *words]) == 0
    folder = one_folder(tmp_path / "runs")
    log = (folder / "log.txt").read_text()
    assert log.count("train.track no longer records the run (OSError: the network is unreachable)") == 1
    assert len(rows(folder)) == 6
