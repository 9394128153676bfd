"""Check that memory and open files do not grow over many steps with checkpoints: `python -m bench.endurance`.

The program trains a very small model for 20,000 steps on the CPU with a checkpoint every half second, in this
process, and samples resident memory, open files and threads. It fails if, between the first tenth of the run
and its end, the memory grew by more than 20 MB, or the number of open files or threads grew at all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

from bench.common import versions
from pgolf.cli.main import main as pgolf
from pgolf.data.text import sample_paths
from pgolf.env import commit_name

MODEL = (
    "width=16 layers=3 heads=1 kv-heads=1 rope-dims=4 xsa-layers=3 parallel-from=2 "
    "recurrence-start=1 recurrence-end=1"
)
GROWTH_MB = 20.0


def sample() -> dict[str, float]:
    """Return resident MB, open files and threads of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "rss_mb": int(status["VmRSS"].split()[0]) / 1024,
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": int(status["Threads"]),
    }


def main(argv: list[str] | None = None) -> int:
    """Run, sample and print one JSON line; return 0 if nothing grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="steps (default 20,000)")
    parser.add_argument("--out", type=Path, default=None, help="append the JSON line to this file")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="pgolf-endurance-") as name:
        base = Path(name)
        train, val = (str(path) for path in sample_paths())
        model, shards = str(base / "t.model"), str(base / "shards")
        pgolf(["data", "tokenizer", "--inputs", val, "--vocab-size", "512", "--out", model])
        pgolf(["data", "shards", "--train", train, "--val", val, "--tokenizer", model, "--out", shards])
        words = ["train", "tiny", "--data", shards, "--out", str(base / "runs"), "--train.device=cpu"]
        words += ["--model.vocab-size=512", "--model.max-context=32"]
        words += [f"--model.{setting}" for setting in MODEL.split()]
        words += ["--data.batch-tokens=64", "--data.micro-tokens=64", "--quant.calibration-batches=2"]
        words += ["--seconds=0", f"--steps={args.steps}", "--train.checkpoint-every=0.5"]
        samples, checkpoints, done = list[dict[str, float]](), set[str](), threading.Event()

        def watch() -> None:
            while not done.wait(0.25):
                folders = (base / "runs").glob("*/checkpoints/*") if (base / "runs").is_dir() else ()
                checkpoints.update(path.name for path in folders)
                if checkpoints:
                    samples.append(sample())

        thread = threading.Thread(target=watch)
        thread.start()
        began = time.monotonic()
        code = pgolf(words)
        done.set()
        thread.join()
    early, late = samples[len(samples) // 10], samples[-len(samples) // 10]
    grown = {key: round(late[key] - early[key], 2) for key in early}
    ok = code == 0 and grown["rss_mb"] <= GROWTH_MB and grown["files"] <= 0 and grown["threads"] <= 0
    row = {
        "bench": "endurance",
        "steps": args.steps,
        "checkpoints_seen": len(checkpoints),
        "seconds": round(time.monotonic() - began),
        "early": early,
        "late": late,
        "grown": grown,
        "highest_rss_mb": max(s["rss_mb"] for s in samples),
        "ok": ok,
        "commit": commit_name(),
        "versions": versions(),
    }
    print(json.dumps(row), file=sys.stderr)
    if args.out is not None:
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
