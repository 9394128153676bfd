"""Train presets one after another, for the same time on the same text, and print one table.

    python -m bench.presets --out out pr1855=shards_8192 pr1855+caseops=shards_caseops naive=shards_1024

Each word is a row: a preset, perhaps with a suffix after "+" that tells two rows of it apart, and its folder
of shards. A row takes one GPU, and as many rows run at the same time as there are GPUs. Rows that are done
are kept, so the same command continues a table that was stopped. What follows "--" is passed to every run.

Every quantized file is also scored in the way of the preset's pull request (`evaluate.method`).

A preset that does not fit its scales to the limit of the challenge may exceed it, as some pull requests did;
the table shows its bytes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.common import RESULTS, Recorder, Sample
from bench.run import figures
from pgolf.cli.train import OVERRUN
from pgolf.config import Method
from pgolf.env import share_of_cores, with_parent
from pgolf.presets import PRESETS
from pgolf.report.summary import SUMMARY, Summary

COLUMNS = {
    "ms_loop_off": ("ms a step, loop off", ".1f"),
    "ms_loop_on": ("loop on", ".1f"),
    "steps": ("steps", ",.0f"),
    "bpb_raw": ("bpb raw", ".4f"),
    "bpb_ema": ("averaged", ".4f"),
    "bpb_quantized": ("quantized", ".4f"),
    "bpb_published": ("in the way of the pull request", ".4f"),
    "seconds_published": ("seconds of that", ",.0f"),
    "bytes": ("bytes", ",.0f"),
}
"""Metric -> heading and format of a column of the table."""


NO_LIMIT = 100_000_000
"""Bytes that no artifact of these presets reaches."""


@dataclass(frozen=True)
class Row:
    """One run of the table."""

    name: str
    data: Path
    out: Path

    @property
    def preset(self) -> str:
        """The preset's name."""
        return self.name.partition("+")[0]

    @property
    def log(self) -> Path:
        """What the run printed."""
        return self.out / f"{self.name}.txt"

    @property
    def method(self) -> Method:
        """The preset's way to score."""
        return PRESETS[self.preset]().evaluate.method

    def summary(self) -> Summary | None:
        """Return the summary of the newest finished run; None if there is none."""
        found = sorted((self.out / self.name).glob(f"*/{SUMMARY}"), key=lambda path: path.stat().st_mtime)
        return Summary.load(found[-1]) if found else None

    def figures(self) -> dict[str, tuple[float, str]]:
        """Return metric -> (value, unit) of the row; empty if its run is not done."""
        summary = self.summary()
        if summary is None:
            return {}
        found = figures(summary)
        score = summary.scores.get("quantized" if self.method == "plain" else self.method)
        if score is not None:
            found["bpb_published"] = (score.bpb, "bits/byte")
            found["seconds_published"] = (score.seconds, "s")
        return found


def read_rows(words: list[str], out: Path) -> list[Row]:
    """Return the rows that `PRESET[+SUFFIX]=FOLDER` name.

    Raises:
        ValueError: another form, an unknown preset, a folder that is not there, a name given twice.
    """
    rows = []
    for word in words:
        name, equals, data = word.partition("=")
        row = Row(name, Path(data), out)
        if not equals or row.preset not in PRESETS:
            raise ValueError(
                f"expected PRESET[+SUFFIX]=FOLDER with a preset of `pgolf presets`, got {word!r}"
            )
        if not row.data.is_dir():
            raise ValueError(f"{word}: no folder {data}; `pgolf data shards` makes it")
        if name in [other.name for other in rows]:
            raise ValueError(f"{name} is given twice; put a suffix to one of them: {name}+second")
        rows.append(row)
    return rows


def start(
    row: Row, gpu: int | None, seconds: float, rest: list[str], *, at_once: int
) -> subprocess.Popen[bytes]:
    """Start the run of a row with its output in `row.log`; gpu None: wherever its settings say."""
    row.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pgolf", "train", row.preset, "--data", str(row.data)]
    command += ["--seconds", f"{seconds:g}", "--out", str(row.out / row.name), "--evaluate.published"]
    if not PRESETS[row.preset]().artifact.fit:
        command += ["--artifact.limit", str(NO_LIMIT)]
    command += rest
    environment = share_of_cores(at_once)
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    with row.log.open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=with_parent(environment))


def run(rows: list[Row], seconds: float, rest: list[str], gpus: int) -> list[str]:
    """Run the rows that are not done, one on each GPU at a time; return the names of those that failed.

    Args:
        rest: further arguments of `pgolf train`.
        gpus: 0 runs one row at a time wherever its settings say.
    """
    waiting = [row for row in rows if row.summary() is None]
    free: list[int | None] = list(range(gpus)) or [None]
    at_once, running, failed = len(free), list[tuple[Row, int | None, subprocess.Popen[bytes]]](), list[str]()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {text}", flush=True)

    try:
        while waiting or running:
            while waiting and free:
                row, gpu = waiting.pop(0), free.pop(0)
                say(f"{row.name} begins" + ("" if gpu is None else f" on GPU {gpu}"))
                running.append((row, gpu, start(row, gpu, seconds, rest, at_once=at_once)))
            time.sleep(0.2)
            for entry in [entry for entry in running if entry[2].poll() is not None]:
                running.remove(entry)
                row, gpu, process = entry
                free.append(gpu)
                if process.returncode in (0, OVERRUN) and row.summary() is not None:
                    say(f"{row.name} is done")
                else:
                    failed.append(row.name)
                    last = row.log.read_text(errors="replace").strip().splitlines()[-1:]
                    say(
                        f"{row.name} failed with status {process.returncode}: {' '.join(last)}; see {row.log}"
                    )
    finally:
        for _, _, process in running:
            process.terminate()
    return failed


def table(rows: list[Row]) -> str:
    """Return the finished rows as a Markdown table; a dash for what a run did not measure."""
    lines = ["| preset | " + " | ".join(heading for heading, _ in COLUMNS.values()) + " | its way to score |"]
    lines.append("|---" * (2 + len(COLUMNS)) + "|")
    for row in rows:
        found = row.figures()
        if found:
            cells = [format(found[m][0], form) if m in found else "-" for m, (_, form) in COLUMNS.items()]
            lines.append(f"| {row.name} | " + " | ".join([*cells, row.method]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the rows, write the result lines, print the table; return 1 if a row failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, rest = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+", metavar="PRESET[+SUFFIX]=FOLDER")
    parser.add_argument("--seconds", type=float, default=120.0, help="clock of every run (default 120)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and what they print")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(own)
    try:
        rows = read_rows(args.rows, args.out)
    except ValueError as e:
        parser.error(str(e))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    failed = run(rows, args.seconds, rest, gpus)
    name = f"{args.seconds:g}s_1gpu"
    device = torch.device("cuda" if gpus else "cpu")
    recorder = Recorder("run", device, args.results, file=f"run-presets_{name}")
    for row in rows:
        summary = row.summary()
        if summary is not None:
            for metric, (value, unit) in row.figures().items():
                recorder.add(
                    f"{row.name}_{name}", f"pgolf {summary.attention}", metric, Sample(value, 0.0, 1), unit
                )
    if recorder.lines:
        recorder.write()
    print(table(rows))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
