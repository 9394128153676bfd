"""Turn the summary of a finished run into result lines: `python -m bench.run FOLDER --case record_600s_1gpu`.

Nothing is measured here: every figure is read from the run's own summary.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from bench.common import RESULTS, Recorder, Sample


def figures(summary: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return metric -> (value, unit) of a run's summary; what the run did not measure is left out."""
    train, seconds, scores = summary["train"], summary["seconds"], summary["scores"]
    ledger = summary["bytes"] or {}  # none after a run that made no artifact
    found: dict[str, tuple[float | None, str]] = {
        "steps": (train["steps"], "steps"),
        "tokens": (train["tokens"], "tokens"),
        "ms_loop_off": (train["ms_loop_off"], "ms"),
        "ms_loop_on": (train["ms_loop_on"], "ms"),
        "tokens_per_s": (train["tokens_per_s"], "1/s"),
        "ms_optimizer": (train.get("ms_optimizer"), "ms"),
        "peak_mib": (summary["peak_mib"], "MiB"),
        "bytes": (ledger.get("total"), "bytes"),
        "bytes_code": (ledger.get("code"), "bytes"),
        "clip_scale": (ledger.get("clip_scale"), "1"),
        "seconds_eval": (sum(v for k, v in seconds.items() if k.startswith("score_")), "s"),
    }
    found |= {f"bpb_{name}": (score["bpb"], "bits/byte") for name, score in scores.items()}
    phases = (
        "start",
        "set_up",
        "warm_up",
        "rehearse",
        "train",
        "save",
        "calibrate",
        "quantize",
        "clock",
        "write",
        "read",
        "plot",
        "total",
    )
    found |= {f"seconds_{phase}": (seconds.get(phase), "s") for phase in phases}
    return {name: (value, unit) for name, (value, unit) in found.items() if value is not None}


def main() -> None:
    """Parse arguments, read the summary, write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="run folder with summary.json")
    parser.add_argument("--case", required=True, help="record_600s_1gpu, record_120s_1gpu, ...")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args()
    summary = json.loads((args.folder / "summary.json").read_text())
    found = "cuda" if torch.cuda.is_available() else "cpu"
    recorder = Recorder(f"run-{args.case}", torch.device(found), args.out)
    for metric, (value, unit) in figures(summary).items():
        recorder.add(args.case, f"pgolf {summary['attention']}", metric, Sample(value, 0.0, 1), unit)
    for line in recorder.lines:
        line["bench"] = "run"
    recorder.write()


if __name__ == "__main__":
    main()
