"""Plots of a run, as PNG files. Needs matplotlib (`pip install 'pgolf[plot]'`)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pgolf.peers import find_peer


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics.jsonl up to the first that is no JSON object (torn: a killed run)."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
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


def first_shown(losses: Sequence[float]) -> int:
    """Return the step at which a plot of the loss begins: the fast fall before it would flatten the rest.

    It is the first whose moving average is at most 1.5 ranges above the lowest one, the range being that of
    the moving average after the first tenth of the run; 0 for a run too short to have a rest.
    """
    if len(losses) < 30:
        return 0
    smooth = smoothed(losses, loss_ceiling(losses))
    rest = smooth[len(losses) // 10 :]
    top = min(rest) + 1.5 * (max(rest) - min(rest))
    wild = [i for i, loss in enumerate(smooth[: len(losses) // 10]) if loss > top]
    return wild[-1] + 1 if wild else 0


def run_title(name: str, bpb: Mapping[str, float]) -> str:
    """Return the run's name with the score that counts: test-time training, else quantized, averaged, raw."""
    best = next((key for key in ("ttt", "quantized", "ema", "raw") if key in bpb), None)
    return name if best is None else f"{name}: {bpb[best]:.4f} bpb ({best})"


def unmarked(text: str) -> str:
    """Return text as matplotlib shows it letter by letter: a dollar sign would begin a formula."""
    return "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")


def plot_loss(metrics: Path, out: Path, *, title: str = "") -> str:
    """Draw the training loss by second, with the step marked that switches depth recurrence on, into `out`.

    Args:
        title: first line above the plot; when empty, the name of the run's folder.
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
    steps, first = len(rows), first_shown([r["loss"] for r in rows])
    smooth = smoothed([r["loss"] for r in rows], loss_ceiling([r["loss"] for r in rows]))[first:]
    rows = rows[first:]
    seconds, losses = [r["elapsed"] for r in rows], [r["loss"] for r in rows]
    ceiling = loss_ceiling(losses)
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot(seconds, losses, color="#b8cbe0", linewidth=0.8, label="step")
    axes.plot(seconds, smooth, color="#1f5a99", linewidth=1.6, label="moving average (10 steps)")
    above = sum(loss > ceiling for loss in losses)
    if above:
        margin = 0.05 * (ceiling - min(losses))
        axes.set_ylim(min(losses) - margin, ceiling + margin)
    switch = next((r["elapsed"] for r in rows if r.get("loop")), None)
    if switch is not None:
        axes.axvline(switch, color="#c0504d", linewidth=1.0, linestyle="--", label="depth recurrence on")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("loss, nats per token")
    notes = [f"training loss, {steps} steps"]
    notes += [f"the first {first} are left out"] if first else []
    notes += [f"{above} above the top"] if above else []
    axes.set_title(f"{unmarked(title or metrics.resolve().parent.name)}\n{', '.join(notes)}", fontsize=11)
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
