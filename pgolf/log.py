"""A run's log: `metrics.jsonl` for machines, `log.txt` and the console for people.

Only the main rank writes; the others are silent. A full disk costs one warning, never the run: training is
worth more than its log. This is the one place in library code that prints.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from pathlib import Path
from typing import Any


class RunLog:
    """Writes one run's metrics and lines below `folder` (made if missing, by the main rank only)."""

    def __init__(self, folder: Path, *, is_main: bool) -> None:
        self.folder = folder
        self.metrics_path = folder / "metrics.jsonl"
        self.text_path = folder / "log.txt"
        self._is_main = is_main
        self._warned = False
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)

    def metric(self, **fields: Any) -> None:
        """Append one JSON object as a line to `metrics.jsonl` and hand it to the system at once.

        Values are plain JSON values; NaN and infinities become null, which is what strict JSON can hold.

        Raises:
            TypeError: a value is not plain JSON (a tensor, say: reading it here would hide a device sync).
        """
        if not self._is_main:
            return
        for name, value in fields.items():
            try:
                json.dumps(value)
            except TypeError as e:
                raise TypeError(
                    f"metric {name!r} must be a plain number, string, list or dict, "
                    f"got {type(value).__name__}; convert it first"
                ) from e
        self._append(self.metrics_path, json.dumps(_finite(fields), allow_nan=False) + "\n")

    def line(self, text: str) -> None:
        """Print one line on the console and append it to `log.txt`."""
        if not self._is_main:
            return
        try:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        except OSError as e:
            self._warn(f"cannot write to the console: {e}")
        self._append(self.text_path, text + "\n")

    def _append(self, path: Path, text: str) -> None:
        """Append all of `text` or nothing: a torn line would spoil the line after it."""
        data = text.encode()
        try:
            with path.open("ab", buffering=0) as file:
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
        try:
            sys.stderr.write(f"warning: {why}. The run goes on; log lines may be missing.\n")
            sys.stderr.flush()
        except OSError:
            return


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
