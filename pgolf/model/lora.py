"""Low-rank adapters next to the frozen matrices of a model, one set per document of a batch.

A batch is N documents of W tokens each, packed as `(N * W, ...)`, so the products with the matrices of all
documents are one `bmm`. The adapters add to the outputs of the model's layers and change nothing else; as
long as B = 0 they add exactly 0. A layer that runs several times has separate adapters for each execution.
`pgolf.evaluate.ttt` trains them.

Legend: `N` documents, `W` tokens per document, `S` executed layers, `D` width, `E` width of k and of v, `r`
rank, `V` vocab. Sources: Hu et al. 2021 (LoRA); positions and sizes as in PR #1855 of parameter-golf.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf.config import ModelConfig


class LayerLora(NamedTuple):
    """Adapters of one executed layer: y += scale * (x A^T) B^T."""

    attn_a: (
        Tensor  # (N, 4 * r, D): A of q, k, v and of a bypass of the whole attention, which share the input
    )
    q_b: Tensor  # (N, D, r)
    k_b: Tensor  # (N, E, r)
    v_b: Tensor  # (N, E, r)
    bypass_b: Tensor  # (N, D, r)
    mlp_a: Tensor  # (N, r, D): bypass of the whole MLP
    mlp_b: Tensor  # (N, D, r)
    scale: float

    def attention(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """Return the terms to add to q, k and v, `(T, D + 2 E)`, and to the attention output, `(T, D)`."""
        low = _rows(n, self.attn_a) * self.scale
        q, k, v, bypass = low.chunk(4, dim=-1)
        parts = [torch.bmm(x, b.mT) for x, b in ((q, self.q_b), (k, self.k_b), (v, self.v_b))]
        return torch.cat(parts, dim=-1).flatten(0, 1), torch.bmm(bypass, self.bypass_b.mT).flatten(0, 1)

    def mlp(self, n: Tensor) -> Tensor:
        """Return the term to add to the output of the MLP, `(T, D)`."""
        return low_rank(n, self.mlp_a, self.mlp_b, self.scale)


class Adapters(NamedTuple):
    """All adapters of N documents in the compute dtype, for one forward pass."""

    layers: list[LayerLora]
    """One per executed layer, in execution order."""
    head_a: Tensor  # (N, r, D)
    head_b: Tensor  # (N, V, r)
    scale: float

    def head(self, hidden: Tensor) -> Tensor:
        """Return the term to add to the logits before the soft cap, `(T, V)`."""
        return low_rank(hidden, self.head_a, self.head_b, self.scale)


def low_rank(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return scale * (x A^T) B^T, with the A and B of each document.

    Args:
        x: `(N * W, D)`.
        a: `(N, r, D)`.
        b: `(N, E, r)`.
        scale: alpha / r.

    Returns:
        `(N * W, E)`.
    """
    return torch.bmm(_rows(x, a) * scale, b.mT).flatten(0, 1)


def _rows(x: Tensor, a: Tensor) -> Tensor:
    """Return x A^T of each document, `(N, W, r)`."""
    return torch.bmm(x.view(a.shape[0], -1, x.shape[-1]), a.mT)


def adapter_shapes(config: ModelConfig, slots: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the adapter tensors of one document by name; dimension 0 is the executed layer."""
    d, e, v = config.width, config.kv_width, config.vocab_size
    return {
        "attn_a": (slots, 4 * rank, d),
        "q_b": (slots, d, rank),
        "k_b": (slots, e, rank),
        "v_b": (slots, e, rank),
        "bypass_b": (slots, d, rank),
        "mlp_a": (slots, rank, d),
        "mlp_b": (slots, d, rank),
        "head_a": (rank, d),
        "head_b": (v, rank),
    }


def initial_adapters(config: ModelConfig, slots: int, rank: int, *, seed: int) -> dict[str, Tensor]:
    """Return the adapters with which every document starts, float32: A uniform in +-1 / sqrt(D), B = 0."""
    rng = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(config.width)
    start = {}
    for name, shape in adapter_shapes(config, slots, rank).items():
        start[name] = torch.zeros(shape)
        if name.endswith("_a"):
            start[name].uniform_(-bound, bound, generator=rng)
    return start


def bind(tensors: dict[str, Tensor], dtype: torch.dtype, *, scale: float) -> Adapters:
    """Return float32 tensors of shape `(N, *adapter_shapes)` as adapters in `dtype`; differentiable."""
    cast = {name: t.to(dtype) for name, t in tensors.items()}
    cut = {name: cast[name].unbind(1) for name in LayerLora._fields[:-1]}  # all fields except for the scale
    slots = len(cut["attn_a"])
    layers = [LayerLora(scale=scale, **{name: parts[i] for name, parts in cut.items()}) for i in range(slots)]
    return Adapters(layers, cast["head_a"], cast["head_b"], scale)
