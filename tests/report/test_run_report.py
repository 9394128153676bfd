"""The page of a run: of a finished one, of several, and of whatever a run that ended too early left."""

import base64
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pgolf.cli.main import main
from pgolf.report.watched import FILES, read_watched
from pgolf.report.watched_page import report_note, run_page

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
RECORD = RESULTS / "20261128_record_600s_2gpu"
FIGURES = [
    "training loss by seconds of training",
    "learning rate by seconds of training",
    "momentum of Muon by seconds of training",
    "norm of the gradient by seconds of training",
    "milliseconds per step",
    "bytes by section",
    "seconds by phase",
]
XHTML = "{http://www.w3.org/1999/xhtml}"


def write(folder: Path, *, rows: int = 60, name: str = "metrics.jsonl", **more: object) -> Path:
    """Write a run's metrics as a run writes them, a validation every 20 steps."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(rows):
        row = {"step": i, "loss": 4 - 0.02 * i, "elapsed": i / 10, "ms": 100.0, "lr": 1.0, "loop": i > 30}
        lines.append(row | {"momentum": 0.9, "grad_norm": 0.5} | more)
        lines += [{"step": i, "elapsed": i / 10, "val_bpb": 2 - 0.01 * i}] if i % 20 == 19 else []
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def parsed(text: str) -> tuple[str, list[str], list[ET.Element]]:
    """Return the visible text, the figures' names and the figures; nothing is taken from elsewhere."""
    tree = ET.fromstring(text)
    assert not [e for e in tree.iter() if e.tag in (f"{XHTML}script", f"{XHTML}link", f"{XHTML}iframe")]
    assert not re.findall(r"""(?:src|href)="(?!data:)|url\((?!#)|@import""", text)
    images = list(tree.iter(f"{XHTML}img"))
    drawn = [ET.fromstring(base64.b64decode(i.get("src", "").split(",")[1])) for i in images]
    return " ".join(tree.itertext()), [i.get("alt", "") for i in images], drawn


@pytest.fixture(scope="module")
def record() -> str:
    pytest.importorskip("matplotlib")
    return run_page(read_watched([RECORD]))


def test_the_page_of_a_finished_run_has_every_figure_and_number(record):
    text, names, drawn = parsed(record)
    assert names == FIGURES
    assert f"{RECORD.name}: 1.0064 bpb (quantized)" in text
    for said in ("finished", "39,715", "15,984,606 of 16,000,000", "1.00644", "mlp_up_bank", "5,213,342"):
        assert said in text, said
    for said in ("87.8", "129.8", "596.66", "optim.muon.lr", "torch 2.11.0"):
        assert said in text, said
    for svg in drawn:
        assert not [v for e in svg.iter() for k, v in e.attrib.items() if "href" in k and v[0] != "#"]


def test_figures_and_page_follow_the_dark_screen(record):
    assert "prefers-color-scheme: dark" in record and 'name="viewport"' in record
    for data in re.findall(r"base64,([^\"]+)", record):
        svg = base64.b64decode(data).decode()
        assert "prefers-color-scheme:dark" in svg and "currentColor" in svg
        assert not re.search(r"#000000|fill: #ffffff", svg)  # ink and paper are the page's


