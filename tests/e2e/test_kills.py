"""The short form of `python -m bench.kills`: a few random kills of builds and runs, different every time."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_random_kills_lose_nothing(tmp_path):
    out, first = tmp_path / "kills.jsonl", time.time_ns() % 1_000_000
    words = [sys.executable, "-m", "bench.kills", "--kills", "3", "--seconds", "20"]
    done = subprocess.run(
        [*words, "--first", str(first), "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},  # it draws, see `no_plots`
    )
    assert done.returncode == 0, f"--first {first}: {done.stdout}\n{done.stderr[-3000:]}"
    totals = json.loads(out.read_text().splitlines()[-1])
    assert totals["trials"] >= 1 and totals["failed"] == 0
    assert totals["slowest_end_s"] <= totals["bound_s"]
