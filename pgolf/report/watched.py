"""What a run's folder says at any time: finished, under way, stopped, or with only its metrics.jsonl left.

Reads files only, and never fails on one that is damaged or of another version: what cannot be read is missing
and is named among the notes. So it reads summary.json entry by entry, and not through `Summary`, which wants
all of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf.config import flat
from pgolf.errors import UserError
from pgolf.report.page import Table
from pgolf.report.plots import read_metrics
from pgolf.report.summary import NOT_PHASES, SUMMARY

FILES = ("metrics.jsonl", SUMMARY, "progress.json", "config.json")
"""Any of them makes a folder a run's."""
LARGEST = 1e300
"""Numbers from here on are damage: JSON's integers may be too large for any axis."""


@dataclass(frozen=True)
class Watched:
    """One run as its files show it."""

    name: str
    """Its folder's name, or its path where two runs have the same."""
    rows: list[dict[str, Any]]
    """Lines of metrics.jsonl."""
    settings: dict[str, Any]
    """config.json by dotted name."""
    summary: dict[str, Any]
    """summary.json; of a run that is not finished what progress.json has of it."""
    finished: bool
    sessions: list[dict[str, Any]]
    """Its processes, as `pgolf.train.progress.Progress` writes them."""
    notes: list[str]
    """What could not be read, and why."""

    def curve(self, x: str, y: str) -> tuple[list[float], list[float]]:
        """Return two columns of metrics.jsonl, see `curve`."""
        return curve(self.rows, x, y)

    def section(self, name: str) -> dict[str, Any]:
        """Return a part of the summary, {} where it is missing."""
        found = self.summary.get(name)
        return found if isinstance(found, dict) else {}

    def bpb(self) -> dict[str, float]:
        """Return bits per byte by score."""
        found = {k: number(v.get("bpb")) for k, v in self.section("scores").items() if isinstance(v, dict)}
        return {k: v for k, v in found.items() if v is not None}

    def parts(self) -> dict[str, float]:
        """Return the counted bytes by section of the artifact, and of the code."""
        ledger = self.section("bytes")
        parts = ledger.get("parts")
        return numbers({**(parts if isinstance(parts, dict) else {}), "code": ledger.get("code")})

    def phases(self) -> dict[str, float]:
        """Return the seconds of every phase, in order."""
        return {k: v for k, v in numbers(self.section("seconds")).items() if k not in NOT_PHASES}

    def status(self) -> str:
        """Say how far the run is."""
        if self.finished:
            return "finished"
        end = self.sessions[-1].get("end") if self.sessions else None
        return f"not finished; {end}" if end else "not finished: under way, or killed"


