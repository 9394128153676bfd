"""`pgolf submit RUN [RUN ...] --out FOLDER`: the submission folder of finished runs.

`pgolf submit --check FOLDER [--against FOLDER]` checks a submission folder, anybody's.
"""

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
    `pgolf submit --check FOLDER [--against FOLDER]` checks a submission folder instead.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders of one configuration with different seeds."""
    out: Path
    """The submission folder to make."""
    data: Path | None = None
    """Folder of the runs' shards, for the tokenizer and the manifest. Without it, the folder that the runs
    name is taken; if it is gone, the tokenizer comes from a run's folder."""
    overwrite: bool = False
    """Replace an older submission in that folder."""
    although_illegal: bool = False
    """Write the folder even if the report of `pgolf legality` in a run's folder says that a condition fails,
    or the headline is SLOT, which learns from what it then scores. The folder then says so."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Check a submission folder of the challenge, made with any program, without running it."""

    check: Path
    """The folder, with submission.json, train_gpt.py and a log per seed."""
    against: Path | None = None
    """The submission folder of the record before, on which this one must improve."""


def run_check(argv: list[str]) -> int:
    """Print what was found about every rule; return 1 if one fails."""
    asked = [word for word in argv if word in ("-h", "--help")]  # not the folder that --check lacks then
    args = tyro.cli(Check, prog="pgolf submit", args=asked or argv)
    from pgolf.report.check import check_folder

    found = check_folder(args.check, args.against)
    width = max(len(finding.rule) for finding in found)
    for finding in found:
        print(f"{finding.verdict:<8}{finding.rule:<{width}}  {finding.text}")
    failed = sum(finding.verdict == "fails" for finding in found)
    print(f"\n{len(found)} rules: {failed} fail, {sum(f.verdict == 'unknown' for f in found)} unknown")
    return 1 if failed else 0


def main(argv: list[str]) -> int:
    """Write the submission and say what it holds."""
    if any(word.partition("=")[0] == "--check" for word in argv):
        return run_check(argv)
    args = tyro.cli(Submit, prog="pgolf submit", args=argv)
    from pgolf.report.submit import write_submission

    runs = write_submission(
        args.runs,
        args.out,
        args,
        data=args.data,
        overwrite=args.overwrite,
        although_illegal=args.although_illegal,
    )
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
