"""The log of a run: its contents, the rank that writes it, and that a full disk does not stop a run."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from pgolf.log import FIRST_S, Progress, RunLog


def rows(log):
    return [json.loads(line) for line in log.metrics_path.read_text().splitlines()]


def test_metrics_are_json_lines_in_order_and_on_disk_at_once(tmp_path):
    log = RunLog(tmp_path / "new" / "run", is_main=True)
    log.metric(step=1, loss=2.5, loop=False, name="a\nb")
    assert rows(log) == [{"step": 1, "loss": 2.5, "loop": False, "name": "a\nb"}]
    RunLog(log.folder, is_main=True).metric(step=2)
    assert [row["step"] for row in rows(log)] == [1, 2]


def test_values_that_are_not_finite_become_null(tmp_path):
    log = RunLog(tmp_path, is_main=True)
    log.metric(loss=float("nan"), parts=[1.0, float("inf")], deep={"x": float("-inf")})
    assert rows(log) == [{"loss": None, "parts": [1.0, None], "deep": {"x": None}}]


def test_tensor_value_is_refused_by_name(tmp_path):
    log = RunLog(tmp_path, is_main=True)
    with pytest.raises(
        TypeError, match=r"metric 'loss' must be a plain number, .*got Tensor; convert it first"
    ):
        log.metric(step=1, loss=torch.ones(()))
    assert not log.metrics_path.exists()


def test_lines_go_to_console_and_file(tmp_path, capsys):
    log = RunLog(tmp_path, is_main=True)
    log.line("step 1")
    log.line("step 2")
    assert capsys.readouterr().out == "step 1\nstep 2\n"
    assert log.text_path.read_text() == "step 1\nstep 2\n"


def test_other_ranks_are_silent_and_make_nothing(tmp_path, capsys):
    log = RunLog(tmp_path / "run", is_main=False)
    log.line("hello")
    log.metric(step=1)
    assert capsys.readouterr() == ("", "")
    assert not log.folder.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_warns_once_and_the_run_goes_on(tmp_path, capsys):
    log = RunLog(tmp_path, is_main=True)
    log.metrics_path.symlink_to("/dev/full")
    for step in range(3):
        log.metric(step=step)
        log.line(f"step {step}")
    captured = capsys.readouterr()
    assert captured.err.count("warning: cannot write") == 1
    assert "No space left on device" in captured.err
    assert "metrics.jsonl" in captured.err
    assert captured.out == "step 0\nstep 1\nstep 2\n"
    assert log.text_path.read_text() == captured.out


def test_progress_says_what_is_done_and_left_on_the_main_rank_only(capsys):
    for is_main in (True, False):
        progress = Progress("ttt", 10, is_main=is_main, every_s=0.0)
        progress.advance(4, lambda: "1.05 bpb")
        progress.advance(8)  # more than announced: nothing left, not a negative time
    captured = capsys.readouterr()
    first, second = captured.err.splitlines()
    assert first.startswith("ttt:  40 %") and first.endswith(" s left  1.05 bpb")
    assert second.startswith("ttt: 100 %") and second.endswith(" 0 s left")
    assert captured.out == ""


def test_the_time_left_does_not_count_a_first_step_that_compiles(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("pgolf.log.time.perf_counter", lambda: now[0])
    progress = Progress("ttt", 1000, is_main=True)
    for seconds, amount in ((80.0, 1), (10.0, 99), (10.0, 100), (10.0, 100)):
        now[0] += seconds
        progress.advance(amount)
    # After 80 s the rate is 10 a second.
    left = [line.split(" s left")[0].split()[-1] for line in capsys.readouterr().err.splitlines()]
    assert left[1:] == ["91", "80", "70"]


def test_progress_waits_between_lines(capsys):
    progress = Progress("plain", 10, is_main=True, every_s=60.0)
    progress.advance(5, lambda: pytest.fail("nobody asked for a line"))
    assert capsys.readouterr().err == ""


def wait_for_line(capsys, what: str) -> str:
    """Return the first text with these words that comes on stderr."""
    end = time.monotonic() + 120
    while what not in (said := capsys.readouterr().err):
        assert time.monotonic() < end, f"nobody said {what!r}"
        time.sleep(0.05)
    return said


def test_a_long_first_step_says_what_it_does_within_two_seconds(capsys):
    """Nothing is counted, as while kernels are compiled."""
    with Progress("ttt", 10, is_main=True, every_s=600.0) as progress:
        said = wait_for_line(capsys, "in the first step, which compiles and loads kernels")
        progress.advance(5)
    assert FIRST_S < 2.0 and said.startswith("ttt:   0 %") and said.count("\n") == 1
    assert capsys.readouterr().err == "", "the next line is due after 600 s"


def test_a_long_step_later_on_is_not_silent_either(capsys):
    with Progress("ttt", 10, is_main=True, every_s=0.1) as progress:
        progress.advance(4)
        assert wait_for_line(capsys, "in the next step").startswith("ttt:  40 %")
        progress.doing = "learning"
        assert wait_for_line(capsys, "learning").startswith("ttt:  40 %")


@pytest.mark.parametrize("is_main", [True, False])
def test_what_is_short_prints_nothing(is_main, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("pgolf.log.time.perf_counter", lambda: now[0])  # a busy machine takes longer
    with Progress("ttt", 10, is_main=is_main) as progress:
        progress.advance(10)
        now[0] = FIRST_S - 0.1
        time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_an_error_ends_the_lines(capsys):
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="x"), Progress("ttt", 10, is_main=True):
        raise ValueError("x")
    assert set(threading.enumerate()) <= before
