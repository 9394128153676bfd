"""The token shard format of the challenge and the manifest next to the shards: reading, writing, finding.

A shard is 256 little-endian int32 (magic 20240520, version 1, n_tokens, zeros) and then n_tokens
little-endian uint16. Byte sidecars (`NAME_val_bytes_000000.bin`) have the same form, with numbers of bytes
instead of ids.

If a folder has a manifest, it must match: a file that the manifest does not list, or that differs from what
it says, is an error that names the file and says what to do. While a folder is being built it contains the
file UNFINISHED, and readers refuse it.

Sources: the data files of the parameter-golf challenge; the header is that of llm.c's `.bin` shards.
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

CHALLENGE_NAME = "fineweb"
"""Prefix of the names of the challenge's shards."""
CHALLENGE_DOCUMENTS = 50_000
"""Documents of the challenge's validation text."""

_SPLITS = ("train", "val", "val_bytes")
_AGAIN = f"copy the folder again, or make it again: {MAKE_SHARDS}"

Split = Literal["train", "val"]
Tokens = NDArray[np.uint16]


def write_shard(path: Path, tokens: NDArray[Any]) -> str:
    """Write one shard atomically and return the SHA-256 of the file, in hexadecimal.

    Args:
        path: the file to write; its folder must exist.
        tokens: `(n,)` integers in [0, 65536), n >= 1.

    Raises:
        TypeError: tokens are not integers.
        ValueError: tokens are not one-dimensional, empty, too many, or out of the range of uint16.
        OSError: the disk is full, or the folder cannot be written.
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
    """Return the number of tokens of a shard, reading only its header and its size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty or truncated, not a shard, or of another version.
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
        raise UserError(f"{path}: shard version {version}, but this program reads version {VERSION} only")
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
        vocab_size: every id must be below it; None does not check that.

    Returns:
        `(n,)` uint16.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty or truncated, not a shard, of another version, or has a token id that is
            not below `vocab_size`.
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
    """Return the shards of one split in the order of their names, without byte sidecars.

    Raises:
        FileNotFoundError: there is no such folder, or it has no shard of that split.
        ValueError: the folder holds an unfinished build.
    """
    require_finished(folder)
    found = list_files(folder, split)
    if not found:
        raise FileNotFoundError(f"no *_{split}_*.bin in {folder}; make shards with: {MAKE_SHARDS}")
    return found


def list_files(folder: Path, split: str) -> list[Path]:
    """Return the files of a split ("val_bytes" for the sidecars) in the order of their names, maybe none."""
    pattern = re.compile(rf".+_{split}_[^_]+\.bin")
    return sorted(p for p in folder.iterdir() if pattern.fullmatch(p.name))


def require_finished(folder: Path) -> None:
    """Raise an error unless `folder` is a folder without an unfinished build.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds an unfinished build; the message has the command that finishes it.
    """
    if not folder.is_dir():
        found = " (it is a file)" if folder.exists() else ""
        raise FileNotFoundError(f"no data folder at {folder}{found}; make one with: {MAKE_SHARDS}")
    marker = folder / MARKER_NAME
    if os.path.lexists(marker):  # true for a broken link too
        command = ""
        with contextlib.suppress(OSError):
            command = marker.read_text(encoding="utf-8", errors="surrogateescape").strip()
        command = command or MAKE_SHARDS
        raise UserError(
            f"{folder} holds an unfinished build of shards, which cannot be used; if the build is no longer "
            f"running, finish it with: {command}"
        )


def sidecar_path(shard: Path) -> Path:
    """Return the path of the byte sidecar of a validation shard: `x_val_0.bin` -> `x_val_bytes_0.bin`."""
    head, number = shard.name.rsplit("_", 1)
    return shard.with_name(f"{head}_bytes_{number}")


