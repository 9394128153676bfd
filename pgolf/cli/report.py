"""`pgolf report RUN [RUN ...] [--out FILE]`: the page of a run, or of several drawn over each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from pgolf.errors import UserError


@dataclass(frozen=True)
class Report:
    """Write one HTML page: loss, validation, schedules, speed, memory, scores, bytes, seconds and settings.

    The page needs no network and no other file. A run that is under way, stopped or killed can be reported
    too; its metrics.jsonl alone is enough. Figures need matplotlib; without it the page has the tables.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders; several are drawn over each other."""
    out: Path | None = None
    """The file to write; without it, report.html in the folder of a single run."""


def main(argv: list[str]) -> int:
    """Write the page and say where it is."""
    args = tyro.cli(Report, prog="pgolf report", args=argv)
    from pgolf.report.watched_page import NAME, write_run_report

    out = args.out
    if out is None:
        if len(args.runs) != 1:
            raise UserError(f"say where to write the report of {len(args.runs)} runs: --out report.html")
        out = args.runs[0] / NAME
    write_run_report(args.runs, out)
    print(f"report: {out}")
    return 0
