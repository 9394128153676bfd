"""Reading of xz, gzip and Zstandard files, either completely or with an error.

A file may contain several streams (members, frames) one after another, as `cat a.xz b.xz`, pixz, pigz, bgzip
and pzstd write them, and between them what the format allows: xz stream padding (zeros, a multiple of four),
zeros after gzip members, skippable Zstandard frames. A stream that ends too early, a damaged stream and other
data after a stream are errors that name the file. (`lzma.LZMAFile` takes padding or other data for the end of
the file and ignores the rest silently.)
"""

from __future__ import annotations

import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pgolf.errors import RunError, UserError

_CHUNK, _PIECE = 1 << 16, 1 << 20


class _Codec(NamedTuple):
    """One compressed format; `decoder()` makes an object that reads one stream."""

    name: str
    decoder: Callable[[], _Xz | _Gzip | _Zstd]
    errors: tuple[type[Exception], ...]
    padding: int
    """The number of zero bytes after a stream must be a multiple of this; 0 = there must be none."""


def open_text(path: Path, raw: io.BufferedReader) -> io.BufferedReader:
    """Return the text of an open file: `raw` itself, or its decompressed contents if the suffix says so.

    Reading the result raises ValueError if the data are damaged or cut off, or followed by other data.

    Raises:
        RuntimeError: no installed package can read the .zst file.
    """
    if path.suffix not in SUFFIXES:
        return raw
    return io.BufferedReader(_Chunks(_decode(path, raw, _CODECS[path.suffix]())), _PIECE)


def _decode(path: Path, raw: io.BufferedReader, codec: _Codec) -> Iterator[bytes]:
    """Yield the decompressed file in pieces of limited size, whatever its compression ratio."""
    data = raw.read(_CHUNK)
    if not data:
        raise UserError(f"{path}: the file is empty, not {codec.name} data; copy it again")
    number = 0
    while data:
        number += 1
        decoder = codec.decoder()
        try:
            yield from decoder.feed(data)
            while not decoder.eof:
                data = raw.read(_CHUNK)
                if not data:
                    raise EOFError("the file ends inside a stream")
                yield from decoder.feed(data)
        except codec.errors as e:
            behind = f", or other data, after stream {number - 1}" if number > 1 else ""
            raise UserError(
                f"{path}: damaged or truncated {codec.name} data{behind} ({e}); copy it again"
            ) from e
        data = _skip_padding(path, raw, codec, decoder.unused or raw.read(_CHUNK))


def _skip_padding(path: Path, raw: io.BufferedReader, codec: _Codec, data: bytes) -> bytes:
    """Return the data that follow a stream and the zeros that its format allows after it."""
    zeros = 0
    while codec.padding and data:
        rest = data.lstrip(b"\0")
        zeros += len(data) - len(rest)
        data = rest or raw.read(_CHUNK)
        if rest:
            break
    if zeros % max(1, codec.padding):
        raise UserError(
            f"{path}: {zeros} zero bytes after a stream, but in {codec.name} files their number is a "
            f"multiple of {codec.padding}; the file was cut or joined wrongly: copy it again"
        )
    return data


class _Chunks(io.RawIOBase):
    """A raw file whose contents come from an iterator of byte strings."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Write the next bytes into `buffer` and return their number, which is 0 only at the end."""
        while not self._rest:
            try:
                self._rest = next(self._chunks)
            except StopIteration:
                return 0
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


class _Xz:
    """Decoder of one xz stream; liblzma checks its index, footer and checksums."""

    def __init__(self) -> None:
        self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        self.eof, self.unused = False, b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the text of `data`; afterwards `eof` says if the stream is over, `unused` is what follows."""
        piece = self._decoder.decompress(data, _PIECE)
        check = self._decoder.check
        if check != lzma.CHECK_UNKNOWN and not lzma.is_check_supported(check):
            raise lzma.LZMAError(f"its checksum is of kind {check}, which this liblzma cannot check")
        yield piece
        while not (self._decoder.eof or self._decoder.needs_input):
            yield self._decoder.decompress(b"", _PIECE)
        self.eof, self.unused = self._decoder.eof, self._decoder.unused_data


class _Gzip:
    """Decoder of one gzip member; zlib checks its CRC and length."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=31)
        self.eof, self.unused = False, b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """As `_Xz.feed`."""
        yield self._decoder.decompress(data, _PIECE)
        while not self._decoder.eof and self._decoder.unconsumed_tail:
            yield self._decoder.decompress(self._decoder.unconsumed_tail, _PIECE)
        self.eof, self.unused = self._decoder.eof, self._decoder.unused_data


class _Zstd:
    """Decoder of one Zstandard frame; its checksum and size are checked if the frame has them."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.eof, self.unused = False, b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """As `_Xz.feed`."""
        # The size of the output cannot be limited, so the input is fed in pieces: 1 KB makes at most 32 MB.
        for at in range(0, len(data), 1024):
            yield self._decoder.decompress(data[at : at + 1024])
            if self._decoder.eof:
                self.eof, self.unused = True, self._decoder.unused_data + data[at + 1024 :]
                return


def _zstd() -> _Codec:
    """Return the Zstandard codec of the standard library (Python 3.14) or of the package `zstandard`."""
    try:
        from compression import zstd
    except ImportError:
        pass
    else:
        options = {zstd.DecompressionParameter.window_log_max: 31}
        return _Codec(
            "zst",
            lambda: _Zstd(zstd.ZstdDecompressor(options=options)),
            (zstd.ZstdError, EOFError),
            padding=0,
        )
    try:
        import zstandard
    except Exception as e:
        raise RunError(
            f"reading .zst needs the package zstandard ({e}); pip install zstandard, or unpack the files: "
            "zstd -d FILE.zst"
        ) from e
    # The largest window, as `zstd --long=31` writes it.
    return _Codec(
        "zst",
        lambda: _Zstd(zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()),
        (zstandard.ZstdError, EOFError),
        padding=0,
    )


_CODECS: dict[str, Callable[[], _Codec]] = {
    ".xz": lambda: _Codec("xz", _Xz, (lzma.LZMAError, EOFError), padding=4),
    ".gz": lambda: _Codec("gzip", _Gzip, (zlib.error, EOFError), padding=1),
    ".zst": _zstd,
}
SUFFIXES = tuple(_CODECS)
"""Suffixes of compressed files."""
