"""Lossless compression of everything in an artifact except for the codes of its matrices.

Brotli with a decoder whose memory is bounded, and the two byte planes of float16. The codes, which are nearly
all of an artifact, go through `pgolf.ops.range_coder`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

S = TypeVar("S")
R = TypeVar("R")

WINDOW_BITS = 24
"""Largest brotli window, 16 MiB: more than any one section."""


class CodecError(ValueError):
    """A stream that does not decode to the declared number of bytes."""


def compress(raw: bytes, *, quality: int) -> bytes:
    """Return the brotli stream of `raw`.

    Args:
        raw: bytes to compress.
        quality: 0 to 11; higher is smaller and slower.
    Raises:
        ValueError: quality out of range. RuntimeError: brotli is not installed.
    """
    if not 0 <= quality <= 11:
        raise ValueError(f"artifact quality must be in [0, 11] (brotli), got {quality}")
    stream: bytes = _brotli().compress(raw, quality=quality, lgwin=WINDOW_BITS)
    return stream


def decompress(stream: bytes, *, raw_length: int) -> bytes:
    """Return the `raw_length` bytes of a brotli stream; whatever the stream is, memory for about as many.

    Raises:
        CodecError: a corrupt or truncated stream, or one of another length.
        RuntimeError: brotli is missing or older than 1.2 (which cannot bound its output).
    """
    brotli = _brotli()
    decoder = brotli.Decompressor()
    parts: list[bytes] = []
    total = 0
    try:
        piece = decoder.process(stream, output_buffer_limit=raw_length + 1)
        while piece and total <= raw_length:
            parts.append(piece)
            total += len(piece)
            if decoder.is_finished():
                break
            piece = decoder.process(b"", output_buffer_limit=raw_length + 1 - min(total, raw_length))
    except brotli.error as e:
        raise CodecError(f"corrupt brotli stream of {len(stream)} bytes") from e
    if total > raw_length:
        raise CodecError(f"expected {raw_length} bytes, the stream holds more")
    if total != raw_length or not decoder.is_finished():
        raise CodecError(f"expected {raw_length} bytes, the stream ends after {total}")
    return parts[0] if len(parts) == 1 else b"".join(parts)


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
