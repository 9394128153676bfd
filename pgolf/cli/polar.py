"""`pgolf polar [--table NAME --steps N --lower L ...]`: compare coefficients of the polar iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from pgolf.errors import RunError, UserError

SOLVED = "solved"
MOST_STEPS = 100
"""Largest number of iterations that can be asked for; all tables converge in fewer than ten."""


@dataclass(frozen=True)
class Polar:
    """Solve a coefficient table for an interval of singular values, and compare it with published tables."""

    table: str = SOLVED
    """Table to print in full: "solved" for the interval [lower, 1], or a name such as polar_express_golf."""
    steps: int = 5
    """Number of iterations, 1 to 100, as in optim.muon.ns-steps."""
    lower: float = 3e-3
    """Smallest singular value, after normalization, that should be mapped close to 1, in (0, 1). The table is
    solved for [lower, 1], and all tables are compared on that interval."""
    cushion: float = 0.02407327424182761
    """Smallest ratio of the ends of an interval for which one iteration is solved, in [0, 1). A larger value
    makes the iterations less sensitive to rounding. The default is that of the Polar Express paper."""
    safety: float = 1.0
    """Largest singular value, >= 1, that the solved table tolerates; PR #1855 uses 1.02."""
    plot: Path | None = None
    """Plot the maps of singular values of all tables to this file (.png, .svg, .pdf)."""


def coefficient_lines(table: Sequence[tuple[float, float, float]]) -> list[str]:
    """Return a table as lines of a Python literal, with all digits."""
    return ["[", *(f"    ({a!r}, {b!r}, {c!r})," for a, b, c in table), "]"]


def comparison_lines(tables: Mapping[str, Sequence[tuple[float, float, float]]], lower: float) -> list[str]:
    """Return a header and one line per table: slope at 0, and statistics of its map of [lower, 1]."""
    from pgolf.optim.polar import quality, slope

    columns = ("steps", "slope at 0", "min", "max", "RMS dev", "mean", "CV")
    lines = [f"{'table':<30}" + "".join(f"{c:>11}" for c in columns)]
    for name, table in tables.items():
        q = quality(table, lower)
        numbers = [f"{len(table)}", f"{slope(table):.1f}"]
        numbers += [f"{v:.4f}" for v in (q.low, q.high, q.rms, q.mean, q.variation)]
        lines.append(f"{name:<30}" + "".join(f"{n:>11}" for n in numbers))
    return lines


def main(argv: list[str]) -> int:
    """Print the chosen table and the comparison; write the plot."""
    args = tyro.cli(Polar, prog="pgolf polar", args=argv)
    from pgolf.optim.polar import NAMES, coefficients, named_tables, polar_express

    if args.steps > MOST_STEPS:
        raise UserError(f"--steps must be at most {MOST_STEPS}, got {args.steps}")
    if args.table not in (SOLVED, *NAMES):
        raise UserError(f"--table must be {SOLVED} or one of {NAMES}, got {args.table!r}")
    solved = polar_express(args.lower, args.steps, cushion=args.cushion, safety=args.safety)
    chosen = solved if args.table == SOLVED else coefficients(args.table, args.steps)
    detail = f" for [{args.lower:g}, 1], cushion {args.cushion:.4g}, safety {args.safety:g}"
    print(f"{args.table}, {len(chosen)} steps{detail if args.table == SOLVED else ''}")
    print("\n".join(coefficient_lines(chosen)))
    tables = {SOLVED: solved, **named_tables(args.steps)}
    print(
        f"\nvalues to which singular values, log-uniform in [{args.lower:g}, 1], are mapped, without "
        "rounding\nRMS dev: deviation from 1, lower is better; CV: standard deviation / mean"
    )
    print("\n".join(comparison_lines(tables, args.lower)))
    if args.plot is not None:
        from pgolf.report.polar_plot import plot_scalar_maps

        if not plot_scalar_maps(tables, args.plot, lower=args.lower):
            raise RunError("--plot needs matplotlib; pip install 'pgolf[plot]'")
        print(f"\n{args.plot}")
    return 0
