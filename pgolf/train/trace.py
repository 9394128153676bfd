"""Traces of some training steps, for `train.profile`: what the device and the host do when.

A trace is a file in Chrome's trace format, which https://ui.perfetto.dev shows; it works without a network
once the page is loaded, and no data leaves the browser.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from pgolf.files import atomic_file
from pgolf.log import RunLog

FIRST, STEPS = 5, 3
"""The step of each loop mode (counted from 0) with which its trace begins, and the steps of a trace."""


class Traces:
    """Traces three steps of each loop mode; `begin` before every step, `end` after the last.

    Args:
        folder: where the files go; None traces nothing.
        cuda: whether kernels of a GPU are part of it.
        log: gets a line per file.
    """

    def __init__(self, folder: Path | None, *, cuda: bool, log: RunLog) -> None:
        self._folder, self._log = folder, log
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self._seen = {False: 0, True: 0}
        self._open: tuple[profile, bool, int] | None = None

    def begin(self, step: int, *, loop: bool) -> None:
        """Note that `step` begins: start its mode's trace, or end the one that has its steps."""
        if self._folder is None:
            return
        if self._open is not None and (self._open[1] != loop or step == self._open[2] + STEPS):
            self.end()
        if self._seen[loop] == FIRST:
            tracer: Any = profile(activities=self._activities)
            tracer.start()
            self._open = tracer, loop, step
        self._seen[loop] += 1

    def end(self) -> None:
        """Write the trace that is under way, if there is one."""
        if self._open is None or self._folder is None:
            return
        (tracer, loop, step), self._open = self._open, None
        tracer.stop()
        path = self._folder / f"trace_recurrence_{'on' if loop else 'off'}.json.gz"
        with tempfile.TemporaryDirectory() as place, atomic_file(path) as file:
            written = Path(place) / path.name
            tracer.export_chrome_trace(str(written))
            shutil.copyfileobj(written.open("rb"), file)
        self._log.line(f"trace from step {step} on: {path}; open it at https://ui.perfetto.dev")
