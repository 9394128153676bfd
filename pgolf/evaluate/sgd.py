"""Score-first SGD: the whole model learns from each chunk of the text, after the chunk was scored.

The text is cut into chunks of `chunk_tokens` inputs, in order. A chunk is scored with a sliding window (the
windows whose first scored input lies in it), and then the model takes `epochs` steps of SGD with momentum on
the mean loss of the chunk's tokens. The rate falls along half a cosine over the chunks; the norm of the
gradient is limited. Nothing is learned from the last chunk. So a score depends on the tokens before it, of
earlier documents too, and on the number of chunks, which sets the rate and is known beforehand.

Source: PRs #549, #1413 and #1493 of parameter-golf. Theirs ignored documents; here no window and no segment
crosses the start of a document. There, a step was the mean over the ranks of each rank's sequences; here it
is the mean over all tokens of the chunk, so the score does not depend on the number of ranks, except for
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pgolf.config import SgdConfig
from pgolf.data.loader import ValidationText, padded_cu_seqlens
from pgolf.dist import Dist
from pgolf.evaluate.documents import document_bounds
from pgolf.evaluate.heads import AdaptedHead
from pgolf.evaluate.predictor import Done, Lesson, Pass, Turn
from pgolf.evaluate.sliding import Fixed, sliding_windows, window_questions
from pgolf.model.gpt import GPT
from pgolf.model.uncompiled import uncompiled


class Learner:
    """A copy of a model that takes steps of SGD on scored tokens, in step on all ranks.

    Args:
        model: prepared; it does not change.
        config: settings.
        dist: ranks that share the tokens of a step.
        context: tokens of the longest segment.
        two_caps: learn the soft cap of the logits too, apart for logits above and below 0.
    """

    def __init__(
        self, model: GPT, config: SgdConfig, dist: Dist, *, context: int, two_caps: bool = False
    ) -> None:
        self.model = uncompiled(model, context=context, own=True)
        self.caps = torch.full((2,), model.config.softcap, device=dist.device) if two_caps else None
        self._config, self._dist, self._context = config, dist, context
        self.is_main = dist.is_main
        caps = [] if self.caps is None else [nn.Parameter(self.caps)]  # shares the memory
        self._parameters = [*self.model.parameters(), *caps]
        self.restart()

    def restart(self) -> None:
        """Forget the momentum."""
        c = self._config
        self._sgd = torch.optim.SGD(self._parameters, lr=c.lr, momentum=c.momentum)

    def state(self) -> list[Tensor]:
        """Return everything that changes."""
        return [p.data for p in self._parameters]

    def study(self, passages: Sequence[Tensor], *, done: float) -> None:
        """Take the steps of one chunk; every rank must call it with the same passages.

        Args:
            passages: `(n + 1,)` each, see `Lesson`; one chunk, which is cut into segments of `context`.
            done: fraction of the chunks before this one, 0 to 1, which sets the rate.
        """
        for group in self._sgd.param_groups:
            group["lr"] = self._config.lr * 0.5 * (1 + math.cos(math.pi * done))
        buffers = self._buffers(passages)
        total = sum(passage.numel() - 1 for passage in passages)
        for _ in range(self._config.epochs):
            self._step(buffers, total)

    def _buffers(self, passages: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return this rank's inputs, targets and starts of segments, packed into buffers."""
        pieces = [
            piece
            for passage in passages
            for piece in zip(
                *(torch.split(part, self._context) for part in (passage[:-1], passage[1:])), strict=True
            )
        ]
        sizes = np.cumsum([0, *(inputs.numel() for inputs, _ in pieces)])
        # As many tokens on every rank as whole segments allow, but no more in a buffer than is configured.
        share = -(-int(sizes[-1]) // self._dist.world_size)
        most = max(self._context, min(share, self._config.batch_tokens))
        buffers, first = [], 0
        while first < len(pieces):
            last = max(int(np.searchsorted(sizes, sizes[first] + most, side="right")) - 1, first + 1)
            inputs, targets = (torch.cat(parts) for parts in zip(*pieces[first:last], strict=True))
            starts = padded_cu_seqlens(sizes[first:last] - sizes[first], inputs.numel())
            buffers.append((inputs, targets, starts.to(inputs.device)))
            first = last
        return buffers[self._dist.rank :: self._dist.world_size]

    def _step(self, buffers: list[tuple[Tensor, Tensor, Tensor]], total: int) -> None:
        """Take one step on the mean loss over all ranks' buffers."""
        for p in self._parameters:
            p.requires_grad_(True).grad = torch.zeros_like(p)
        with torch.enable_grad():
            for inputs, targets, cu_seqlens in buffers:
                nats = self._losses(inputs, targets, cu_seqlens)
                (nats.sum() / total).backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        flat = self._dist.all_reduce(torch.cat([g.flatten() for g in gradients]))
        for g, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            g.copy_(part.view_as(g))
        if self._config.grad_clip:
            nn.utils.clip_grad_norm_(self._parameters, self._config.grad_clip)
        self._sgd.step()
        for p in self._parameters:
            p.requires_grad_(False).grad = None

    def _losses(self, inputs: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
        model, width = self.model, self._context
        if self.caps is None:
            losses: Tensor = model(inputs, targets, cu_seqlens, max_seqlen=width, loop=True)
            return losses
        hidden, table = model.hidden(inputs, cu_seqlens, max_seqlen=width, loop=True)
        return AdaptedHead(hidden, table, model.config.softcap, self._parameters[-1]).nats(targets)


class ScoreFirst(Fixed):
    """A predictor whose model learns each chunk after it was scored.

    Args:
        learner: the model that learns.
        chunks: number of chunks of the whole text, which sets the rate.
    """

    def __init__(self, learner: Learner, *, chunks: int) -> None:
        super().__init__(learner.model)
        self._learner, self._chunks, self._done = learner, chunks, 0

    def learn(self, lesson: Lesson) -> None:
        """Take the steps of the chunk that was scored."""
        self._learner.study(lesson.passages, done=self._done / max(self._chunks - 1, 1))
        self._done += 1

    def state(self) -> list[Tensor]:
        """Return the parameters."""
        return self._learner.state()


def sgd_pass(
    model: GPT,
    text: ValidationText,
    dist: Dist,
    *,
    bos_id: int,
    context: int,
    stride: int,
    batch_tokens: int,
    config: SgdConfig,
    whole: int = 0,
    done: Done | None = None,
) -> Pass:
    """Return the pass of score-first SGD over a text.

    Args:
        model: prepared on dist.device; it does not change.
        text: the validation text.
        dist: ranks that share windows and steps.
        bos_id, context, stride, batch_tokens: of the sliding window, see `window_pass`.
        config: settings.
        whole: tokens of the text whose number of chunks sets the rate; 0: `text`. The beginning of a text has
            the scores that it has in the whole text only with the same number.
        done: see `Done`; what is done is not scored, but learned again.

    Raises:
        ValueError: as in `sliding_windows`.
    """
    bounds = document_bounds(text, bos_id)
    windows = sliding_windows(*bounds, context=context, stride=stride)
    inputs = text.tokens.size - 1
    chunks = -(-((whole or text.tokens.size) - 1) // config.chunk_tokens)
    turns = []
    for begin in range(0, inputs, config.chunk_tokens):
        end = min(begin + config.chunk_tokens, inputs)
        low, high = np.searchsorted(windows[:, 1], [begin, end])
        # Every rank gets equal parts of the chunk, as all of them must have scored it before it is learned.
        first, last = (low + (high - low) * (dist.rank + k) // dist.world_size for k in (0, 1))
        questions = window_questions(
            windows[first:last],
            context=context,
            batch_tokens=max(batch_tokens, context),
            device=dist.device,
            done=done,
        )
        passages = None if end == inputs else _documents_in(bounds[0], begin, end)
        turns.append(Turn(questions, passages=passages))
    learner = Learner(model, config, dist, context=context)
    return Pass(ScoreFirst(learner, chunks=chunks), turns, f"sgd, stride {stride}")


def _documents_in(starts: NDArray[np.int64], begin: int, end: int) -> NDArray[np.int64]:
    """Return the parts `(P, 2)` of [begin, end) that belong to one document each."""
    inside = starts[(starts > begin) & (starts < end)]
    cuts = np.concatenate(([begin], inside, [end]))
    return np.stack((cuts[:-1], cuts[1:]), axis=1)
