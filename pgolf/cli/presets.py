"""`pgolf presets [NAME]`: list the presets with what their pull requests report."""

from __future__ import annotations

import re
import textwrap

from pgolf.cli.overrides import preset_hint, preset_of
from pgolf.cli.table import align
from pgolf.errors import UserError
from pgolf.presets import PRESETS
from pgolf.published import PUBLISHED, Published

USAGE = """usage: pgolf presets [NAME]

lists the presets with the figures of their pull requests (eight H100, the challenge's text), or says all that
is known of one, which may also be named by the number of its pull request; `pgolf config NAME` prints its
settings, `pgolf config A --diff B` how two presets differ"""
COLUMNS = ("preset", "pull request", "bits/byte", "scored", "steps", "ms/step", "bytes", "what")
NOTE = """
The figures are those that the pull requests report, for eight H100 and the challenge's text; bits per byte of
other text, and of another way to score (`pgolf evaluate --mode`), are not comparable with them.
`pgolf presets NAME` says what a preset does not repeat. `pgolf train` without a name trains best_1gpu; tiny
is for a first try on a CPU."""


def main(argv: list[str]) -> int:
    """Print the table of presets, or the figures of one."""
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
    elif not argv:
        print(table())
    elif len(argv) == 1 and (argv[0] in PRESETS or preset_of(argv[0])):
        print(one(preset_of(argv[0]) or argv[0]))
    elif len(argv) == 1:
        raise UserError(f"no preset is called {argv[0]!r}; {preset_hint(argv[0])}")
    else:
        raise UserError(f"expected one name of a preset, got {' '.join(argv)!r}; see pgolf presets --help")
    return 0


def table() -> str:
    """Return one row per preset."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for name in PRESETS:
        what = re.sub(r"^PR #\d+'s (settings|training)[:,] ", "", summary(name))
        rows.append((name, *figures(name), what))
    return "\n".join([*align(rows), NOTE])


def summary(name: str) -> str:
    """Return what a preset is, in one line."""
    return (PRESETS[name].__doc__ or "").splitlines()[0]


def figures(name: str) -> tuple[str, ...]:
    """Return the cells of a preset's row between its name and its summary."""
    found = PUBLISHED.get(name)
    if found is None:
        return ("",) * (len(COLUMNS) - 2)
    return (
        f"#{found.pull_request}" if found.pull_request else "baseline",
        f"{found.bpb:.5f}",
        "SLOT" if found.scored.startswith("SLOT") else PRESETS[name]().evaluate.method,
        f"{found.steps:,}",
        f"{found.ms:.1f}",
        f"{found.bytes:,}",
    )


def _left_out(found: Published) -> str:
    count = found.evaluation_parameters
    return f", {count} of them in its evaluation only" if count else ""


def one(name: str) -> str:
    """Return all that is known of a preset."""
    lines = [f"{name}: {summary(name)}"]
    found = PUBLISHED.get(name)
    if found is None:
        lines += [line.strip() for line in (PRESETS[name].__doc__ or "").strip().splitlines()[2:]]
    else:
        seeds = "1 seed" if found.seeds == 1 else f"mean of {found.seeds} seeds"
        lines += [
            f"published    {found.bpb:.5f} bits per byte ({seeds}, {found.scored})",
            f"             {found.steps:,} steps of {found.ms:.1f} ms, {found.bytes:,} bytes",
            f"parameters   {found.parameters:,}{_left_out(found)}",
            *textwrap.wrap(
                f"differs      {found.differs}", 100, subsequent_indent=" " * 13, break_on_hyphens=False
            ),
        ]
        if found.as_logged:
            lines.append(f"as logged    pgolf train {name} {found.as_logged}")
        if found.pull_request:
            lines.append(f"source       {found.url}")
    other = "" if name == "pr1855" else f"; pgolf config {name} --diff pr1855"
    lines.append(f"settings     pgolf config {name}{other}")
    return "\n".join(lines)
