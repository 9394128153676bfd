"""Documents from text files, and the small sample of text that is part of the package.

Formats: `.jsonl` or `.ndjson` (one `{"text": ...}` per line), `.txt` (one document, or several separated by
lines that contain only `<|endoftext|>`), and `.parquet` (a `text` column; needs pyarrow). All of them except
for the last may be compressed as `.xz`, `.gz` or `.zst`. Text is UTF-8; a byte order mark at the beginning of
a file is removed. Reading has two parts, so that parsing can run in several processes: `read_batches` finds
where documents begin and end, and `RawBatch.documents` parses them.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pgolf.config_io import DuplicateKeyError, unique_pairs
from pgolf.data.compressed import SUFFIXES, open_text
from pgolf.errors import RunError, UserError
from pgolf.peers import find_peer

SEPARATOR = b"<|endoftext|>"
TEXT_KEY = "text"
FORMATS = ".jsonl, .ndjson, .txt (also as .xz, .gz, .zst), .parquet"

_JSON = (".jsonl", ".ndjson")
_MARKS = (  # the longer ones first, because the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


class Document(NamedTuple):
    """One document and where it comes from; `line` counts from 1 and is the row in parquet files."""

    text: str
    source: str
    line: int


class Sample(NamedTuple):
    """The text in the package: about 1 MB of English Wikipedia to train on and 100 KB to validate on."""

    train: Path
    val: Path


def sample_paths() -> Sample:
    """Return the files of the sample (for its licence see the file LICENSE next to them)."""
    folder = Path(__file__).parent / "sample"
    return Sample(folder / "train.jsonl.xz", folder / "val.jsonl.xz")


@dataclass(frozen=True)
class RawBatch:
    """Several consecutive documents of one file, not parsed yet."""

    source: str
    """Path of the file."""
    is_json: bool
    """Whether each item is a JSON object (true) or the document itself (false)."""
    items: list[tuple[int, bytes]]
    """Line (or row) number and raw bytes of each document."""
    consumed: int
    """Bytes of the file, as compressed, that were read so far; for the progress line."""
    text_key: str = TEXT_KEY
    """Key of the text in a JSON object."""

    def documents(self) -> Iterator[Document]:
        """Parse the batch.

        Raises:
            ValueError: a document is not valid; the message names file and line.
        """
        for line, raw in self.items:
            where = f"{self.source}, line {line}"
            yield Document(
                _parse_json(raw, self.text_key, where) if self.is_json else _decode(raw, where),
                self.source,
                line,
            )


def check_text_file(path: Path) -> None:
    """Raise OSError or ValueError if there is no file at `path`, a folder, or a file of unknown format."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected text files; name those in it: {path}/*.jsonl")
    if not path.is_file():
        raise FileNotFoundError(f"no text file at {path}; expected one of {FORMATS}")
    _kind(path)


def read_batches(path: Path, *, text_key: str = TEXT_KEY, batch_bytes: int = 1 << 20) -> Iterator[RawBatch]:
    """Yield the documents of a file, not parsed, in batches of about `batch_bytes` bytes.

    Args:
        path: the file.
        text_key: key of the text in JSON objects, or name of its column in a parquet file.

    Raises:
        OSError: there is no such file, or it is a folder.
        ValueError: the format is unknown, the encoding is not UTF-8, or compressed data are damaged.
        RuntimeError: the package that reads .parquet or .zst is missing.
    """
    check_text_file(path)
    kind = _kind(path)
    with path.open("rb") as raw:
        items: list[tuple[int, bytes]] = []
        size = 0
        for line, item in _items(path, raw, kind, text_key):
            items.append((line, item))
            size += len(item)
            if size >= batch_bytes:
                yield RawBatch(str(path), kind in _JSON, items, raw.tell(), text_key)
                items, size = [], 0
        if items:
            yield RawBatch(str(path), kind in _JSON, items, raw.tell(), text_key)


def iterate_documents(path: Path, *, text_key: str = TEXT_KEY) -> Iterator[Document]:
    """Yield the documents of one file in order.

    Raises:
        OSError, ValueError, RuntimeError: as in `read_batches` and `RawBatch.documents`.
    """
    for batch in read_batches(path, text_key=text_key):
        yield from batch.documents()


def _kind(path: Path) -> str:
    suffixes = path.suffixes
    packed = len(suffixes) > 1 and suffixes[-1] in SUFFIXES
    kind = suffixes[-2] if packed else path.suffix
    if kind not in (*_JSON, ".txt", ".parquet") or (packed and kind == ".parquet"):
        raise UserError(f"{path}: unknown text format, expected one of {FORMATS}")
    return kind


