"""The token shard format of the challenge, the manifest beside it, and how both are found and written.

A shard is 256 little-endian int32 (magic 20240520, version 1, n_tokens, zeros) and then n_tokens
little-endian uint16. Byte sidecars (`NAME_val_bytes_000000.bin`) have the same form with bytes instead of
ids. This file knows nothing about text or tokenizers.

The manifest is the law of a folder that has one: a file that it does not list, or that is not as it says, is
an error that names the file and what to do.

A folder in which a build began holds the file UNFINISHED until the build is over, and is no data set before.

Source: the parameter-golf challenge's data files; the header is the one of llm.c's `.bin` shards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pgolf.config_io import unique_pairs
from pgolf.errors import UserError
from pgolf.files import atomic_file, file_sha256

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.model"
MARKER_NAME = "UNFINISHED"
MAKE_SHARDS = "pgolf data shards --train TEXT --val TEXT --tokenizer MODEL --out FOLDER"

_SPLITS = ("train", "val", "val_bytes")
_AGAIN = f"copy the folder again, or make it again: {MAKE_SHARDS}"

Split = Literal["train", "val"]
Tokens = NDArray[np.uint16]


def write_shard(path: Path, tokens: NDArray[Any]) -> str:
    """Write one shard atomically and return the SHA-256 of the file, in hex.

    Args:
        path: the file to make; its folder must exist.
        tokens: `(n,)` integers in [0, 65536), n >= 1.
    Raises:
        TypeError: not integers. ValueError: not one-dimensional, empty, or out of the uint16 range.
        OSError: the disk is full or the folder cannot be written.
    """
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"{path}: shard tokens must be integers, got {tokens.dtype}")
    if tokens.ndim != 1 or tokens.size == 0:
        raise UserError(f"{path}: shard tokens must be one-dimensional and not empty, got {tokens.shape}")
    if tokens.size >= 2**31:
        raise UserError(f"{path}: a shard holds fewer than 2**31 tokens, got {tokens.size}; write several")
    if tokens.dtype != np.uint16 and (int(tokens.min()) < 0 or int(tokens.max()) > 65535):
        raise UserError(
            f"{path}: shard tokens must lie in [0, 65536), got {int(tokens.min())}..{int(tokens.max())}"
        )
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    body = np.ascontiguousarray(tokens, dtype="<u2")
    digest = hashlib.sha256(header.tobytes())
    digest.update(body.data)
    with atomic_file(path) as handle:
        handle.write(header.tobytes())
        handle.write(body.data)
    return digest.hexdigest()


def shard_tokens(path: Path) -> int:
    """Return the number of tokens of a shard, from its header and size only.

    Raises:
        FileNotFoundError: no such file. ValueError: empty, foreign, of another version, or truncated.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no shard at {path}; make shards with: {MAKE_SHARDS}")
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise UserError(f"{path}: a shard starts with a header of {HEADER_BYTES} bytes, the file has {size}")
    with path.open("rb") as handle:
        magic, version, tokens = (int(v) for v in np.frombuffer(handle.read(12), dtype="<i4"))
    if magic != MAGIC:
        raise UserError(f"{path}: not a token shard: magic {magic}, expected {MAGIC}")
    if version != VERSION:
        raise UserError(f"{path}: shard version {version}, this reader knows version {VERSION}")
    if tokens <= 0:
        raise UserError(f"{path}: the header announces {tokens} tokens, expected at least 1")
    expected = HEADER_BYTES + 2 * tokens
    if size != expected:
        what = "truncated" if size < expected else "too long"
        raise UserError(
            f"{path}: {what}: {tokens} tokens need {expected} bytes, the file has {size}; "
            "copy it again or make it again"
        )
    return tokens


def read_shard(path: Path, *, vocab_size: int | None = None) -> Tokens:
    """Return the tokens of a shard as a read-only memory map.

    Args:
        path: the shard.
        vocab_size: when given, every id must be below it.
    Returns:
        `(n,)` uint16.
    Raises:
        FileNotFoundError: no such file. ValueError: empty, foreign, of another version, truncated, or a token
            id that is not below `vocab_size`.
    """
    count = shard_tokens(path)
    tokens: Tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
    if vocab_size is not None and int(tokens.max()) >= vocab_size:
        where = int(np.argmax(tokens >= vocab_size))
        raise UserError(
            f"{path}: token {int(tokens[where])} at position {where} is not below the vocabulary size "
            f"{vocab_size}; the shards were made with another tokenizer"
        )
    return tokens


