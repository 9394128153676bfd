"""What holds a folder for one process, ends it in order on a signal, and ends its children with it.

`held` is a lock of the kernel's (flock): it goes with its process, however that ends, and leaves nothing to
clean up. Children end with their parent through `pgolf.env.follow_parent`, also when that is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

LOCK = "lock"
GRACE_SECONDS = 20.0
"""Between asking a child to end and killing it."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class HeldError(RuntimeError):
    """Another process works in the folder."""


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Process(Protocol):
    """A child under way."""

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit code.

        Raises:
            subprocess.TimeoutExpired: it runs on.
        """


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold `folder` (made if missing) for this process while the block runs.

    Raises:
        HeldError: another process holds it; names it. OSError: the folder cannot be made or locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            file.seek(0)
            raise HeldError(
                f"{folder} is held by {_holder(file.read())}; wait for it, stop it, or choose another folder"
            ) from e
        file.truncate(0)
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": began}, file)
        file.flush()
        yield
        file.truncate(0)


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


@contextlib.contextmanager
def raised_signals() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into `Stopped` while the block runs.

    Ignored ones (nohup) stay ignored. Only the first is raised: the next ones would cut short what it began.
    Outside of the main thread, which alone gets signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopped = False

    def stop(signum: int, _: FrameType | None) -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            raise Stopped(signum)

    before = {s: signal.getsignal(s) for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end(processes: Sequence[Process], grace: float = GRACE_SECONDS) -> int:
    """Ask children to end, kill those that do not within `grace` seconds, and return how many these were."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + grace
    stubborn = 0
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            stubborn += 1
            process.kill()
            process.wait()
    return stubborn
