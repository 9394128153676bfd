"""Plots of a run: what they show when a step is wild, and what is said when they cannot be drawn."""

import json
import sys

import pytest

from pgolf.report.plots import loss_ceiling, plot_loss, smoothed, why_no_plots


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
