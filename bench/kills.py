"""Kill shard builds and runs at random moments and check that nothing is lost: `python -m bench.kills`.

One trial builds shards, or trains, writes and scores a very small model, on one rank or on two. A signal is
sent to a rank at a random moment; then the files are checked, and the work is resumed, perhaps killed again,
until it is finished. A trial fails if

    a process takes longer to end than its limit (ranks without a signal must end without torchrun's help),
    a file under its final name is not complete, or a checkpoint with an index is not valid,
    the finished run differs in one bit from a run that was never interrupted: raw and averaged weights,
    artifact, metrics (except for times), score; or the shards differ.

Processes are forked from this one, so that a kill costs a fraction of a second instead of a start of Python.
Only the CPU is used. The number of a trial is the seed of its random choices; `--first` continues after an
earlier part. The program writes one JSON line per trial and one line of totals.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Two processes on two cores must not wait for each other by spinning. This must precede the import of torch.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

import matplotlib.pyplot  # noqa: F401 - loaded here once, not in every child
import torch
from safetensors.torch import load_file

import pgolf.dist
import pgolf.watch
from bench.common import versions
from pgolf.artifact.code import code_bytes
from pgolf.artifact.export import describe
from pgolf.artifact.read import read_artifact
from pgolf.cli.main import main as command_line
from pgolf.data.text import sample_paths
from pgolf.env import commit_name
from pgolf.train import run as run_module
from pgolf.train.checkpoint import INDEX, read_checkpoint
from pgolf.train.progress import PROGRESS

SETTINGS = [
    "--model.vocab-size=512",
    "--model.width=32",
    "--model.layers=3",
    "--model.heads=2",
    "--model.kv-heads=1",
    "--model.rope-dims=4",
    "--model.xsa-layers=3",
    "--model.parallel-from=2",
    "--model.recurrence-start=1",
    "--model.recurrence-end=1",
    "--model.max-context=64",
    "--data.batch-tokens=1024",
    "--data.micro-tokens=512",
    "--quant.calibration-batches=2",
    "--quant.gradient-batches=2",
    "--seconds=0",
    "--steps=24",
    "--evaluate.no-raw",
    "--train.checkpoint-every=0.1",
    "--train.rank-timeout=5",
    "--train.device=cpu",
]
MEET_S = 12.0
"""Seconds that ranks wait for a rank that got a signal before it had connected; 120 outside this program."""
BOUND_S = 5 + 3 + 52.0
"""Seconds after a hit in which every process must have ended: train.rank_timeout, the grace of the main
thread, and 52 s for writing on a busy machine, or for `MEET_S`. Runs that were not hit get `RUN_S`."""
RUN_S = 300.0
SIGNALS = {1: ("KILL", "KILL", "TERM", "INT", "HUP"), 2: ("KILL", "KILL", "TERM", "INT", "STOP")}


@dataclass
class Trial:
    """The events of one trial."""

    number: int
    what: str
    hits: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    slowest_end_s: float = 0.0
    error: str = ""


ENDED: dict[int, int] = {}
"""Exit status of every process that ended: the system tells it once."""


def start(words: list[str], output: Path, world: int, *, plain: bool = False) -> list[int]:
    """Fork `world` ranks that run the command line `words`; return their process numbers.

    `plain` leaves out plots and report page, which take as long as the rest of such a small run.
    """
    with socket.socket() as probe:
        # The ranks inherit it, so that no other program is given the port; rank 0 may listen there.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", 0))
        port = probe.getsockname()[1]
        return [_fork(words, output, rank, world, port, plain) for rank in range(world)]


def _fork(words: list[str], output: Path, rank: int, world: int, port: int, plain: bool) -> int:
    child = os.fork()
    if child:
        ENDED.pop(child, None)  # the system gives the number of an ended process to a new one, some day
        return child
    code = 99
    try:
        os.setpgid(0, 0)
        # A background job ignores SIGINT, one under nohup SIGHUP, and so would its children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        if world > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            os.environ.update({k: str(v) for k, v in place.items()}, MASTER_ADDR="localhost")
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if plain:
            run_module.plot_loss = lambda *_, **__: "left out"  # type: ignore[assignment]
            run_module.report_note = lambda *_, **__: ""  # type: ignore[assignment]
        code = command_line(words)
        sys.stdout.flush()
    except SystemExit as e:
        code = int(e.code or 0)
    except BaseException as e:
        os.write(2, f"child: {type(e).__name__}: {e}\n".encode())
    finally:
        os._exit(code)


def wait(processes: list[int], seconds: float) -> dict[int, int] | None:
    """Return the exit status of every process, or None if one is still running after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        for process in processes:
            if process not in ENDED:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    ENDED[process] = os.waitstatus_to_exitcode(status)
        if all(process in ENDED for process in processes):
            return {process: ENDED[process] for process in processes}
        if time.monotonic() > end:
            return None
        time.sleep(0.005)


