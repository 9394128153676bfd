"""Sums of losses on disk, with which an interrupted evaluation goes on.

A folder holds a file per way to score and rank, `ttt.sums`, `ttt.1.sums` and so on, to which only that rank
appends. A line is JSON, a space and 16 hexadecimal digits of the SHA-256 of the JSON of all lines up to it.
The first line says what the sums are of: SHA-256 of the artifact and of the text, the way and every setting
on which a loss depends to the last bit. Each other line holds the sums of documents that were scored
together: a list of [first, end, nats], where the inputs [first, end) of the text have the targets in the sum.

A line without its end was being written when the process was killed; it is dropped. A line whose digits do
not fit is an error. All ranks read all files before any of them appends, so another number of ranks can go
on. What was scored together is either in the files as a whole or scored again as a whole, in tensors of the
same shapes, so the score is the same to the last bit, as far as the device gives the same losses twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pgolf.data.loader import ValidationText
from pgolf.dist import Dist
from pgolf.errors import UserError
from pgolf.evaluate.bpb import Piece

FORMAT = "pgolf sums 1"
BEGINNING = f'{{"format":"{FORMAT}"'.encode()
"""Of every file; the rest of the first line depends on what was scored."""
DIGITS = 16
"""Hexadecimal digits of a line's checksum."""
EVERY_S = 2.0
"""Seconds between two writes, at least; so much work may be lost, and what was not scored to its end."""


def text_sha256(text: ValidationText) -> str:
    """Return the SHA-256 of the tokens and bytes of a text, hexadecimal."""
    digest = hashlib.sha256()
    for part in (text.tokens, text.bytes):
        digest.update(np.ascontiguousarray(part, dtype="<i8").data)
    return digest.hexdigest()


def kept_facts(folder: Path, way: str) -> dict[str, Any]:
    """Return what the sums of a way in a folder say that they are of; nothing if there are none."""
    for path in _files(folder, way) if folder.is_dir() else []:
        with path.open("rb") as file:
            line = file.readline()
        if line.endswith(b"\n"):  # else it was being written when the process was killed
            with contextlib.suppress(ValueError):  # damaged, as `open_sums` will say
                found = json.loads(line.rpartition(b" ")[0])
                return found if isinstance(found, dict) else {}
    return {}


class Sums:
    """The sums of one evaluation: those of earlier processes, and a file to which this rank appends.

    Attributes:
        before: what is in the files, in the order of the text.

    Args:
        path: this rank's file, which is open.
        file: its descriptor, at the end of the last whole line. digest: of the lines in it.
        before: see above.
    """

    def __init__(self, path: Path, file: int, digest: Any, before: Piece) -> None:
        self.before = before
        self._path, self._file, self._digest = path, file, digest
        self._waiting: list[Piece] = []
        self._last = time.monotonic()
        last = int(before.end.max(initial=0))
        covered = np.zeros(last + 1, dtype=np.int64)
        for first, end in zip(before.first.tolist(), before.end.tolist(), strict=True):
            covered[first + 1 : end + 1] += 1
        if (covered > 1).any():
            raise UserError(
                f"{path.parent}: token {int(np.argmax(covered > 1))} is in two sums; all ranks must see the "
                "same folder, and only one evaluation may write into it; delete the folder to begin anew"
            )
        self._covered = np.cumsum(covered)

    @property
    def tokens(self) -> int:
        """Number of tokens whose losses are in `before`."""
        return int((self.before.end - self.before.first).sum())

    def done(self, windows: NDArray[np.int64]) -> bool:
        """Tell whether the targets of all these windows, `(K, 3)` as in `Question`, are in `before`.

        Raises:
            ValueError: some are, and others are not.
        """
        first, end = (np.minimum(windows[:, i], self._covered.size - 1) for i in (1, 2))
        found = int((self._covered[end] - self._covered[first]).sum())
        wanted = int((windows[:, 2] - windows[:, 1]).sum())
        if 0 < found < wanted:
            raise UserError(
                f"{self._path}: the sums are of other batches than those that are scored now; delete the "
                "folder to begin anew"
            )
        return found == wanted

    def add(self, piece: Piece) -> None:
        """Keep the sums of what was scored together; they are written at the latest in the next call."""
        self._waiting.append(piece)
        if time.monotonic() - self._last >= EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting, but no sums that are not finite; waits for the device.

        Raises:
            OSError: the file cannot be written.
        """
        waiting, self._waiting = self._waiting, []
        lines = []
        for piece in waiting:
            nats = piece.nats.cpu().tolist()
            rows = zip(piece.first.tolist(), piece.end.tolist(), nats, strict=True)
            if np.isfinite(nats).all():  # else the evaluation will fail, and so will the next one
                lines.append(_line([list(row) for row in rows], self._digest))
        try:
            rest = b"".join(lines)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as e:
            raise OSError(
                e.errno,
                f"cannot write {self._path}: {e.strerror}; the same command goes on from what is in it",
            ) from e
        self._last = time.monotonic()


def _line(data: Any, digest: Any) -> bytes:
    """Return a line with its checksum, and add it to `digest`."""
    text = json.dumps(data, separators=(",", ":")).encode()
    digest.update(text)
    checksum: str = digest.hexdigest()
    return text + b" " + checksum[:DIGITS].encode() + b"\n"


@contextmanager
def open_sums(folder: Path, facts: dict[str, Any], dist: Dist, *, fresh: bool = False) -> Iterator[Sums]:
    """Open the sums of one way to score; every rank must call it.

    Args:
        folder: made if it is missing; all ranks must see the same one.
        facts: what the sums depend on, JSON values by name; "way" names the files.
        dist: the ranks.
        fresh: begin anew in any case.

    Raises:
        ValueError: a file is of other facts, or damaged, or in use. OSError: it cannot be read or written.
    """
    way = facts["way"]
    path = folder / (f"{way}.{dist.rank}.sums" if dist.rank else f"{way}.sums")
    file = -1
    try:
        with _together(dist):
            folder.mkdir(parents=True, exist_ok=True)
            file = _locked(path)
        with _together(dist):
            if dist.is_main and fresh:
                for other in _files(folder, way):
                    os.truncate(other, 0)
        with _together(dist):
            digest, _ = _read(path, facts, file)
        with _together(dist):
            before = _read_all(folder, facts)
            sums = Sums(path, file, digest, before)
        digests = dist.gather_ints([int.from_bytes(_fingerprint(before), "little", signed=True)])
        with _together(dist):
            if any(row != digests[0] for row in digests):
                raise UserError(
                    f"{folder} has other files on other hosts; pass a folder that all ranks share"
                )
        yield sums
    finally:
        if file >= 0:
            os.close(file)


@contextmanager
def _together(dist: Dist) -> Iterator[None]:
    """Let no rank go on before all have ended the block, and none if one has failed."""
    error: Exception | None = None
    try:
        yield
    except (OSError, ValueError) as e:
        error = e
    dist.check(error)


def _locked(path: Path) -> int:
    """Open a file to append to, which no other process may write until it is closed."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(file)
        raise UserError(f"{path} is in use by another evaluation; wait for it, or pass another folder") from e
    return file


