"""Plots of a run: what they show when a step is wild, and what is said when they cannot be drawn."""

import json
import sys

import pytest

from pgolf.report.plots import (
    first_shown,
    loss_ceiling,
    plot_loss,
    read_metrics,
    run_title,
    smoothed,
    why_no_plots,
)


def metrics(folder, losses):
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps({"loss": v, "elapsed": i}) + "\n" for i, v in enumerate(losses)))
    return path


@pytest.mark.parametrize("count", [4, 20, 500])
def test_a_wild_first_step_does_not_flatten_the_rest(count):
    calm = [3 + 4 * 0.99**i for i in range(count - 1)]
    losses = [1e6, *calm]
    spread = max(calm) - min(calm)
    assert max(calm) <= loss_ceiling(losses) <= max(calm) + 2.5 * max(spread, 0.1)
    smooth = smoothed(losses, loss_ceiling(losses))
    assert max(smooth) <= loss_ceiling(losses)


@pytest.mark.parametrize("losses", [[6.9], [6.9, 10.2, 9.4, 8.3], [10.8 * 0.99**i + 2 for i in range(300)]])
def test_usual_curves_are_shown_whole(losses):
    assert loss_ceiling(losses) == max(losses)


def test_a_plot_is_drawn_with_wild_missing_and_no_steps(tmp_path):
    pytest.importorskip("matplotlib")
    for number, losses in enumerate(([1e9, 5.0, None, 4.0, 3.0], [], [2.0])):
        out = tmp_path / f"{number}.png"
        assert plot_loss(metrics(tmp_path, losses), out) == ""
        assert out.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_reason_and_the_remedy_are_said(tmp_path, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    said = plot_loss(metrics(tmp_path, [1.0]), tmp_path / "loss.png")
    assert said == "matplotlib is not installed; pip install matplotlib"
    assert not (tmp_path / "loss.png").exists()
    (tmp_path / "matplotlib.py").write_text("raise TypeError('built for another numpy')")
    assert why_no_plots().startswith(
        "matplotlib is not usable: TypeError: built for another numpy; pip install"
    )


def test_a_plot_begins_where_there_is_something_to_see():
    record = [9.0, 12.6, 11.5, *(2.2 + 6 * 0.99**i for i in range(3000))]
    first = first_shown(record)
    shown = record[first:]
    assert 100 < first < 300  # of 3,003: the fast fall
    assert max(shown) < 2.8  # 2.5 to 2.2 is what the rest falls
    assert first_shown([9.0, 12.6, *(2.2 + 6 * 0.7**i for i in range(10))]) == 0  # too short to have a rest
    diverged = [3.0 - 0.001 * i for i in range(200)] + [3.0 + 0.1 * i for i in range(200)]
    assert first_shown(diverged) == 0
    assert first_shown([]) == first_shown([4.0] * 100) == 0


def test_the_title_names_the_run_its_score_and_what_is_left_out(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    said: list[str] = []
    monkeypatch.setattr(pyplot.Axes, "set_title", lambda _, text, **__: said.append(text))
    path = metrics(tmp_path, [9.0, 12.6, *(2.2 + 6 * 0.97**i for i in range(500))])
    title = run_title("20261128-record", {"raw": 1.03, "ema": 1.002, "quantized": 1.00644})
    assert title == "20261128-record: 1.0064 bpb (quantized)"
    assert run_title("x", {"quantized": 1.0, "ttt": 0.99}) == "x: 0.9900 bpb (ttt)"
    plot_loss(path, tmp_path / "loss.png", title=title)
    plot_loss(path, tmp_path / "loss.png")
    assert said[0].startswith(f"{title}\ntraining loss, 502 steps, the first ")
    assert said[1].startswith(f"{run_title(tmp_path.name, {})}\n")


@pytest.mark.parametrize("end", ['{"loss": 1.0, "ela', "[" * 100_000, "3", "\udcff"])
def test_what_a_killed_run_wrote_last_is_left_out(tmp_path, end):
    path = metrics(tmp_path, [3.0, 2.0])
    path.write_bytes(path.read_bytes() + end.encode(errors="surrogateescape"))
    assert [row["loss"] for row in read_metrics(path)] == [3.0, 2.0]
