"""The artifact file, byte by byte, and the strict parser of everything in it that is not a weight.

All integers are little-endian.

| offset | bytes | meaning |
|---|---|---|
| 0 | 4 | magic `PGLF` |
| 4 | 2 | format version, 2 (1 had brotli streams of column-major codes) |
| 6 | 2 | zero |
| 8 | 4 | `n`, bytes of the stored header |
| 12 | 4 | `m`, bytes of the header's JSON, at most 1 MiB |
| 16 | n | header: brotli stream of UTF-8 JSON |
| 16 + n | ... | sections, back to back in the order of the table, each one stream |
| size - 32 | 32 | SHA-256 of every byte before it |

Header JSON, one object with exactly these keys:
- `model`: the resolved `ModelConfig`; `tokenizer_sha256`: 64 hex digits; `config_hash`: 16 hex digits;
  `limit`: the byte limit that the file was written under.
- `tensors`: the parameters, `{"name", "kind", "shape", "bits"}`; kind `matrix` (int8 codes and float16 row
  steps, bits 4-8), `gate` (the same, bits 8) or `small` (float16 values, bits 16).
- `sections`: the table, `{"name", "kind", "dtype", "shape", "offset", "length", "raw"}`; `offset` from the
  end of the header, `length` stored bytes, `raw` bytes after decoding.

Sections follow from the tensors and nothing else (`plan_sections`), in this order:
1. kind `codes`: for each matrix parameter, in order, one section for each matrix `(R, C)` of the bank, named
   `parameter.index`: the stream of `pgolf.ops.encode_codes`, whose bytes csrc/kernels/range_coder.h specifies
   (and `decode_codes_ref` reads with nothing compiled). Matrices do not depend on each other.
2. kind `steps`, named `scales`: the row steps of all matrix parameters, then of all gates, float16 as two
   byte planes (all low bytes, then all high bytes).
3. kind `gates`, named `gates`: the int8 codes of all gates, row-major.
4. kind `small`, named `small`: the values of all small parameters, float16, two byte planes.
The last three are brotli streams and always there, empty or not.

A parser must reject whatever disagrees with this text. Ours raises `ArtifactError` and nothing else, and
allocates only after the declared sizes were checked: at most 1 GiB of raw bytes over all sections.
"""

from __future__ import annotations

import hashlib
import struct

from pgolf.artifact.codec import CodecError, compress, decompress
from pgolf.artifact.header import ArtifactError, Header, encode_header, parse_header

__all__ = ["MAGIC", "VERSION", "ArtifactError", "frame", "parse"]

MAGIC = b"PGLF"
VERSION = 2
PREFIX = struct.Struct("<4sHHII")
DIGEST_BYTES = 32
MAX_HEADER_BYTES = 1 << 20


def frame(header: Header, streams: list[bytes]) -> bytes:
    """Return the complete file: prefix, header, the sections' streams, checksum."""
    text = encode_header(header)
    stored = compress(text, quality=11)
    body = b"".join([PREFIX.pack(MAGIC, VERSION, 0, len(stored), len(text)), stored, *streams])
    return body + hashlib.sha256(body).digest()


def parse(data: bytes) -> tuple[Header, list[memoryview]]:
    """Return an artifact's header and its sections' stored bytes, with lengths and checksum checked.

    Args:
        data: the whole file.
    Raises:
        ArtifactError: foreign, truncated, corrupt or contradictory; the message names the part.
    """
    if len(data) < PREFIX.size + DIGEST_BYTES:
        raise ArtifactError(
            f"artifact is truncated: {len(data)} bytes, the smallest has {PREFIX.size + DIGEST_BYTES}"
        )
    magic, version, zero, stored, raw = PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise ArtifactError(f"not a pgolf artifact: expected magic {MAGIC!r}, got {magic!r}")
    if version != VERSION or zero:
        raise ArtifactError(
            f"artifact version {version} (flags {zero}) is not readable, expected {VERSION} (0)"
        )
    body = memoryview(data)[:-DIGEST_BYTES]
    begin = PREFIX.size + stored
    if begin > len(body) or raw > MAX_HEADER_BYTES:
        raise ArtifactError(
            f"artifact header of {stored} bytes ({raw} raw) does not fit the file of {len(data)} bytes "
            f"(raw limit {MAX_HEADER_BYTES}); the file is truncated or corrupt"
        )
    if hashlib.sha256(body).digest() != data[-DIGEST_BYTES:]:
        raise ArtifactError("artifact checksum does not match its contents; the file is corrupt or truncated")
    try:
        text = decompress(body[PREFIX.size : begin], raw_length=raw)
    except CodecError as e:
        raise ArtifactError(f"artifact header: {e}") from e
    header = parse_header(text)
    return header, _cut(header, body[begin:])


def _cut(header: Header, payload: memoryview) -> list[memoryview]:
    """Return the stored bytes of each section; the table must cover the payload without gap or overlap."""
    streams, position = [], 0
    for section in header.sections:
        if section.offset != position or section.length > len(payload) - position:
            raise ArtifactError(
                f"artifact section {section.plan.name!r} claims bytes {section.offset} to "
                f"{section.offset + section.length}, expected to start at {position} of {len(payload)}"
            )
        streams.append(payload[position : position + section.length])
        position += section.length
    if position != len(payload):
        raise ArtifactError(f"artifact sections end at {position}, the payload has {len(payload)} bytes")
    return streams
