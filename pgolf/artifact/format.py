"""The artifact file, byte by byte, and the strict parser of everything in it that is not a weight.

All integers are little-endian.

| offset | bytes | meaning |
|---|---|---|
| 0 | 4 | magic `PGLF` |
| 4 | 2 | format version, 4 (1: brotli streams of column-major codes, 2: no pools, 3: no trellis) |
| 6 | 2 | zero |
| 8 | 4 | `n`, bytes of the stored header |
| 12 | 4 | `m`, bytes of the header's JSON, at most 1 MiB |
| 16 | n | header: brotli stream of UTF-8 JSON |
| 16 + n | ... | sections, back to back in the order of the table, each one stream |
| size - 32 | 32 | SHA-256 of every byte before it |

Header JSON, one object with exactly these keys, of which only `coder` may be absent:

- `model`: the resolved `ModelConfig`, with the settings `recurrence_start`, `recurrence_end` and
  `recurrence_repeats` under their former names `loop_start`, `loop_end` and `loops`, and with the newer
  settings of `LATER` in `header.py` only where they are not what is said there; `tokenizer_sha256`: 64 hex
  digits; `config_hash`: 16 hex digits; `limit`: the byte limit that the file was written under.
- `coder`: "brotli", "lzma" or "zlib", what the codes are written with; absent for pgolf's range coder.
- `tensors`: the parameters, `{"name", "kind", "shape", "bits", "steps", "columns", "trellis"}`; kind `matrix`
  (int8 codes, bits 4-8), `gate` (int8 codes, bits 8) or `small` (float16 values, bits 16, steps "none").
  `steps` is this format's word for quantization scales: those of the rows are "float16" or, for a matrix,
  "log": float16(2^(n / 8)) with an integer n in [-160, 127]; then `columns` may be true, for factors of the
  columns in the same form. w = value * scale * column factor.
  A code's value is the code; with `trellis` true, which a matrix may have, it is a quarter more or less, as
  csrc/kernels/trellis.h says of the codes above it in its column.
- `corrections`: `{"name", "index", "rank", "left_scales", "group"}`: the product A B that is added to matrix
  `index` of a parameter `(R, C)`. A `(R, rank)` int8 has `left_scales` = 1 or R scales (a row), B `(rank, C)`
  int8 one for every `group` elements, row-major.
- `sections`: the table, `{"name", "kind", "dtype", "shape", "transposed", "pool", "offset", "length",
  "raw"}`; `offset` from the end of the header, `length` stored bytes, `raw` bytes after decoding.

Sections follow from the tensors and corrections and nothing else (`plan_sections`), in this order:

1. kind `codes`: for each matrix parameter, in order, one section for each matrix `(R, C)` of the bank, named
   `parameter.index`: the stream of `pgolf.ops.encode_codes`, whose bytes csrc/kernels/range_coder.h specifies
   (`decode_codes_ref` is a second statement of them, in Python). Three kinds of matrices are coded with the
   rows of another as their `pool` (null for the rest), which must be decoded first:
   `qo_bank.i` with `kv_bank.i`, if the banks have as many matrices of one width, and the second half of them
   (outputs of the heads, with the values) transposed; `mlp_down_bank.i`, transposed, with `mlp_up_bank.i`.
   With a `coder` no section has a pool and all are transposed: the int8 codes, column after column, as one
   brotli stream, one xz file whose decoder takes at most 16 MiB, or one zlib stream.
2. kind `steps`: `scales`, the "float16" scales of the rows of all matrices, then of all gates; then, for the
   "log" ones, in groups (each matrix's rows, then its columns if they have factors): `centers`, one int16 per
   group, and `exponents`, int8, n minus the group's center.
3. kind `gates`, named `gates`: the int8 codes of all gates, row-major.
4. kind `small`, named `small`: the values of all small parameters, float16.
5. kind `corrections`: `corrections`, int8, A then B of each; `correction_scales`, float16, of A then of B.

All but the codes are brotli streams and always there, empty or not. float16 and int16 are stored as two
planes: all low bytes, then all high bytes.

A reader goes through the file once, front to back, and must reject whatever disagrees with this text. Ours
raises `ArtifactError` and nothing else. It allocates only what the file's own length allows: the header at
most 1 MiB, all sections together at most 1 MiB + 64 x the file's bytes (and at most 1 GiB) after decoding,
checked before the first section is read; a decoder of codes
takes at most 26 MiB of its own, and 2 bytes for each code of its matrix and pool.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterator
from typing import BinaryIO

from pgolf.artifact.codec import CodecError, compress, decompress
from pgolf.artifact.header import MAX_RAW_BYTES, ArtifactError, Header, Section, encode_header, parse_header

__all__ = ["MAGIC", "VERSION", "ArtifactError", "Reader", "frame", "parse", "raw_limit"]

MAGIC = b"PGLF"
VERSION = 4
PREFIX = struct.Struct("<4sHHII")
DIGEST_BYTES = 32
MAX_HEADER_BYTES = 1 << 20
MAX_EXPANSION = 64
"""Trained codes expand 2.3 times; matrices that are still zero take two bytes and may be most of a toy."""


def raw_limit(file_bytes: int) -> int:
    """Return how many bytes the sections of a file of this size may have after decoding."""
    return min(MAX_RAW_BYTES, (1 << 20) + MAX_EXPANSION * file_bytes)


def frame(header: Header, streams: list[bytes]) -> bytes:
    """Return the complete file: prefix, header, the sections' streams, checksum."""
    text = encode_header(header)
    stored = compress(text, quality=11)
    body = b"".join([PREFIX.pack(MAGIC, VERSION, 0, len(stored), len(text)), stored, *streams])
    return body + hashlib.sha256(body).digest()


