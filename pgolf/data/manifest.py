"""Check of a data folder against its manifest, including the counts and the tokenizer.

A folder that another tool made has no manifest; results that use such a folder say so (`NO_MANIFEST`). Such
a folder is checked for shards, byte sidecars and a tokenizer that cannot belong together, and for documents
that are in both splits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pgolf.data import caseops
from pgolf.data.shards import (
    MAKE_SHARDS,
    MANIFEST_NAME,
    Manifest,
    Tokens,
    check_challenge,
    list_files,
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

    A folder without a manifest is refused if its byte sidecars cannot belong to its shards and its tokenizer.
    The challenge's validation text, which is recognised by its name, must have all of its documents.

    Args:
        training: compare the SHA-256 and the number of documents of the training shards too; without a
            manifest, refuse a training text that has more than 1 % of the validation documents.

    Raises:
        FileNotFoundError: the folder or a file of the manifest does not exist.
        ValueError: the build is unfinished, the manifest is damaged, or a file differs or is not listed.
    """
    require_finished(folder)
    if not os.path.lexists(folder / MANIFEST_NAME):
        _verify_without(folder, training=training)
        return None
    manifest = read_manifest(folder)
    check_challenge(manifest.name, manifest.total("val").documents)
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


def _verify_without(folder: Path, *, training: bool) -> None:
    """Check what shards, sidecars and a tokenizer without a manifest say about each other."""
    try:
        tokenizer = find_tokenizer(folder)
    except FileNotFoundError:
        return  # nothing can be said; who needs the tokenizer says that it is missing
    documents: dict[str, int] = {}
    for path in list_files(folder, "val"):
        tokens = read_shard(path, vocab_size=tokenizer.vocab_size)
        name = path.name.rsplit("_val_", 1)[0]
        documents[name] = documents.get(name, 0) + int(np.count_nonzero(tokens == tokenizer.bos_id))
        side = sidecar_path(path)
        if side.is_file() and (sizes := read_shard(side)).size == tokens.size:
            _check_sidecar(side, tokens, sizes, tokenizer)
    for name, count in documents.items():
        check_challenge(name, count)
    both = _documents_in_both(folder, tokenizer.bos_id) if training else 0
    if 100 * both > sum(documents.values()):
        raise UserError(
            f"{folder}: {both:,} of the {sum(documents.values()):,} validation documents are in the "
            "training shards too, so a score would be of text that was trained on; make the folder again: "
            f"{MAKE_SHARDS}"
        )


def _check_sidecar(side: Path, tokens: Tokens, sizes: Tokens, tokenizer: Tokenizer) -> None:
    """Raise ValueError if a byte sidecar cannot be that of these tokens of this tokenizer."""
    wrong = (tokens == tokenizer.bos_id) & (sizes > 0)
    what = "BOS, which stands for no text"
    if tokenizer.caseops and not wrong.any():
        first = caseops.FIRST_ID
        last = first + len(caseops.OPERATORS) - 1  # the id of ESC; after it an operator is text itself
        wrong = (tokens >= first) & (tokens <= last) & (sizes > 0)
        wrong[1:] &= tokens[:-1] != last
        what = "an operator of CaseOps, which stands for no text of its own"
    if wrong.any():
        at = int(np.argmax(wrong))
        raise UserError(
            f"{side}: {sizes[at]} bytes at position {at} for {what}; the sidecar belongs to other data or "
            f"was counted in another way: copy it again, or make the folder again: {MAKE_SHARDS}"
        )
    same = float(np.mean(tokenizer.usual_bytes(tokens) == sizes))
    if same < 0.8:  # measured: 0.97 to 1 for the right tokenizer, 0.07 to 0.74 for others
        raise UserError(
            f"{side}: only {100 * same:.0f} % of its entries are the bytes of the tokens in "
            f"{tokenizer.path.name}; shards, sidecar and tokenizer do not belong together: copy the folder "
            f"again, with the tokenizer that made it, or make it again: {MAKE_SHARDS}"
        )


def _documents_in_both(folder: Path, bos_id: int) -> int:
    """Return how many validation documents have the same tokens as a training document."""
    val = {d for path in list_files(folder, "val") for d in _documents(path, bos_id)}
    train = (d for path in list_files(folder, "train") for d in _documents(path, bos_id))
    return len({document for document in train if document in val})


def _documents(path: Path, bos_id: int) -> Iterator[bytes]:
    tokens = read_shard(path)
    starts = np.flatnonzero(tokens == bos_id).tolist()
    for start, end in zip(starts, [*starts[1:], tokens.size], strict=True):
        yield tokens[start:end].tobytes()


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
