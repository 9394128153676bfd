"""Files that are written completely or not at all, and their hashes."""

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
    """Yield a temporary binary file, which is renamed to `path` (after fsync) only if the block succeeds.

    If the process is killed in the block, the old file stays, and the next write removes the temporary file.

    Raises:
        OSError: the file cannot be written, for example on a full disk. The temporary file is removed; an
            older file of that name and other files are unchanged.
    """
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temp.open("wb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # tells `_sweep` on another machine that the file is in use
            _sweep(path)
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
            temp.replace(path)
    except OSError as e:
        reason = f"cannot write {path}: {e.strerror}; files that were finished before it are kept"
        raise OSError(e.errno, reason) from e
    finally:
        temp.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove temporary files of `path` whose process no longer runs here and which no process has locked."""
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
        os.kill(process, 0)  # signal 0 only checks whether the process exists
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True  # the process of another user, or a number too large for one
    return True


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
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