def _files(folder: Path, way: str) -> list[Path]:
    return sorted(p for p in folder.iterdir() if re.fullmatch(rf"{way}(\.\d+)?\.sums", p.name))


def _read_all(folder: Path, facts: dict[str, Any]) -> Piece:
    """Return what is in the files of all ranks."""
    rows: list[list[float]] = []
    for path in _files(folder, facts["way"]):
        rows += _read(path, facts)[1]
    rows.sort()
    columns = [[row[i] for row in rows] for i in range(3)]
    first, end = (np.array(c, dtype=np.int64) for c in columns[:2])
    return Piece(first, end, torch.tensor(columns[2], dtype=torch.float64))


def _fingerprint(piece: Piece) -> bytes:
    parts = [piece.first, piece.end, piece.nats.numpy()]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).digest()[:8]


def _read(path: Path, facts: dict[str, Any], file: int = -1) -> tuple[Any, list[list[float]]]:
    """Return the digest of a file's lines, and their rows; its last line is dropped if it has no end.

    Args:
        path: the file. facts: what it should be of.
        file: its descriptor if it is to be appended to; then it is cut after the last whole line, and gets
            its first line if it has none.
    """
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if not whole and data[: len(BEGINNING)] != BEGINNING[: len(data)]:
        raise UserError(f"{path} is not a file of sums; move it away, or pass another folder")
    digest, rows = hashlib.sha256(), list[list[float]]()
    for number, line in enumerate(data[:whole].split(b"\n")[:-1]):
        text, _, found = line.rpartition(b" ")
        digest.update(text)
        if found != digest.hexdigest()[:DIGITS].encode():
            raise UserError(
                f"{path} is damaged in line {number + 1}: its checksum does not fit; delete the file, and "
                "its part of the text will be scored again"
            )
        if number:
            rows += json.loads(text)
        else:
            _check(path, json.loads(text), facts)
    if file >= 0:
        os.ftruncate(file, whole)
        if not whole:
            os.write(file, _line({"format": FORMAT, **facts}, digest))
    return digest, rows


def _check(path: Path, found: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raise UserError if a file is not of these facts."""
    wanted = {"format": FORMAT, **facts}
    names = [n for n in (*wanted, *(set(found) - set(wanted))) if found.get(n) != wanted.get(n)]
    if names:
        shown = "; ".join(f"{n} is {wanted.get(n)} now and was {found.get(n)}" for n in names)
        raise UserError(
            f"{path} has the sums of another evaluation: {shown}. Pass another folder, or delete this file "
            "to begin anew"
        )
