"""What a token's id, and that of the token before it, add to the model in addition to its embedding.

Legend: `T` tokens, `D` width, `V` vocab, `B` buckets, `W` width of the table, `G` kv width.
Sources, pull requests of parameter-golf: bigram hash #162, value embeddings #414. Differs: a pair of tokens
never spans two documents, for which published stacks, whose documents are not separated, have no rule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.model.gates import rms_norm, smear, smear_channels


class Bigram(NamedTuple):
    """The parameters of the bigram hash in the compute dtype."""

    table: Tensor  # (B, W)
    proj: Tensor  # (D, W)
    scale: Tensor  # (1,)


class Smear(NamedTuple):
    """The parameters of the smear gate in the compute dtype."""

    weight: Tensor  # (1, gate window)
    strength: Tensor  # (1,)
    over_bos: bool


class ChannelSmear(NamedTuple):
    """The parameters of the smear gate by channel in the compute dtype."""

    logit: Tensor  # (D,)
    over_bos: bool


def bigram_index(ids: Tensor, first: Tensor, buckets: int) -> Tensor:
    """Return the bucket `(T,)` of each token and the one before it.

    It is (36313 * id XOR 27191 * previous id) mod (buckets - 1). The first token of a segment (so every BOS)
    has no previous token and gets the bucket buckets - 1; the token after it is paired with it as usual.

    Args:
        ids: `(T,)` int64.
        first: `(T,)` bool, true at the first token of every segment.
        buckets: `B`, >= 2.
    """
    previous = torch.cat((ids[:1], ids[:-1]))
    index = torch.bitwise_xor(36313 * ids, 27191 * previous) % (buckets - 1)
    return torch.where(first, torch.full_like(index, buckets - 1), index)


def stem(
    ids: Tensor, table: Tensor, first: Tensor, gate: Smear | ChannelSmear | None, bigram: Bigram | None
) -> Tensor:
    """Return the embeddings `(T, D)` of `ids` `(T,)`, with the bigram's added, smeared and normed.

    Smearing by channel comes after the norm, as in the pull requests that have it.

    Args:
        table: `(V, D)`.
        first: `(T,)` bool, true at the first token of every segment.
        gate: smear gate; None: none.
        bigram: bigram hash; None: none.
    """
    x = F.embedding(ids, table)
    if bigram is not None:
        pairs = F.embedding(bigram_index(ids, first, bigram.table.shape[0]), bigram.table)
        x = x + bigram.scale * F.linear(pairs, bigram.proj)
    edges = None if gate is not None and gate.over_bos else first
    if isinstance(gate, Smear):
        x = smear(x, edges, gate.weight, gate.strength)
    x = rms_norm(x)
    return smear_channels(x, edges, gate.logit) if isinstance(gate, ChannelSmear) else x


def value_embeddings(ids: Tensor, table: Tensor, proj: Tensor, scale: Tensor) -> Tensor:
    """Return what the token ids add to the values of the layers that have it, `(T, G)`.

    Args:
        ids: `(T,)`.
        table: `(V, W)`.
        proj: `(G, W)`.
        scale: `(1,)`; each layer multiplies by a scale of its own in addition.
    """
    return scale * F.linear(F.embedding(ids, table), proj)
