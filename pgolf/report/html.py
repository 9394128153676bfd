"""The report of an ablation as one HTML page that needs no other file, and its writing to disk.

Plots are SVG inside data URIs, drawn by matplotlib (`pip install 'pgolf[plot]'`); without it the page has the
tables only and says so. The page is well-formed XML: no scripts, no links, no fonts from elsewhere.
"""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

from pgolf.data.shards import atomic_file
from pgolf.peers import find_peer
from pgolf.report.ablation import Ablation, CellResult, Table, arm_mean, compare_arms, facts, markdown, tables
from pgolf.report.plots import read_metrics

COLORS = ("#1f5a99", "#c0504d", "#4f8a4c", "#8a5aa0", "#c98a1b", "#3d9aa0", "#7a7a7a", "#a0527a")
MAX_POINTS = 300
"""Points of a curve in the page: a curve of 5,000 steps is thinned to this."""
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; font-variant-numeric: tabular-nums }
th, td { border: 1px solid #ccc; padding: 0.25em 0.6em; text-align: left; vertical-align: top }
th { background: #f2f4f7 } img { max-width: 100%; margin: 0.5em 0 } .warn { color: #a02020; font-weight: 600 }
"""


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
    title = html.escape(f"Ablation {ablation.name}")
    body = [f"<h1>{title}</h1>", "<ul>", *(_fact(line) for line in facts(ablation)), "</ul>"]
    found = tables(ablation)
    body += [_table(table) for table in found[:2]]
    body += _plots(ablation)
    body += [_table(table) for table in found[2:]]
    head = f'<head><meta charset="utf-8"/><title>{title}</title><style>{STYLE}</style></head>'
    start = '<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml" lang="en">'
    return "\n".join([start, head, "<body>", *body, "</body>", "</html>", ""])


def _fact(line: str) -> str:
    loud = line.startswith(("WARNING", "INTERIM"))
    return f'<li class="warn">{html.escape(line)}</li>' if loud else f"<li>{html.escape(line)}</li>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in table.head)
    rows = ["<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in table.rows]
    return "\n".join([f"<h2>{html.escape(table.title)}</h2>", f"<table><tr>{head}</tr>", *rows, "</table>"])


def _plots(ablation: Ablation) -> list[str]:
    """Return the plots as img elements."""
    peer = find_peer("matplotlib", "matplotlib.figure")
    if not peer.usable:
        why = html.escape(peer.problem)
        return [f"<p>No plots: matplotlib is {why}; pip install 'pgolf[plot]' and build it again.</p>"]
    curves = [(c, _curve(c)) for c in ablation.cells if c.metrics is not None and c.metrics.is_file()]
    return [
        _differences_plot(ablation),
        _gap_plot(ablation, curves),
        _loss_plot(ablation, curves, "step", "step"),
        _loss_plot(ablation, curves, "elapsed", "seconds of training"),
        _speed_plot(ablation),
    ]


def _curve(cell: CellResult) -> dict[str, list[float]]:
    """Return step, elapsed and loss (moving average over about 20 steps) of a run, thinned."""
    assert cell.metrics is not None
    rows = [r for r in read_metrics(cell.metrics) if r.get("loss") is not None]
    mean, smooth = rows[0]["loss"] if rows else 0.0, []
    for row in rows:
        mean += 0.1 * (row["loss"] - mean)
        smooth.append(mean)
    every = max(1, -(-len(rows) // MAX_POINTS))
    picked = range(0, len(rows), every)
    curve = {key: [rows[i][key] for i in picked] for key in ("step", "elapsed")}
    return {**curve, "loss": [smooth[i] for i in picked]}


def _color(ablation: Ablation, arm: str) -> str:
    return COLORS[list(ablation.arms).index(arm) % len(COLORS)]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """Return a figure outside of pyplot, so that no global state is left behind, and its axes."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="tight")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _image(figure: Any, text: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="{html.escape(text)}" src="data:image/svg+xml;base64,{data}"/></p>'


def _loss_plot(
    ablation: Ablation, curves: list[tuple[CellResult, dict[str, list[float]]]], key: str, label: str
) -> str:
    figure, axes = _figure(8, 4.2)
    named: set[str] = set()
    for cell, curve in curves:
        name = "_" if cell.arm in named else cell.arm
        named.add(cell.arm)
        axes.plot(curve[key], curve["loss"], color=_color(ablation, cell.arm), linewidth=0.9, label=name)
    axes.set(xlabel=label, ylabel="loss, nats per token", title=f"training loss by {label}, a line a seed")
    if named:
        axes.legend()
    return _image(figure, f"training loss by {label}")


def _gap_plot(ablation: Ablation, curves: list[tuple[CellResult, dict[str, list[float]]]]) -> str:
    """Draw the loss less the baseline's of the same seed: where in the run the pairs part, and how far."""
    base = {c.seed: curve for c, curve in curves if c.arm == ablation.baseline}
    figure, axes = _figure(8, 4.2)
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
    axes.axhline(0, color="#222222", linewidth=1)
    title = f"training loss less that of {ablation.baseline}, a line a pair"
    axes.set(xlabel="step", ylabel="nats per token", title=title)
    if named:
        axes.legend()
    return _image(figure, title)


def _differences_plot(ablation: Ablation) -> str:
    """Draw each pair's difference as a dot and the mean with its 95 % interval."""
    compared = compare_arms(ablation)
    figure, axes = _figure(8, 1.2 + 0.6 * len(compared))
    for row, c in enumerate(compared):
        color = _color(ablation, c.arm)
        axes.plot(c.differences, [row] * len(c.differences), "o", color=color, alpha=0.45, markersize=5)
        if c.pairs.n >= 2:
            axes.plot([c.pairs.low, c.pairs.high], [row + 0.18] * 2, color=color, linewidth=2)
            axes.plot([c.pairs.mean], [row + 0.18], "D", color=color, markersize=6)
    axes.axvline(0, color="#222222", linewidth=1)
    axes.set_yticks(range(len(compared)), [f"{c.arm} (n={c.pairs.n})" for c in compared])
    axes.set_ylim(len(compared) - 0.4, -0.6)
    title = f"difference from {ablation.baseline} by seed; mean and 95 % interval"
    axes.set(xlabel=f"bpb {ablation.metric}; left of 0 is better", title=title)
    return _image(figure, title)


def _speed_plot(ablation: Ablation) -> str:
    figure, axes = _figure(8, 1.2 + 0.5 * len(ablation.arms))
    for row, arm in enumerate(ablation.arms):
        mean = arm_mean(ablation, arm, "ms")
        if mean.n:
            error = mean.se if mean.n > 1 else 0.0
            axes.barh(row, mean.mean, xerr=error, color=_color(ablation, arm), height=0.6)
    axes.set_yticks(range(len(ablation.arms)), list(ablation.arms))
    axes.set_ylim(len(ablation.arms) - 0.4, -0.6)
    axes.set(xlabel="ms a step, mean over the run", title="speed by arm, +- standard error")
    return _image(figure, "milliseconds a step by arm")