def find_shards(folder: Path, split: Split) -> list[Path]:
    """Return the shards of one split in name order, byte sidecars left out.

    Raises:
        FileNotFoundError: no such folder, or no shard of that split in it. ValueError: an unfinished build.
    """
    require_finished(folder)
    found = list_files(folder, split)
    if not found:
        raise FileNotFoundError(f"no *_{split}_*.bin in {folder}; make shards with: {MAKE_SHARDS}")
    return found


def list_files(folder: Path, split: str) -> list[Path]:
    """Return the files of a split ("val_bytes": the sidecars) in name order; there may be none."""
    pattern = re.compile(rf".+_{split}_[^_]+\.bin")
    return sorted(p for p in folder.iterdir() if pattern.fullmatch(p.name))


def require_finished(folder: Path) -> None:
    """Raise unless this is a folder, and one in which no build was left unfinished.

    Raises:
        FileNotFoundError: no such folder. ValueError: an unfinished build, with the command that finishes it.
    """
    if not folder.is_dir():
        found = " (it is a file)" if folder.exists() else ""
        raise FileNotFoundError(f"no data folder at {folder}{found}; make one with: {MAKE_SHARDS}")
    marker = folder / MARKER_NAME
    if os.path.lexists(marker):  # a link to nothing, too
        command = ""
        with contextlib.suppress(OSError):
            command = marker.read_text(encoding="utf-8", errors="surrogateescape").strip()
        command = command or MAKE_SHARDS
        raise UserError(
            f"{folder} holds an unfinished build of shards, no data set; where it is not running any more, "
            f"finish it with: {command}"
        )


def sidecar_path(shard: Path) -> Path:
    """Return where the byte sidecar of a validation shard lies: `x_val_0.bin` -> `x_val_bytes_0.bin`."""
    head, number = shard.name.rsplit("_", 1)
    return shard.with_name(f"{head}_bytes_{number}")


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says about one file."""

    split: str
    """train, val, or val_bytes for a byte sidecar."""
    tokens: int
    """Entries of the file."""
    documents: int
    """Documents that start in it."""
    bytes: int
    """UTF-8 bytes of those documents."""
    sha256: str
    """Of the whole file, hex."""


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` of a folder of shards, written last."""

    name: str
    """Prefix of the shard names."""
    tokenizer_sha256: str
    """Of `tokenizer.model`, hex."""
    vocab_size: int
    """Number of token ids."""
    bos_id: int
    """The id before every document."""
    lossless: bool
    """Decoding the validation ids gives back every validation document exactly."""
    files: dict[str, ShardInfo]
    """Per file name."""

    def total(self, split: str) -> ShardInfo:
        """Return the sums of tokens, documents and bytes of one split (its sha256 is empty)."""
        infos = [info for info in self.files.values() if info.split == split]
        tokens, documents, size = (
            sum(getattr(info, key) for info in infos) for key in ("tokens", "documents", "bytes")
        )
        return ShardInfo(split, tokens, documents, size, sha256="")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, with the totals of each split for people to read."""
    data = dataclasses.asdict(manifest)
    data["splits"] = {}
    for split in ("train", "val"):
        total = manifest.total(split)
        data["splits"][split] = {"tokens": total.tokens, "documents": total.documents, "bytes": total.bytes}
    with atomic_file(folder / MANIFEST_NAME) as handle:
        handle.write((json.dumps(data, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        FileNotFoundError: no such folder, or it has none (other tools' shards). ValueError: the manifest is
            damaged or contradicts itself, or the folder holds an unfinished build.
    """
    require_finished(folder)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        if os.path.lexists(path):
            raise FileNotFoundError(f"{path} is no file (a link to one that is gone?); {_AGAIN}")
        raise FileNotFoundError(
            f"no {MANIFEST_NAME} in {folder}; folders made by this command have one: {MAKE_SHARDS}"
        )
    try:
        data = json.loads(path.read_bytes(), object_pairs_hook=unique_pairs)
        files = {name: ShardInfo(**info) for name, info in data.pop("files").items()}
        totals = data.pop("splits")
        manifest = Manifest(files=files, **data)
        _check_sense(manifest, totals)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise UserError(f"{path}: damaged manifest ({e}); {_AGAIN}") from e
    return manifest


