"""What keeps a folder for one process at a time.

`held` is a lock of the operating system (flock): it goes with its process, however that ends, and leaves
nothing to clean up.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from pgolf.errors import RunError

LOCK = "lock"


class HeldError(RunError):
    """Another process works in the folder."""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold `folder` (made if missing) for this process while the block runs.

    Raises:
        HeldError: another process holds it; names it. OSError: the folder cannot be made or locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Opened for appending, which makes the file if it is missing and keeps what the holder wrote.
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            file.seek(0)
            raise HeldError(
                f"{folder} is held by {_holder(file.read())}; wait for it, stop it, or choose another folder"
            ) from e
        # What stands in the file is for people only; the lock is what counts. So a stale text does no harm.
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