def test_metrics_alone_are_enough_and_a_torn_line_is_left_out(tmp_path):
    pytest.importorskip("matplotlib")
    folder = write(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "lo')
    text, names, _ = parsed(run_page(read_watched([folder])))
    assert names == [FIGURES[0], "validation during training by seconds of training", *FIGURES[1:5]]
    assert "not finished: under way, or killed" in text and "60" in text


def test_a_stopped_run_says_so_and_shows_what_it_knows(tmp_path):
    folder = write(tmp_path / "run")
    session = {"started": "2026-11-28T06:57:25Z", "end": "SIGTERM", "world_size": 2, "from_step": 0}
    summary = {
        "seconds": {"set_up": 11.5},
        "device": "CPU",
        "train": {"steps": 60},
        "scores": {},
        "bytes": None,
    }
    progress = {"stage": "training", "clock": 6.0, "summary": summary, "sessions": [session]}
    (folder / "progress.json").write_text(json.dumps(progress))
    text, _, _ = parsed(run_page(read_watched([folder])))
    assert "not finished; SIGTERM" in text and "11.50" in text and "0 to" in text
    # Scores may be there while a further way to score runs: it is not finished before progress.json is gone.
    (folder / "summary.json").write_text(json.dumps(summary))
    assert not read_watched([folder])[0].finished


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", "\x00\xff", "[" * 9999])
def test_a_damaged_file_costs_what_it_said_and_not_the_page(tmp_path, content, monkeypatch):
    monkeypatch.setattr("pgolf.report.watched_page.why_no_plots", lambda: "not asked for")
    for file in FILES:
        folder = write(tmp_path / file, rows=3)
        (folder / file).write_bytes(content.encode("latin1"))
        text, _, _ = parsed(run_page(read_watched([folder])))
        assert file == "metrics.jsonl" or f"{file}: {file} is left out" in text


def test_a_summary_of_another_shape_is_shown_as_far_as_it_goes(tmp_path):
    folder = write(tmp_path / "run", rows=3)
    odd = {
        "scores": {"raw": 3},
        "train": [],
        "seconds": {"a": "b", "save": 2},
        "bytes": {"parts": 1, "code": 5},
    }
    (folder / "summary.json").write_text(json.dumps(odd | {"sessions": [1], "versions": "x", "commit": 3}))
    (folder / "config.json").write_text('{"train": 3, "model": {"layers": [1]}}')
    text, _, _ = parsed(run_page(read_watched([folder])))
    assert "2.00" in text and "model.layers" in text


def test_values_that_are_no_numbers_are_not_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    odd = {"grad_norm": "3", "momentum": [1], "lr": float("nan"), "ms": 10**400, "loss": None}
    _, names, _ = parsed(run_page(read_watched([write(tmp_path, **odd)])))
    assert names == ["validation during training by seconds of training"]


@pytest.mark.parametrize(
    "name", ["a $b_c$ $\\frac", "<b>&amp;\"'", "l\u00e4uf \u65e5\u672c", "line\nbreak\x01", "\udcff"]
)
def test_any_name_of_a_folder_is_shown(tmp_path, name, monkeypatch):
    monkeypatch.setattr("pgolf.report.watched_page._lines", lambda *_, **__: "")  # three figures are enough
    text, _, _ = parsed(run_page(read_watched([write(tmp_path / name), write(tmp_path / f"{name}2")])))
    if name.isprintable():
        assert name in text


def test_several_runs_are_laid_over_each_other_with_what_differs(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    others = [RESULTS / "20261123_record_600s_1gpu_196k", RESULTS / "20261122_record_100s_2gpu"]
    out = tmp_path / "report.html"
    assert main(["report", str(RECORD), *map(str, others), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"report: {out}\n"
    text, names, drawn = parsed(out.read_text())
    assert names[:2] == ["training loss by seconds of training", "training loss by step"]
    labels = " ".join(drawn[0].itertext())
    for run in (RECORD, *others):
        assert run.name in labels
    differ = text[text.index("Settings that differ") : text.index("All settings")]
    assert "data.batch_tokens" in differ and "model.layers" not in differ


def test_two_folders_of_one_name_are_told_apart(tmp_path):
    runs = read_watched([write(tmp_path / place / "run") for place in ("a", "b")])
    assert [run.name for run in runs] == [str(tmp_path / place / "run") for place in ("a", "b")]


def test_the_verb_writes_into_the_run_and_refuses_in_one_sentence(tmp_path, capsys, monkeypatch):
    folder = write(tmp_path / "run")
    monkeypatch.chdir(folder)
    assert main(["report", "."]) == 0
    assert "<h1>run</h1>" in (folder / "report.html").read_text()
    for words, said in (
        ([str(tmp_path)], "it holds none of metrics.jsonl, summary.json, progress.json, config.json"),
        ([".", "."], "say where to write the report of 2 runs: --out report.html"),
        ([".", "--out", str(tmp_path / "none" / "a.html")], "make it first"),
    ):
        capsys.readouterr()
        assert main(["report", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_without_matplotlib_the_page_has_its_tables_and_says_why(tmp_path, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "matplotlib.py").write_text("raise TypeError('built for another numpy')")
    monkeypatch.syspath_prepend(tmp_path)
    text, names, _ = parsed(run_page(read_watched([RECORD])))
    assert names == [] and "1.00644" in text
    assert "No plots: matplotlib is not usable: TypeError: built for another numpy" in text


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path):
    folder = write(tmp_path / "run", rows=1)
    assert report_note(folder) == f"report: {folder / 'report.html'}"
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    note = report_note(folder)
    assert note.startswith("no report: ") and note.endswith(f"write it with: pgolf report {folder}")
