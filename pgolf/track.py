"""A run's metrics in TensorBoard or Weights & Biases, next to its metrics.jsonl.

Both are optional packages. One that is asked for and cannot be imported is refused before the run begins,
because nobody would notice the missing record for ten minutes. Whatever fails later (a full disk, no network,
no login) costs one warning and the record, never the run.
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
"""Package -> what is imported of it."""
FLUSH_S = 10
"""Seconds after which TensorBoard finds new values on disk."""
CLOSE_S = 60.0
"""Seconds that the end of a run waits for its record: an upload may hang, and everything else is on disk."""


class Record(Protocol):
    """Where values go."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add the values of a step; a value that is there already may stay or be replaced."""

    def close(self, facts: dict[str, float]) -> None:
        """Add what the whole run found and end the record."""


class Tracker:
    """Hands a run's metrics to a record from a thread of its own, and gives it up at its first failure.

    The training loop only puts a line into a queue: a record that is slow, or hangs, takes none of its time.
    """

    def __init__(self, open_record: Callable[[], Record], warn: Callable[[str], object]) -> None:
        """Open the record; `warn` takes the one sentence that says why it could not be kept."""
        self._warn = warn
        self._works = True
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="pgolf-track", daemon=True)
        self._guarded(lambda: setattr(self, "_record", open_record()))
        self._record: Record
        self._thread.start()

    def metric(self, fields: dict[str, Any]) -> None:
        """Record the finite numbers of one line of metrics.jsonl, which names its `step`."""
        step = fields.get("step")
        if self._works and isinstance(step, int):
            values = numbers({k: v for k, v in fields.items() if k != "step"})
            named = {f"{_group(name)}/{name}": value for name, value in values.items()}
            self._queue.put(lambda: self._record.write(step, named))

    def close(self, summary: dict[str, Any]) -> None:
        """Record the scores and bytes of `summary` (summary.json's content) and end the record."""
        scores = {f"score/{name}": score.get("bpb") for name, score in (summary.get("scores") or {}).items()}
        sizes = summary.get("bytes") or {}
        facts = numbers({**scores, **{f"bytes/{key}": sizes.get(key) for key in ("model", "code", "total")}})
        self._queue.put(lambda: self._record.close(facts))
        self._queue.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._works = False
            self._warn(
                f"warning: train.track has not finished its record after {CLOSE_S:.0f} s; the run's files "
                "are complete, so the process may be ended"
            )

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            if self._works:
                self._guarded(work)

    def _guarded(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as e:  # of a package that we do not know
            self._works = False
            self._warn(
                f"warning: train.track no longer records the run ({describe(e)}); the run goes on and keeps "
                "its metrics.jsonl"
            )


def check_tracker(kind: Kind) -> None:
    """Refuse a record whose package cannot be used.

    Raises:
        ValueError: names the package, why it cannot be used, and how to install it.
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
    """Return the tracker of the run in `folder`, None if it is not to be recorded. For the main rank only.

    Args:
        settings: the run's configuration, for the record.
        first_step: the first step that will be recorded; a run that goes on has recorded those before it.
        warn: takes the one sentence that says why the record could not be kept.
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
        # Values of an earlier process at or after `purge_step` are of work that was lost: they are hidden.
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
        # Its console capture would put itself between a run and its own log.
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
        # Steps only rise there: what a killed process recorded stays, though its last steps are done again.
        if step >= self._first:
            self._run.log(values, step=step)

    def close(self, facts: dict[str, float]) -> None:
        self._run.summary.update(facts)
        self._run.finish()


def _lasting_id(folder: Path) -> str:
    """Return the name under which all processes of a run are one run there, kept in `folder`."""
    path = folder / "id.txt"
    if not path.is_file():
        folder.mkdir(exist_ok=True)
        path.write_text(secrets.token_hex(8))
    return path.read_text().strip()
