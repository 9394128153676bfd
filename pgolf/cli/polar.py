"""`pgolf polar [--table NAME --steps N --lower L ...]`: coefficients of the polar iteration, compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from pgolf.errors import RunError, UserError

SOLVED = "solved"
MOST_STEPS = 100
"""Iterations of a table; all converge in fewer than ten."""


@dataclass(frozen=True)
class Polar:
    """Solve a table for an interval of singular values and compare it with the published ones."""

    table: str = SOLVED
    """The table to print in full: "solved" for [lower, 1], or a name such as polar_express_golf."""
    steps: int = 5
    """Iterations, as in optim.muon.ns-steps; at most 100."""
    lower: float = 3e-3
    """Smallest singular value to serve after normalization, in (0, 1); the quality is over [lower, 1]."""
    cushion: float = 0.02407327424182761
    """Smallest ratio of interval ends that one step of the solved table is made for; the paper's value."""
    safety: float = 1.0
    """Factor of tolerance against rounding in the solved table, >= 1; PR #1855 uses 1.02."""
    plot: Path | None = None
    """Write the scalar maps of all tables to this file (.png, .svg, .pdf)."""


def coefficient_lines(table: Sequence[tuple[float, float, float]]) -> list[str]:
    """Return a table as a Python literal, ready to paste, every digit kept."""
    return ["[", *(f"    ({a!r}, {b!r}, {c!r})," for a, b, c in table), "]"]


def comparison_lines(tables: Mapping[str, Sequence[tuple[float, float, float]]], lower: float) -> list[str]:
    """Return a header and one line a table: slope at 0, and what becomes of [lower, 1]."""
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
    print(f"\nsingular values, log-uniform in [{args.lower:g}, 1], exact arithmetic; CV: deviation over mean")
    print("\n".join(comparison_lines(tables, args.lower)))
    if args.plot is not None:
        from pgolf.report.polar_plot import plot_scalar_maps

        if not plot_scalar_maps(tables, args.plot, lower=args.lower):
            raise RunError("--plot needs matplotlib; pip install 'pgolf[plot]'")
        print(f"\n{args.plot}")
    return 0
