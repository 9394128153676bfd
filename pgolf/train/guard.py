"""What holds a folder for one process, and ends its children with it.

`held` is a lock of the kernel's (flock): it goes with its process, however that ends, and leaves nothing to
clean up. Children end with their parent through `pgolf.env.follow_parent`, also when that is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from pgolf.errors import RunError

LOCK = "lock"
GRACE_SECONDS = 20.0
"""Between asking a child to end and killing it."""


class HeldError(RunError):
    """Another process works in the folder."""


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
