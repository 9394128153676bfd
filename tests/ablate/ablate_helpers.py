"""Plans and cells for the tests of ablations: the cells only write files."""

import json
import math
from pathlib import Path

from pgolf.ablate.plan import Cell, Plan, read_plan
from pgolf.ablate.run import run_plan
from pgolf.artifact.size import Ledger
from pgolf.cli.overrides import load_base
from pgolf.config import to_dict
from pgolf.evaluate.bpb import Score
from pgolf.report.summary import Summary, Training
from tests.e2e.conftest import SMALL

PLAN = {
    "name": "test",
    "base": "tiny",
    "data": "shards",
    "steps": 5,
    "overrides": {"data.micro_tokens": 512},
    "baseline": "base",
    "arms": {"base": {}, "jordan": {"optim.muon.coefficients": "jordan"}},
    "seeds": [1, 2, 3],
}


def make_plan(folder: Path, **changes: object) -> Plan:
    path = folder / "plan.json"
    path.write_text(json.dumps({**PLAN, "out": str(folder / "out"), **changes}))
    return read_plan(path, load_base)


def write_summary(run: Path, cell: Cell, **bpb: float) -> None:
    """Write the summary of a run with these scores."""
    summary = Summary(cell.arm, "0" * 16, "CPU", 1, "sdpa", 1000, ledger=Ledger((("all", 700),), 77, 16_000))
    summary.put("train", 0.06)
    rates = {"ms_loop_off": 10.0, "ms_loop_on": None, "tokens_per_s": 1000.0}
    summary.train = Training(steps=5, tokens=60, loop_step=None, last_loss=3.5, **rates)
    for name, value in bpb.items():
        summary.scores[name] = Score(nats=1.0, tokens=1, bytes=1, bpb=value, loss=1.0, seconds=0.1)
    summary.save(run / "summary.json")


class FakeCells:
    """Starts cells that end at once: `plans` says how; the others finish with a score by arm and seed."""

    def __init__(self, **fates: str) -> None:
        self.fates, self.started = fates, []

    def __call__(self, cell, gpu):
        self.started.append((cell.arm, cell.seed, gpu))
        fate = self.fates.get(f"{cell.arm}{cell.seed}", "finish")
        run = cell.folder / f"run{len(list(cell.folder.iterdir()))}"
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps(to_dict(cell.config)))
        if fate == "interrupt":
            raise KeyboardInterrupt
        if fate in ("finish", "nan"):
            bpb = 1.2 + 0.01 * cell.seed + {"base": 0.0}.get(cell.arm, -0.002 - 0.0001 * cell.seed)
            write_summary(run, cell, raw=bpb + 0.01, quantized=math.nan if fate == "nan" else bpb)
            return FakeProcess(0)
        (cell.folder / "output.txt").write_text(f"step 1\n{fate}\n")
        return FakeProcess(2)


class FakeProcess:
    def __init__(self, code):
        self.code, self.stopped = code, False

    def poll(self):
        return self.code

    def terminate(self):
        self.stopped = True

    def kill(self):
        raise AssertionError("it ended when asked")

    def wait(self, timeout=None):
        return self.code


DIVERGED = "pgolf train: the loss is nan at step 3 (0.2 s); lower optim.muon.lr; nothing was quantized"
"""What a run that diverges says last."""


def run_all(plan, start, gpus=0, per_gpu=1):
    lines = []
    run_plan(plan, start, gpus=gpus, per_gpu=per_gpu, commit="abc", say=lines.append, poll_seconds=0.0)
    return lines


def small_overrides() -> dict[str, object]:
    """SMALL of the end-to-end tests as dotted settings."""
    words = [w.removeprefix("--").replace("-", "_").split("=") for w in SMALL]
    return {key: int(value) for key, value in words if "." in key}
