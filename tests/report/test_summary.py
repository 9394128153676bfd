"""The summary of a run: its phases, its file, and the files of runs of earlier versions."""

import json
import time
from pathlib import Path

import pytest

from pgolf.artifact.size import Ledger
from pgolf.errors import UserError
from pgolf.evaluate.bpb import Score
from pgolf.report.summary import PHASES, Phase, SessionEntry, Summary, Training, format_table

COMMITTED = sorted((Path(__file__).parents[2] / "bench" / "results").glob("*/summary.json"))


def make_summary() -> Summary:
    """Return the summary of a run in two processes that was a little late."""
    s = Summary("tiny", "0" * 16, "CPU", 1, "sdpa", 1000, reserve=2.0, clock=10.5, total=20.0, overrun=0.5)
    for name, seconds in (("start", 1.0), ("train", 8.0), ("save", 1.0), ("quantize", 1.0), ("read", 0.5)):
        s.put(name, seconds)
    s.scores["raw"] = Score(nats=100.0, tokens=50, bytes=96, bpb=1.5, loss=2.0, seconds=1.0)
    times = {"ms_loop_off": 10.0, "ms_loop_on": None, "tokens_per_s": 6.5}
    s.train = Training(steps=4, tokens=52, loop_step=None, last_loss=None, **times)
    s.ledger = Ledger((("all", 700), ("header", 20)), 80, 16_000, 1.25)
    s.data = {"manifest": "ab" * 32, "validation": {"tokens": 51, "documents": 2, "bytes": 96}}
    s.versions = {"python": "3.11"}
    s.sessions = [
        SessionEntry("2026-11-28T00:00:00Z", 1, 0, 0.0, 0.0, end="killed", to_step=2, clock_to=5.0),
        SessionEntry("2026-11-28T00:01:00Z", 1, 1, 5.0, 0.25),
    ]
    return s


def test_a_summary_comes_back_from_its_file(tmp_path):
    s = make_summary()
    s.save(tmp_path / "summary.json")
    assert Summary.load(tmp_path / "summary.json") == s
    assert s.validation.bytes == 96 and s.manifest == "ab" * 32


def test_the_file_has_phases_in_order_with_what_is_none_among_them():
    data = make_summary().to_dict()
    order = ["start", "reserve", "train", "save", "quantize", "clock", "read", "total"]
    assert list(data["seconds"]) == order and data["seconds"]["clock"] == 10.5
    assert data["bytes"]["total"] == 800 and data["train"]["steps"] == 4
    assert "end" not in data["sessions"][1], "what a process that is under way cannot say is left out"


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_summaries_of_earlier_versions_load_and_keep_every_figure(path):
    old = json.loads(path.read_text())
    summary = Summary.load(path)
    new = summary.to_dict()
    assert old.pop("train").items() <= new["train"].items()
    assert {key: new[key] for key in old} == old
    assert list(new["seconds"]) == list(old["seconds"])
    assert summary.spent("inside") == pytest.approx(summary.clock, abs=0.6)
    assert summary.phases.keys() <= PHASES.keys()


def test_a_phase_is_timed_and_adds_up_over_processes():
    s = make_summary()
    s.phases["save"] = Phase("save", "inside", 1.0)
    began = time.perf_counter()
    with s.phase("save"):
        time.sleep(0.02)
    most = 1.0 + time.perf_counter() - began
    assert s.phases["save"].where == "inside" and 1.02 <= s.phases["save"].seconds <= most
    assert s.under_way == "save"


def test_a_phase_that_fails_stays_under_way_and_counts_nothing():
    s = make_summary()
    with pytest.raises(ZeroDivisionError), s.phase("read"):
        _ = 1 / 0
    assert s.under_way == "read" and s.phases["read"].seconds == 0.5
    with pytest.raises(ZeroDivisionError), s.phase("plot"):
        _ = 1 / 0
    assert "plot" not in s.phases


def test_a_phase_that_this_version_does_not_know_comes_after_the_clock():
    data = make_summary().to_dict()
    data["seconds"]["upload"] = 3.0
    summary = Summary.from_dict(data, "summary")
    assert summary.phases["upload"] == Phase("upload", "after", 3.0) and summary.spent("after") == 3.5


WRONG = [
    (lambda s: s.pop("device"), "here has no 'device', which a run writes"),
    (lambda s: s.pop("bytes"), "here has no 'bytes', which a run writes"),
    (lambda s: s["train"].pop("steps"), "here: train has no 'steps', which a run writes"),
    (lambda s: s["train"].update(steps=1.5), "here: train: steps is 1.5, expected a whole number"),
    (lambda s: s["train"].update(steps=True), "here: train: steps is True, expected a whole number"),
    (lambda s: s.update(seconds=[1]), r"here: seconds is \[1\], expected an object"),
    (lambda s: s["seconds"].update(save="1"), "here: seconds of save is '1', expected a number"),
    (lambda s: s["scores"].update(raw=1.5), "here: score raw is 1.5, expected an object"),
    (lambda s: s["scores"]["raw"].update(bpb="4"), "here: score raw: bpb is '4', expected a number"),
    (lambda s: s.update(sessions={}), "here: sessions is {}, expected a list"),
    (lambda s: s["versions"].update(torch=2), "here: version of torch is 2, expected a string"),
    (lambda s: s["bytes"].pop("code"), "here: bytes has no 'code', which a run writes"),
    (lambda s: s["bytes"].update(total=9), "here: bytes: total is 9, but its parts sum to 800"),
    (lambda s: s["bytes"]["parts"].update(all=-1), "here: bytes: all is -1, expected a whole number"),
    (lambda s: s["data"].update(validation=3), "here: data, validation is 3, expected an object"),
    (lambda s: s["data"]["validation"].pop("tokens"), "expected whole numbers of tokens, documents and"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_no_run_writes_is_named(change, message):
    data = json.loads(json.dumps(make_summary().to_dict()))
    change(data)
    with pytest.raises(UserError, match=message):
        Summary.from_dict(data, "here")


def test_the_closing_table_says_what_went_wrong_too():
    text = format_table(make_summary())
    assert "raw            1.5000" in text and "artifact 800 bytes of 16,000 (code 80)" in text
    assert "THE CLOCK WAS OVERRUN: it stopped at 10.50 s, 0.50 s too late" in text
    assert "2 processes; 0.2 s of lost work" in text and "clock 10.5, read 0.5, total 20.0" in text