def end_all(processes: list[int]) -> None:
    """Kill the processes that are left."""
    for process in processes:
        try:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        except (ProcessLookupError, ChildProcessError):
            continue


def hit(rng: random.Random, trial: Trial, processes: list[int], moment: float) -> str:
    """Send a random signal to a random process after `moment` seconds, and wait; return what failed."""
    early = wait(processes, moment)
    if early is not None:
        trial.ends.append("before the hit")
        return _statuses(early, allowed=(0,))
    world = len(processes)
    name, rank = rng.choice(SIGNALS[world]), rng.randrange(world)
    trial.hits.append(f"{name} to {rank} of {world} after {moment:.2f} s")
    began = time.monotonic()
    try:
        os.kill(processes[rank], getattr(signal, f"SIG{name}"))
    except ProcessLookupError:
        return ""
    others = processes if name != "STOP" else [p for p in processes if p != processes[rank]]
    found = wait(others, BOUND_S)
    took = time.monotonic() - began
    trial.slowest_end_s = max(trial.slowest_end_s, round(took, 2))
    end_all([p for p in processes if found is None or p not in found])
    if found is None:
        return f"a process was still there {BOUND_S:g} s after {trial.hits[-1]}"
    trial.ends.append(",".join(str(code) for code in found.values()))
    return ""


def _statuses(found: dict[int, int], allowed: tuple[int, ...]) -> str:
    wrong = [code for code in found.values() if code not in allowed]
    return f"exit status {wrong}" if wrong else ""


def look(folder: Path) -> str:
    """Return what is wrong with the files of a run that was killed; "" if every file is complete."""
    for path in folder.rglob("*"):
        if path.name.startswith(".") or path.is_dir():
            continue
        try:
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".pgolf":
                read_artifact(path)
            if path.name == INDEX:
                read_checkpoint(path.parent).load()
        except Exception as e:
            return f"{path.name} is not whole: {type(e).__name__}: {e}"
    return ""


def outcome(folder: Path) -> dict[str, Any]:
    """Return everything that must be equal in two runs with the same settings."""
    sections = describe(folder / "model.pgolf")["sections"]  # the header holds a hash of the folder's name
    found: dict[str, Any] = {f"artifact {s['name']}": s["sha256"] for s in sections}
    for name in ("raw", "ema"):
        tensors = load_file(folder / f"{name}.safetensors")
        found[name] = {k: t.numpy().tobytes() for k, t in sorted(tensors.items())}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in row.items() if k not in ("ms", "elapsed")} for row in rows]
    summary = json.loads((folder / "summary.json").read_text())
    found["scores"] = {k: s["nats"] for k, s in summary["scores"].items()}
    found["steps"] = summary["train"]["steps"]
    return found


def train_trial(trial: Trial, rng: random.Random, base: Path, world: int, reference: dict[str, Any]) -> str:
    """Train, with signals, until the run is finished."""
    out, log = base / "runs", base / "output.txt"
    words = ["train", "tiny", "--data", str(base.parent / "shards"), "--out", str(out), *SETTINGS]
    hits, plain = rng.choice((1, 2, 3, 4)), rng.random() < 0.8
    for attempt in range(60):
        runs = sorted(out.iterdir()) if out.is_dir() else []
        runs = [run for run in runs if (run / PROGRESS).is_file()]
        command = ["train", "--resume", str(runs[0])] if runs else words
        processes = start(command, log, world, plain=plain)
        if attempt < hits:
            wrong = hit(rng, trial, processes, rng.uniform(0.0, reference["seconds"]))
            wrong = wrong or "".join(look(run) for run in (out.iterdir() if out.is_dir() else []))
        else:
            found = wait(processes, RUN_S)
            end_all(processes if found is None else [])
            wrong = "the run hangs" if found is None else _statuses(found, allowed=(0,))
        if wrong:
            return f"{wrong}\n{log.read_text()[-1500:]}"
        finished = [run for run in out.iterdir() if (run / "summary.json").is_file()] if out.is_dir() else []
        finished = [run for run in finished if not (run / PROGRESS).is_file()]
        if finished:
            ours, theirs = outcome(finished[0]), reference["outcome"]
            return "".join(f"{k} differs after {trial.hits}; " for k in ours if ours[k] != theirs[k])
    return "not finished after 60 attempts"


def build_trial(trial: Trial, rng: random.Random, base: Path, reference: dict[str, Any]) -> str:
    """Build shards, with a signal; until finished the folder must be refused, then equal the reference."""
    out, log = base / "shards", base / "output.txt"
    words = build_words(out, base.parent / "tokenizer.model", shard_tokens=20_000)
    wrong = hit(rng, trial, start(words, log, 1), rng.uniform(0.0, reference["seconds"]))
    if wrong:
        return wrong
    inspected = wait(start(["data", "inspect", str(out)], log, 1), RUN_S)
    if trial.ends[-1] not in ("0", "before the hit"):
        if inspected is None or set(inspected.values()) == {0}:
            return "an unfinished folder passed `data inspect`"
        again = wait(start([*words, "--overwrite"], log, 1), RUN_S)
        if again is None or set(again.values()) != {0}:
            return f"the build could not be finished\n{log.read_text()[-1500:]}"
    return "" if shards_of(out) == reference["shards"] else f"the shards differ after {trial.hits}"


