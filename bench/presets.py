"""Train presets one after another, for the same time on the same text, and print one table.

    python -m bench.presets --out out pr1855=shards_8192 pr1855+caseops=shards_caseops naive=shards_1024
    python -m bench.presets --out out pr1855=shards "pr1855+half=shards data.batch_tokens=98304"

Each word is a row: a preset, perhaps with a suffix after "+" that tells two rows of it apart, its folder of
shards, and perhaps settings of its own. A row takes one GPU, and as many rows train at the same time as there
are GPUs. Rows that are done are kept, so the same command continues a table that was stopped. What follows
"--" is passed to every run.

When all rows are trained, every quantized file is scored in the way of the preset's pull request
(`evaluate.method`), by `bench.options` in a process of its own, so that a score that fails costs no run.
`--documents N` scores the first N documents only, because some ways take minutes; the gain on plain scoring
is that of the same documents in any case. Several scores can share a GPU, because most ways wait for the host
(`--at-once N`); their seconds are then longer than those of one alone, and the table leaves them out.

A preset that does not fit its scales to the limit of the challenge may exceed it, as some pull requests did;
the table shows its bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.common import RESULTS, Recorder, Sample
from bench.options import PUBLISHED
from bench.run import figures
from pgolf.cli.train import OVERRUN
from pgolf.config import Method
from pgolf.env import share_of_cores, with_parent
from pgolf.presets import PRESETS
from pgolf.report.summary import SUMMARY, Summary
from pgolf.train.weights import ARTIFACT

COLUMNS = {
    "ms_loop_off": ("ms a step, loop off", ".1f"),
    "ms_loop_on": ("loop on", ".1f"),
    "steps": ("steps", ",.0f"),
    "bpb_raw": ("bpb raw", ".4f"),
    "bpb_ema": ("averaged", ".4f"),
    "bpb_quantized": ("quantized", ".4f"),
    "bpb_published": ("in the way of the pull request", ".4f"),
    "gain_published": ("gain on plain, same documents", ".4f"),
    "seconds_published": ("seconds of that", ",.0f"),
    "bytes": ("bytes", ",.0f"),
}
"""Metric -> heading and format of a column of the table."""


SCORES, SHARED = "scores", "scores-shared"
"""Folders of scores that had a GPU to themselves, and of those that shared one."""
NO_LIMIT = 100_000_000
"""Bytes that no artifact of these presets reaches."""


@dataclass(frozen=True)
class Row:
    """One run of the table."""

    name: str
    data: Path
    out: Path
    settings: tuple[str, ...] = ()
    """KEY=VALUE, for its run."""

    @property
    def preset(self) -> str:
        """The preset's name."""
        return self.name.partition("+")[0]

    @property
    def method(self) -> Method:
        """The preset's way to score."""
        return PRESETS[self.preset]().evaluate.method

    @property
    def run(self) -> Path | None:
        """The folder of the newest finished run; None if there is none."""
        found = sorted((self.out / self.name).glob(f"*/{SUMMARY}"), key=lambda path: path.stat().st_mtime)
        return found[-1].parent if found else None

    @property
    def scores(self) -> Path | None:
        """The result lines of the way of the pull request; None if it was not scored."""
        for folder in (SCORES, SHARED):
            if found := sorted((self.out / folder).glob(f"*_{self.name}.jsonl")):
                return found[-1]
        return None

    def summary(self) -> Summary | None:
        """Return the summary of the newest finished run; None if there is none."""
        return Summary.load(self.run / SUMMARY) if self.run else None

    def figures(self) -> dict[str, tuple[float, str]]:
        """Return metric -> (value, unit) of the row; empty if its run is not done."""
        summary = self.summary()
        if summary is None:
            return {}
        found = figures(summary)
        if self.method == "plain" and "quantized" in summary.scores:
            found["bpb_published"] = (summary.scores["quantized"].bpb, "bits/byte")
        elif self.scores is not None:
            lines = [json.loads(line) for line in self.scores.read_text().splitlines()]
            score = {line["metric"]: line["value"] for line in lines if line["case"].startswith(PUBLISHED)}
            found["bpb_published"] = (score["bpb"], "bits/byte")
            found["gain_published"] = (-score["difference"], "bits/byte")
            if self.scores.parent.name == SCORES:
                found["seconds_published"] = (score["seconds"], "s")
            found["tokens_published"] = (score["tokens"], "tokens")
        return found


