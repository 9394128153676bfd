"""Result lines of a finished run, from its summary: `python -m bench.run FOLDER --case record_600s_1gpu`.

Nothing is measured here: device, commit and versions are those of the run. `record` in the names of cases is
the former name of the preset `pr1855`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from bench.common import RESULTS, Recorder, Sample
from pgolf.report.summary import SUMMARY, Summary


def figures(summary: Summary) -> dict[str, tuple[float, str]]:
    """Return metric -> (value, unit) of a run's summary; what the run did not measure is left out."""
    train, ledger = summary.trained, summary.ledger
    scoring = [phase.seconds for name, phase in summary.phases.items() if name.startswith("score_")]
    found: dict[str, tuple[float | None, str]] = {
        "steps": (train.steps, "steps"),
        "tokens": (train.tokens, "tokens"),
        "ms_loop_off": (train.ms_loop_off, "ms"),
        "ms_loop_on": (train.ms_loop_on, "ms"),
        "tokens_per_s": (train.tokens_per_s, "1/s"),
        "ms_optimizer": (train.ms_optimizer, "ms"),
        "peak_mib": (summary.peak_mib, "MiB"),
        # A run that made no artifact has no ledger.
        "bytes": (ledger and ledger.total, "bytes"),
        "bytes_code": (ledger and ledger.code, "bytes"),
        "clip_scale": (ledger and ledger.clip_scale, "1"),
        "seconds_eval": (sum(scoring), "s"),
    }
    found |= {f"bpb_{name}": (score.bpb, "bits/byte") for name, score in summary.scores.items()}
    # The reserve was planned and not spent, and the seconds of each score are in seconds_eval.
    seconds = {k: v for k, v in summary.seconds().items() if k != "reserve" and not k.startswith("score_")}
    found |= {f"seconds_{name}": (value, "s") for name, value in seconds.items()}
    return {name: (value, unit) for name, (value, unit) in found.items() if value is not None}


def of_run(summary: Summary) -> dict[str, Any]:
    """Return where and with what the run was made, as result lines say it."""
    commit = summary.commit.removesuffix("-dirty")
    return {
        "device": summary.device,
        "commit": commit,
        "dirty": commit != summary.commit,
        "versions": summary.versions,
    }


def main() -> None:
    """Parse arguments, read the summary, write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="run folder with summary.json")
    parser.add_argument("--case", required=True, help="record_600s_1gpu, record_120s_1gpu, ...")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args()
    summary = Summary.load(args.folder / SUMMARY)
    recorder = Recorder(
        "run", torch.device("cpu"), args.out, file=f"run-{args.case}", measured=of_run(summary)
    )
    for metric, (value, unit) in figures(summary).items():
        recorder.add(args.case, f"pgolf {summary.attention}", metric, Sample(value, 0.0, 1), unit)
    recorder.write()


if __name__ == "__main__":
    main()
