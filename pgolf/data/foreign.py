"""Checks of a data folder that another tool made, which has no manifest to compare it with.

They find shards, byte sidecars and a tokenizer that cannot belong together, a validation text of the
challenge that is not whole, and validation documents that are in the training text too. They are not part of
`verify_folder`, because that is in the code that counts against the limit.
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
    Tokens,
    check_challenge,
    list_files,
    read_shard,
    sidecar_path,
)
from pgolf.data.tokenizer import Tokenizer, find_tokenizer
from pgolf.errors import UserError


def check_foreign(folder: Path, *, training: bool = False) -> None:
    """Check what shards, sidecars and a tokenizer without a manifest say about each other.

    With a manifest (see `verify_folder`), and without a tokenizer, nothing is done.

    Args:
        training: also refuse a training text that has more than 1 % of the validation documents.

    Raises:
        ValueError: byte sidecars cannot belong to the shards and the tokenizer; shards that are called as the
            challenge's do not have all of its validation documents; or, with `training`, the splits overlap.
    """
    if os.path.lexists(folder / MANIFEST_NAME):
        return
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
        wrong = np.isin(tokens, caseops.IDS) & (sizes > 0)
        wrong[1:] &= tokens[:-1] != caseops.IDS[-1]  # after ESC, an operator is text itself
        what = "an operator of CaseOps, which stands for no text of its own"
    if wrong.any():
        at = int(np.argmax(wrong))
        raise UserError(
            f"{side}: {sizes[at]} bytes at position {at} for {what}; the sidecar belongs to other data or "
            f"was counted in another way: copy it again, or make the folder again: {MAKE_SHARDS}"
        )
    some = slice(1_000_000)  # enough, and a shard of the challenge may have a hundred times as many
    same = float(np.mean(tokenizer.usual_bytes(tokens[some]) == sizes[some]))
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