def read_rows(words: list[str], out: Path) -> list[Row]:
    """Return the rows that `PRESET[+SUFFIX]=FOLDER [KEY=VALUE ...]` name.

    Raises:
        ValueError: another form, an unknown preset, a folder that is not there, a name given twice.
    """
    rows = list[Row]()
    for word in words:
        first, *settings = word.split()
        name, equals, data = first.partition("=")
        row = Row(name, Path(data), out, tuple(settings))
        if not equals or row.preset not in PRESETS or not all("=" in setting for setting in settings):
            raise ValueError(
                "expected PRESET[+SUFFIX]=FOLDER [KEY=VALUE ...] with a preset of `pgolf presets`, "
                f"got {word!r}"
            )
        if not row.data.is_dir():
            raise ValueError(f"{word}: no folder {data}; `pgolf data shards` makes it")
        if name in [other.name for other in rows]:
            raise ValueError(f"{name} is given twice; put a suffix to one of them: {name}+second")
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Job:
    """A process of a row."""

    row: Row
    what: str
    command: list[str]
    log: Path

    def start(self, gpu: int | None, at_once: int) -> subprocess.Popen[bytes]:
        """Start it with its output in `log`; gpu None: wherever its settings say."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = share_of_cores(at_once)
        if gpu is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
        with self.log.open("wb") as file:
            return subprocess.Popen(self.command, stdout=file, stderr=file, env=with_parent(environment))


def train_job(row: Row, seconds: float, rest: list[str]) -> Job:
    """Return the run of a row."""
    command = [sys.executable, "-m", "pgolf", "train", row.preset, "--data", str(row.data)]
    command += ["--seconds", f"{seconds:g}", "--out", str(row.out / row.name)]
    if not PRESETS[row.preset]().artifact.fit:
        command += ["--artifact.limit", str(NO_LIMIT)]
    own = [part for setting in row.settings for part in ("--" + setting).split("=", 1)]
    return Job(row, "training", [*command, *rest, *own], row.out / f"{row.name}.txt")


def score_job(row: Row, documents: int, folder: str) -> Job:
    """Return what scores a row's file plainly and in the way of its pull request."""
    assert row.run is not None
    command = [sys.executable, "-m", "bench.options", str(row.run / ARTIFACT), "--data", str(row.data)]
    command += ["--rows", "plain", PUBLISHED, "--documents", str(documents)]
    command += ["--file", row.name, "--out", str(row.out / folder)]
    return Job(row, "scoring", command, row.out / f"{row.name}.score.txt")


def run(jobs: list[Job], places: list[int | None]) -> list[str]:
    """Run jobs, each in the first place that is free; return the names of the rows that failed.

    Args:
        places: GPUs, as often as they take a job at the same time; None: no GPU is chosen.
    """
    waiting, free, failed = list(jobs), list(places), list[str]()
    running = list[tuple[Job, int | None, subprocess.Popen[bytes]]]()
    began = time.monotonic()

    def say(job: Job, text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {job.row.name}: {job.what} {text}", flush=True)

    try:
        while waiting or running:
            while waiting and free:
                job, gpu = waiting.pop(0), free.pop(0)
                say(job, "begins" + ("" if gpu is None else f" on GPU {gpu}"))
                running.append((job, gpu, job.start(gpu, len(places))))
            time.sleep(0.2)
            for entry in [entry for entry in running if entry[2].poll() is not None]:
                running.remove(entry)
                job, gpu, process = entry
                free.append(gpu)
                # A run that took longer than its clock has made its file all the same.
                if process.returncode in (0, OVERRUN) and job.row.run is not None:
                    say(job, "is done")
                    continue
                failed.append(job.row.name)
                last = " ".join(job.log.read_text(errors="replace").strip().splitlines()[-1:])
                say(job, f"failed with status {process.returncode}: {last}; see {job.log}")
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
    parser.add_argument("rows", nargs="+", metavar="PRESET[+SUFFIX]=FOLDER [KEY=VALUE ...]")
    parser.add_argument("--seconds", type=float, default=120.0, help="clock of every run (default 120)")
    parser.add_argument(
        "--documents",
        type=int,
        default=0,
        help="score so many documents in the published way; 0 (default): all",
    )
    parser.add_argument("--at-once", type=int, default=1, help="scores that share a GPU (default 1)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and what they print")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(own)
    try:
        rows = read_rows(args.rows, args.out)
    except ValueError as e:
        parser.error(str(e))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    places: list[int | None] = list(range(gpus)) or [None]
    failed = run([train_job(row, args.seconds, rest) for row in rows if row.run is None], places)
    unscored = [row for row in rows if row.run is not None and row.method != "plain" and row.scores is None]
    folder = SCORES if args.at_once == 1 else SHARED
    failed += run([score_job(row, args.documents, folder) for row in unscored], places * args.at_once)
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
