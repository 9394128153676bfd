"""Low-rank adapters next to the frozen matrices of a model, one set per document of a batch.

A batch is N documents of W tokens each, packed as `(N * W, ...)`, so the products with the matrices of all
documents are one `bmm`. The adapters add to the outputs of the model's layers and change nothing else; as
long as B = 0 they add exactly 0. A layer that runs several times has separate adapters for each execution.
`pgolf.evaluate.ttt` trains them.

Legend: `N` documents, `W` tokens per document, `T` = N W, `S` executed layers, `D` width, `E` width of k and
of v, `r` rank, `V` vocab.
Sources: Hu et al. 2021 (LoRA); positions and sizes as in PR #1855 of parameter-golf.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf.config import PLACES, ModelConfig
from pgolf.model.attention import Asked, Term, low_product
from pgolf.model.parameters import layer_order


class Scales(NamedTuple):
    """The scales that `fold` has multiplied into a layer's matrices, for adapters and observers."""

    ln: Tensor  # ()
    attn: Tensor  # (D,)
    mlp: Tensor  # (D,)


_NAMES = {"q": "q_b", "k": "k_b", "v": "v_b", "o": "bypass_b"}


class LayerLora(NamedTuple):
    """Adapters of one executed layer: y += scale * (x A^T) B^T; None where there is none.

    Scales multiply A and B, which have fewer elements than what they are applied to.
    """

    attn_a: (
        Tensor | None
    )  # (N, m * r, D): A of those m of q, k, v and o that there are, which share the input
    q_b: Tensor | None  # (N, D, r)
    k_b: Tensor | None  # (N, E, r)
    v_b: Tensor | None  # (N, E, r)
    bypass_b: Tensor | None  # (N, D, r): o, a bypass of the whole attention
    mlp_a: Tensor | None  # (N, r, D): bypass of the whole MLP
    mlp_b: Tensor | None  # (N, D, r)
    scale: float

    def attention(self, n: Tensor, scales: Scales, asked: Asked | None = None) -> tuple[Term, ...]:
        """Return the terms to add to q, k, v and the attention output: `(R, D)`, `(T, E)` twice, `(R, D)`.

        Args:
            n: `(T, D)` normed input of the attention.
            scales: of the layer.
            asked: the tokens whose output is wanted, R of them; None: all.
        """
        if self.attn_a is None:
            return (None,) * 4
        bypass = None if self.bypass_b is None else self.bypass_b * scales.attn[:, None]
        bs = (self.q_b, self.k_b, self.v_b, bypass)
        low = _rows(n, self.attn_a * (scales.ln * self.scale))
        before = 0 if asked is None else low.shape[1] - asked.each
        parts = iter(low.chunk(sum(b is not None for b in bs), dim=-1))
        return tuple(
            None if b is None else (next(parts)[:, first:], b)
            for b, first in zip(bs, (before, 0, 0, before), strict=True)
        )

    def mlp(self, n: Tensor, scales: Scales) -> Tensor:
        """Return the term to add to the output of the MLP, `(T, D)`, for its normed input `n` `(T, D)`."""
        assert self.mlp_a is not None and self.mlp_b is not None
        return low_rank(n, self.mlp_a * (scales.ln * self.scale), self.mlp_b * scales.mlp[:, None])


class Adapters(NamedTuple):
    """All adapters of N documents in the compute dtype, for one forward pass."""

    layers: list[LayerLora]
    """One per executed layer, in execution order."""
    head_a: Tensor | None  # (N, r, D)
    head_b: Tensor | None  # (N, V, r)
    scale: float

    def head(self, hidden: Tensor) -> Tensor | None:
        """Return the term to add to the logits before the soft cap, `(T, V)`."""
        if self.head_a is None or self.head_b is None:
            return None
        return low_rank(hidden, self.head_a * self.scale, self.head_b)


def low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return (x A^T) B^T, with the A and B of each document.

    Args:
        x: `(N * W, D)`.
        a: `(N, r, D)`.
        b: `(N, E, r)`.

    Returns:
        `(N * W, E)`.
    """
    return low_product(_rows(x, a), b)


def _rows(x: Tensor, a: Tensor) -> Tensor:
    """Return x A^T of each document, `(N, W, r)`."""
    return torch.bmm(x.view(a.shape[0], -1, x.shape[-1]), a.mT)


def adapter_shapes(
    config: ModelConfig, slots: int, rank: int, places: Collection[str] = PLACES
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the adapter tensors of one document by name; dimension 0 is the executed layer.

    Args:
        config: of the model.
        slots: executed layers.
        rank: r.
        places: those of `PLACES` that have adapters.
    """
    d, e, v = config.width, config.kv_width, config.vocab_size
    widths = {"q": d, "k": e, "v": e, "o": d}
    found: dict[str, tuple[int, ...]] = {}
    inside = [place for place in widths if place in places]
    if inside:
        found["attn_a"] = (slots, len(inside) * rank, d)
        found |= {_NAMES[place]: (slots, widths[place], rank) for place in inside}
    if "mlp" in places:
        found |= {"mlp_a": (slots, rank, d), "mlp_b": (slots, d, rank)}
    if "head" in places:
        found |= {"head_a": (rank, d), "head_b": (v, rank)}
    return found


def initial_adapters(
    config: ModelConfig, slots: int, rank: int, *, seed: int, places: Collection[str] = PLACES
) -> dict[str, Tensor]:
    """Return the adapters with which every document starts, float32: A uniform in +-1 / sqrt(D), B = 0."""
    rng = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(config.width)
    start = {}
    for name, shape in adapter_shapes(config, slots, rank, places).items():
        start[name] = torch.zeros(shape)
        if name.endswith("_a"):
            start[name].uniform_(-bound, bound, generator=rng)
    return start


def bind(tensors: dict[str, Tensor], config: ModelConfig, dtype: torch.dtype, *, scale: float) -> Adapters:
    """Return float32 tensors of shape `(N, *adapter_shapes)` as adapters in `dtype`; differentiable."""
    cast = {name: t.to(dtype) for name, t in tensors.items()}
    names = LayerLora._fields[:-1]  # all fields except for the scale
    cut = {name: cast[name].unbind(1) for name in names if name in cast}
    slots = sum(map(len, layer_order(config, loop=True)))
    absent = dict.fromkeys(names)
    layers = [
        LayerLora(**{**absent, **{name: parts[i] for name, parts in cut.items()}}, scale=scale)
        for i in range(slots)
    ]
    return Adapters(layers, cast.get("head_a"), cast.get("head_b"), scale)
