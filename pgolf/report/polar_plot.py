"""Plot of scalar maps of polar tables. Needs matplotlib (`pip install 'pgolf[plot]'`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pgolf.errors import UserError
from pgolf.files import atomic_file
from pgolf.optim.polar import Coefficients, quality, scalar_map
from pgolf.peers import find_peer

POINTS = 2_000  # a composition of quintics oscillates fast near 1
DECADES_BELOW = 1.5  # how far below `lower` the axis starts, so that the loss of small values is seen
COLUMNS = 3


def plot_scalar_maps(tables: Mapping[str, Sequence[Coefficients]], out: Path, *, lower: float) -> bool:
    """Draw what each table makes of a singular value into `out`: one panel per table, with a log axis.

    Args:
        tables: at least one, by the name for its panel.
        out: file to write (atomically); the suffix is the format, as in .png, .svg or .pdf.
        lower: end of the interval of interest, in (0, 1); marked, and the titles give the outputs over it.

    Returns:
        False when matplotlib cannot be used (nothing is written).

    Raises:
        UserError: matplotlib does not know the suffix.
    """
    if not find_peer("matplotlib", "matplotlib.pyplot").usable:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    start = lower / 10**DECADES_BELOW
    grid = [start ** (1 - i / (POINTS - 1)) for i in range(POINTS)]
    rows = -(-len(tables) // COLUMNS)
    size = (4 * COLUMNS, 2.6 * rows + 0.8)
    figure, panels = plt.subplots(
        rows, COLUMNS, figsize=size, dpi=110, sharex=True, sharey=True, squeeze=False
    )
    try:
        for axes in panels.flat[len(tables) :]:
            axes.set_visible(False)
        for axes, (name, table) in zip(panels.flat, tables.items(), strict=False):
            found = quality(table, lower)
            axes.axhline(1.0, color="#999999", linewidth=0.8)
            axes.axvline(lower, color="#c0504d", linewidth=0.9, linestyle="--")
            axes.plot(grid, [scalar_map(table, s) for s in grid], color="#1f5a99", linewidth=0.9)
            axes.set_title(f"{name} x {len(table)}: {found.low:.3f} to {found.high:.3f}", fontsize=9)
            axes.grid(alpha=0.3)
        for axes in panels.flat[max(0, len(tables) - COLUMNS) : len(tables)]:
            axes.tick_params(labelbottom=True)  # the lowest of its column
        panels[0, 0].set_xscale("log")
        panels[0, 0].set_xlim(start, 1.0)
        figure.suptitle("polar iteration in exact arithmetic", fontsize=11)
        figure.supxlabel(f"singular value after normalization (dashed: {lower:g})", fontsize=9)
        figure.supylabel("after the last step", fontsize=9)
        figure.tight_layout()
        form, known = out.suffix.removeprefix(".") or "png", figure.canvas.get_supported_filetypes()
        if form not in known:
            raise UserError(f"matplotlib writes no .{form} files; use one of {', '.join(sorted(known))}")
        with atomic_file(out) as file:
            figure.savefig(file, format=form)
    finally:
        plt.close(figure)
    return True
