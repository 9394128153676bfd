"""Recording of a run's metrics in TensorBoard or Weights & Biases, in addition to its metrics.jsonl.

Both are optional packages. If one is asked for and cannot be imported, that is an error before the run
begins, because a missing record might be noticed only after the run. A later failure (a full disk, no
network, no login) ends the recording with one warning; the run goes on.
"""

from __future__ import annotations

import json
import math
import queue
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from pgolf.errors import UserError
from pgolf.peers import describe, find_peer

Kind = Literal["none", "tensorboard", "wandb"]
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
"""By package: the module that is imported."""
FLUSH_S = 10
"""Seconds until TensorBoard finds new values on disk."""
CLOSE_S = 60.0
"""Longest time, in seconds, that the end of a run waits for the record, because an upload may hang."""


class Record(Protocol):
    """A place where values are recorded."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add the values of a step; a value that was recorded before may be kept or replaced."""

    def close(self, facts: dict[str, float]) -> None:
        """Add the results of the whole run and close the record."""


class Tracker:
    """Writes the metrics of a run to a record in a separate thread, until the first failure.

    The training loop only puts values into a queue, so a record that is slow or hangs costs it no time.
    """

    def __init__(self, open_record: Callable[[], Record], warn: Callable[[str], object]) -> None:
        """Open the record; `warn` is called with a sentence if recording fails."""
        self._warn = warn
        self._works = True
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="pgolf-track", daemon=True)
        self._guarded(lambda: setattr(self, "_record", open_record()))
        self._record: Record
        self._thread.start()

    def metric(self, fields: dict[str, Any]) -> None:
        """Record the finite numbers of one line of metrics.jsonl, under the `step` in it."""
        step = fields.get("step")
        if self._works and isinstance(step, int):
            values = numbers({k: v for k, v in fields.items() if k != "step"})
            named = {f"{_group(name)}/{name}": value for name, value in values.items()}
            self._queue.put(lambda: self._record.write(step, named))

    def close(self, summary: dict[str, Any]) -> None:
        """Record the scores and bytes of `summary` (the contents of summary.json) and close the record."""
        scores = {f"score/{name}": score.get("bpb") for name, score in (summary.get("scores") or {}).items()}
        sizes = summary.get("bytes") or {}
        facts = numbers({**scores, **{f"bytes/{key}": sizes.get(key) for key in ("model", "code", "total")}})
        self._queue.put(lambda: self._record.close(facts))
        self._queue.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._works = False
            self._warn(
                f"warning: train.track has not finished its record after {CLOSE_S:.0f} s; the files of the "
                "run are complete, so you may end the process"
            )

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            if self._works:
                self._guarded(work)

    def _guarded(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as e:  # the package may raise anything
            self._works = False
            self._warn(
                f"warning: train.track no longer records the run ({describe(e)}); the run goes on and writes "
                "its metrics.jsonl"
            )


def check_tracker(kind: Kind) -> None:
    """Check that the package of a record can be used.

    Raises:
        ValueError: it cannot; the message says why, and how to install it.
    """
    if kind == "none":
        return
    peer = find_peer(kind, MODULES[kind])
    if not peer.usable:
        raise UserError(
            f"train.track={kind}: {kind} is {peer.problem}; pip install 'pgolf[{kind}]', or set "
            "train.track=none"
        )


def start_tracker(
    kind: Kind, folder: Path, settings: dict[str, Any], *, first_step: int, warn: Callable[[str], object]
) -> Tracker | None:
    """Return the tracker of the run in `folder`, or None if kind is "none"; only the main rank calls it.

    Args:
        kind: where to record.
        settings: the run's configuration, for the record.
        first_step: the first step that will be recorded; a resumed run has recorded the steps before it.
        warn: called with a sentence if recording fails.
    """
    if kind == "none":
        return None
    if kind == "tensorboard":
        return Tracker(lambda: _TensorBoard(folder, settings, first_step), warn)
    return Tracker(lambda: _WandB(folder, settings), warn)


def numbers(fields: dict[str, Any]) -> dict[str, float]:
    """Return the entries that are finite numbers; true and false count as 1 and 0."""
    return {k: float(v) for k, v in fields.items() if isinstance(v, (bool, int, float)) and math.isfinite(v)}


def _group(name: str) -> str:
    return "validation" if name.startswith("val_") else "training"


class _TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path, settings: dict[str, Any], first_step: int) -> None:
        writer: Any = find_peer("tensorboard", MODULES["tensorboard"], "SummaryWriter").found
        # Values that an earlier process recorded at or after `purge_step` belong to lost steps; hide them.
        self._writer = writer(folder / "tensorboard", purge_step=first_step, flush_secs=FLUSH_S)
        rows = json.dumps(settings, indent=2).splitlines()
        self._writer.add_text("settings", "\n".join(f"    {row}" for row in rows), first_step)
        self._last = first_step

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._last = max(self._last, step)

    def close(self, facts: dict[str, float]) -> None:
        self.write(self._last, facts)
        self._writer.close()


class _WandB:
    """A run of Weights & Biases, with its files in RUN/wandb; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        wandb: Any = find_peer("wandb", MODULES["wandb"]).found
        # The console capture of wandb would intercept the run's own log.
        quiet = wandb.Settings(console="off", silent=True)
        self._run = wandb.init(
            project=wandb.setup().settings.project or "pgolf",  # WANDB_PROJECT, or the user's own settings
            name=folder.name,
            id=_lasting_id(folder / "wandb"),
            dir=str(folder),
            config=settings,
            resume="allow",
            settings=quiet,
        )
        self._first = int(self._run.step)

    def write(self, step: int, values: dict[str, float]) -> None:
        # wandb accepts increasing steps only, so the values of a killed process stay for steps done again.
        if step >= self._first:
            self._run.log(values, step=step)

    def close(self, facts: dict[str, float]) -> None:
        self._run.summary.update(facts)
        self._run.finish()


def _lasting_id(folder: Path) -> str:
    """Return the id, saved in `folder`, by which wandb joins all processes of a run into one run."""
    path = folder / "id.txt"
    if not path.is_file():
        folder.mkdir(exist_ok=True)
        path.write_text(secrets.token_hex(8))
    return path.read_text().strip()
