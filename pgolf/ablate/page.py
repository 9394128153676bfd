"""The report of an ablation as one HTML page that needs no other file, and its writing to disk.

Plots are drawn by matplotlib (`pip install 'pgolf[plot]'`); without it the page has the tables only and says
why. `pgolf.report.page` owns the frame and the style.
"""

from __future__ import annotations

import html
from pathlib import Path

from pgolf.ablate.compare import arm_mean, compare_arms
from pgolf.ablate.results import Ablation, CellResult
from pgolf.ablate.tables import facts, markdown, tables
from pgolf.files import atomic_file
from pgolf.report.page import COLORS, figure, image, page, table
from pgolf.report.plots import loss_ceiling, read_metrics, smoothed, why_no_plots

MAX_POINTS = 300
"""Points of a curve in the page: a curve of 5,000 steps is thinned to this."""


def write_report(ablation: Ablation, folder: Path) -> tuple[Path, Path]:
    """Write report.md and report.html into `folder` (made if missing), atomically; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "report.md", folder / "report.html"
    for path, text in zip(paths, (markdown(ablation), html_page(ablation)), strict=True):
        with atomic_file(path) as file:
            file.write(text.encode())
    return paths


def html_page(ablation: Ablation) -> str:
    """Return the whole report as one self-contained XHTML page."""
    found = tables(ablation)
    body = ["<ul>", *(_fact(line) for line in facts(ablation)), "</ul>"]
    first = 2 + (ablation.costs is not None) + (ablation.ladders is not None)
    body += [table(each) for each in found[:first]]
    body += _plots(ablation)
    body += [table(each) for each in found[first:]]
    return page(f"Ablation {ablation.name}", body)


def _fact(line: str) -> str:
    loud = line.startswith(("WARNING", "INTERIM"))
    return f'<li class="warn">{html.escape(line)}</li>' if loud else f"<li>{html.escape(line)}</li>"


def _plots(ablation: Ablation) -> list[str]:
    """Return the plots as img elements."""
    if why := why_no_plots():
        return [f"<p>No plots: {html.escape(why)}, and write the report again with --report-only.</p>"]
    curves = [(c, _curve(c)) for c in ablation.cells if c.metrics is not None and c.metrics.is_file()]
    return [
        _differences_plot(ablation),
        _gap_plot(ablation, curves),
        _loss_plot(ablation, curves, "step", "step"),
        _loss_plot(ablation, curves, "elapsed", "seconds of training"),
        _speed_plot(ablation),
    ]


def _curve(cell: CellResult) -> dict[str, list[float]]:
    """Return step, elapsed and loss (moving average over about 10 steps) of a run, thinned."""
    assert cell.metrics is not None
    rows = [r for r in read_metrics(cell.metrics) if r.get("loss") is not None]
    losses = [row["loss"] for row in rows]
    smooth = smoothed(losses, loss_ceiling(losses))
    # Smoothed first and thinned then: single steps of a thinned curve would be noise.
    every = max(1, -(-len(rows) // MAX_POINTS))
    picked = range(0, len(rows), every)
    curve = {key: [rows[i][key] for i in picked] for key in ("step", "elapsed")}
    return {**curve, "loss": [smooth[i] for i in picked]}


def _color(ablation: Ablation, arm: str) -> str:
    return COLORS[list(ablation.arms).index(arm) % len(COLORS)]


def _loss_plot(
    ablation: Ablation, curves: list[tuple[CellResult, dict[str, list[float]]]], key: str, label: str
) -> str:
    drawn, axes = figure(8, 4.2)
    named: set[str] = set()
    for cell, curve in curves:
        name = "_" if cell.arm in named else cell.arm
        named.add(cell.arm)
        axes.plot(curve[key], curve["loss"], color=_color(ablation, cell.arm), linewidth=0.9, label=name)
    axes.set(
        xlabel=label, ylabel="loss, nats per token", title=f"training loss by {label}, one line per seed"
    )
    if named:
        axes.legend(frameon=False)
    return image(drawn, f"training loss by {label}")


def _gap_plot(ablation: Ablation, curves: list[tuple[CellResult, dict[str, list[float]]]]) -> str:
    """Draw the loss minus the baseline's of the same seed: where in the run the pairs part, and how far."""
    base = {c.seed: curve for c, curve in curves if c.arm == ablation.baseline}
    drawn, axes = figure(8, 4.2)
    named: set[str] = set()
    for cell, curve in curves:
        if cell.arm == ablation.baseline or cell.seed not in base:
            continue
        other = dict(zip(base[cell.seed]["step"], base[cell.seed]["loss"], strict=True))
        steps = [s for s in curve["step"] if s in other]
        gap = [v - other[s] for s, v in zip(curve["step"], curve["loss"], strict=True) if s in other]
        name = "_" if cell.arm in named else cell.arm
        named.add(cell.arm)
        axes.plot(steps, gap, color=_color(ablation, cell.arm), linewidth=0.9, label=name)
    axes.axhline(0, color="black", linewidth=1)
    title = f"training loss less that of {ablation.baseline}, one line per pair"
    axes.set(xlabel="step", ylabel="nats per token", title=title)
    if named:
        axes.legend(frameon=False)
    return image(drawn, title)


def _differences_plot(ablation: Ablation) -> str:
    """Draw each pair's difference as a dot and the mean with its 95 % interval."""
    compared = compare_arms(ablation)
    drawn, axes = figure(8, 1.2 + 0.6 * len(compared))
    for row, c in enumerate(compared):
        color = _color(ablation, c.arm)
        axes.plot(c.differences, [row] * len(c.differences), "o", color=color, alpha=0.45, markersize=5)
        if c.pairs.n >= 2:
            axes.plot([c.pairs.low, c.pairs.high], [row + 0.18] * 2, color=color, linewidth=2)
            axes.plot([c.pairs.mean], [row + 0.18], "D", color=color, markersize=6)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(compared)), [f"{c.arm} (n={c.pairs.n})" for c in compared])
    axes.set_ylim(len(compared) - 0.4, -0.6)
    title = f"difference from {ablation.baseline} by seed; mean and 95 % interval"
    axes.set(xlabel=f"bpb {ablation.metric}; left of 0 is better", title=title)
    return image(drawn, title)


def _speed_plot(ablation: Ablation) -> str:
    drawn, axes = figure(8, 1.2 + 0.5 * len(ablation.arms))
    for row, arm in enumerate(ablation.arms):
        mean = arm_mean(ablation, arm, "ms")
        if mean.n:
            error = mean.se if mean.n > 1 else 0.0
            axes.barh(row, mean.mean, xerr=error, color=_color(ablation, arm), height=0.6)
    axes.set_yticks(range(len(ablation.arms)), list(ablation.arms))
    axes.set_ylim(len(ablation.arms) - 0.4, -0.6)
    axes.set(xlabel="ms per step, mean over the run", title="speed by arm, +- standard error")
    return image(drawn, "milliseconds per step by arm")
