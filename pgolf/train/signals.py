"""SIGTERM, SIGHUP and SIGINT as a request to save and leave, answered where that is safe.

While training runs, a signal only leaves a note that the loop reads before the next step, so that all ranks
stop after the same step and none is left in a collective. In every other phase it raises `Stopped` at once,
because files are written atomically and what an earlier phase saved is on disk.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

WATCHED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
ECHO_S = 2.0
"""Seconds in which further signals count as the first one: Ctrl-C reaches a rank from the terminal and again
from torchrun."""


class Stopped(KeyboardInterrupt):
    """A signal, whose number is `signum`, asked the process to end.

    It is no `Exception`: being asked to stop is not a failure, and nothing that handles failures catches it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Signals:
    """The handlers of `WATCHED`, installed while a `with` block runs.

    In a thread other than the main one, where Python allows no handlers, it does nothing.

    Attributes:
        requested: the first signal that came, 0 before.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._since = 0.0
        self._deferred = self._closing = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        # A library's user may run this in a thread; signals are then that program's own business.
        if threading.current_thread() is threading.main_thread():
            for number in WATCHED:
                # A shell starts background jobs with SIGINT ignored, nohup a process with SIGHUP ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note signals inside the block; one that comes `ECHO_S` after the first still raises."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def close(self) -> None:
        """From now on signals change nothing: the process is ending already."""
        self._closing = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._closing:
            return
        # Python runs this between two bytecodes of the main thread: it must not wait, write or take a lock.
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since = number, now
            if self._deferred:
                return
        elif now - self._since < ECHO_S:
            return  # the same request again, by another way
        raise Stopped(number)