def read_watched(folders: Sequence[Path]) -> list[Watched]:
    """Return the runs in `folders`, in that order.

    Raises:
        ValueError: no folder given. FileNotFoundError: a folder holds no file of a run.
    """
    if not folders:
        raise UserError("expected at least one run folder, got none; `pgolf train` makes them")
    names = [folder.resolve().name for folder in folders]
    return [
        _read(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def curve(rows: Sequence[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    """Return the values of two columns, from the rows where both are numbers."""
    pairs = [(number(row.get(x)), number(row.get(y))) for row in rows]
    kept = [(a, b) for a, b in pairs if a is not None and b is not None]
    return [a for a, _ in kept], [b for _, b in kept]


def number(value: Any) -> float | None:
    """Return a finite number as it is, None for anything else."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if plain and -LARGEST < value < LARGEST else None


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the entries that are finite numbers."""
    return {k: v for k, v in values.items() if number(v) is not None}


def _read(folder: Path, name: str) -> Watched:
    if not any((folder / file).is_file() for file in FILES):
        raise FileNotFoundError(
            f"no run at {folder}: it holds none of {', '.join(FILES)}; `pgolf train` makes run folders"
        )
    notes: list[str] = []
    summary, progress, config = (_object(folder / file, notes) for file in FILES[1:])
    metrics = folder / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.is_file() else []
    # A further way to score may still be under way when the first summary is there; progress.json goes last.
    finished = bool(summary) and not (folder / "progress.json").is_file()
    known = summary or progress.get("summary")
    sessions = progress.get("sessions") or summary.get("sessions")
    return Watched(
        name=name,
        rows=rows,
        settings={k: v for k, v in flat(config).items() if k != "version"},
        summary=known if isinstance(known, dict) else {},
        finished=finished,
        sessions=[s for s in sessions if isinstance(s, dict)] if isinstance(sessions, list) else [],
        notes=notes,
    )


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    """Return the JSON object in a file; {} without one, with a note if there is something else in it."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as e:
        notes.append(f"{path.name} is left out: {type(e).__name__}: {e}")
        return {}
    if not isinstance(data, dict):
        notes.append(f"{path.name} is left out: it holds no JSON object")
        return {}
    return data


def facts(runs: Sequence[Watched]) -> Table:
    """Return the main figures, one column per run; rows that no run has are left out."""
    rows = [(what, [_text(value(run)) for run in runs]) for what, value in FACTS.items()]
    head = ("", *(run.name for run in runs)) if len(runs) > 1 else ()
    return Table("", head, [(w, *v) for w, v in rows if any(v)])


def scores(runs: Sequence[Watched]) -> Table:
    """Return every score of every run."""
    head = ("run", "weights", "bits per byte", "nats per token", "tokens", "bytes of text", "seconds")
    rows = []
    for run in runs:
        for name, score in run.section("scores").items():
            values = numbers(score) if isinstance(score, dict) else {}
            figures = [f"{values[k]:.5f}" if k in values else "" for k in ("bpb", "loss")]
            counts = [f"{values[k]:,.0f}" if k in values else "" for k in ("tokens", "bytes")]
            seconds = f"{values['seconds']:.1f}" if "seconds" in values else ""
            rows.append((run.name, name, *figures, *counts, seconds))
    return _without_run(Table("Scores (lower is better)", head, rows), runs)


def by_run(what: str, found: Sequence[dict[str, float]], runs: Sequence[Watched], form: str) -> Table:
    """Return values by name, one column per run, in the order in which they come."""
    names = dict.fromkeys(name for values in found for name in values)
    rows = [(n, *(format(v[n], form) if n in v else "" for v in found)) for n in names]
    return Table("", (what, *(run.name for run in runs)), rows)


def sessions(runs: Sequence[Watched]) -> Table:
    """Return the processes of every run."""
    head = ("run", "started", "ended", "how", "ranks", "steps", "seconds on the clock", "lost seconds")
    rows = []
    for run in runs:
        for s in run.sessions:
            steps = f"{s.get('from_step', '')} to {s.get('to_step', '')}"
            clock = [number(s.get(key)) for key in ("clock_from", "clock_to")]
            span = " to ".join("" if c is None else f"{c:.1f}" for c in clock)
            lost = number(s.get("lost_seconds"))
            words = [str(s.get(key, "")) for key in ("started", "ended", "end", "world_size")]
            rows.append((run.name, *words, steps, span, "" if lost is None else f"{lost:.1f}"))
    return _without_run(Table("Processes", head, rows), runs)


def settings(runs: Sequence[Watched], *, different: bool) -> Table:
    """Return the settings by dotted name, one column per run: all, or only those that differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [(n, *(str(run.settings.get(n, "")) for run in runs)) for n in names]
    kept = [row for row in rows if not different or len(set(row[1:])) > 1]
    title = "Settings that differ" if different else ""
    return Table(title, ("setting", *(run.name for run in runs)), kept)


def _without_run(content: Table, runs: Sequence[Watched]) -> Table:
    """Return a table whose first column names the run; without that column where there is only one."""
    if len(runs) > 1:
        return content
    return Table(content.title, content.head[1:], [row[1:] for row in content.rows])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value or "")


def _train(key: str) -> Any:
    return lambda run: number(run.section("train").get(key))


def _steps(run: Watched) -> Any:
    steps = number(run.section("train").get("steps"))
    return steps if steps is not None else len(run.curve("step", "loss")[0])


def _score(run: Watched) -> str:
    return ", ".join(f"{name} {bpb:.4f}" for name, bpb in run.bpb().items())


def _artifact(run: Watched) -> str:
    ledger = numbers(run.section("bytes"))
    return f"{ledger['total']:,} of {ledger['limit']:,}" if {"total", "limit"} <= set(ledger) else ""


def _commit(name: str) -> str:
    return name[:12] + ("-dirty" if name.endswith("-dirty") else "")


FACTS: dict[str, Any] = {
    "status": Watched.status,
    "bits per byte": _score,
    "artifact with code, bytes": _artifact,
    "steps": _steps,
    "skipped steps": _train("skipped_steps"),
    "tokens": _train("tokens"),
    "tokens per second": _train("tokens_per_s"),
    "ms per step, depth recurrence off": _train("ms_loop_off"),
    "ms per step, depth recurrence on": _train("ms_loop_on"),
    "ms per step, optimizer": _train("ms_optimizer"),
    "seconds on the clock": lambda run: number(run.section("seconds").get("clock")),
    "too late by, seconds": lambda run: number(run.summary.get("overrun")) or "",
    "peak GPU memory, MiB": lambda run: number(run.summary.get("peak_mib")) or "",
    "parameters": lambda run: number(run.summary.get("parameters")),
    "device": lambda run: run.summary.get("device"),
    "ranks": lambda run: number(run.summary.get("world_size")),
    "attention": lambda run: run.summary.get("attention"),
    "seed": lambda run: str(run.settings.get("train.seed", "")),
    "started": lambda run: run.summary.get("started"),
    "commit": lambda run: _commit(str(run.summary.get("commit") or "")),
    "versions": lambda run: ", ".join(f"{k} {v}" for k, v in run.section("versions").items()),
}
"""Row of the first table -> what it says of a run; numbers are formatted, what is empty is left out."""
