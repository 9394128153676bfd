"""Compressed text is read completely or refused: several streams, data between them, and damage."""

import bz2
import gzip
import json
import lzma
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pgolf.data.text import iterate_documents

TEXTS = [f"document {n} " + "abc " * (n % 90) for n in range(200)]
LINES = [(json.dumps({"text": text}) + "\n").encode() for text in TEXTS]
SKIPPED = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"  # a Zstandard frame that holds no text


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    packed: bytes = zstandard.ZstdCompressor(write_checksum=True).compress(data)
    return packed


PACK: dict[str, Callable[[bytes], bytes]] = {"xz": lzma.compress, "gz": gzip.compress, "zst": zstd}
PADDING = {"xz": bytes(8), "gz": bytes(5), "zst": SKIPPED}


def read(folder: Path, suffix: str, data: bytes) -> list[str]:
    path = folder / f"a.jsonl.{suffix}"
    path.write_bytes(data)
    return [document.text for document in iterate_documents(path)]


@pytest.mark.parametrize("suffix", PACK)
def test_several_streams_and_padding_are_one_text(tmp_path: Path, suffix: str) -> None:
    pack, padding = PACK[suffix], PADDING[suffix]
    many = [pack(line) for line in LINES]
    assert read(tmp_path, suffix, pack(b"".join(LINES))) == TEXTS
    assert read(tmp_path, suffix, b"".join(many)) == TEXTS
    assert read(tmp_path, suffix, padding.join(many) + padding) == TEXTS
    halves = b"".join(LINES)
    assert read(tmp_path, suffix, pack(halves[:777]) + pack(b"") + pack(halves[777:])) == TEXTS


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("tail", [b"\x01", b"\0\0tail", b"tail of something else", SKIPPED[:3]])
def test_a_foreign_tail_is_refused(tmp_path: Path, suffix: str, tail: bytes) -> None:
    with pytest.raises(
        ValueError, match=rf"a\.jsonl\.{suffix}: .*(after (stream 1|a stream)).*copy it again"
    ):
        read(tmp_path, suffix, PACK[suffix](b"".join(LINES)) + tail)


def test_xz_padding_is_a_multiple_of_four(tmp_path: Path) -> None:
    for zeros in (1, 2, 3, 5, 70_001):
        with pytest.raises(ValueError, match=f"{zeros} zero bytes after a stream, .* multiple of 4"):
            read(tmp_path, "xz", lzma.compress(LINES[0]) + bytes(zeros))


@pytest.mark.parametrize("suffix", PACK)
def test_no_cut_and_no_changed_byte_gives_other_text(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(5)
    parts = [PACK[suffix](b"".join(LINES[:120])), PACK[suffix](b"".join(LINES[120:]))]
    whole = b"".join(parts)
    for cut in rng.sample([n for n in range(len(whole)) if n != len(parts[0])], 40):
        with pytest.raises(ValueError, match=rf"a\.jsonl\.{suffix}: "):
            read(tmp_path, suffix, whole[:cut])
    for _ in range(60):
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        try:
            got = read(tmp_path, suffix, bytes(changed))
        except ValueError as e:
            assert f"a.jsonl.{suffix}" in str(e)
        else:
            assert got == TEXTS, "a header's byte without a meaning may change"


@pytest.mark.parametrize("suffix", PACK)
def test_empty_and_foreign_files_are_named(tmp_path: Path, suffix: str) -> None:
    PACK[suffix](b"")  # skips where there is no library
    with pytest.raises(ValueError, match=rf"a\.jsonl\.{suffix}: the file is empty"):
        read(tmp_path, suffix, b"")
    for foreign in (LINES[0], bz2.compress(LINES[0]), bytes(100)):
        with pytest.raises(ValueError, match=rf"a\.jsonl\.{suffix}: damaged or truncated"):
            read(tmp_path, suffix, foreign)


@pytest.mark.parametrize("suffix", PACK)
def test_text_that_shrinks_a_lot_comes_back(tmp_path: Path, suffix: str) -> None:
    text = "x" * 9_000_000
    data = PACK[suffix](text.encode())
    (tmp_path / f"a.txt.{suffix}").write_bytes(data)
    assert [d.text for d in iterate_documents(tmp_path / f"a.txt.{suffix}")] == [text]


def test_a_missing_zstandard_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("zstandard", "compression"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeError, match=r"reading \.zst needs the package zstandard .*pip install zstand"):
        read(tmp_path, "zst", b"any")
