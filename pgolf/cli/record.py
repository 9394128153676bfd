"""`pgolf record RUN [RUN ...] --out FOLDER`: the submission folder of finished runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Record:
    """Write README, submission.json, logs, artifacts and counted code of finished runs, one a seed.

    All figures come from the runs' own summaries. The folder appears complete or not at all.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders of one configuration with different seeds."""
    out: Path
    """The folder to make."""
    author: str = ""
    """Who submits; left out when empty."""
    github_id: str = ""
    """The author's account; left out when empty."""
    name: str = ""
    """Title of the record; when empty, the configuration's name."""
    blurb: str = ""
    """One sentence; when empty, the sizes of model and machine."""
    date: str = ""
    """yyyy-mm-dd; when empty, the day of the last run."""
    data: Path | None = None
    """Folder of the runs' shards, for the tokenizer; when absent, where the runs found them."""
    prepare_seconds: float | None = None
    """Seconds that making tokenizer and shards took before the runs."""
    overwrite: bool = False
    """Replace an older record in that folder."""


def main(argv: list[str]) -> int:
    """Write the record and say what it holds."""
    args = tyro.cli(Record, prog="pgolf record", args=argv)
    from pgolf.report.record import write_record
    from pgolf.report.submission import Entry, submission

    entry = Entry(
        author=args.author,
        github_id=args.github_id,
        name=args.name,
        blurb=args.blurb,
        date=args.date,
        prepare_seconds=args.prepare_seconds,
    )
    runs = write_record(args.runs, args.out, entry, data=args.data, overwrite=args.overwrite)
    data = submission(runs, entry)
    seeds = "one seed" if len(runs) == 1 else f"{len(runs)} seeds, sd {data['val_bpb_std']:.5f}"
    print(f"{args.out}: {data['val_bpb']:.5f} bpb ({data['headline_score']}, {seeds})")
    print(f"{data['bytes_total']:,} bytes of {runs[0].config.artifact.limit:,}")
    for key in ("author", "github_id", "date"):
        if key not in data:
            print(f"not said: {key}; pass --{key.replace('_', '-')}")
    return 0
