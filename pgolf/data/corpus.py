"""Documents from files, and the small sample of text that is bundled with the package.

Formats: `.jsonl` (one `{"text": ...}` a line), `.txt` (one document, or several divided by lines that hold
only `<|endoftext|>`), `.parquet` (a `text` column; needs pyarrow); `.jsonl` and `.txt` also as `.xz`. Reading
is split in two so that parsing can be spread over processes: `read_batches` only finds where documents begin
and end, `RawBatch.documents` parses them.
"""

from __future__ import annotations

import contextlib
import json
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pgolf.peers import find_peer

SEPARATOR = b"<|endoftext|>"
FORMATS = ".jsonl, .jsonl.xz, .txt, .txt.xz, .parquet"


class Document(NamedTuple):
    """One document and where it came from (`line` counts from 1; a row number in parquet files)."""

    text: str
    source: str
    line: int


class Sample(NamedTuple):
    """The bundled text: about 1 MB of English Wikipedia to train on and 100 KB to validate on."""

    train: Path
    val: Path


def sample_paths() -> Sample:
    """Return the bundled sample's files (licence: LICENSE beside them)."""
    folder = Path(__file__).parent / "sample"
    return Sample(folder / "train.jsonl.xz", folder / "val.jsonl.xz")


@dataclass(frozen=True)
class RawBatch:
    """Some undecoded documents of one file, in order."""

    source: str
    """The file's path."""
    is_json: bool
    """Each item is a JSON object; else it is the document itself."""
    items: list[tuple[int, bytes]]
    """Line (or row) number and raw bytes of each document."""
    consumed: int
    """Bytes of the (compressed) file read so far: for progress."""

    def documents(self) -> Iterator[Document]:
        """Parse the batch.

        Raises:
            ValueError: a document that is not valid, naming file and line.
        """
        for line, raw in self.items:
            where = f"{self.source}, line {line}"
            yield Document(
                _parse_json(raw, where) if self.is_json else _decode(raw, where), self.source, line
            )


def read_batches(path: Path, *, batch_bytes: int = 1 << 20) -> Iterator[RawBatch]:
    """Yield the documents of a file, unparsed, in batches of about `batch_bytes` bytes.

    Raises:
        FileNotFoundError: no such file. ValueError: unknown format or damaged compression.
        RuntimeError: a parquet file without pyarrow.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no text file at {path}; expected one of {FORMATS}")
    kind = _kind(path)
    with path.open("rb") as raw:
        items: list[tuple[int, bytes]] = []
        size = 0
        for line, item in _items(path, raw, kind):
            items.append((line, item))
            size += len(item)
            if size >= batch_bytes:
                yield RawBatch(str(path), kind == ".jsonl", items, raw.tell())
                items, size = [], 0
        if items:
            yield RawBatch(str(path), kind == ".jsonl", items, raw.tell())


def iterate_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of one file in order.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: as `read_batches` and `RawBatch.documents`.
    """
    for batch in read_batches(path):
        yield from batch.documents()


def _kind(path: Path) -> str:
    suffixes = path.suffixes
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".xz" else path.suffix
    if kind not in (".jsonl", ".txt", ".parquet") or path.name.endswith(".parquet.xz"):
        raise ValueError(f"{path}: unknown text format, expected one of {FORMATS}")
    return kind


def _items(path: Path, raw: BinaryIO, kind: str) -> Iterator[tuple[int, bytes]]:
    """Yield (line, bytes) of each document of an open file."""
    if kind == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        with lzma.LZMAFile(raw) if path.suffix == ".xz" else contextlib.nullcontext(raw) as lines:
            if kind == ".jsonl":
                yield from ((n, line) for n, line in enumerate(lines, start=1) if not line.isspace())
            else:
                yield from _split_text(lines)
    except (lzma.LZMAError, EOFError) as e:
        raise ValueError(f"{path}: damaged or truncated xz data ({e}); copy it again") from e


def _split_text(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Cut a text file at its separator lines; empty documents are left out."""
    first, parts = 1, list[bytes]()
    for number, line in enumerate(lines, start=1):
        if line.rstrip(b"\r\n") != SEPARATOR:
            parts.append(line)
            continue
        if parts:
            yield first, b"".join(parts)
        first, parts = number + 1, []
    if parts:
        yield first, b"".join(parts)


def _parquet_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (row, text) of a parquet file's `text` column."""
    peer = find_peer("pyarrow", "pyarrow.parquet")
    if not peer.usable:
        raise RuntimeError(
            f"{path}: reading parquet needs pyarrow, which is {peer.problem}; pip install pyarrow"
        )
    table = peer.found.ParquetFile(path)
    if "text" not in table.schema_arrow.names:
        raise ValueError(f"{path}: no column 'text'; columns: {', '.join(table.schema_arrow.names)}")
    row = 0
    for batch in table.iter_batches(batch_size=1024, columns=["text"]):
        for value in batch.column(0).to_pylist():
            row += 1
            if value is None:
                raise ValueError(f"{path}, line {row}: the text is null")
            yield row, value.encode()


def _parse_json(raw: bytes, where: str) -> str:
    try:
        value = json.loads(raw)
    except ValueError as e:
        raise ValueError(f'{where}: not JSON ({e}); expected one {{"text": ...}} object a line') from e
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{where}: expected an object with a string "text", got {raw[:60]!r}')
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(
            f"{where}: the text has a lone surrogate at character {e.start}; it is not Unicode"
        ) from e
    return text


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        raise ValueError(f"{where}: not UTF-8 at byte {e.start} of the document ({e.reason})") from e
