"""Check of a data folder against its manifest, including the counts and the tokenizer.

A folder that another tool made has no manifest; results that use such a folder say so (`NO_MANIFEST`), and
pgolf/data/foreign.py checks what can be checked of it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from pgolf.data.shards import (
    MAKE_SHARDS,
    MANIFEST_NAME,
    Manifest,
    read_manifest,
    read_shard,
    require_finished,
    sidecar_path,
    verify_manifest,
)
from pgolf.data.tokenizer import Tokenizer, find_tokenizer
from pgolf.errors import UserError

NO_MANIFEST = (
    "the data folder has no manifest.json (another tool made the shards), so it cannot be checked whether "
    "they are complete and unchanged"
)
"""The note in every result that uses a folder without a manifest."""


def verify_folder(folder: Path, *, training: bool = False) -> Manifest | None:
    """Check a data folder against its manifest and return the manifest, or None if there is none.

    The check compares the list of shards and sidecars, their sizes, the SHA-256 of the tokenizer, of the
    validation shards and of their sidecars, the numbers of documents and bytes of the validation text, and
    the vocabulary size and BOS of the tokenizer. If the manifest says that the validation ids decode exactly
    but the tokenizer is lossy, the decoding is checked too. The number of bytes of the training text cannot
    be checked, because training shards have no sidecars.

    Args:
        training: compare the SHA-256 and the number of documents of the training shards too.

    Raises:
        FileNotFoundError: the folder or a file of the manifest does not exist.
        ValueError: the build is unfinished, the manifest is damaged, or a file differs or is not listed.
    """
    require_finished(folder)
    if not os.path.lexists(folder / MANIFEST_NAME):
        return None
    manifest = read_manifest(folder)
    verify_manifest(folder, manifest, training=training)
    tokenizer = find_tokenizer(folder)
    for what in ("vocab_size", "bos_id", "caseops"):
        _check_count(tokenizer.path, what, getattr(tokenizer, what), getattr(manifest, what))
    for name, info in manifest.files.items():
        path = folder / name
        if info.split == "val_bytes":
            _check_count(path, "bytes", int(read_shard(path).sum(dtype=np.int64)), info.bytes)
        elif info.split == "val" or training:
            starts = np.count_nonzero(read_shard(path, vocab_size=manifest.vocab_size) == manifest.bos_id)
            _check_count(path, "documents", int(starts), info.documents)
        if info.split == "val" and manifest.lossless and not tokenizer.lossless:
            _check_decoding(path, tokenizer)
    return manifest


def _check_decoding(path: Path, tokenizer: Tokenizer) -> None:
    """Raise ValueError if the documents of a validation shard seem not to decode exactly.

    The original text is not available. The decoded text of a document must have as many bytes as the sidecar
    says, and must encode to the same ids.
    """
    tokens, sizes = read_shard(path), read_shard(sidecar_path(path))
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    totals = np.add.reduceat(sizes, starts, dtype=np.int64)
    documents = np.split(tokens, starts)[1:]
    for number, (ids, size) in enumerate(zip(documents, totals, strict=True), start=1):
        text = tokenizer.decode(ids)
        if len(text.encode()) != size or not np.array_equal(
            tokenizer.encode_ids([text], threads=1)[0], ids[1:]
        ):
            raise UserError(
                f"{path}: document {number} does not decode exactly ({tokenizer.lossy_because}), but "
                f"{MANIFEST_NAME} says lossless; make it again: {MAKE_SHARDS}"
            )


def _check_count(path: Path, what: str, got: int, expected: int) -> None:
    if got != expected:
        raise UserError(
            f"{path}: {what} {got:,}, but {MANIFEST_NAME} says {expected:,}; copy the folder again, or make "
            f"it again: {MAKE_SHARDS}"
        )