def _items(path: Path, raw: io.BufferedReader, kind: str, text_key: str) -> Iterator[tuple[int, bytes]]:
    """Yield (line, bytes) of each document of an open file."""
    if kind == ".parquet":
        yield from _parquet_rows(path, text_key)
        return
    lines = _utf8_lines(path, open_text(path, raw))
    if kind in _JSON:
        yield from ((n, line) for n, line in enumerate(lines, start=1) if not line.isspace())
    else:
        yield from _split_text(lines)


def _utf8_lines(path: Path, file: io.BufferedReader) -> Iterator[bytes]:
    """Return the lines of a file without its byte order mark; refuse a file that is not UTF-8."""
    head, first = file.peek(64)[:64], file.readline()
    found = next((name for mark, name in _MARKS if first.startswith(mark)), None) or _zeros(head)
    if found:
        raise UserError(
            f"{path}: the file is {found}, expected UTF-8; convert it: "
            f"iconv -f {found} -t UTF-8 {path.name} > utf8-{path.name} (decompress a compressed file first)"
        )
    first = first.removeprefix(codecs.BOM_UTF8)
    return itertools.chain([first] if first else [], file)


def _zeros(head: bytes) -> str | None:
    """Return the wide encoding whose pattern of zero bytes `head`, the beginning of a file, has; or None."""
    for name, width, places in (
        ("UTF-32LE", 4, (1, 2, 3)),
        ("UTF-32BE", 4, (0, 1, 2)),
        ("UTF-16LE", 2, (1,)),
        ("UTF-16BE", 2, (0,)),
    ):
        whole = head[: len(head) // width * width]
        zero = [whole[i::width].count(0) == len(whole) // width for i in range(width)]
        if len(whole) >= 4 * width and [i for i in range(width) if zero[i]] == list(places):
            return name
    return None


def _split_text(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the documents of a text file, which separator lines divide; empty ones are left out."""
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


def _parquet_rows(path: Path, text_key: str) -> Iterator[tuple[int, bytes]]:
    """Yield (row, text) of one column of a parquet file: strings, or bytes that are UTF-8."""
    peer, arrow = find_peer("pyarrow", "pyarrow.parquet"), find_peer("pyarrow", "pyarrow")
    if not peer.usable:
        raise RunError(f"{path}: reading parquet needs pyarrow, which is {peer.problem}; pip install pyarrow")
    pyarrow, parquet = arrow.found, peer.found
    try:
        table = parquet.ParquetFile(path)
        schema = table.schema_arrow
        if text_key not in schema.names:
            raise UserError(
                f"no column {text_key!r}; columns: {', '.join(schema.names)}; choose one with --text-key"
            )
        if schema.names.count(text_key) > 1:
            raise UserError(
                f"{schema.names.count(text_key)} columns are called {text_key!r}; rename all except for one"
            )
        kind = schema.field(text_key).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not str(kind).startswith(
            ("string", "large_string", "binary", "large_binary", "fixed_size_binary")
        ):
            raise UserError(f"column {text_key!r} holds {kind}, expected string or binary")
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
            # Read as bytes, because pyarrow does not check that strings are UTF-8; `_decode` does.
            column = batch.column(0)
            column = column.dictionary_decode() if isinstance(column, pyarrow.DictionaryArray) else column
            for value in column.cast(pyarrow.large_binary()).to_pylist():
                row += 1
                if value is None:
                    raise UserError(f"line {row}: the text is null")
                yield row, value
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        raise UserError(f"{path}: {e}") from e


def _parse_json(raw: bytes, key: str, where: str) -> str:
    # Numbers are not used, and an int of more than 4,300 digits would be an error, so they become floats.
    try:
        value: Any = json.loads(_decode(raw, where), parse_int=float, object_pairs_hook=unique_pairs)
    except RecursionError as e:
        raise UserError(f'{where}: JSON nested too deeply; expected one {{"{key}": ...}} per line') from e
    except json.JSONDecodeError as e:
        raise UserError(f'{where}: not JSON ({e}); expected one {{"{key}": ...}} object per line') from e
    except DuplicateKeyError as e:
        raise UserError(f"{where}: {e}") from e
    text = value.get(key) if isinstance(value, dict) else None
    if not isinstance(text, str):
        others = [k for k, v in value.items() if isinstance(v, str)] if isinstance(value, dict) else []
        hint = f"; it has strings at {', '.join(others[:8])}: choose one with --text-key" if others else ""
        raise UserError(f'{where}: expected an object with a string "{key}", got {raw[:60]!r}{hint}')
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"{where}: the text is not Unicode (a lone surrogate at character {e.start}); repair it"
        ) from e
    return text


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not UTF-8 at byte {e.start} of the document ({e.reason})") from e
