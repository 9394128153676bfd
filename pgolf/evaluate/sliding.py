"""Sliding-window scoring, in which most tokens see nearly `max_context` tokens before them.

Plain scoring cuts a long document into segments, so the first tokens of a segment have no context. Here
windows of `max_context` tokens move forward by `stride` tokens within a document, and each window scores only
the tokens that no earlier window scored. The start of a window depends only on its position, so no score
depends on how long the document is. With stride = max_context, this is plain scoring.
A document of n tokens costs forward passes over about n * max_context / stride tokens.
Legend: `T` tokens of a buffer, `K` windows. Source: the sliding evaluation of parameter-golf PR #1218, the
first that scores the tail of the text once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pgolf.data.loader import IGNORED_TARGET, ValBatch, ValidationText, buffer_size, padded_cu_seqlens
from pgolf.data.stream import cut_segments
from pgolf.dist import Dist
from pgolf.errors import UserError
from pgolf.evaluate.bpb import Score, evaluate_bpb
from pgolf.evaluate.documents import document_bounds
from pgolf.log import Progress

CPU = torch.device("cpu")


def sliding_windows(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], *, context: int, stride: int
) -> NDArray[np.int64]:
    """Return the windows of all documents in order, `(K, 3)` int64 with rows (begin, first scored, end).

    The numbers are positions of inputs. The first window of a document scores all of its `context` tokens.
    The k-th window after it ends at start + context + k * stride, or at the end of the document, and scores
    the tokens after the end of the window before it.

    Args:
        starts, lengths: `(n,)` inputs of each document, as from `document_bounds`.
        context: tokens of the longest window.
        stride: tokens by which windows move, in [1, context].

    Raises:
        ValueError: the stride is out of range.
    """
    if not 1 <= stride <= context:
        raise UserError(f"stride must be in [1, max_context={context}], got {stride}")
    more = -(-np.maximum(lengths - context, 0) // stride)  # number of windows after the first
    document = np.repeat(np.arange(starts.size), more + 1)
    first = np.concatenate(([0], np.cumsum(more + 1)[:-1]))
    k = np.arange(document.size) - first[document]
    begin = starts[document] + k * stride
    scored = np.where(k == 0, begin, begin + context - stride)
    end = np.minimum(begin + context, starts[document] + lengths[document])
    return np.stack((begin, scored, end), axis=1)


def window_buffers(
    windows: NDArray[np.int64], *, context: int, batch_tokens: int
) -> list[tuple[NDArray[np.int64], int]]:
    """Pack whole windows, in order, into buffers; return the windows and the tokens of each buffer.

    Args:
        windows: `(K, 3)`, from `sliding_windows`.
        context: tokens of the longest window.
        batch_tokens: T, largest number of tokens in a buffer, at least context.

    Raises:
        ValueError: batch_tokens < context.
    """
    if batch_tokens < context:
        raise UserError(f"batch_tokens must be at least max_context={context}, got {batch_tokens}")
    offsets = np.concatenate(([0], np.cumsum(windows[:, 2] - windows[:, 0])))
    buffers, first = [], 0
    while first < len(windows):
        last = int(np.searchsorted(offsets, offsets[first] + batch_tokens, side="right")) - 1
        buffers.append((windows[first:last], int(offsets[last] - offsets[first])))
        first = last
    return buffers


def window_batches(
    text: ValidationText,
    windows: NDArray[np.int64],
    *,
    context: int,
    batch_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device = CPU,
) -> Iterator[ValBatch]:
    """Yield this rank's buffers of whole windows, in host memory; buffer b belongs to rank b mod world_size.

    Args:
        text: the text to which the positions of the windows refer.
        windows, context, batch_tokens: as in `window_buffers`.
        rank, world_size: select this rank's buffers.
        device: where the model runs; the length of the last buffer depends on it (`buffer_size`).

    Raises:
        ValueError: batch_tokens < context.
    """
    buffers = window_buffers(windows, context=context, batch_tokens=batch_tokens)
    for index in range(rank, len(buffers), world_size):
        inside, count = buffers[index]
        last = index == len(buffers) - 1
        size = buffer_size(count, batch_tokens, first=index == 0, last=last, device=device)
        yield _pack(text, inside, size, context)


def _pack(text: ValidationText, windows: NDArray[np.int64], size: int, context: int) -> ValBatch:
    """Return windows as one padded buffer, in which targets that another window scores are ignored."""
    inputs = torch.zeros(size, dtype=torch.int64)
    targets = torch.full((size,), IGNORED_TARGET, dtype=torch.int64)
    sizes = torch.zeros(size, dtype=torch.int64)
    starts, at, tokens = [], 0, 0
    for begin, scored, end in windows.tolist():
        ids = torch.from_numpy(text.tokens[begin : end + 1].astype(np.int64))
        skip, stop = scored - begin, at + end - begin
        inputs[at:stop] = ids[:-1]
        targets[at + skip : stop] = ids[1 + skip :]
        sizes[at + skip : stop] = torch.from_numpy(text.bytes[scored + 1 : end + 1])
        starts.append(at)
        at, tokens = stop, tokens + end - scored
    bounds = np.array(starts if at == size else [*starts, at], dtype=np.int64)
    cu_seqlens = padded_cu_seqlens(cut_segments(bounds, size, context), size)
    return ValBatch(inputs, targets, sizes, cu_seqlens, max_seqlen=context, tokens=tokens)


def score_sliding(
    model: nn.Module,
    text: ValidationText,
    dist: Dist,
    *,
    bos_id: int,
    context: int,
    stride: int,
    batch_tokens: int,
) -> Score:
    """Return the score with a sliding window; every token except for the first one is scored once.

    Args:
        model: as in `evaluate_bpb`.
        text: the validation text.
        dist: ranks that share the buffers.
        bos_id: the id that starts a document.
        context: tokens of the longest window.
        stride: tokens by which windows move, in [1, context].
        batch_tokens: largest number of tokens per forward pass (at least one window); it changes speed and
            memory, not the score.

    Raises:
        ValueError, RuntimeError: as in `sliding_windows` and `evaluate_bpb`.
    """
    starts, lengths = document_bounds(text, bos_id)
    windows = sliding_windows(starts, lengths, context=context, stride=stride)
    most = max(batch_tokens, context)
    buffers = window_buffers(windows, context=context, batch_tokens=most)[dist.rank :: dist.world_size]
    batches = window_batches(
        text,
        windows,
        context=context,
        batch_tokens=most,
        rank=dist.rank,
        world_size=dist.world_size,
        device=dist.device,
    )
    label = "plain" if stride == context else f"sliding, stride {stride}"
    work = sum(count for _, count in buffers)
    progress = Progress(label, work, is_main=dist.is_main)

    def reported() -> Iterator[ValBatch]:
        for batch, (_, count) in zip(batches, buffers, strict=True):
            yield batch
            progress.advance(count)

    return evaluate_bpb(
        model, reported(), dist, expected_tokens=text.tokens.size - 1, expected_bytes=int(text.bytes.sum())
    )
