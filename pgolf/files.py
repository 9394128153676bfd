"""Files that are either complete or not there, and their hashes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` only if the block succeeds (same folder, fsync, rename).

    A process that is killed in between leaves the old file, and a temporary that the next write removes.

    Raises:
        OSError: the file cannot be written (a full disk, say); the temporary file is removed, an older file
            of that name and its finished neighbours stay as they were.
    """
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temp.open("wb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # says to `_sweep` of another machine that somebody is writing
            _sweep(path)
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
            temp.replace(path)
    except OSError as e:
        reason = f"cannot write {path}: {e.strerror}; files finished before it are kept"
        raise OSError(e.errno, reason) from e
    finally:
        temp.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove temporaries of writers of `path` that were killed: no such process here, and nobody's lock."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"(\d+)\.tmp")
    for other in path.parent.iterdir():
        match = pattern.fullmatch(other.name)
        if match is None or _alive(int(match[1])):
            continue
        with contextlib.suppress(OSError), other.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            other.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True  # somebody else's, or no possible number
    return True


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_file(path) as file:
        file.write(json.dumps(data, indent=2).encode() + b"\n")
