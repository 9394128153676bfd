"""Compiled blocks for batches of documents with adapters, in which every forward pass has other sizes.

Test-time training reads a batch chunk by chunk: windows grow and documents end, so that hardly two passes
have the same number of documents N and of tokens T (400 pairs in the project's validation text). A graph for
each would take hours, padding to a few sizes a third of the work. So N and T are symbols in the graphs here,
and all other sizes are constants, as in training; one graph of each kind of block serves all passes.

A graph takes longer to compile than some work takes without it, so that work is not compiled: embeddings, the
join of the lanes and MUDD connections; passes of one document (a size of 1 cannot be a symbol, and few are);
passes without gradients; and the layer that runs last, where most tokens only need keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pgolf.model.blocks import Context, LayerWeights, parallel_block, serial_block
from pgolf.model.gates import Skip
from pgolf.model.gpt import GPT
from pgolf.ops._compiler import room_for_graphs


def compile_adapted(model: GPT, *, backend: str = "inductor") -> GPT:
    """Compile the blocks of a model that is called with adapters only; return the model.

    Args:
        model: prepared and not compiled, see `uncompiled`.
        backend: backend of torch.compile.
    """
    room_for_graphs(model.config.layers)
    model._mix = None  # what the compiler makes of the mixes leaves out the gradients of frozen factors
    jit = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
    model._serial = _with_symbols(serial_block, jit)
    model._parallel = _with_symbols(parallel_block, jit)
    return model


def _mark(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.mark_dynamic(tensor, 0)


def _with_symbols(block: Callable[..., Any], jit: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `serial_block` or `parallel_block`."""
    compiled = jit(block)

    def run(
        config: Any, kernels: Any, x: Any, skip: Skip | None, w: LayerWeights, ctx: Context, *rest: Any
    ) -> Any:
        adapters = [] if w.lora is None else [t for t in w.lora if isinstance(t, Tensor)]
        several = bool(adapters) and adapters[0].shape[0] > 1
        if ctx.asked is not None or not several or not torch.is_grad_enabled():
            return block(config, kernels, x, skip, w, ctx, *rest)
        if isinstance(x, Tensor) and not x.requires_grad:
            # The first layer's, whose gradient nobody needs. With one it shares the graph of later layers.
            x = x.detach().requires_grad_()
        lanes = x if isinstance(x, tuple) else (x,)
        _mark(*lanes, None if skip is None else skip.saved, *adapters)
        _mark(ctx.x0, *ctx.rope, ctx.cu_seqlens, ctx.values)
        return compiled(config, kernels, x, skip, w, ctx, *rest)

    return run
