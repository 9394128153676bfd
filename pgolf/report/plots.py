"""Plots of a run, as PNG files. Needs matplotlib (`pip install 'pgolf[plot]'`)."""

from __future__ import annotations

import json
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


def plot_loss(metrics: Path, out: Path) -> bool:
    """Draw the training loss by second, with the loop switch marked, into `out`.

    Returns:
        False when matplotlib cannot be used (nothing is written).
    """
    if not find_peer("matplotlib", "matplotlib.pyplot").usable:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r for r in read_metrics(metrics) if "loss" in r]
    seconds, losses = [r["elapsed"] for r in rows], [r["loss"] for r in rows]
    smooth, mean = [], losses[0] if losses else 0.0
    for loss in losses:
        mean += 0.1 * (loss - mean)
        smooth.append(mean)
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot(seconds, losses, color="#b8cbe0", linewidth=0.8, label="step")
    axes.plot(seconds, smooth, color="#1f5a99", linewidth=1.6, label="moving average (10 steps)")
    switch = next((r["elapsed"] for r in rows if r.get("loop")), None)
    if switch is not None:
        axes.axvline(switch, color="#c0504d", linewidth=1.0, linestyle="--", label="depth recurrence on")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(f"training loss, {len(rows)} steps")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out)
    plt.close(figure)
    return True
