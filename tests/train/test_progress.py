"""What an unfinished run keeps: one process at a time, a clock that survives, sessions that add up."""

import contextlib
import json
import os
import threading

import pytest

from pgolf.dist import Dist
from pgolf.presets import tiny
from pgolf.report.summary import Summary, Training
from pgolf.train.budget import Clock
from pgolf.train.progress import (
    CLOCK,
    PROGRESS,
    ClockFile,
    Progress,
    keep_metrics,
    read_clock,
    read_past,
)
from pgolf.train.session import Around, Session
from pgolf.train.signals import Signals


def test_the_clock_on_disk_is_the_last_beat_or_nothing(tmp_path):
    assert read_clock(tmp_path) == 0.0
    beats = ClockFile(tmp_path)
    for seconds in (1.0, 599.9994, 12.5):
        beats.beat(seconds)
        assert read_clock(tmp_path) == pytest.approx(seconds, abs=1e-3)
    beats.close()
    beats.beat(99.0)
    assert read_clock(tmp_path) == 12.5
    for damaged in ("", "nan", "-1", "1e999", "12.5x"):
        (tmp_path / CLOCK).write_text(damaged)
        assert read_clock(tmp_path) == 0.0


def test_a_disk_that_lets_the_clock_wait_holds_up_nobody(tmp_path, monkeypatch):
    """The thread that watches the ranks beats; while it waited, it gave the others no sign of life."""
    write, released, asked = os.pwrite, threading.Event(), []

    def waiting(*arguments):
        asked.append(arguments)
        assert released.wait(120)
        return write(*arguments)

    config, dist = tiny(), Dist.start("cpu")
    with contextlib.ExitStack() as files, Signals() as signals:
        around = Around(dist, signals, (), files)
        words = {"past": None, "steps": lambda: 0, "keep_weights": lambda: None}
        session = Session(config, around, tmp_path / "run", make_summary(), **words)
        dist.watch.leave()  # so that its thread does not beat as well
        monkeypatch.setattr(os, "pwrite", waiting)
        session.start_clock(Clock(config.train, dist), at=41.5)
        for _ in range(3):
            session._beat()  # it would not return
        assert session._writing is not None and not session._writing.done()
        released.set()
        session._writing.result(120)
        assert len(asked) == 1 and 41.5 <= read_clock(tmp_path / "run") <= session.clock.elapsed


def make_summary(*, steps: int = 0) -> Summary:
    """Return what is known of a run, which has trained if there are steps."""
    summary = Summary("tiny", "0" * 16, "CPU", 1, "sdpa", 1000)
    if steps:
        times = {"ms_loop_off": 1.0, "ms_loop_on": None, "tokens_per_s": 1.0}
        summary.train = Training(steps=steps, tokens=steps, loop_step=None, last_loss=3.0, **times)
    return summary


SUMMARY = json.dumps(make_summary().to_dict())


def run_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_a_killed_process_is_completed_from_its_traces(tmp_path):
    folder = run_folder(tmp_path)
    Progress(folder, world_size=2, past=None).write("training", make_summary(), 0.0)
    ClockFile(folder).beat(41.5)
    rows = [{"step": s, "loss": 1.0} for s in range(7)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 7, "lo')
    past = read_past(folder)
    assert (past.stage, past.clock, past.lost, past.checkpoint) == ("training", 41.5, 41.5, None)
    progress = Progress(folder, world_size=1, past=past)
    killed, present = progress.sessions
    assert killed.end == "killed" and killed.to_step == 7 and killed.clock_to == 41.5
    assert killed.ended is None
    assert present.clock_from == 41.5 and present.lost_seconds == 41.5 and present.from_step == 0


def test_a_process_that_ended_orderly_keeps_what_it_said(tmp_path):
    folder = run_folder(tmp_path)
    progress = Progress(folder, world_size=1, past=None)
    progress.end("SIGTERM", step=12, clock=30.0)
    summary = make_summary(steps=12)
    progress.write("trained", summary, 30.0, reached=True)
    past = read_past(folder)
    assert past.stage == "trained" and past.lost == 0.0 and past.summary == summary
    progress.write("trained", summary, 34.5)  # calibrated, then killed: to be done again
    assert read_past(folder).lost == 4.5
    assert Progress(folder, world_size=1, past=past).sessions[0].end == "SIGTERM"
    assert Progress(folder, world_size=1, past=past).session.from_step == 12


BAD = {
    "no run": (None, FileNotFoundError, "no run at"),
    "finished": ("summary.json", ValueError, "is finished"),
    "never begun": (None, ValueError, "start again with"),
    "torn": ('{"stage": "trai', ValueError, "is damaged"),
    "foreign": (
        f'{{"stage": "x", "summary": {SUMMARY}, "sessions": [], "clock": 0}}',
        ValueError,
        "unknown stage",
    ),
    "no summary": (
        '{"stage": "training", "summary": {}, "sessions": [], "clock": 0}',
        ValueError,
        "is damaged: summary has no 'name', which a run writes; start the run again",
    ),
    **{
        f"clock {clock}": (
            f'{{"stage": "training", "summary": {SUMMARY}, "sessions": [], "run": "a", "stage_clock": 0.0, '
            f'"clock": {clock}}}',
            ValueError,
            "the clock must be seconds >= 0",
        )
        for clock in ("NaN", "Infinity", "-1.0", '"12"')
    },
    "deep": ("[" * 100_000, ValueError, "is damaged"),
    "a list": ("[]", ValueError, "is damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_folder_that_cannot_go_on_says_why(tmp_path, case):
    text, error, message = BAD[case]
    if case != "no run":
        run_folder(tmp_path)
    if text == "summary.json":
        (tmp_path / "summary.json").write_text("{}")
    elif text is not None:
        (tmp_path / PROGRESS).write_text(text)
    with pytest.raises(error, match=message):
        read_past(tmp_path)


def test_metrics_of_lost_steps_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": s, "loss": float(s)} for s in range(5)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"torn')
    assert keep_metrics(path, 3) == rows[:3]
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[:3]
    assert keep_metrics(tmp_path / "none.jsonl", 3) == []
