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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgolf.data.loader import ValidationText, buffer_size
from pgolf.dist import Dist
from pgolf.errors import UserError
from pgolf.evaluate.documents import document_bounds
from pgolf.evaluate.heads import Head
from pgolf.evaluate.predictor import Done, Inputs, Lesson, Pass, Question, Turn
from pgolf.model.gpt import GPT

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
        context: tokens of the longest window; 0: any number, and one that has more than batch_tokens is
            alone in a longer buffer.
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
        last = max(last, first + 1)
        buffers.append((windows[first:last], int(offsets[last] - offsets[first])))
        first = last
    return buffers


def window_questions(
    windows: NDArray[np.int64],
    *,
    context: int,
    batch_tokens: int,
    device: torch.device = CPU,
    rank: int = 0,
    world_size: int = 1,
    done: Done | None = None,
) -> list[Question]:
    """Return this rank's buffers of whole windows as questions; each goes to the next rank.

    Args:
        windows, context, batch_tokens: as in `window_buffers`. Without `context`, buffers are as long as
            their windows need, rounded up to a multiple of 64.
        device: where the model runs; the length of the last buffer depends on it (`buffer_size`).
        rank, world_size: select this rank's buffers.
        done: see `Done`; such buffers are left out.

    Raises:
        ValueError: batch_tokens < context.
    """
    buffers = window_buffers(windows, context=context, batch_tokens=batch_tokens)
    left = [i for i, (inside, _) in enumerate(buffers) if done is None or not done(inside)]
    questions = []
    for index in left[rank::world_size]:
        inside, count = buffers[index]
        last = index == len(buffers) - 1
        if context:
            size = buffer_size(count, batch_tokens, first=index == 0, last=last, device=device)
        else:
            size = -(-count // 64) * 64
        width = context or int((inside[:, 2] - inside[:, 0]).max())
        questions.append(Question(inside, width, size=size))
    return questions


class Fixed:
    """A predictor that does not learn: a model as it is.

    Args:
        model: called as `model.hidden(ids, cu_seqlens, max_seqlen=, loop=True)`; prepared, and it may be
            compiled.
    """

    def __init__(self, model: GPT) -> None:
        self._model = model

    def begin(self) -> None:
        """Nothing: there is nothing to forget."""

    def predict(self, inputs: Inputs) -> Head:
        """Return the model's distributions."""
        hidden, _ = self._model.hidden(inputs.ids, inputs.cu_seqlens, max_seqlen=inputs.width, loop=True)
        return Head(hidden, self._model.tok_emb, self._model.config.softcap)

    def learn(self, lesson: Lesson) -> None:
        """Nothing: the model stays as it is."""

    def state(self) -> list[Tensor]:
        """Return nothing, because nothing changes."""
        return []


def window_pass(
    model: GPT,
    text: ValidationText,
    dist: Dist,
    *,
    bos_id: int,
    context: int,
    stride: int,
    batch_tokens: int,
    done: Done | None = None,
) -> Pass:
    """Return the pass of a sliding window over a text.

    Args:
        model: prepared on dist.device.
        text: the validation text.
        dist: ranks that share the buffers.
        bos_id: the id that starts a document.
        context: tokens of the longest window.
        stride: tokens by which windows move, in [1, context]; context: plain scoring.
        batch_tokens: largest number of tokens per forward pass (at least one window); it changes speed and
            memory, not the score.
        done: see `Done`.

    Raises:
        ValueError: as in `sliding_windows`.
    """
    windows = sliding_windows(*document_bounds(text, bos_id), context=context, stride=stride)
    questions = window_questions(
        windows,
        context=context,
        batch_tokens=max(batch_tokens, context),
        device=dist.device,
        rank=dist.rank,
        world_size=dist.world_size,
        done=done,
    )
    label = "plain" if stride == context else f"sliding, stride {stride}"
    return Pass(Fixed(model), [Turn([question]) for question in questions], label)
