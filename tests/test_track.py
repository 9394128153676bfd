"""TensorBoard and Weights & Biases: what is recorded, and that their errors do not end a run."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pgolf import track
from pgolf.ablate.plan import run_key
from pgolf.cli.train import MAY_CHANGE
from pgolf.config import Config, from_dict
from pgolf.log import RunLog
from pgolf.report.finished_runs import FREE
from pgolf.track import Tracker, check_tracker, start_tracker

SUMMARY = {"scores": {"raw": {"bpb": 1.25}, "quantized": {"bpb": 1.5}}, "bytes": {"total": 1000, "parts": {}}}


def train(folder: Path, kind: str, steps: range, *, at: int = 0, losses: float = 0.0) -> list[str]:
    """Write steps through the log of a run and return the warnings."""
    said: list[str] = []
    log = RunLog(folder, is_main=True)
    tracker = start_tracker(kind, folder, {"train": {"seed": 7}}, first_step=at, warn=said.append)
    assert tracker is not None
    log.follow = tracker.metric
    for step in steps:
        log.metric(step=step, loss=losses + step, lr=0.5, loop=step > 2, grad_norm=float("nan"))
        if step == 3:
            log.metric(step=step, val_bpb=1.125)
    tracker.close(SUMMARY)
    return said


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wait_for_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give wandb's second process more time than on an idle machine, to start and to write."""
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "240")
    monkeypatch.setattr(track, "CLOSE_S", 240.0)


def wandb_records(path: Path) -> list:
    """Return the records of an offline run that was finished.

    wandb's second process answers before it has written its file, so wait for the record of the end.
    """
    for _ in range(2400):
        records = wandb_records_so_far(path)
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    pytest.fail(f"{path} has no record of the run's end after 240 s: {len(records)} records")


def wandb_records_so_far(path: Path) -> list:
    """Return the records in a file: a log in LevelDB's format behind 7 bytes, one protobuf each."""
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, records, whole, at = path.read_bytes(), [], b"", 7
    while at + 7 <= len(data):
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at % 32768 > 32768 - 7 or not kind:  # the end of a block is filled with zeros
            at += 32768 - at % 32768
            continue
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            records.append(proto.Record.FromString(whole))
            whole = b""
    return records


def test_tensorboard_reads_back_what_was_measured(tmp_path):
    pytest.importorskip("tensorboard")
    assert train(tmp_path, "tensorboard", range(5)) == []
    found = scalars(tmp_path)
    assert found["training/loss"] == [(i, float(i)) for i in range(5)]
    assert found["training/loop"] == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1)]
    assert found["validation/val_bpb"] == [(3, 1.125)]
    assert found["score/quantized"] == [(4, 1.5)] and found["bytes/total"] == [(4, 1000)]
    assert "training/grad_norm" not in found  # never finite
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("at", [0, 3])
def test_a_run_that_goes_on_hides_what_was_lost_in_tensorboard(tmp_path, monkeypatch, at):
    pytest.importorskip("tensorboard")
    train(tmp_path, "tensorboard", range(6))
    seconds = track.find_peer("tensorboard", "tensorboard.summary.writer.event_file_writer").found.time
    now = seconds.time
    monkeypatch.setattr(seconds, "time", lambda: now() + 2)  # an event file is named by its second
    train(tmp_path, "tensorboard", range(at, 8), at=at, losses=100)
    losses = scalars(tmp_path)["training/loss"]
    assert losses == [(i, float(i + 100 * (i >= at))) for i in range(8)]


def test_wandb_offline_keeps_one_run_over_processes(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    wait_for_wandb(monkeypatch)
    assert train(tmp_path, "wandb", range(4)) == []
    time.sleep(1.1)  # wandb names a process's folder by the second and the run's id
    assert train(tmp_path, "wandb", range(2, 6), at=2) == []
    records = [r for p in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")) for r in wandb_records(p)]
    runs = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    lasting = (tmp_path / "wandb" / "id.txt").read_text()
    assert {(r.run_id, r.project, r.display_name) for r in runs} == {(lasting, "pgolf", tmp_path.name)}
    history = [r.history.item for r in records if r.WhichOneof("record_type") == "history"]
    rows = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items} for items in history]
    assert [(row["_step"], row["training/loss"]) for row in rows] == [
        (i, float(i)) for i in (0, 1, 2, 3, 2, 3, 4, 5)
    ]
    assert rows[3]["validation/val_bpb"] == 1.125  # in the row of its step
    told = [u for r in records if r.WhichOneof("record_type") == "summary" for u in r.summary.update]
    assert {"score/quantized", "bytes/total"} <= {u.key or "/".join(u.nested_key) for u in told}


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_package_that_cannot_be_used_is_refused_with_the_remedy(kind, tmp_path, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] in (kind, "torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    (tmp_path / kind).mkdir()
    (tmp_path / kind / "__init__.py").write_text("raise TypeError('built for another protobuf')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError,
        match=rf"train.track={kind}: {kind} is not usable: TypeError: .*pip install 'pgolf\[{kind}\]'",
    ):
        check_tracker(kind)
    check_tracker("none")
    assert start_tracker("none", tmp_path, {}, first_step=0, warn=pytest.fail) is None


def test_how_a_run_is_recorded_is_no_part_of_what_it_computes():
    run = Config()
    recorded = replace(run, train=replace(run.train, track="wandb"))
    assert run_key(recorded) == run_key(run)
    assert "train.track" in MAY_CHANGE and "train.track" in FREE
    with pytest.raises(ValueError, match=r"train\.track"):
        from_dict(Config, {"train": {"track": "mlflow"}})


class Faulty:
    """A record that fails in one of its calls."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.calls: list[str] = []
        self._call("open")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.where:
            raise OSError("no space left on the tracker's disk")

    def write(self, step, values):
        self._call("write")

    def close(self, facts):
        self._call("close")


@pytest.mark.parametrize("where", ["open", "write", "close"])
def test_a_tracker_that_fails_is_told_once_and_given_up(where):
    said: list[str] = []
    tracker = Tracker(lambda: Faulty(where), said.append)
    for step in range(3):
        tracker.metric({"step": step, "loss": 1.0})
    tracker.close(SUMMARY)
    tracker.metric({"step": 4, "loss": 1.0})
    assert len(said) == 1
    assert "(OSError: no space left on the tracker's disk); the run goes on" in said[0]


def test_a_tracker_that_hangs_takes_no_time_of_the_loop_and_is_left_behind(monkeypatch):
    class Hangs(Faulty):
        def write(self, step, values):
            track.threading.Event().wait(600)

    monkeypatch.setattr(track, "CLOSE_S", 0.05)
    said: list[str] = []
    began = time.perf_counter()
    tracker = Tracker(lambda: Hangs(""), said.append)
    for step in range(100):
        tracker.metric({"step": step, "loss": 1.0})
    tracker.close({})
    assert time.perf_counter() - began < 300
    assert len(said) == 1 and "has not finished its record after 0 s" in said[0]
