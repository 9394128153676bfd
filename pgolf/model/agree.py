"""The agreement of ranks on the kernels of their models, which each rank tried by itself."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pgolf.dist import Dist
    from pgolf.model.gpt import GPT, CompileName


def agree_on_kernels(model: GPT, dist: Dist, *, compile: CompileName) -> None:
    """Let all ranks have the same attention and heads; every rank calls it with its prepared model.

    A trial may fail on a single GPU. Where ranks differ, all take what torch computes, which all of them
    have: its attention where the attention differs, and in any case its operators for the heads. Then
    `attention_note` of every model names the ranks and the reasons, and rank 0 warns with it.

    Args:
        model: after `prepare`, of which only the device, the attention and `compile` may have been chosen.
        compile: with which the model was prepared.
    """
    names, heads = dist.gather_texts(model.attention_name), dist.gather_texts(model.heads_name)
    own = f"{model.attention_name} with {model.heads_name} heads", model.attention_note, model.heads_note
    texts = dist.gather_texts(", ".join(filter(None, own)))
    if len(set(names)) == len(set(heads)) == 1:
        return
    together = model.attention_name
    if len(set(names)) > 1:
        together = "sdpa" if "sdpa" in names else "varlen"
    model.prepare(dist.device, attention=together, heads="composed", compile=compile)
    found = "; ".join(f"rank {rank} had {text}" for rank, text in enumerate(texts))
    model.attention_note = f"attention is {together} with composed heads on all ranks, because {found}"
    if dist.is_main:
        warnings.warn(model.attention_note, stacklevel=2)
