"""How long the process has run, and how long spans of work take on the device, without waiting for it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

STAT = Path("/proc/self/stat")


def process_seconds() -> float | None:
    """Return the seconds since this process was started: Python's own start and all imports are in them.

    From field 22 of /proc/self/stat (proc(5)), to a hundredth of a second. None where the system does not
    say: without that file (macOS), and on kernels that leave the field 0 (gVisor).
    """
    try:
        # Field 2 is the program's name in parentheses and may hold spaces: count from behind it.
        fields = STAT.read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, AttributeError, IndexError, ValueError):
        return None
    return age if began > 0 and age >= 0 else None


class DeviceTimer:
    """Milliseconds of spans on a device: two events in its stream around each; the host's clock on a CPU.

    Nothing waits until `read`, so the device's queue does not run dry, and a replayed graph stays one launch.
    A span that waits for other ranks, such as the optimizer, which averages gradients first, lasts until they
    have come: its time includes exposed communication and the lateness of other ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    @contextmanager
    def span(self) -> Iterator[None]:
        """Time what the block queues on the current stream."""
        begin = self._mark()
        yield
        self._spans.append((begin, self._mark()))

    def read(self) -> list[float]:
        """Return the milliseconds of every span; the device must have finished them."""
        if self._cuda:
            return [begin.elapsed_time(end) for begin, end in self._spans]
        return [1000 * (end - begin) for begin, end in self._spans]

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        # A new event for each mark: one that is recorded again forgets its first time, which `read` needs.
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
