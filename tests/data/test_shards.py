import json
import resource
import struct
from pathlib import Path

import numpy as np
import pytest

from pgolf.data.shards import (
    Manifest,
    ShardInfo,
    find_shards,
    read_manifest,
    read_shard,
    sidecar_path,
    verify_manifest,
    write_manifest,
    write_shard,
)
from pgolf.files import file_sha256


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 65536, count).astype(np.uint16)


# One token, an odd count, more than a page, and both ends of the range.
@pytest.mark.parametrize(
    "data", [tokens(1), tokens(129), tokens(5001), np.array([0, 65535], dtype=np.uint16)]
)
def test_shard_round_trips_with_its_hash(tmp_path: Path, data: np.ndarray) -> None:
    path = tmp_path / "x_train_000000.bin"
    digest = write_shard(path, data)
    assert np.array_equal(read_shard(path), data)
    assert file_sha256(path) == digest


def test_shard_bytes_are_the_challenge_layout(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    write_shard(path, np.array([1, 258], dtype=np.int64))
    expected = struct.pack("<256i", 20240520, 1, 2, *([0] * 253)) + b"\x01\x00\x02\x01"
    assert path.read_bytes() == expected


def test_reading_a_missing_shard_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no shard at .*x\.bin; make shards with: pgolf data shards"):
        read_shard(tmp_path / "x.bin")


def header(magic: int = 20240520, version: int = 1, count: int = 3) -> bytes:
    return struct.pack("<256i", magic, version, count, *([0] * 253))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file has 0"),
        (header()[:1023], "header of 1024 bytes, the file has 1023"),
        (header(magic=7) + b"\0" * 6, "not a token shard: magic 7, expected 20240520"),
        (header(version=2) + b"\0" * 6, "shard version 2, but this program reads version 1 only"),
        (header(count=0), "announces 0 tokens"),
        (header(count=-1), "announces -1 tokens"),
        (header() + b"\0" * 5, "truncated: 3 tokens need 1030 bytes, the file has 1029"),
        (header() + b"\0" * 8, "too long: 3 tokens need 1030 bytes, the file has 1032"),
    ],
)
def test_reading_a_bad_shard_says_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_shard(path)
    assert str(path) in str(caught.value)


def test_reading_names_the_first_id_outside_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    write_shard(path, np.array([1, 99, 100, 101], dtype=np.uint16))
    assert read_shard(path, vocab_size=102).size == 4
    with pytest.raises(ValueError, match="token 100 at position 2 is not below the vocabulary size 100"):
        read_shard(path, vocab_size=100)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (np.array([1.0]), TypeError, "must be integers, got float64"),
        (np.array([], dtype=np.uint16), ValueError, "not empty"),
        (np.zeros((2, 2), dtype=np.uint16), ValueError, "one-dimensional"),
        (np.array([5, 65536]), ValueError, r"\[0, 65536\), got 5..65536"),
        (np.array([-1, 5]), ValueError, r"\[0, 65536\), got -1..5"),
    ],
)
def test_writing_bad_tokens_fails(tmp_path: Path, data: np.ndarray, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        write_shard(tmp_path / "x.bin", data)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_finished_shards_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    first, second = tmp_path / "x_train_000000.bin", tmp_path / "x_train_000001.bin"
    write_shard(first, tokens(100))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel refuses the write half-way, as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        with pytest.raises(
            OSError, match=r"cannot write .*x_train_000001\.bin: .*finished before it are kept"
        ):
            write_shard(second, tokens(50_000))
        with pytest.raises(OSError, match=r"cannot write .*x_train_000000\.bin"):
            write_shard(first, tokens(50_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert [p.name for p in tmp_path.iterdir()] == [first.name]
    assert np.array_equal(read_shard(first), tokens(100))


def test_find_shards_sorts_and_leaves_sidecars_out(tmp_path: Path) -> None:
    names = [
        "b_train_000001.bin",
        "b_train_000000.bin",
        "b_val_000000.bin",
        "b_val_bytes_000000.bin",
        "x.txt",
    ]
    for name in names:
        (tmp_path / name).touch()
    assert [p.name for p in find_shards(tmp_path, "train")] == ["b_train_000000.bin", "b_train_000001.bin"]
    assert [p.name for p in find_shards(tmp_path, "val")] == ["b_val_000000.bin"]
    assert sidecar_path(tmp_path / "b_val_000000.bin") == tmp_path / "b_val_bytes_000000.bin"


def test_find_shards_fails_with_the_command(tmp_path: Path) -> None:
    (tmp_path / "b_val_bytes_000000.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"no \*_val_\*\.bin in .*pgolf data shards"):
        find_shards(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match="no data folder at"):
        find_shards(tmp_path / "none", "train")


def folder_with_manifest(folder: Path) -> Manifest:
    digest = write_shard(folder / "x_train_000000.bin", tokens(7))
    (folder / "tokenizer.model").write_bytes(b"model")
    files = {"x_train_000000.bin": ShardInfo("train", 7, 2, 20, digest)}
    sha = file_sha256(folder / "tokenizer.model")
    manifest = Manifest("x", sha, vocab_size=65536, bos_id=1, lossless=True, files=files)
    write_manifest(folder, manifest)
    return manifest


def test_manifest_round_trips_and_verifies(tmp_path: Path) -> None:
    manifest = folder_with_manifest(tmp_path)
    assert read_manifest(tmp_path) == manifest
    verify_manifest(tmp_path, manifest)
    splits = json.loads((tmp_path / "manifest.json").read_text())["splits"]
    assert splits["train"] == {"tokens": 7, "documents": 2, "bytes": 20}


def test_verify_names_the_changed_and_the_missing_file(tmp_path: Path) -> None:
    manifest = folder_with_manifest(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"tokenizer\.model: SHA-256 is"):
        verify_manifest(tmp_path, manifest)
    (tmp_path / "x_train_000000.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lists .*x_train_000000\.bin, which does not exist"):
        verify_manifest(tmp_path, manifest)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {"a": {}}, "splits": {}}'])
def test_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json: damaged manifest"):
        read_manifest(tmp_path)
