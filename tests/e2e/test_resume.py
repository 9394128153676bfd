"""Runs that are killed, stopped or lose a rank: the rank is named, and the run resumes bit for bit."""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from pgolf.artifact.export import describe
from pgolf.cli.main import main
from pgolf.files import atomic_file
from pgolf.train import run as run_module
from pgolf.train import session
from pgolf.train import weights as weights_module
from pgolf.train.checkpoint import newest_checkpoint
from pgolf.train.guard import held
from pgolf.train.progress import PROGRESS
from pgolf.train.signals import Stopped
from pgolf.train.weights import load_weights
from tests.e2e.conftest import SMALL
from tests.e2e.test_run import start_ranks, summary, two_ranks
from tests.forks import Forked

STEPS = 12
SETTINGS = [*SMALL, "--data.batch-tokens=1024", f"--steps={STEPS}"]
SETTINGS += ["--train.checkpoint-every=0.05", "--train.rank-timeout=100"]


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory) -> Path:
    """The run without interruption, in a process like those that are killed."""
    out = tmp_path_factory.mktemp("whole")
    assert start(["train", "tiny", "--data", str(shards), "--out", str(out), *SETTINGS]).wait(240) == 0
    (folder,) = out.iterdir()
    return folder


def start(words: list[str], program: tuple[str, ...] = ("-m", "pgolf")) -> Forked:
    return Forked([*program, *words])


def here(words: list[str]) -> int:
    """Run the command line in this process, with one thread, so that it computes the bits of `start`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return main(words)
    finally:
        torch.set_num_threads(threads)


def stop_here(words: list[str], at_step: int) -> None:
    """Run the command line in this process until SIGTERM stops it, which comes when the step is logged."""
    metric = session.RunLog.metric

    def stopping(log: session.RunLog, **fields: object) -> None:
        metric(log, **fields)
        if fields.get("step") == at_step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.RunLog, "metric", stopping)
        assert here(words) == 128 + signal.SIGTERM


HIT = """
import os, sys, threading, time
from pgolf.cli.main import main
from pgolf.train.progress import read_clock
from pgolf.train.session import RunLog

metric = RunLog.metric

def watched(log, **fields):
    metric(log, **fields)
    if fields.get("step") == {step}:
        if {after_s}:
            while not read_clock(log.folder):  # it is written four times per second
                time.sleep(0.01)
            threading.Timer({after_s}, os.kill, (os.getpid(), {number})).start()
        else:
            os.kill(os.getpid(), {number})
    elif {after_s} and fields.get("step", 0) > {step}:
        time.sleep(600)

