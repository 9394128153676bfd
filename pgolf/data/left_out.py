"""The last documents of the training text, which a run does not train on: the cap is fitted to them.

Which documents they are depends on the shards and on their number only, and so it is the same for any number
of ranks, for every order of the text, and for a run that is resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgolf.data.shards import Tokens, read_shard, shard_tokens
from pgolf.errors import UserError


class Cut(NamedTuple):
    """A training text without its last documents."""

    paths: list[Path]
    """The shards that are left, in order."""
    sizes: list[int]
    """The tokens of each shard that are left, from its beginning."""
    documents: list[Tokens]
    """The documents that are left out, in order."""


def cut_documents(paths: Sequence[Path], *, bos_id: int, count: int) -> Cut:
    """Cut the last `count` documents off a text.

    A document begins with a BOS. A shard of which nothing else is left is left out as a whole, with what may
    stand before its first BOS: the end of a document of another shard.

    Args:
        paths: the shards, in order.
        bos_id: the id that starts a document.
        count: number of documents to leave out; 0: none, and no shard is read.

    Raises:
        UserError: the text has fewer than count + 1 documents.
    """
    kept, documents = list(paths), list[Tokens]()
    sizes = [shard_tokens(path) for path in kept]
    while kept and len(documents) < count:
        tokens = read_shard(kept[-1])
        begins = np.flatnonzero(tokens == bos_id)
        first = max(0, begins.size - (count - len(documents)))
        documents = [*np.split(tokens, begins[first:])[1:], *documents]
        if first:
            sizes[-1] = int(begins[first])
        else:
            del kept[-1], sizes[-1]
    if not kept:
        raise UserError(
            f"quant.cap_documents={count} leaves nothing to train on: the training text has {len(documents)} "
            f"documents; pass at most {max(0, len(documents) - 1)}, or a larger text"
        )
    return Cut(kept, sizes, documents)
