"""A model for work whose shapes change from call to call, where the compiler would make a graph for each."""

from __future__ import annotations

from dataclasses import replace

import torch

from pgolf.model.attention import AttentionKernel
from pgolf.model.gpt import GPT
from pgolf.ops import stream_mix


def uncompiled(
    model: GPT, kernel: AttentionKernel | None = None, *, context: int = 0, own: bool = False
) -> GPT:
    """Return a model that shares the weights of `model`, is not compiled and has no gradients.

    It serves work whose shapes change from call to call, where the compiler would make a graph for each.

    Args:
        kernel: attention kernel; that of `model` if None.
        context: tokens of the longest segment; 0: as in `model`.
        own: give it a copy of the weights, which may change.
    """
    model._kernels()  # prepares the model if that has not been done
    config = replace(model.config, max_context=context or model.config.max_context)
    with torch.device("meta"):
        twin = GPT(config)
    weights = model.state_dict()
    twin.load_state_dict({n: t.clone() for n, t in weights.items()} if own else weights, assign=True)
    twin.requires_grad_(False).eval()
    # `heads_branch` attends with a kernel of its own.
    twin.prepare(
        model.tok_emb.device,
        attention=model.attention_name,
        heads=model.heads_name if kernel is None else "composed",
    )
    # Where no compiler fuses the mixes, their operator saves a tenth of all passes over tensors.
    twin._mlp, twin._mix = model._mlp, stream_mix
    if kernel is not None:
        twin._attention = kernel
    twin.compute_dtype = model.compute_dtype
    return twin