RunLog.metric = watched
sys.exit(main(sys.argv[1:]))
"""


def hit(number: int, step: int, after_s: float = 0.0) -> tuple[str, ...]:
    """Return the program that gets a signal when a step is logged, or up to one step and `after_s` later.

    It sends the signal to itself: another process that waits for the line may come when the run has ended.
    """
    return ("-c", HIT.format(number=int(number), step=step, after_s=after_s))


def saved(folder: Path) -> int:
    """The step of the newest checkpoint; 0 without one, as when a run is killed before the first is whole."""
    checkpoint, _ = newest_checkpoint(folder, identity=json.loads((folder / PROGRESS).read_text())["run"])
    return checkpoint.step if checkpoint is not None else 0


def assert_same(folder: Path, whole: Path) -> None:
    for name in ("raw", "ema"):
        first, second = (load_weights(f / f"{name}.safetensors")[0] for f in (whole, folder))
        assert first.keys() == second.keys()
        assert [k for k in first if not torch.equal(first[k], second[k])] == [], name
    metrics = [
        [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, folder)
    ]
    for rows in metrics:
        for row in rows:
            del row["ms"], row["elapsed"]
    assert metrics[0] == metrics[1]
    scores = [{k: s.nats for k, s in summary(f).scores.items()} for f in (whole, folder)]
    assert scores[0] == scores[1]


def test_a_run_killed_twice_equals_the_one_that_was_not_bit_for_bit(shards, whole, tmp_path):
    rng = random.Random(time.time_ns())
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SETTINGS]
    steps = []
    for at in sorted(rng.sample(range(2, STEPS - 1), 2)):
        process = start(words, hit(signal.SIGKILL, at, rng.uniform(0.001, 0.03)))
        _, errors = process.communicate(timeout=240)
        assert process.returncode == -signal.SIGKILL, errors
        (folder,) = tmp_path.iterdir()
        words = ["train", "--resume", str(folder)]
        steps.append(saved(folder))
    process = start(words)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert_same(folder, whole)
    sessions = summary(folder).sessions
    assert [s.end for s in sessions] == ["killed", "killed", "finished"]
    # How many checkpoints were complete by then depends on the disk; none that was may be lost.
    assert [s.from_step for s in sessions[1:]] == steps, "it went on from the newest checkpoint"
    assert sessions[1].clock_from == sessions[0].clock_to > 0, "lost work is on the clock"
    assert sessions[2].clock_from == sessions[1].clock_to >= sessions[1].clock_from
    assert not (folder / PROGRESS).exists() and not (folder / "checkpoints").exists()
    assert re.search(r"^3 processes; \d+\.\d s of lost work", (folder / "log.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_the_last_step_and_the_run_goes_on(shards, whole, tmp_path, number):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("ignored by whoever started the tests")
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SETTINGS]
    process = start([*words, "--train.checkpoint-every=0"], hit(number, 3))
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 128 + number, errors
    (folder,) = tmp_path.iterdir()
    text = (folder / "log.txt").read_text()
    assert f"stopped by {number.name} during train; go on with: pgolf train --resume {folder}" in text
    assert load_weights(folder / "raw.safetensors")[2]["steps"] >= 4
    assert here(["train", "--resume", str(folder), "--train.checkpoint-every=0.05"]) == 0
    assert_same(folder, whole)
    one, two = summary(folder).sessions
    assert one.end == number.name and two.from_step == one.to_step
    assert two.lost_seconds < 1.0


@pytest.fixture(scope="module")
def stopped_once(shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stopped")
    stop_here(["train", "tiny", "--data", str(shards), "--out", str(out), *SETTINGS], 5)
    (folder,) = out.iterdir()
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path) -> Path:
    """A run of one process that was stopped after some steps."""
    return Path(shutil.copytree(stopped_once, tmp_path / "runs" / stopped_once.name))


def test_a_run_goes_on_with_two_ranks_and_back_with_one(stopped, whole):
    done = two_ranks(["train", "--resume", str(stopped), "--train.device=cpu"])
    assert done.returncode == 0, done.stderr[-3000:]
    alone, together = (load_weights(f / "raw.safetensors")[0] for f in (whole, stopped))
    for name in alone:
        torch.testing.assert_close(
            together[name], alone[name], atol=2e-3, rtol=2e-2, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert [s.world_size for s in summary(stopped).sessions] == [1, 2]
    assert summary(stopped).train.tokens == summary(whole).train.tokens


def test_two_ranks_that_are_killed_go_on_bit_for_bit_and_also_as_one(shards, tmp_path):
    words = ["train", "tiny", "--data", str(shards), "--train.device=cpu", *SETTINGS]
    done = two_ranks([*words, "--out", str(tmp_path / "whole")])
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = start_ranks(2, [*words, "--out", str(tmp_path / "runs")], hit(signal.SIGKILL, 6))
    _, errors = ranks[0].communicate(timeout=240)
    assert ranks[0].returncode == -signal.SIGKILL, errors
    ranks[1].kill()
    ranks[1].communicate()
    (folder,) = (tmp_path / "runs").iterdir()
    done = two_ranks(["train", "--resume", str(folder)])
    assert done.returncode == 0, done.stderr[-3000:]
    (whole,) = (tmp_path / "whole").iterdir()
    assert_same(folder, whole)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other_in_seconds_with_its_number(shards, tmp_path, victim):
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SETTINGS, "--steps=100000"]
    ranks = start_ranks(2, words)
    assert ranks[0].stdout is not None
    for line in ranks[0].stdout:
        if line.startswith("step     4"):
            break
    ranks[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    ranks[1 - victim].communicate(timeout=240)
    assert time.monotonic() - began < 90.0, "not before its silence would have been noticed"
    assert ranks[1 - victim].returncode == 2
    (folder,) = tmp_path.iterdir()
    reason = f"failed during train: rank {victim} ended without a message (killed?)"
    assert (folder / "log.txt").read_text().count(reason) == 1
    if victim == 1:
        assert load_weights(folder / "raw.safetensors")[2]["steps"] >= 4
        sessions = json.loads((folder / PROGRESS).read_text())["sessions"]
        assert sessions[-1]["end"] == "failed: rank 1 ended without a message (killed?)"
    ranks[victim].wait()


SLOW_DISK = """
import sys, time
from pgolf import watch
from pgolf.cli.main import main
from pgolf.train import weights

save = weights.save_weights

def slowly(*arguments, **facts):
    time.sleep(1.0)
    save(*arguments, **facts)

