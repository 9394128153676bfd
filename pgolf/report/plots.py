"""Plots of a run, as PNG files. Needs matplotlib (`pip install 'pgolf[plot]'`)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from pgolf.peers import find_peer


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics.jsonl; a torn last line (killed run) is dropped."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def why_no_plots() -> str:
    """Return the sentence that says why nothing can be drawn, "" if matplotlib is there and works."""
    peer = find_peer("matplotlib", "matplotlib.figure")  # the part that loads the compiled ones
    return "" if peer.usable else f"matplotlib is {peer.problem}; pip install matplotlib"


def loss_ceiling(losses: Sequence[float]) -> float:
    """Return the top of a plot of losses: a few wild steps do not flatten the rest.

    The largest tenth of the steps (one at least) may be cut off, where they are above the others' maximum by
    more than twice the others' range.
    """
    kept = sorted(losses)[: -max(1, math.ceil(0.1 * len(losses)))]
    if not kept:
        return max(losses, default=1.0)
    return min(max(losses), kept[-1] + 2 * max(kept[-1] - kept[0], 0.1))


def smoothed(losses: Sequence[float], ceiling: float) -> list[float]:
    """Return the moving average over about 10 steps; what is above the ceiling counts as the ceiling."""
    mean, smooth = min(losses[0], ceiling) if losses else 0.0, []
    for loss in losses:
        mean += 0.1 * (min(loss, ceiling) - mean)
        smooth.append(mean)
    return smooth


def plot_loss(metrics: Path, out: Path) -> str:
    """Draw the training loss by second, with the loop switch marked, into `out`.

    Returns:
        Why there is no plot (then nothing is written), "" if there is.
    """
    if why := why_no_plots():
        return why
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    every = read_metrics(metrics)
    rows = [r for r in every if r.get("loss") is not None]
    curve = [(r["elapsed"], r["val_bpb"]) for r in every if r.get("val_bpb") is not None]
    seconds, losses = [r["elapsed"] for r in rows], [r["loss"] for r in rows]
    ceiling = loss_ceiling(losses)
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot(seconds, losses, color="#b8cbe0", linewidth=0.8, label="step")
    average = "moving average (10 steps)"
    axes.plot(seconds, smoothed(losses, ceiling), color="#1f5a99", linewidth=1.6, label=average)
    above = sum(loss > ceiling for loss in losses)
    if above:
        margin = 0.05 * (ceiling - min(losses))
        axes.set_ylim(min(losses) - margin, ceiling + margin)
    switch = next((r["elapsed"] for r in rows if r.get("loop")), None)
    if switch is not None:
        axes.axvline(switch, color="#c0504d", linewidth=1.0, linestyle="--", label="depth recurrence on")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(f"training loss, {len(rows)} steps" + (f", {above} above the top" if above else ""))
    axes.grid(alpha=0.3)
    if curve:
        right = axes.twinx()
        right.plot(*zip(*curve, strict=True), color="#3c8d53", marker="o", markersize=3, linewidth=1.2)
        right.set_ylabel("validation, bits per byte (green)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(out)
    plt.close(figure)
    return ""