class Reader:
    """An artifact as it comes from a file: the header at once, then one section after the other.

    The checksum stands at the end, so it is compared after the last section; whoever iterates to the end and
    meets no error has read what was written.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        """Read and check the header.

        Args:
            file: at its beginning. size: bytes of the whole file.
        Raises:
            ArtifactError: foreign, truncated or contradictory; the message names the part.
        """
        self._file, self._hash = file, hashlib.sha256()
        self.digest = b""  # of all but the last 32 bytes, once every section has been read
        if size < PREFIX.size + DIGEST_BYTES:
            raise ArtifactError(
                f"artifact is truncated: {size} bytes, the smallest has {PREFIX.size + DIGEST_BYTES}"
            )
        stored, raw = _check_prefix(self._take(PREFIX.size))
        payload = size - PREFIX.size - stored - DIGEST_BYTES
        if payload < 0 or raw > MAX_HEADER_BYTES:
            raise ArtifactError(
                f"artifact header of {stored} bytes ({raw} raw) does not fit the file of {size} bytes "
                f"(raw limit {MAX_HEADER_BYTES}); the file is truncated or corrupt"
            )
        try:
            text = decompress(self._take(stored), raw_length=raw)
        except CodecError as e:
            raise ArtifactError(f"artifact header is corrupt: {e}") from e
        self.header = parse_header(text, raw_limit=raw_limit(size))
        _check_table(self.header, payload)

    def sections(self) -> Iterator[tuple[Section, bytes]]:
        """Yield each section with its stored bytes; once.

        Raises:
            ArtifactError: after the last one, when the checksum does not match; a file that ends early.
        """
        for section in self.header.sections:
            yield section, self._take(section.length)
        self.digest = self._hash.digest()
        if self._take(DIGEST_BYTES) != self.digest or self._file.read(1):
            raise ArtifactError(
                "artifact checksum does not match its contents; the file is corrupt or truncated"
            )

    def _take(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            raise ArtifactError(f"artifact ends inside of {count} bytes it announced; the file is truncated")
        self._hash.update(data)
        return data


def parse(data: bytes) -> tuple[Header, list[bytes]]:
    """Return an artifact's header and its sections' stored bytes, with lengths and checksum checked.

    Args:
        data: the whole file.
    Raises:
        ArtifactError: foreign, truncated, corrupt or contradictory; the message names the part.
    """
    reader = Reader(io.BytesIO(data), len(data))
    return reader.header, [stream for _, stream in reader.sections()]


def _check_prefix(prefix: bytes) -> tuple[int, int]:
    """Return the stored and the raw length of the header."""
    magic, version, zero, stored, raw = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise ArtifactError(f"not a pgolf artifact: expected magic {MAGIC!r}, got {magic!r}")
    if version != VERSION or zero:
        raise ArtifactError(
            f"artifact version {version} (flags {zero}) is not readable, expected {VERSION} (0)"
        )
    return stored, raw


def _check_table(header: Header, payload: int) -> None:
    """Refuse a table that does not cover the payload without gap or overlap."""
    position = 0
    for section in header.sections:
        if section.offset != position or section.length > payload - position:
            raise ArtifactError(
                f"artifact section {section.plan.name!r} claims bytes {section.offset} to "
                f"{section.offset + section.length}, expected to start at {position} of {payload}; "
                "the file is truncated or corrupt"
            )
        position += section.length
    if position != payload:
        raise ArtifactError(
            f"artifact sections end at {position}, the payload has {payload} bytes; "
            "the file is corrupt or not whole"
        )