weights.save_weights, watch.GRACE_S = slowly, 0.1
sys.exit(main(sys.argv[1:]))
"""


def test_one_thread_alone_ends_a_run_that_has_lost_a_rank(shards, tmp_path):
    """Keeping the weights took longer than the grace: the watching thread wrote the same files once more."""
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SETTINGS, "--steps=100000"]
    ranks = start_ranks(2, words, ("-c", SLOW_DISK))
    assert ranks[0].stdout is not None
    for line in ranks[0].stdout:
        if line.startswith("step     4"):
            break
    ranks[1].kill()
    ranks[0].communicate(timeout=240)
    assert ranks[0].returncode == 2
    (folder,) = tmp_path.iterdir()
    text = (folder / "log.txt").read_text()
    assert text.count("failed during train: rank 1 ended without a message (killed?)") == 1
    assert text.count("the weights after ") == 1
    raw, averaged = (load_weights(folder / f"{name}.safetensors")[2] for name in ("raw", "ema"))
    assert raw["pair"] == averaged["pair"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_noticed_in_the_stated_time(shards, tmp_path, victim):
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SETTINGS, "--steps=100000"]
    words += ["--train.rank-timeout=5"]
    ranks = start_ranks(2, words)
    assert ranks[0].stdout is not None
    for line in ranks[0].stdout:
        if line.startswith("step     4"):
            break
    ranks[victim].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        ranks[1 - victim].communicate(timeout=240)
        took = time.monotonic() - began
    finally:
        ranks[victim].kill()
        ranks[victim].communicate()
    assert 4.0 < took < 5 + 3 + 90.0  # the timeout, the grace, a busy machine; a collective waits for minutes
    (folder,) = tmp_path.iterdir()
    assert (folder / "log.txt").read_text().count(f"rank {victim} has given no sign of life for 5 s") == 1


def test_a_stopped_run_can_be_finished_without_training_more(stopped):
    assert main(["train", "--finish", str(stopped)]) == 0
    s = summary(stopped)
    assert 6 <= s.train.steps < STEPS
    assert list(s.scores) == ["raw", "ema", "quantized"] and s.ledger.total > 0
    assert [x.end for x in s.sessions] == ["SIGTERM", "finished"]
    assert s.sessions[1].from_step == s.sessions[1].to_step == s.train.steps


def test_a_signal_while_scoring_leaves_what_another_process_finishes(shards, whole, tmp_path, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise Stopped(signal.SIGINT)

    words = ["train", str(whole / "config.json"), "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "score_model", stop)
        assert main(words) == 130
    (folder,) = tmp_path.iterdir()
    assert (folder / "model.pgolf").is_file() and not (folder / "summary.json").exists()
    clock = json.loads((folder / PROGRESS).read_text())["clock"]
    assert main(["train", "--resume", str(folder)]) == 0
    s = summary(folder)
    assert s.clock == clock, "scoring is not on the clock"
    assert s.ledger.model_bytes == (folder / "model.pgolf").stat().st_size
    assert s.train.steps == STEPS and [x.end for x in s.sessions] == ["SIGINT", "finished"]


def test_a_signal_during_calibration_leaves_trained_weights(whole, tmp_path, monkeypatch, one_thread):
    def stop(*_: object, **__: object) -> None:
        raise Stopped(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.Quantizer, "calibrated", stop)
        assert main(["train", str(whole / "config.json"), "--out", str(tmp_path)]) == 143
    (folder,) = tmp_path.iterdir()
    assert "stopped by SIGTERM during calibrate" in (folder / "log.txt").read_text()
    assert main(["train", "--resume", str(folder)]) == 0
    assert summary(folder).train.steps == STEPS
    ours, theirs = (describe(f / "model.pgolf")["sections"] for f in (folder, whole))
    assert [s["sha256"] for s in ours] == [s["sha256"] for s in theirs]


def test_what_cannot_go_on_is_refused_in_one_sentence(stopped, whole, capsys):
    refused = [
        (["--resume"], "needs the folder of a run"),
        (["--resume", "/nowhere"], "no run at /nowhere"),
        (["--resume", str(whole)], "is finished"),
        (["--resume", str(stopped), "--steps", "99"], "train.steps is 12 in the run"),
        (["--finish", str(stopped), "--optim.muon.lr", "1"], "optim.muon.lr is 0.05 in the run"),
    ]
    for words, message in refused:
        assert main(["train", *words]) == 2
        assert message in capsys.readouterr().err
    with held(stopped):
        assert main(["train", "--resume", str(stopped)]) == 2
    assert f"is held by process {os.getpid()} on" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(stopped, capsys):
    newest = max((stopped / "checkpoints").iterdir())
    with atomic_file(newest / "shard-00-of-01.safetensors") as file:
        file.write(b"torn")
    assert main(["train", "--resume", str(stopped)]) == 0
    text = (stopped / "log.txt").read_text()
    assert "warning: a checkpoint is not used: " in text and f"{newest.name}/shard-00-of-01" in text


def test_a_clock_that_was_overrun_is_told_and_has_its_own_exit_status(shards, tmp_path):
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SMALL]
    assert main([*words, "--steps=1000000", "--seconds=1", "--train.quantize-reserve=0"]) == 3
    (folder,) = tmp_path.iterdir()
    s = summary(folder)
    assert s.overrun == pytest.approx(s.clock - 1.0)
    assert "THE CLOCK WAS OVERRUN" in (folder / "log.txt").read_text()


def test_the_weights_that_are_scored_can_be_chosen_and_training_can_be_validated(shards, tmp_path):
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SMALL]
    assert main([*words, "--evaluate.no-raw", "--evaluate.no-ema", "--evaluate.every=2"]) == 0
    (folder,) = tmp_path.iterdir()
    assert list(summary(folder).scores) == ["quantized"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(row["step"], row["val_bpb"]) for row in rows if "val_bpb" in row]
    assert [step for step, _ in curve] == [1, 3] and curve[1][1] < curve[0][1]
    assert [row["step"] for row in rows if "loss" in row] == list(range(6))


def saves(count: int, number: int, monkeypatch) -> None:
    """Let the `count`-th write of weights be cut short by a signal, as a killed process would be."""
    original, calls = weights_module.save_weights, []

    def save(*arguments: object, **facts: object) -> None:
        calls.append(arguments)
        if len(calls) == count:
            raise Stopped(number)
        original(*arguments, **facts)  # type: ignore[arg-type]

    monkeypatch.setattr(weights_module, "save_weights", save)


def test_weights_of_two_moments_are_no_pair(whole, tmp_path, monkeypatch, saved_at_once):
    """A process that ends between the two files leaves new raw weights next to an older average."""
    settings = ["--out", str(tmp_path), "--train.checkpoint-every=0.01"]
    with monkeypatch.context() as patch:
        saves(2, signal.SIGTERM, patch)
        assert main(["train", str(whole / "config.json"), *settings]) == 143
    (folder,) = tmp_path.iterdir()
    shutil.copy(whole / "ema.safetensors", folder)  # whole, but of another moment
    assert main(["train", "--finish", str(folder)]) == 0
    s = summary(folder)
    assert 0 < s.train.steps <= STEPS
    raw, averaged = (load_weights(folder / f"{name}.safetensors")[2] for name in ("raw", "ema"))
    assert raw["pair"] == averaged["pair"] and raw["steps"] == averaged["steps"] == s.train.steps


def test_an_overrun_is_remembered_by_the_process_that_scores(shards, tmp_path, monkeypatch):
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "score_model", lambda *_: (_ for _ in ()).throw(Stopped(signal.SIGTERM)))
        assert main([*words, "--steps=1000000", "--seconds=1", "--train.quantize-reserve=0"]) == 143
    (folder,) = tmp_path.iterdir()
    assert main(["train", "--resume", str(folder), "--data.micro-tokens=1024"]) == 3
    s = summary(folder)
    assert s.overrun > 0 and "THE CLOCK WAS OVERRUN" in (folder / "log.txt").read_text()
    assert s.config_hash == describe(folder / "model.pgolf")["config_hash"], "still the artifact's run"


def test_checkpoints_of_another_run_are_not_taken(stopped, shards, tmp_path):
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path / "other"), *SETTINGS]
    stop_here([*words, "--train.seed=7"], 8)
    (other,) = (tmp_path / "other").iterdir()
    shutil.rmtree(stopped / "checkpoints")
    shutil.copytree(other / "checkpoints", stopped / "checkpoints")
    (stopped / "raw.safetensors").unlink()
    assert main(["train", "--resume", str(stopped)]) == 0
    text = (stopped / "log.txt").read_text()
    assert "is a checkpoint of another run" in text and "there is no checkpoint yet" in text
    assert summary(stopped).train.steps == STEPS


def test_initial_weights_are_not_needed_again(whole, shards, tmp_path):
    base = shutil.copy(whole / "raw.safetensors", tmp_path / "base.safetensors")
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path / "runs"), *SETTINGS]
    stop_here([*words, f"--train.init={base}"], 4)
    Path(base).unlink()
    (folder,) = (tmp_path / "runs").iterdir()
    assert main(["train", "--resume", str(folder)]) == 0


def test_a_validation_is_no_part_of_a_steps_time_and_survives_a_stop(shards, tmp_path, monkeypatch):
    original = run_module.score_model

    def slowly(*arguments: object) -> object:
        time.sleep(0.4)
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(run_module, "score_model", slowly)
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SMALL, "--evaluate.every=2"]
    assert main(words) == 0
    (folder,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    pauses = [row["val_s"] for row in rows if "val_bpb" in row]
    steps = sum(row["ms"] for row in rows if "loss" in row) / 1000
    assert len(pauses) == 2
    assert steps < summary(folder).phases["train"].seconds - 0.7, "the pauses are on the clock, in no step"
