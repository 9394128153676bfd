"""Local attention: each document is read once, and each token attends to the last `context` tokens alone.

Plain scoring cuts a long document into segments, so the first tokens of a segment have no context. Here a
document is one segment, and in every layer a token attends to itself and the `context` - 1 tokens before it.
So every token has that many, as in a sliding window of stride 1, for the products of plain scoring and twice
its attention at most. Through the layers, a token also depends on tokens further back. Documents longer than
`LONGEST` tokens are cut into windows which overlap by `context` tokens, so that one document fits in memory.
"""

from __future__ import annotations

from dataclasses import replace

from pgolf.data.loader import ValidationText
from pgolf.dist import Dist
from pgolf.evaluate.documents import document_bounds
from pgolf.evaluate.heads import Head
from pgolf.evaluate.predictor import Done, Inputs, Pass, Turn
from pgolf.evaluate.sliding import Fixed, sliding_windows, window_questions
from pgolf.model.attention import local_attention
from pgolf.model.gpt import GPT
from pgolf.model.uncompiled import uncompiled

LONGEST = 65_536
"""Tokens of the longest window, unless two contexts are more."""


class Local(Fixed):
    """A model as it is, but for its attention, which reaches back `context` tokens.

    It shares the weights of `model`, which stays as it is, and is not compiled: a pass over the text takes
    less time than a compiler would.
    """

    def __init__(self, model: GPT, context: int) -> None:
        super().__init__(uncompiled(model, local_attention(model.attention_name, context)))

    def predict(self, inputs: Inputs) -> Head:
        """Return the model's distributions."""
        # Kernels make as many blocks for every segment as the longest one needs.
        self._model.config = replace(self._model.config, max_context=inputs.width)
        return super().predict(inputs)


def local_pass(
    model: GPT,
    text: ValidationText,
    dist: Dist,
    *,
    bos_id: int,
    context: int,
    batch_tokens: int,
    done: Done | None = None,
    longest: int = LONGEST,
) -> Pass:
    """Return the pass of local attention over a text.

    Args:
        model, text, dist, bos_id, done: as in `window_pass`.
        context: tokens to which a token attends, itself among them, >= 1.
        batch_tokens: tokens per forward pass, but for a window that has more; it changes speed and memory,
            not the score.
        longest: tokens of the longest window; it is at least 2 * context.
    """
    longest = max(longest, 2 * context)
    windows = sliding_windows(*document_bounds(text, bos_id), context=longest, stride=longest - context)
    questions = window_questions(
        windows,
        context=0,
        batch_tokens=batch_tokens,
        device=dist.device,
        rank=dist.rank,
        world_size=dist.world_size,
        done=done,
    )
    label = f"local attention, {context:,} tokens"
    return Pass(Local(model, context), [Turn([question]) for question in questions], label)
