"""General compressors for an artifact, with decoders whose memory is bounded, and byte planes of float16.

Brotli compresses everything except for the codes of the matrices. The codes, which are nearly all of an
artifact, go through `pgolf.ops.range_coder`, or through brotli, lzma or zlib where `artifact.coder` says so.
"""

from __future__ import annotations

import lzma
import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pgolf.config import Coder

S = TypeVar("S")
R = TypeVar("R")

WINDOW_BITS = 24
"""Largest brotli window, 16 MiB: more than any one section."""
XZ_PRESET, XZ_MEMORY, ZLIB_LEVEL = 6, 16 << 20, 9
"""What the published stacks wrote with, and the bytes that the decoder of that preset (it needs 9 MiB) may
take, whatever a stream asks for."""


class CodecError(ValueError):
    """A stream that does not decode to the declared number of bytes."""


def compress(raw: bytes, *, quality: int, coder: Coder = "brotli") -> bytes:
    """Return the stream of `raw`.

    Args:
        raw: bytes to compress.
        quality: of brotli, 0 to 11; higher is smaller and slower.
        coder: "brotli", "lzma" (an xz file with preset 6) or "zlib" (level 9).
    Raises:
        ValueError: quality out of range. RuntimeError: brotli is not installed.
    """
    if not 0 <= quality <= 11:
        raise ValueError(f"artifact quality must be in [0, 11] (brotli), got {quality}")
    if coder == "lzma":
        return lzma.compress(raw, preset=XZ_PRESET)
    if coder == "zlib":
        return zlib.compress(raw, ZLIB_LEVEL)
    stream: bytes = _brotli().compress(raw, quality=quality, lgwin=WINDOW_BITS)
    return stream


def decompress(stream: bytes, *, raw_length: int, coder: Coder = "brotli") -> bytes:
    """Return the `raw_length` bytes of a stream; whatever the stream is, memory for about as many.

    Args:
        stream: the whole stream and nothing else. raw_length: bytes that it must hold. coder: its coder.
    Raises:
        CodecError: a corrupt or truncated stream, one of another length, or one with bytes after its end.
        RuntimeError: brotli is missing or older than 1.2 (which cannot bound its output).
    """
    brotli = _brotli()
    try:
        raw, ended = _decoded(stream, coder, most=raw_length + 1)
    except (brotli.error, lzma.LZMAError, zlib.error) as e:
        raise CodecError(f"corrupt {coder} stream of {len(stream)} bytes") from e
    if len(raw) > raw_length:
        raise CodecError(f"expected {raw_length} bytes, the stream holds more")
    if len(raw) != raw_length or not ended:
        raise CodecError(f"expected {raw_length} bytes and then the stream's end, got {len(raw)} bytes")
    return raw


def _decoded(stream: bytes, coder: Coder, *, most: int) -> tuple[bytes, bool]:
    """Return about `most` bytes of a stream, if it has as many, and whether it ends where the bytes do."""
    if coder != "brotli":
        xz = coder == "lzma"
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY) if xz else zlib.decompressobj()
        raw = decoder.decompress(stream, most)
        return raw, decoder.eof and not decoder.unused_data
    decoder = _brotli().Decompressor()
    parts: list[bytes] = []
    left = most
    piece = decoder.process(stream, output_buffer_limit=left)
    while piece:
        parts.append(piece)
        left -= len(piece)
        if left <= 0 or decoder.is_finished():
            break
        piece = decoder.process(b"", output_buffer_limit=left)
    return b"".join(parts), decoder.is_finished()


def split_bytes(values: NDArray[Any]) -> bytes:
    """Return 2-byte values as two planes, all low bytes, then all high bytes, which compress better."""
    little = values.astype(values.dtype.newbyteorder("<"))
    planes: bytes = little.view(np.uint8).reshape(-1, 2).T.tobytes()
    return planes


def join_bytes(raw: bytes, dtype: type[np.generic] = np.float16) -> NDArray[Any]:
    """Return the values of two byte planes; the inverse of `split_bytes`."""
    planes = np.frombuffer(raw, np.uint8).reshape(2, -1)
    little = np.ascontiguousarray(planes.T).reshape(-1).view(np.dtype(dtype).newbyteorder("<"))
    values: NDArray[Any] = little.astype(dtype)
    return values


def in_threads(work: Callable[[S], R], items: Iterable[S]) -> list[R]:
    """Return [work(item) for item in items], on a thread per core; our coders release Python's lock."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(work, items))


def _brotli() -> Any:
    try:
        import brotli
    except ImportError as e:
        raise RuntimeError(
            "artifacts are compressed with brotli, which is not installed; run: pip install 'brotli>=1.2'"
        ) from e
    if not hasattr(brotli.Decompressor, "can_accept_more_data"):
        raise RuntimeError(
            f"brotli {brotli.__version__} cannot bound its output; run: pip install 'brotli>=1.2'"
        )
    return brotli
