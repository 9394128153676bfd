"""A run's log: `metrics.jsonl` for programs, `log.txt` and the console for people.

Only the main rank writes; the others are silent. On a full disk there is one warning and the run goes on,
because training is worth more than its log. No other module of the library prints.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO


class RunLog:
    """Writes one run's metrics and lines into `folder`, which the main rank makes if it is missing."""

    def __init__(self, folder: Path, *, is_main: bool) -> None:
        self.folder = folder
        self.metrics_path = folder / "metrics.jsonl"
        self.text_path = folder / "log.txt"
        self._is_main = is_main
        self.follow: Callable[[dict[str, Any]], object] | None = None
        """Called with every metric that was written, on the main rank."""
        self._warned = False
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)

    def metric(self, **fields: Any) -> None:
        """Append one JSON object as a line to `metrics.jsonl` and hand it to the operating system at once.

        Values are plain JSON values; NaN and infinities become null, because strict JSON has none.

        Raises:
            TypeError: a value is not plain JSON, for example a tensor. Reading a tensor here would make the
                host wait for the device where nobody sees it.
        """
        if not self._is_main:
            return
        # Each value by itself, so that the error can name the one that is wrong.
        for name, value in fields.items():
            try:
                json.dumps(value)
            except TypeError as e:
                raise TypeError(
                    f"metric {name!r} must be a plain number, string, list or dict, "
                    f"got {type(value).__name__}; convert it first"
                ) from e
        self._append(self.metrics_path, json.dumps(_finite(fields), allow_nan=False) + "\n")
        if self.follow is not None:
            self.follow(fields)

    def line(self, text: str) -> None:
        """Print one line on the console and append it to `log.txt`.

        Letters that the console's encoding lacks are escaped there. If the console is gone, there is one
        warning on stderr.
        """
        if not self._is_main:
            return
        try:
            _write(sys.stdout, text + "\n")
        except (OSError, ValueError) as e:
            self._warn(f"cannot write to the console: {e}")
        self._append(self.text_path, text + "\n")

    def _append(self, path: Path, text: str) -> None:
        """Append all of `text` or nothing, because half a line would spoil the line after it."""
        data = text.encode(errors="backslashreplace")  # the name of a file need not be valid text
        try:
            with path.open("ab", buffering=0) as file:
                # Unbuffered, so that the write says how much of the line the disk took.
                end = file.seek(0, os.SEEK_END)
                if file.write(data) != len(data):
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError as e:
            self._warn(f"cannot write {path}: {e}; free some space")

    def _warn(self, why: str) -> None:
        if self._warned:
            return
        self._warned = True
        _complain(f"warning: {why}. The run goes on; log lines may be missing.\n")


def _write(stream: TextIO | None, text: str) -> None:
    """Write to a console in its own encoding, at once; nothing if the process was started without it."""
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def _complain(text: str) -> None:
    """Write to stderr; nothing happens if it is closed."""
    with contextlib.suppress(OSError, ValueError):
        _write(sys.stderr, text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


FIRST_S = 1.5
"""Seconds after which something long that has printed nothing yet says what it is doing."""


class Progress:
    """Lines on stderr while something long runs: how much of it is done, and how many seconds are left.

    In a `with` block there are lines from another thread too, while no work is counted: the first after
    `FIRST_S` seconds, in which kernels may be compiled, then about every `every_s` seconds.

    Args:
        label: begins every line. total: amount of work in any unit, > 0.
        is_main: whether this rank prints. every_s: seconds between two lines.

    Attributes:
        doing: what is said of work that is not counted yet.
    """

    def __init__(self, label: str, total: float, *, is_main: bool, every_s: float = 5.0) -> None:
        self._label, self._total, self._is_main, self._every_s = label, total, is_main, every_s
        self._start = self._last = time.perf_counter()
        self._done = 0.0
        self._marks = [(self._start, 0.0)]
        self._spoke = False
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self.doing = "in the first step, which compiles and loads kernels"

    def __enter__(self) -> Progress:
        if self._is_main:
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _beat(self) -> None:
        """Print a line whenever nothing was printed for long, until the block ends."""
        while not self._end.wait(0.1):
            now = time.perf_counter()
            # Later than a line of `advance` would come, so that there is none between two of them.
            if now - self._last >= (self._every_s + 1.0 if self._spoke else min(FIRST_S, self._every_s)):
                self._say(now, self.doing)

    def _say(self, now: float, text: str) -> None:
        self._last, self._spoke = now, True
        share = min(100 * self._done / self._total, 100.0)
        _complain(f"{self._label}: {share:3.0f} %  {now - self._start:.0f} s, {text}".rstrip() + "\n")

    def begin(self, note: str) -> None:
        """Print a first line before there is anything to estimate from."""
        if self._is_main:
            _complain(f"{self._label}:   0 %  {note}\n")

    def advance(self, amount: float, note: Callable[[], str] = lambda: "") -> None:
        """Count work that is done; every `every_s` seconds print a line, which ends with `note()`."""
        self._done += amount
        self.doing = "in the next step"
        now = time.perf_counter()
        if not self._is_main or now - self._last < self._every_s or self._done <= 0:
            return
        self._last = now  # else the other thread may print a line while `note` waits for the device
        text = note()
        now = time.perf_counter()  # after that
        # By the rate of the latter half of what is done, since the first step may have compiled for minutes.
        then, before = next(m for m in reversed(self._marks) if m[1] <= self._done / 2)
        self._marks.append((now, self._done))
        left = (now - then) / (self._done - before) * max(self._total - self._done, 0.0)
        self._say(now, f"{left:.0f} s left  {text}")
