"""`pgolf submit RUN [RUN ...] --out FOLDER`: the submission folder of finished runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from pgolf.report.submission import Entry


@dataclass(frozen=True, kw_only=True)
class Submit(Entry):
    """Write README, submission.json, logs, artifacts and counted code of finished runs, one run per seed.

    All figures come from the summaries of the runs. The folder appears when it is complete, or not at all.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders of one configuration with different seeds."""
    out: Path
    """The folder to make."""
    data: Path | None = None
    """Folder of the runs' shards, for the tokenizer and the manifest. Without it, the folder that the runs
    name is taken; if it is gone, the tokenizer comes from a run's folder."""
    overwrite: bool = False
    """Replace an older submission in that folder."""


def main(argv: list[str]) -> int:
    """Write the submission and say what it holds."""
    args = tyro.cli(Submit, prog="pgolf submit", args=argv)
    from pgolf.report.submit import write_submission

    runs = write_submission(args.runs, args.out, args, data=args.data, overwrite=args.overwrite)
    data = json.loads((args.out / "submission.json").read_text())
    seeds = "one seed" if len(runs) == 1 else f"{len(runs)} seeds, sd {data['val_bpb_std']:.5f}"
    print(f"{args.out}: {data['val_bpb']:.5f} bpb ({data['headline_score']}, {seeds})")
    if data["val_text"].startswith("not "):
        print(f"validation text: {data['val_text']}")
    print(f"{data['bytes_total']:,} bytes of {runs[0].config.artifact.limit:,}")
    for key in ("author", "github_id", "date"):
        if key not in data:
            print(f"missing: {key}; pass --{key.replace('_', '-')}")
    return 0
