"""Test-time training with phases: pauses in which the model itself learns from documents that were scored.

Documents are read as in `ttt.py`, in batches of similar length, the longest first. When as many of them are
scored as a boundary says, all ranks pause, and the model takes steps of SGD with momentum over the documents
scored so far: in order of length, the shortest first, as many as the boundary says, so that the longest are
left out where a batch passed the boundary; in chunks of `chunk_tokens`, the rate falling along half a cosine,
nothing learned from the last chunk. Then the adapters of the next documents start anew, on the model that
has learned. After the last phase the model does not change any more.

The challenge accepted this. But documents are not read in the order of the text, so a score depends on
documents that come later in it: the strict reading of the rules fails (`LOOSE` in `config_evaluate.py`), and
every output says so.

Source: PRs #1610, #1626, #1767, #1787 and #1855 of parameter-golf. There, ranks claimed batches while they
ran, so that it depended on their speed which documents a phase had; here, batches are shared beforehand. The
differences of `ttt.py` from them apply too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pgolf.config import PhasesConfig
from pgolf.data.loader import ValidationText
from pgolf.dist import Dist
from pgolf.evaluate.documents import document_bounds
from pgolf.evaluate.predictor import Done, Lesson, Pass, Turn
from pgolf.evaluate.sgd import Learner
from pgolf.evaluate.ttt import (
    Adapted,
    DocumentBatch,
    batch_turns,
    left_over,
    plan_batches,
    share_batches,
    worth_compiling,
)
from pgolf.log import Progress
from pgolf.model.gpt import GPT


class Phased(Adapted):
    """Adapters on a model that learns in phases.

    Args:
        learner: the model that learns.
        phases: settings of the phases and of the adapters.
        documents: largest number of documents per batch.
        compiled: as in `Adapted`.
    """

    def __init__(
        self, learner: Learner, phases: PhasesConfig, *, documents: int, compiled: bool = False
    ) -> None:
        super().__init__(
            learner.model, phases.adapters, documents=documents, caps=learner.caps, compiled=compiled
        )
        self._learner, self._chunk = learner, phases.chunk_tokens

    def learn(self, lesson: Lesson) -> None:
        """Let the adapters learn a chunk, or the model learn scored documents."""
        if not lesson.passages:
            super().learn(lesson)
            return
        self._learner.restart()
        chunks = cut_passages(lesson.passages, self._chunk)
        progress = Progress("phase", len(chunks) - 1, is_main=self._learner.is_main)
        for number, chunk in enumerate(chunks[:-1]):
            self._learner.study(chunk, done=number / (len(chunks) - 1))
            progress.advance(1)
        self._state.reset(warm=False)

    def state(self) -> list[Tensor]:
        """Return the adapters, their moments and the model's parameters."""
        return [*super().state(), *self._learner.state()]


def cut_passages(passages: Sequence[Tensor], size: int) -> list[list[Tensor]]:
    """Return passages, one after another, as chunks of `size` inputs; the last one may have fewer.

    Args:
        passages: `(n + 1,)` tokens each, n inputs and their targets.
        size: inputs of a chunk.
    """
    chunks: list[list[Tensor]] = [[]]
    room = size
    for passage in passages:
        at, inputs = 0, passage.numel() - 1
        while at < inputs:
            if not room:
                chunks.append([])
                room = size
            end = min(at + room, inputs)
            chunks[-1].append(passage[at : end + 1])
            room -= end - at
            at = end
    return chunks


def plan_phases(batches: list[DocumentBatch], phases: PhasesConfig) -> list[list[DocumentBatch]]:
    """Return the batches before each phase, and those after the last one; the longest documents come first.

    A phase begins after the batch with which its boundary is reached; if the text has fewer documents, there
    are fewer phases.
    """
    parts: list[list[DocumentBatch]] = [[]]
    done, boundaries = 0, list(phases.boundaries)
    for batch in batches:
        parts[-1].append(batch)
        done += batch.documents.size
        if boundaries and done >= boundaries[0]:
            boundaries = [b for b in boundaries if b > done]
            parts.append([])
    return parts


def phased_pass(
    model: GPT,
    text: ValidationText,
    dist: Dist,
    *,
    bos_id: int,
    context: int,
    phases: PhasesConfig,
    done: Done | None = None,
    compiled: bool | None = None,
) -> Pass:
    """Return the pass of test-time training with phases over a text.

    Args:
        model, text, dist, bos_id, context: as in `adapted_pass`.
        phases: settings of the phases and of the adapters.
        done: see `Done`; such documents are not scored, but phases learn from them again. It is of no use
            with adapters.warm_a.
        compiled: as in `adapted_pass`.

    Raises:
        ValueError: the text has no documents.
    """
    bounds = document_bounds(text, bos_id)
    whole = plan_batches(bounds[1], context, phases.adapters, dist.world_size)
    if compiled is None:
        compiled = worth_compiling(whole, model, dist)
    parts = plan_phases(whole, phases)
    turns: list[Turn] = []
    room, past = 1, 0
    for number, part in enumerate(parts):
        mine = share_batches(left_over(part, bounds, done), dist.rank, dist.world_size)
        room = max([room, *(batch.documents.size for batch in mine)])
        turns += [turn for batch in mine for turn in batch_turns(batch, bounds)]
        past += sum(batch.documents.size for batch in part)
        if number < len(parts) - 1:
            read = np.concatenate([batch.documents for old in parts[: number + 1] for batch in old])
            turns.append(Turn(passages=_passages(read, bounds, _boundary(phases, past))))
    learner = Learner(model, phases, dist, context=context, two_caps=phases.two_caps)
    return Pass(Phased(learner, phases, documents=room, compiled=compiled), turns, "phased")


def _boundary(phases: PhasesConfig, done: int) -> int:
    """Return the largest boundary that `done` documents reach."""
    return max(b for b in phases.boundaries if b <= done)


def _passages(
    read: NDArray[np.int64], bounds: tuple[NDArray[np.int64], NDArray[np.int64]], count: int
) -> NDArray[np.int64]:
    """Return the inputs `(count, 2)` of the shortest `count` documents of `read`, the shortest first."""
    starts, lengths = bounds
    order = read[np.argsort(lengths[read], kind="stable")][:count]
    return np.stack((starts[order], starts[order] + lengths[order]), axis=1)
