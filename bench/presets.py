"""Train presets one after another, for the same time on the same text, and print one table.

    python -m bench.presets --out out pr1855=shards_8192 pr1855+caseops=shards_caseops naive=shards_1024

Each word is a row: a preset, perhaps with a suffix after "+" that tells two rows of it apart, and its folder
of shards. A row takes one GPU, and as many rows run at the same time as there are GPUs. Rows that are done
are kept, so the same command continues a table that was stopped. What follows "--" is passed to every run.

Every quantized file is then scored in the way of the preset's pull request (`evaluate.method`), by
`bench.options` in a process of its own, so that a score that fails costs no run. `--documents N` scores the
first N documents only, because some ways take minutes; the gain on plain scoring is that of the same
documents in any case.

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
    def score_log(self) -> Path:
        """What the scoring in the way of the pull request printed."""
        return self.out / f"{self.name}.score.txt"

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
        found = sorted((self.out / "scores").glob(f"*_{self.name}.jsonl"))
        return found[-1] if found else None

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
            found["seconds_published"] = (score["seconds"], "s")
            found["tokens_published"] = (score["tokens"], "tokens")
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
    row: Row, gpu: int | None, command: list[str], log: Path, *, at_once: int
) -> subprocess.Popen[bytes]:
    """Start a process of a row with its output in `log`; gpu None: wherever its settings say."""
    row.out.mkdir(parents=True, exist_ok=True)
    environment = share_of_cores(at_once)
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=with_parent(environment))


def train_command(row: Row, seconds: float, rest: list[str]) -> list[str]:
    """Return the command of a row's run."""
    command = [sys.executable, "-m", "pgolf", "train", row.preset, "--data", str(row.data)]
    command += ["--seconds", f"{seconds:g}", "--out", str(row.out / row.name)]
    if not PRESETS[row.preset]().artifact.fit:
        command += ["--artifact.limit", str(NO_LIMIT)]
    return [*command, *rest]


def score_command(row: Row, documents: int) -> list[str]:
    """Return the command that scores a row's file plainly and in the way of its pull request."""
    assert row.run is not None
    command = [sys.executable, "-m", "bench.options", str(row.run / ARTIFACT), "--data", str(row.data)]
    command += ["--rows", "plain", PUBLISHED, "--documents", str(documents)]
    return [*command, "--file", row.name, "--out", str(row.out / "scores")]


@dataclass
class Running:
    """A process of a row."""

    row: Row
    gpu: int | None
    process: subprocess.Popen[bytes]
    log: Path


def run(rows: list[Row], seconds: float, rest: list[str], gpus: int, documents: int = 0) -> list[str]:
    """Run what is not done of the rows, one row on each GPU at a time; return the names of those that failed.

    Args:
        rest: further arguments of `pgolf train`.
        gpus: 0 runs one row at a time wherever its settings say.
        documents: score the first so many documents in the way of the pull request; 0 = all.
    """

    def scored(row: Row) -> bool:
        return row.method == "plain" or row.scores is not None

    waiting = [row for row in rows if row.run is None or not scored(row)]
    free: list[int | None] = list(range(gpus)) or [None]
    at_once, running, failed = len(free), list[Running](), list[str]()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {text}", flush=True)

    def next_process(row: Row, gpu: int | None) -> None:
        """Start the run of a row, or its scoring if the run is done."""
        if row.run is None:
            command, log = train_command(row, seconds, rest), row.log
        else:
            command, log = score_command(row, documents), row.score_log
        running.append(Running(row, gpu, start(row, gpu, command, log, at_once=at_once), log))

    try:
        while waiting or running:
            while waiting and free:
                row, gpu = waiting.pop(0), free.pop(0)
                say(f"{row.name} begins" + ("" if gpu is None else f" on GPU {gpu}"))
                next_process(row, gpu)
            time.sleep(0.2)
            for entry in [entry for entry in running if entry.process.poll() is not None]:
                running.remove(entry)
                row, status = entry.row, entry.process.returncode
                trains = entry.log == row.log
                if status not in (0, *([OVERRUN] if trains else [])) or row.run is None:
                    failed.append(row.name)
                    last = entry.log.read_text(errors="replace").strip().splitlines()[-1:]
                    what = "" if trains else ", scoring,"
                    say(f"{row.name}{what} failed with status {status}: {' '.join(last)}; see {entry.log}")
                elif trains and not scored(row):
                    say(f"{row.name} is trained")
                    next_process(row, entry.gpu)
                    continue
                else:
                    say(f"{row.name} is done")
                free.append(entry.gpu)
    finally:
        for entry in running:
            entry.process.terminate()
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
    parser.add_argument(
        "--documents",
        type=int,
        default=0,
        help="score so many documents in the published way; 0 (default): all",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and what they print")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(own)
    try:
        rows = read_rows(args.rows, args.out)
    except ValueError as e:
        parser.error(str(e))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    failed = run(rows, args.seconds, rest, gpus, args.documents)
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