def _check_sense(manifest: Manifest, totals: dict[str, dict[str, int]]) -> None:
    """Raise ValueError where the manifest cannot be right, whatever lies in the folder."""
    numbers = {"vocab_size": manifest.vocab_size, "bos_id": manifest.bos_id}
    digests = {"tokenizer_sha256": manifest.tokenizer_sha256}
    if type(manifest.lossless) is not bool:
        raise UserError(f"lossless is {manifest.lossless!r}, expected true or false")
    if not isinstance(manifest.name, str):
        raise UserError(f"name is {manifest.name!r}, expected the prefix of the shard names")
    for name, info in manifest.files.items():
        if info.split not in _SPLITS or not re.fullmatch(rf"[^/]+_{info.split}_[^/_]+\.bin", name):
            raise UserError(f"{name!r} is no file of split {info.split!r}")
        if not name.startswith(f"{manifest.name}_{info.split}_"):
            raise UserError(f"{name!r} is no file of a set that is named {manifest.name!r}")
        digests[f"sha256 of {name}"] = info.sha256
        numbers |= {f"{key} of {name}": getattr(info, key) for key in ("tokens", "documents", "bytes")}
    for what, number in numbers.items():
        if type(number) is not int or number < 0:
            raise UserError(f"{what} is {number!r}, expected a number")
    for what, digest in digests.items():
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise UserError(f"{what} is {digest!r}, expected 64 hex digits")
    for name, info in manifest.files.items():
        if not 0 < info.documents <= info.tokens:
            raise UserError(f"{name} has {info.documents:,} documents in {info.tokens:,} tokens")
    for split in ("train", "val"):
        total = manifest.total(split)
        sums = {"tokens": total.tokens, "documents": total.documents, "bytes": total.bytes}
        if totals[split] != sums:
            raise UserError(f"its files of {split} sum to {sums}, it says {totals[split]}")
    for name, info in manifest.files.items():
        side = manifest.files.get(sidecar_path(Path(name)).name)
        if info.split != "val":
            continue
        if side is None or dataclasses.replace(side, split="val", sha256=info.sha256) != info:
            raise UserError(f"the sidecar of {name} is not listed with the same counts")


def verify_manifest(folder: Path, manifest: Manifest, *, training: bool = True) -> None:
    """Check that a folder holds the files of its manifest and no other shards, each as the manifest says.

    Compared are the SHA-256 of the tokenizer and of every file, of training shards only with `training`,
    otherwise their size.

    Raises:
        FileNotFoundError: a listed file is not there. ValueError: a file differs or is not listed (named).
    """
    for name in (TOKENIZER_NAME, *manifest.files):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{MANIFEST_NAME} lists {folder / name}, which is not there; {_AGAIN}")
    on_disk = {p.name for split in _SPLITS for p in list_files(folder, split)}
    strays = sorted(on_disk - manifest.files.keys())
    if strays:
        raise UserError(
            f"{folder} holds {', '.join(strays[:8])}{', ...' if strays[8:] else ''}, which {MANIFEST_NAME} "
            f"does not list; move out of the folder what is not of its data, or make it again: {MAKE_SHARDS}"
        )
    _check_hash(folder / TOKENIZER_NAME, manifest.tokenizer_sha256)
    for name, info in manifest.files.items():
        found = shard_tokens(folder / name)
        if found != info.tokens:
            raise UserError(
                f"{folder / name}: {found:,} tokens, {MANIFEST_NAME} says {info.tokens:,}; {_AGAIN}"
            )
        if info.split != "train" or training:
            _check_hash(folder / name, info.sha256)


def _check_hash(path: Path, expected: str) -> None:
    got = file_sha256(path)
    if got != expected:
        raise UserError(
            f"{path}: SHA-256 is {got[:16]}..., {MANIFEST_NAME} says {expected[:16]}...: the file was "
            f"changed, damaged or swapped; {_AGAIN}"
        )
