"""Whether a data folder is what its manifest says, with the counts and the tokenizer too.

Folders of other tools have no manifest; what rests on them says so (`NO_MANIFEST`).
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
    "no manifest.json in the data folder: shards of another tool, nothing says whether they are whole and "
    "unchanged"
)
"""What every result says that rests on such a folder."""


def verify_folder(folder: Path, *, training: bool = False) -> Manifest | None:
    """Check a data folder against its manifest and return that; None where it has none.

    Compared are the list of shards and sidecars, their size, the SHA-256 of the tokenizer, of validation
    shards and sidecars (`training`: of training shards too), documents and bytes of the validation text
    (`training`: documents of the other too), the tokenizer's vocabulary and BOS, and, where it is lossy, that
    the validation ids decode exactly if the manifest says so. Bytes of the training text are not: its shards
    have no sidecars.

    Raises:
        FileNotFoundError: no such folder, or a listed file is not there. ValueError: an unfinished build, a
            damaged manifest, or a file that differs or is not listed.
    """
    require_finished(folder)
    if not os.path.lexists(folder / MANIFEST_NAME):
        return None
    manifest = read_manifest(folder)
    verify_manifest(folder, manifest, training=training)
    tokenizer = find_tokenizer(folder)
    for what in ("vocab_size", "bos_id"):
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
    """Raise unless the documents of a validation shard come back from their ids, as far as that can be told.

    The text is not at hand: a document's ids must give as many bytes as the sidecar says, and the text of
    these the same ids.
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
            f"{path}: {what} {got:,}, {MANIFEST_NAME} says {expected:,}; copy the folder again, or make it "
            f"again: {MAKE_SHARDS}"
        )