@dataclass(frozen=True)
class ShardInfo:
    """The entry of one file in the manifest."""

    split: str
    """"train", "val", or "val_bytes" for a byte sidecar."""
    tokens: int
    """Number of entries of the file."""
    documents: int
    """Number of documents that start in it."""
    bytes: int
    """UTF-8 bytes of those documents."""
    sha256: str
    """SHA-256 of the whole file, hexadecimal."""


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` of a folder of shards, written last."""

    name: str
    """Prefix of the names of the shards."""
    tokenizer_sha256: str
    """SHA-256 of `tokenizer.model`, hexadecimal."""
    vocab_size: int
    """Number of token ids."""
    bos_id: int
    """The id before every document."""
    lossless: bool
    """Whether decoding the validation ids gives every validation document back exactly."""
    files: dict[str, ShardInfo]
    """Entries by file name."""
    caseops: bool = False
    """Whether the text of the ids is in the form of CaseOps."""

    def total(self, split: str) -> ShardInfo:
        """Return the sums of tokens, documents and bytes of one split; the sha256 of the result is empty."""
        infos = [info for info in self.files.values() if info.split == split]
        tokens, documents, size = (
            sum(getattr(info, key) for info in infos) for key in ("tokens", "documents", "bytes")
        )
        return ShardInfo(split, tokens, documents, size, sha256="")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, with the totals of each split in addition, for human readers."""
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
        FileNotFoundError: there is no such folder, or it has no manifest (another tool made it).
        ValueError: the manifest is damaged or contradicts itself, or the folder holds an unfinished build.
    """
    require_finished(folder)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        if os.path.lexists(path):
            raise FileNotFoundError(f"{path} is not a file (perhaps a broken link); {_AGAIN}")
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
    """Raise ValueError if the manifest contradicts itself, whatever files are in the folder."""
    numbers = {"vocab_size": manifest.vocab_size, "bos_id": manifest.bos_id}
    digests = {"tokenizer_sha256": manifest.tokenizer_sha256}
    for what in ("lossless", "caseops"):
        if type(getattr(manifest, what)) is not bool:
            raise UserError(f"{what} is {getattr(manifest, what)!r}, expected true or false")
    if not isinstance(manifest.name, str):
        raise UserError(f"name is {manifest.name!r}, expected the prefix of the shard names")
    for name, info in manifest.files.items():
        if info.split not in _SPLITS or not re.fullmatch(rf"[^/]+_{info.split}_[^/_]+\.bin", name):
            raise UserError(f"{name!r} cannot be the name of a file of split {info.split!r}")
        if not name.startswith(f"{manifest.name}_{info.split}_"):
            raise UserError(f"{name!r} does not begin with the name of the shards, {manifest.name!r}")
        digests[f"sha256 of {name}"] = info.sha256
        numbers |= {f"{key} of {name}": getattr(info, key) for key in ("tokens", "documents", "bytes")}
    for what, number in numbers.items():
        if type(number) is not int or number < 0:
            raise UserError(f"{what} is {number!r}, expected a whole number >= 0")
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
            raise UserError(f"the files of {split} sum to {sums}, but the totals say {totals[split]}")
    for name, info in manifest.files.items():
        side = manifest.files.get(sidecar_path(Path(name)).name)
        if info.split != "val":
            continue
        if side is None or dataclasses.replace(side, split="val", sha256=info.sha256) != info:
            raise UserError(f"the sidecar of {name} is not listed with the same counts")


def verify_manifest(folder: Path, manifest: Manifest, *, training: bool = True) -> None:
    """Check that a folder holds exactly the files of its manifest, and that they are as the manifest says.

    The SHA-256 of the tokenizer, of the validation shards and of the sidecars are compared.

    Args:
        training: compare the SHA-256 of the training shards too, in addition to their sizes.

    Raises:
        FileNotFoundError: a listed file does not exist.
        ValueError: a file, which the message names, differs or is not listed.
    """
    for name in (TOKENIZER_NAME, *manifest.files):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{MANIFEST_NAME} lists {folder / name}, which does not exist; {_AGAIN}")
    on_disk = {p.name for split in _SPLITS for p in list_files(folder, split)}
    strays = sorted(on_disk - manifest.files.keys())
    if strays:
        raise UserError(
            f"{folder} holds {', '.join(strays[:8])}{', ...' if strays[8:] else ''}, which {MANIFEST_NAME} "
            f"does not list; move these files out of the folder, or make it again: {MAKE_SHARDS}"
        )
    _check_hash(folder / TOKENIZER_NAME, manifest.tokenizer_sha256)
    for name, info in manifest.files.items():
        found = shard_tokens(folder / name)
        if found != info.tokens:
            raise UserError(
                f"{folder / name}: {found:,} tokens, but {MANIFEST_NAME} says {info.tokens:,}; {_AGAIN}"
            )
        if info.split != "train" or training:
            _check_hash(folder / name, info.sha256)


def check_challenge(name: str, documents: int) -> None:
    """Refuse a part of the challenge's validation text as if it were the whole.

    Args:
        name: prefix of the names of the shards.
        documents: number of validation documents.

    Raises:
        ValueError: the name is the challenge's, the number is not.
    """
    if name == CHALLENGE_NAME and documents != CHALLENGE_DOCUMENTS:
        raise UserError(
            f"{name}_val_*.bin: {documents:,} documents, but the challenge's validation text has "
            f"{CHALLENGE_DOCUMENTS:,}, so scores could not be compared; use all of them (none may be trained "
            "on), or give shards of another text another name"
        )


def _check_hash(path: Path, expected: str) -> None:
    got = file_sha256(path)
    if got != expected:
        raise UserError(
            f"{path}: SHA-256 is {got[:16]}..., but {MANIFEST_NAME} says {expected[:16]}...: the file was "
            f"changed, damaged or swapped; {_AGAIN}"
        )
