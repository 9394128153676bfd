"""report.html of one run, or of several drawn over each other: figures and tables on one page.

A finished run has it in its folder. `pgolf report RUN [RUN ...]` writes it of any run, also of one that is
under way or was killed. `pgolf.report.page` owns the frame and the style.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pgolf.files import atomic_file
from pgolf.peers import describe
from pgolf.report.page import COLORS, figure, folded, image, page, table, words
from pgolf.report.plots import first_shown, loss_ceiling, run_title, smoothed, unmarked, why_no_plots
from pgolf.report.watched import (
    Watched,
    by_run,
    curve,
    facts,
    numbers,
    read_watched,
    scores,
    sessions,
    settings,
)

NAME = "report.html"
MAX_POINTS = 400
"""Points of a curve in the page: one of 5,000 steps is thinned to this."""
WIDTH, HEIGHT = 4.8, 3.0
"""Of a figure, inches: at the width of a phone its letters can still be read."""
GAP, LINE = 0.35, 0.17
"""Room above the names of several runs below a figure, and height of a name, inches."""
LEAST_SHARE = 0.001
"""Of the bytes, that a section has in the figure; all are in the table."""


def write_run_report(folders: Sequence[Path], out: Path) -> None:
    """Write the page on the runs in `folders` to `out`, atomically.

    Raises:
        ValueError: no folder given. FileNotFoundError: a folder holds no run, or `out` has no folder.
    """
    text = run_page(read_watched(folders))
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent} for the report; make it first")
    with atomic_file(out) as file:
        file.write(text.encode(errors="backslashreplace"))


def report_note(folder: Path) -> str:
    """Write the page of the run in `folder` there; return the line that says so, or why there is none.

    Never raises: the run is done, and its report can be written again.
    """
    try:
        write_run_report([folder], folder / NAME)
    except Exception as e:
        return f"no report: {describe(e)}; write it with: pgolf report {folder}"
    return f"report: {folder / NAME}"


def run_page(runs: Sequence[Watched]) -> str:
    """Return the page on one or several runs as self-contained XHTML."""
    one = runs[0]
    title = run_title(one.name, one.bpb()) if len(runs) == 1 else f"{len(runs)} runs"
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    body = [f'<p class="warn">{words(note)}</p>' for note in notes]
    body += [table(facts(runs)), *_figures(runs)]
    if any(run.section("scores") for run in runs):
        body.append(table(scores(runs)))
    if len(runs) > 1:
        body.append(table(settings(runs, different=True)))
    if any(run.sessions for run in runs):
        body.append(table(sessions(runs)))
    sizes = [run.parts() | _total(run) for run in runs]
    seconds = [numbers(run.section("seconds")) for run in runs]
    for what, content in (
        ("Bytes by section", by_run("section", sizes, runs, ",.0f")),
        ("Seconds of every phase", by_run("phase", seconds, runs, ",.2f")),
        ("All settings", settings(runs, different=False)),
    ):
        if content.rows:
            body.append(folded(what, [table(content)]))
    return page(title, body)


def _total(run: Watched) -> dict[str, float]:
    ledger = numbers(run.section("bytes"))
    return {key: ledger[key] for key in ("total", "limit") if key in ledger}


def _figures(runs: Sequence[Watched]) -> list[str]:
    """Return the figures for which there is something to draw."""
    if why := why_no_plots():
        return [f"<p>No plots: {words(why)}, and write the report again.</p>"]
    drawn = [_loss(runs, "elapsed", "seconds of training")]
    if len(runs) > 1:
        drawn.append(_loss(runs, "step", "step"))
    drawn += [
        _lines(runs, "val_bpb", "validation during training", "bits per byte, lower is better", marker="o"),
        _lines(runs, "lr", "learning rate", "factor on the rates"),
        _lines(runs, "momentum", "momentum of Muon", "momentum"),
        _lines(runs, "grad_norm", "norm of the gradient", "norm", log=True),
        _speed(runs),
        _bars(runs, _large_parts(runs), "bytes by section", "bytes", "{:,.0f}"),
        _bars(runs, [run.phases() for run in runs], "seconds by phase", "seconds", "{:,.1f}"),
    ]
    return ['<div class="figures">', *(image for image in drawn if image), "</div>"]


def _axes(title: str, x: str, y: str, runs: Sequence[Watched], height: float = HEIGHT) -> tuple[Any, Any]:
    """Return a figure with room below its axes for the names of several runs."""
    drawn, axes = figure(WIDTH, height + (GAP + LINE * len(runs) if len(runs) > 1 else 0.0))
    axes.set(title=title, xlabel=x, ylabel=y)
    return drawn, axes


def _colored(runs: Sequence[Watched]) -> list[tuple[Watched, str]]:
    return [(run, COLORS[i % len(COLORS)]) for i, run in enumerate(runs)]


def _legend(axes: Any, runs: Sequence[Watched]) -> None:
    """Name the colours of several runs below the axes, where they hide nothing."""
    if len(runs) > 1:
        below = -0.6 / (axes.figure.get_figheight() - GAP - LINE * len(runs) - 0.8)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, below), markerscale=2)


def _thin(values: Sequence[float]) -> list[float]:
    return list(values[:: max(1, -(-len(values) // MAX_POINTS))])


def _loss(runs: Sequence[Watched], x: str, label: str) -> str:
    """Draw the moving average of the loss, of a single run the steps too, from where it flattens on."""
    drawn, axes = _axes("training loss", label, "nats per token, lower is better", runs)
    lows, tops, ends = [], [], []
    for run, color in _colored(runs):
        at, losses = run.curve(x, "loss")
        first = first_shown(losses)
        # From where the fast fall has ended, or the rest of the curve would be a flat line.
        smooth, at, shown = smoothed(losses, loss_ceiling(losses))[first:], at[first:], losses[first:]
        if not shown:
            continue
        if len(runs) == 1:
            axes.plot(_thin(at), _thin(shown), color=color, alpha=0.35, linewidth=0.7)
        axes.plot(_thin(at), _thin(smooth), color=color, linewidth=1.4, label=unmarked(run.name))
        switch = next((row.get(x) for row in run.rows if row.get("loop") is True), None)
        if isinstance(switch, (int, float)) and switch > at[0]:
            axes.axvline(switch, color=color, linewidth=0.9, linestyle="--")
        seen = shown if len(runs) == 1 else smooth
        lows.append(min(seen))
        tops.append(min(max(seen), loss_ceiling(shown)))
        ends.append(smooth[-1])
    if not lows:
        return ""
    # The one that fell furthest does not flatten the others; every end is in sight.
    low, high = min(lows), max(min(tops), *ends)
    margin = 0.05 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)
    if any(run.rows and run.rows[-1].get("loop") for run in runs):
        axes.set_title("training loss (dashed: depth recurrence on)")
    _legend(axes, runs)
    return image(drawn, f"training loss by {label}")


def _lines(
    runs: Sequence[Watched], key: str, title: str, label: str, *, log: bool = False, marker: str = ""
) -> str:
    """Draw a column of metrics.jsonl by seconds of training."""
    curves = [(run, color, run.curve("elapsed", key)) for run, color in _colored(runs)]
    curves = [(run, color, found) for run, color, found in curves if found[0]]
    if not curves:
        return ""
    drawn, axes = _axes(title, "seconds of training", label, runs)
    for run, color, (at, values) in curves:
        axes.plot(
            _thin(at),
            _thin(values),
            color=color,
            linewidth=1.2,
            marker=marker,
            markersize=3,
            label=unmarked(run.name),
        )
    if log and any(value > 0 for _, _, (_, values) in curves for value in values):
        axes.set_yscale("log")
    _legend(axes, runs)
    return image(drawn, f"{title} by seconds of training")


def _speed(runs: Sequence[Watched]) -> str:
    """Draw the milliseconds of every step; of a single run in two colours, by depth recurrence."""
    drawn, axes = _axes("speed", "step", "ms per step, lower is better", runs)
    top, named = 0.0, set()
    for run, color in _colored(runs):
        for mode in (False, True):
            at, ms = curve([row for row in run.rows if bool(row.get("loop")) is mode], "step", "ms")
            if not ms:
                continue
            middle = median(ms)
            top = max(top, 1.5 * middle)
            name, shade = "_" if run.name in named else unmarked(run.name), color
            if len(runs) == 1:
                name, shade = f"depth recurrence {'on' if mode else 'off'}: {middle:.1f} ms", COLORS[mode]
            named.add(run.name)
            axes.scatter(_thin(at), _thin(ms), s=4, color=shade, linewidths=0, label=name)
    if not top:
        return ""
    axes.set_ylim(0, top)
    if len(runs) == 1:
        axes.legend(frameon=False, fontsize=8, markerscale=2)
    _legend(axes, runs)
    return image(drawn, "milliseconds per step")


def _large_parts(runs: Sequence[Watched]) -> list[dict[str, float]]:
    parts = [run.parts() for run in runs]
    return [{k: v for k, v in p.items() if v >= LEAST_SHARE * sum(p.values())} for p in parts]


def _bars(
    runs: Sequence[Watched], found: Sequence[dict[str, float]], title: str, label: str, form: str
) -> str:
    """Draw values by name as horizontal bars, one per run, on a log axis, because they span decades."""
    names = list(dict.fromkeys(name for values in found for name in values))
    if not names:
        return ""
    drawn, axes = _axes(title, label, "", runs, 1.2 + (0.16 + 0.12 * len(runs)) * len(names))
    thick = 0.8 / len(runs)
    for i, ((run, color), values) in enumerate(zip(_colored(runs), found, strict=True)):
        shift = thick * (i - (len(runs) - 1) / 2)
        kept = [(row + shift, values[n]) for row, n in enumerate(names) if values.get(n, 0) > 0]
        bars = axes.barh(
            [y for y, _ in kept], [v for _, v in kept], height=thick, color=color, label=unmarked(run.name)
        )
        axes.bar_label(bars, [form.format(v) for _, v in kept], padding=2, fontsize=8 if thick > 0.3 else 6)
    axes.set(xscale="log", xlabel=f"{label}, log scale")
    axes.margins(x=0.25)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    _legend(axes, runs)
    return image(drawn, title)
