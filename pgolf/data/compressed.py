"""Compressed text files as plain ones: xz, gzip and Zstandard, read whole or refused.

A file may hold several streams (members, frames) one after another, as `cat a.xz b.xz`, pixz, pigz, bgzip
and pzstd make them, and what its format allows between them: xz stream padding (zeros, a multiple of four),
zeros behind gzip members, skippable Zstandard frames. Everything else is an error that names the file: a
stream that ends too early, one that is damaged, and a tail that is of no stream. (`lzma.LZMAFile` takes
padding or a foreign tail for the end of the file, and says nothing.)
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
    """One format: `decoder()` makes an object that reads one stream."""

    name: str
    decoder: Callable[[], _Xz | _Gzip | _Zstd]
    errors: tuple[type[Exception], ...]
    padding: int
    """Zeros between and behind streams must be a multiple of this; 0 = there must be none."""


def open_text(path: Path, raw: io.BufferedReader) -> io.BufferedReader:
    """Return the text of an open file: `raw` itself, or what it holds where the suffix says compressed.

    Reading raises ValueError (damaged, cut off, or with a tail that is not of the format).

    Raises:
        RuntimeError: a .zst file, and nothing to read it with is installed.
    """
    if path.suffix not in SUFFIXES:
        return raw
    return io.BufferedReader(_Chunks(_decode(path, raw, _CODECS[path.suffix]())), _PIECE)


def _decode(path: Path, raw: io.BufferedReader, codec: _Codec) -> Iterator[bytes]:
    """Yield the decompressed file in pieces that fit in memory, however well it was compressed."""
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
                    raise EOFError("it ends inside a stream")
                yield from decoder.feed(data)
        except codec.errors as e:
            behind = f", or foreign data, behind stream {number - 1}" if number > 1 else ""
            raise UserError(
                f"{path}: damaged or truncated {codec.name} data{behind} ({e}); copy it again"
            ) from e
        data = _skip_padding(path, raw, codec, decoder.unused or raw.read(_CHUNK))


def _skip_padding(path: Path, raw: io.BufferedReader, codec: _Codec, data: bytes) -> bytes:
    """Return what follows a stream after the zeros that may stand there."""
    zeros = 0
    while codec.padding and data:
        rest = data.lstrip(b"\0")
        zeros += len(data) - len(rest)
        data = rest or raw.read(_CHUNK)
        if rest:
            break
    if zeros % max(1, codec.padding):
        raise UserError(
            f"{path}: {zeros} zero bytes behind a stream, {codec.name} files have a multiple of "
            f"{codec.padding} there: it was cut or joined wrongly; copy it again"
        )
    return data


class _Chunks(io.RawIOBase):
    """A raw file made of byte strings."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with what there is, at least one byte before the end."""
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
    """One xz stream; index, footer and checksums are checked by liblzma."""

    def __init__(self) -> None:
        self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        self.eof, self.unused = False, b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what `data` gives; then `eof` says that the stream is over, `unused` is what follows it."""
        piece = self._decoder.decompress(data, _PIECE)
        check = self._decoder.check
        if check != lzma.CHECK_UNKNOWN and not lzma.is_check_supported(check):
            raise lzma.LZMAError(f"its checksum is of kind {check}, which cannot be checked here")
        yield piece
        while not (self._decoder.eof or self._decoder.needs_input):
            yield self._decoder.decompress(b"", _PIECE)
        self.eof, self.unused = self._decoder.eof, self._decoder.unused_data


class _Gzip:
    """One gzip member; zlib checks CRC and length."""

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
    """One Zstandard frame; a checksum and the size are checked where the frame has them."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.eof, self.unused = False, b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """As `_Xz.feed`."""
        # The output cannot be limited, so a little at a time: a KB of input makes 32 MB at most.
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
    # The window that `zstd --long=31` makes.
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
