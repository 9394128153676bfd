"""Streams that several blocks read, handed from block to block so that each adds its gradient in its kernels.

The first embedding x0 is read by every block, and the output of a block of the encoder half by the next block
and by a skip. Autograd adds the gradients of such readers by kernels of their own, of three passes over
`(T, D)` each, because a graph of torch.compile ends with its block. If a block returned the stream that it
reads, and the next reader took that, the sum would be part of the block's backward graph, at one pass. But
torch.compile leaves an output that shares its memory with an input to autograd. So a block returns a thread:
a tensor of the stream's shape and of one element of memory, whose gradient is added to the stream's. The next
reader takes the stream's values with the thread's gradient.

Legend: `T` tokens, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pgolf.model.blocks import Context, parallel_block, serial_block

Lanes = tuple[Tensor, Tensor]


class _Thread(torch.autograd.Function):
    """A thread of a stream: its gradient is the stream's."""

    @staticmethod
    def forward(_ctx: Any, stream: Tensor) -> Tensor:
        return stream.new_zeros(()).expand(stream.shape)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Tied(torch.autograd.Function):
    """The values of a stream with the gradient of a thread."""

    @staticmethod
    def forward(_ctx: Any, stream: Tensor, _thread: Tensor) -> Tensor:
        return stream.view(stream.shape)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def _thread(stream: Tensor, again: bool) -> Tensor | None:
    if not again:
        return None
    thread: Tensor = _Thread.apply(stream)  # type: ignore[no-untyped-call]
    return thread


def _tie(stream: Tensor, thread: Tensor | None) -> Tensor:
    """Return `stream` for its next reader; with None, as it is."""
    if thread is None:
        return stream
    tied: Tensor = _Tied.apply(stream.detach(), thread)  # type: ignore[no-untyped-call]
    return tied


def _serial(again: tuple[bool, bool], inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return what `serial_block` does, and the threads of x and of x0."""
    x, ctx = inputs[2], inputs[5]
    return serial_block(*inputs), _thread(x, again[0]), _thread(ctx.x0, again[1])


def _parallel(again: bool, inputs: tuple[Any, ...]) -> tuple[Lanes, Tensor | None]:
    """Return what `parallel_block` does, and the thread of x0."""
    return parallel_block(*inputs), _thread(inputs[5].x0, again)


class Threads:
    """The blocks of a model in passes with gradients."""

    def __init__(self, jit: Callable[..., Any] | None) -> None:
        self._serial = jit(_serial) if jit else _serial
        self._parallel = jit(_parallel) if jit else _parallel

    def serial(self, again: tuple[bool, bool], *inputs: Any) -> tuple[Tensor, Tensor, Context]:
        """Run `serial_block`; return the stream `(T, D)`, and x and the context for later readers.

        Args:
            again: whether there are later readers of x and of x0.
            inputs: of the block.
        """
        x, ctx = inputs[2], inputs[5]
        y, of_x, of_x0 = self._serial(again, inputs)
        return y, _tie(x, of_x), ctx._replace(x0=_tie(ctx.x0, of_x0))

    def parallel(self, again: bool, *inputs: Any) -> tuple[Lanes, Context]:
        """Run `parallel_block`; return the lanes `(T, D)`, and the context for later readers.

        Args:
            again: whether there are later readers of x0.
            inputs: of the block.
        """
        ctx: Context = inputs[5]
        lanes, of_x0 = self._parallel(again, inputs)
        return lanes, ctx._replace(x0=_tie(ctx.x0, of_x0))


def threaded(jit: Callable[..., Any] | None) -> Threads | None:
    """Return the blocks with threads, which `jit` compiles (None: nothing does).

    The program that scores has `_no_threads.py` in place of this module.
    """
    return Threads(jit)
