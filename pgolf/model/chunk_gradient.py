"""Gradients of adapters through the last tokens of each document alone: its context is a constant.

The exact gradient of a chunk's loss also runs through the keys and values of the tokens before the chunk, for
which a backward pass over all of them is needed. Here they are computed first and without a gradient, in a
pass that keeps them; then the tokens of the chunk alone pass through the layers, with another attention
kernel, which puts the kept keys and values before theirs. The states, and so the losses, are those of one
pass over all tokens. Source: dynamic evaluation of Transformer-XL (Krause et al. 2019), whose memory is a
constant as well.
Legend: `N` documents, `W` tokens of each, `T` = N W, `C` of them in the chunk, `R` = N C, `D` width, `V`
vocab.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf.model.attention import Asked
from pgolf.model.blocks import Context
from pgolf.model.gpt import GPT, layer_order
from pgolf.model.lora import Adapters
from pgolf.model.uncompiled import uncompiled


class ChunkGradient:
    """A model whose adapters' gradients do not run through the context.

    Args:
        model: prepared and not compiled; its weights are shared.
    """

    def __init__(self, model: GPT) -> None:
        self._first = uncompiled(model, self._keep)
        self._second = uncompiled(model, self._recall)
        assert model._attention is not None
        self._kernel, self._slots = model._attention, sum(map(len, layer_order(model.config, loop=True)))
        self._kept: list[tuple[Tensor, Tensor]] = []

    def hidden(
        self, ids: Tensor, cu_seqlens: Tensor, *, max_seqlen: int, adapters: Adapters, asked: int
    ) -> tuple[Tensor, Tensor]:
        """Return what `GPT.hidden` does, the states `(R, D)` of the chunk and the table `(V, D)`.

        Args:
            ids, cu_seqlens, max_seqlen, adapters: of `GPT.hidden`; all documents have max_seqlen tokens.
            asked: C, the tokens of the chunk, fewer than max_seqlen.
        """
        model, before = self._first, max_seqlen - asked
        weights, table = model.layer_weights(), model.tok_emb.to(model.compute_dtype)
        x0, values = model.embed(ids, table, cu_seqlens), model.values(ids)
        rope = model.rope(ids.numel())
        self._chunk = Asked.last(asked, max_seqlen, cu_seqlens, rope)

        def early(x: Tensor) -> Tensor:
            return x.view(-1, max_seqlen, *x.shape[1:])[:, :before].flatten(0, 1)

        turned = early(rope[0]), early(rope[1])
        starts = cu_seqlens // max_seqlen * before
        self._kept.clear()
        with torch.no_grad():
            of_early = None if values is None else early(values)
            # Nobody asks for the states of the context, but one of each document is the least that there is.
            one = Asked.last(1, before, starts, turned)
            model.layers(weights, Context(early(x0), turned, starts, of_early, one), True, None, adapters)
        late = None if values is None else self._chunk.rows(values)
        ctx = Context(self._chunk.rows(x0), self._chunk.rope, cu_seqlens, late)
        return model.scaled(self._second.layers(weights, ctx, True, None, adapters)), table

    def _keep(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Keep the keys and values of the context, and attend."""
        self._kept.append((k, v))
        return q if len(self._kept) == self._slots else self._kernel(q, k, v, cu_seqlens, max_seqlen)

    def _recall(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Attend from the chunk to what was kept and to the chunk itself."""
        n, before = self._chunk.cu_seqlens.numel() - 1, self._kept.pop(0)

        def joined(old: Tensor, new: Tensor) -> Tensor:
            pair = [t.view(n, -1, *t.shape[1:]) for t in (old, new)]
            return torch.cat(pair, dim=1).flatten(0, 1)

        k, v = (joined(*pair) for pair in zip(before, (k, v), strict=True))
        q = self._chunk.padded(q, k.shape[0])
        return self._chunk.rows(self._kernel(q, k, v, cu_seqlens, max_seqlen))