def build_words(out: Path, tokenizer: Path, *, shard_tokens: int) -> list[str]:
    """Return the command that builds shards from the small part of the sample text."""
    train, val = (str(tokenizer.with_name(f"{split}.jsonl")) for split in ("train", "val"))
    words = ["data", "shards", "--train", train, "--val", val, "--tokenizer", str(tokenizer)]
    return [*words, "--out", str(out), "--shard-tokens", str(shard_tokens), "--jobs", "1"]


def shards_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder of shards, which must have no others."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if not p.name.startswith(".")}


def prepare(base: Path) -> dict[Any, dict[str, Any]]:
    """Make tokenizer, shards and the runs without interruption, by number of ranks, and "build"."""
    from pgolf.data.text import iterate_documents

    log = base / "output.txt"

    def run(words: list[str], world: int = 1) -> float:
        began = time.monotonic()
        found = wait(start(words, log, world, plain=True), RUN_S)
        if found is None or set(found.values()) != {0}:
            raise SystemExit(f"the run that nothing interrupts failed: {found}\n{log.read_text()[-3000:]}")
        return time.monotonic() - began

    text, model = sample_paths(), base / "tokenizer.model"
    documents = [d.text for d in iterate_documents(text.train)][:80]
    held_out = [d.text for d in iterate_documents(text.val)][:5]
    for name, texts in (("train", documents), ("val", held_out)):
        lines = (json.dumps({"text": t}) + "\n" for t in texts)
        model.with_name(f"{name}.jsonl").write_text("".join(lines))
    run(["data", "tokenizer", "--inputs", str(text.val), "--vocab-size", "512", "--out", str(model)])
    run(build_words(base / "shards", model, shard_tokens=10_000_000))
    seconds = run(build_words(base / "many", model, shard_tokens=20_000))
    found: dict[Any, dict[str, Any]] = {"build": {"seconds": seconds, "shards": shards_of(base / "many")}}
    for world in (1, 2):
        out = base / f"reference{world}"
        words = ["train", "tiny", "--data", str(base / "shards"), "--out", str(out), *SETTINGS]
        seconds = run(words, world)
        found[world] = {"seconds": seconds, "outcome": outcome(next(out.iterdir()))}
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the trials; return 0 if none failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="signals to send (default 100)")
    parser.add_argument("--first", type=int, default=0, help="number of the first trial (default 0)")
    parser.add_argument("--seconds", type=float, default=1e9, help="then begin no further trial")
    parser.add_argument("--out", type=Path, default=None, help="append JSON lines to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    code_bytes()  # kept for every child: it takes as long as the rest of so small a run
    pgolf.watch.MEET_S = pgolf.dist.MEET_S = MEET_S
    began, kills, failed, number = time.monotonic(), 0, 0, args.first
    signals: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="pgolf-kills-") as name:
        base = Path(name)
        reference = prepare(base)
        # At least one trial, even where the runs without interruption took all of the time.
        while kills < args.kills and (number == args.first or time.monotonic() - began < args.seconds):
            rng = random.Random(number)
            what = rng.choice(("build", 1, 1, 1, 2, 2))
            trial, folder = Trial(number, str(what)), base / f"trial{number}"
            folder.mkdir()
            if what == "build":
                trial.error = build_trial(trial, rng, folder, reference["build"])
            else:
                trial.error = train_trial(trial, rng, folder, what, reference[what])
            shutil.rmtree(folder)
            kills, failed, number = kills + len(trial.hits), failed + bool(trial.error), number + 1
            signals.update(h.split()[0] for h in trial.hits)
            slowest = max(slowest, trial.slowest_end_s)
            if args.out is not None:
                with args.out.open("a") as file:
                    file.write(json.dumps(vars(trial)) + "\n")
            if trial.error or number % 20 == 0:
                state = f"{kills} signals, {number - args.first} trials, {failed} failed"
                print(f"{state}, {time.monotonic() - began:.0f} s {trial.error}", flush=True)
    totals = {
        "first": args.first,
        "trials": number - args.first,
        "signals": kills,
        "by_signal": dict(signals),
        "failed": failed,
        "slowest_end_s": slowest,
        "bound_s": BOUND_S,
        "seconds": round(time.monotonic() - began),
        "commit": commit_name(),
        "versions": versions(),
    }
    print(json.dumps(totals))
    if args.out is not None:
        with args.out.open("a") as file:
            file.write(json.dumps(totals) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
