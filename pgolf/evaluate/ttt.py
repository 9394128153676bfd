"""Test-time training: adapters learn from the tokens of each document, after those tokens were scored.

All documents start from the same adapters and do not influence each other, so the score of a token depends
only on the artifact and on the tokens before it in its document:
 1. A document is read in chunks. The end of a chunk depends only on its position, not on the document's
 length. 2. The tokens of a chunk are scored by one forward pass over a window of at most `max_context` tokens
 that
    ends with the chunk. `predictor.read` counts the losses before they are used for anything else.
 3. Then the mean loss of the chunk, from the same forward pass, gives the document's adapters one step of
    AdamW without momentum. The weights of the model do not change.
Documents of similar length are read together, chunk by chunk, with the longest first in the batch, so that
the documents that are still being read are always the first rows of every tensor. All windows of a batch have
the same length and are packed without padding. A rank gets whole batches, smaller ones if there are many
ranks.

The method comes from PR #1855, with these differences. Chunks grow with the position, from 64 tokens to 256
tokens from position 2,048 on. (With 48 tokens throughout, the longest document of the challenge would take
2,024 sequential steps instead of 392, and this project's validation text 78 million window tokens instead of
21 million.) The matrix A starts again with every document; the start of a window does not depend on where the
document ends. Phases, in which the model itself learns from whole documents, are in `phases.py`; kept A is a
setting.
Legend: `N` documents that are read, `C` tokens of a chunk, `W` of a window, `D` width, `V` vocab.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgolf.config import TttConfig
from pgolf.data.loader import ValidationText
from pgolf.dist import Dist
from pgolf.evaluate.documents import document_bounds
from pgolf.evaluate.ensemble import Ensemble
from pgolf.evaluate.heads import AdaptedHead
from pgolf.evaluate.predictor import Done, Inputs, Lesson, Pass, Predictor, Question, Turn
from pgolf.model.adapted import compile_adapted
from pgolf.model.blocks import LayerWeights
from pgolf.model.chunk_gradient import ChunkGradient
from pgolf.model.gpt import GPT, layer_order
from pgolf.model.lora import bind, initial_adapters
from pgolf.model.uncompiled import uncompiled

CHUNK_MULTIPLE = 16
"""Chunks longer than the shortest have a multiple of this number of tokens, which suits the tensor cores."""


class Chunk(NamedTuple):
    """Positions [begin, end) of a document, which are scored in a window that starts at `start`."""

    start: int
    begin: int
    end: int


def plan_chunks(length: int, context: int, config: TttConfig) -> list[Chunk]:
    """Return the chunks of a document of `length` targets; the last chunk may end after the document.

    The first chunks have the tokens of config.first_chunks. After them, a chunk at position p has
    clamp(p / chunk_growth, chunk, chunk_max) tokens; all have at most `context`.
    """
    chunks: list[Chunk] = []
    begin, first = 0, config.sizes
    while begin < length:
        size = config.chunk
        if config.chunk_growth:
            grown = begin // config.chunk_growth // CHUNK_MULTIPLE * CHUNK_MULTIPLE
            size = max(size, min(grown, config.chunk_max))
        if len(chunks) < len(first):
            size = first[len(chunks)]
        end = begin + min(size, context)
        chunks.append(Chunk(max(0, end - context), begin, end))
        begin = end
    return chunks


@dataclass(frozen=True)
class DocumentBatch:
    """Documents that are read together, and their cost."""

    documents: NDArray[np.int64]
    """`(n,)` indices of the documents, the longest first."""
    chunks: list[Chunk]
    """The chunks of the longest document."""
    cost: float
    """What reading them takes, in units of a token of a short window."""


MOST_SHARE = 0.6
"""Largest part of a rank's share of the cost of all documents that a batch may have, so that ranks can share
the work. Smaller batches take more steps, and each costs time on the host, so one rank has large ones."""
LEAST_COST = 1e6
"""Cost below which batches are not made smaller: a second or two on a GPU."""
ATTENTION_WIDTH = 4096
"""Tokens of a window at which attention costs a token as much as everything else (counted)."""
DOCUMENT_COST = 128
"""Cost of the optimizer's step on one document's adapters (counted from the bytes that it moves)."""
STEP_COST = 8192
"""Least cost of a step: below it, launching its kernels takes longer than running them (counted)."""


COMPILE_COST = 4.5e8
"""Cost of the batches that a GPU reads from which on compiling is worth its time. On an H200 a step of
`pr1855` with 65,536 window tokens takes 84 ms, compiled 80, and a cost of a million takes 1.0 s; compiling
takes 20 s and more, also with the graphs on disk. The project's validation text has a cost of 3.5e7, or 4.8e7
with windows of 3,072 tokens (docs/findings.md, the entry about 84,800 tokens per second)."""
COMPOSED_COST = 2.7e7
"""The same where the kernels next to attention cannot run: there a compiled step took 0.55 of the time
(docs/findings.md, the entry about three processes on one GPU)."""


def step_cost(documents: int, width: int) -> float:
    """Return the cost of a step on some documents with windows of `width` tokens."""
    return max(documents * (width * (1 + width / ATTENTION_WIDTH) + DOCUMENT_COST), STEP_COST)


def plan_batches(
    lengths: NDArray[np.int64], context: int, config: TttConfig, ranks: int = 1
) -> list[DocumentBatch]:
    """Group documents of similar length so that a forward pass has at most batch_tokens tokens.

    A batch of a single document may have more. A batch that has too much of the cost of all documents, as the
    one with the longest has on many ranks, gets fewer documents.

    Args:
        lengths: `(n,)` number of targets of each document, all >= 1.
        context: tokens of the longest window.
        ranks: how many share the batches, >= 1.
    """
    order = np.argsort(-lengths, kind="stable")

    def batch(first: int, count: int, chunks: list[Chunk]) -> DocumentBatch:
        documents = order[first : first + count]
        read = [int((lengths[documents] > c.begin).sum()) for c in chunks]
        cost = sum(step_cost(n, c.end - c.start) for n, c in zip(read, chunks, strict=True))
        return DocumentBatch(documents, chunks, cost)

    def plan(limit: float) -> list[DocumentBatch]:
        batches, first = [], 0
        while first < order.size:
            chunks = plan_chunks(int(lengths[order[first]]), context, config)
            widest = max(c.end - c.start for c in chunks)
            count = max(1, min(config.batch_documents, config.batch_tokens // widest))
            found = batch(first, count, chunks)
            while found.cost > limit and count > 1:
                count = max(1, min(count - 1, int(count * limit / found.cost)))
                found = batch(first, count, chunks)
            batches.append(found)
            first += count
        return batches

    whole = plan(float("inf"))
    return plan(max(LEAST_COST, MOST_SHARE / ranks * sum(found.cost for found in whole)))


def share_batches(batches: list[DocumentBatch], rank: int, world_size: int) -> list[DocumentBatch]:
    """Return this rank's batches; the most costly comes first, and each goes to the rank with the least."""
    load = [0.0] * world_size
    mine = []
    for batch in sorted(batches, key=lambda b: -b.cost):
        to = load.index(min(load))
        load[to] += batch.cost
        if to == rank:
            mine.append(batch)
    return mine


class AdapterState:
    """Float32 adapters of many documents with their second moments, and AdamW on the first ones of them.

    Where the model computes in another dtype, there is a copy in that dtype, which the model reads.

    Args:
        model: determines the sizes, the dtype, the device and the number of executed layers.
        config: rank, learning rate and the other settings.
        documents: largest number of documents.
    """

    def __init__(self, model: GPT, config: TttConfig, documents: int) -> None:
        slots = sum(map(len, layer_order(model.config, loop=True)))
        device, dtype = model.tok_emb.device, model.compute_dtype
        self._config = config
        start = initial_adapters(model.config, slots, config.rank, seed=config.seed, places=config.places)
        self._start = {name: t.to(device) for name, t in start.items()}
        self._values = {n: t.new_empty((documents, *t.shape)) for n, t in self._start.items()}
        self._squares = {n: torch.empty_like(t) for n, t in self._values.items()}
        self._copies = self._values
        if dtype != torch.float32:
            self._copies = {n: torch.empty_like(t, dtype=dtype) for n, t in self._values.items()}
        self._steps = 0
        self.reset(warm=False)

    def reset(self, *, warm: bool) -> None:
        """Set all adapters to their initial values and the moments to zero.

        Args:
            warm: leave the matrices A as they are.
        """
        for name, start in self._start.items():
            if not (warm and name.endswith("_a")):
                self._values[name].copy_(start.expand_as(self._values[name]))
                self._copies[name].copy_(self._values[name])
            self._squares[name].zero_()
        self._steps = 0

    def tensors(self) -> list[Tensor]:
        """Return everything that changes."""
        copies = [] if self._copies is self._values else self._copies.values()
        return [*self._values.values(), *self._squares.values(), *copies]

    def leaves(self, count: int, first: int = 0) -> dict[str, Tensor]:
        """Return the adapters of `count` documents as autograd leaves that share their memory."""
        return {n: t[first : first + count].detach().requires_grad_() for n, t in self._copies.items()}

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], count: int) -> None:
        """Take one step of AdamW with beta1 = 0 on the adapters of the first `count` documents, see `adamw`.

        Args:
            gradients: of the `leaves`, `(N, ...)` with N >= count.
            count: number of documents that learn.
        """
        self._steps += 1
        groups = (self._values, self._squares, gradients, self._copies)
        values, squares, found, copies = ([group[n][:count] for n in gradients] for group in groups)
        adamw(values, squares, found, copies, self._config, self._steps)


def adamw(
    values: list[Tensor],
    squares: list[Tensor],
    gradients: list[Tensor],
    copies: list[Tensor],
    config: TttConfig,
    step: int,
) -> None:
    """Take one step of AdamW without momentum on lists of tensors, with few launches for all of them.

    v <- beta2 v + (1 - beta2) g^2;  p <- (1 - lr wd) p - lr g / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        values, squares: float32, p and v; updated.
        gradients: g, in the dtype of `copies`.
        copies: p rounded to the compute dtype; updated. In float32 it has the tensors of `values`.
        config: lr, weight decay wd, beta2 and eps.
        step: t, from 1 on.
    """
    c = config
    g = [torch.empty_like(t) for t in values]  # contiguous, as the step takes them
    torch._foreach_copy_(g, gradients)
    steps = [torch.full((), step, dtype=torch.float32, device=g[0].device)] * len(g)
    # Without momentum the first moment is the gradient, in the same memory. Each tensor is read and written
    # once, as in a compiled step.
    torch._fused_adamw_(
        *(values, g, g, squares, [], steps),
        lr=c.lr,
        beta1=0.0,
        beta2=c.beta2,
        weight_decay=c.weight_decay,
        eps=c.eps,
        amsgrad=False,
        maximize=False,
    )
    if copies[0] is not values[0]:
        torch._foreach_copy_(copies, values)


class Adapted:
    """A predictor whose adapters learn each chunk after it was scored; the model does not change.

    Args:
        model: not compiled, see `uncompiled`; its parameters need no gradients.
        config: settings.
        documents: largest number of documents per batch.
        caps: `(2,)` caps of the logits above and below 0, None for those of the model; they may change.
        compiled: compile the blocks, unless config.gradient is "chunk", see `compile_adapted`.
    """

    def __init__(
        self,
        model: GPT,
        config: TttConfig,
        *,
        documents: int,
        caps: Tensor | None = None,
        compiled: bool = False,
    ) -> None:
        self._chunk_gradient = ChunkGradient(model) if config.gradient == "chunk" else None
        if compiled and self._chunk_gradient is None:
            # Of the same weights, so that others may use the model as it is.
            model = compile_adapted(uncompiled(model, context=model.config.max_context))
        self._model, self._config, self._caps = model, config, caps
        self._state = AdapterState(model, config, documents)
        self._leaves: dict[str, Tensor] = {}
        self._weights: list[LayerWeights] | None = None

    def begin(self) -> None:
        """Start other documents with adapters that have no effect."""
        self._weights = self._model.layer_weights()  # which change between batches at most
        self._state.reset(warm=self._config.warm_a)

    def predict(self, inputs: Inputs) -> AdaptedHead:
        """Return the distributions in the last tokens of each document's window."""
        model, config, width = self._model, self._config, inputs.width
        count = inputs.ids.numel() // width
        self._leaves = self._state.leaves(count, inputs.lane)
        adapters = bind(self._leaves, model.config, model.compute_dtype, scale=config.alpha / config.rank)
        what: dict[str, Any] = {"max_seqlen": width, "adapters": adapters, "asked": inputs.asked}
        if self._chunk_gradient is not None and inputs.asked < width and torch.is_grad_enabled():
            hidden, table = self._chunk_gradient.hidden(inputs.ids, inputs.cu_seqlens, **what)
        else:
            what["weights"] = self._weights
            hidden, table = model.hidden(inputs.ids, inputs.cu_seqlens, loop=True, **what)
        return AdaptedHead(hidden, table, model.config.softcap, self._caps, adapters)

    def learn(self, lesson: Lesson) -> None:
        """Take one step on the mean loss of the chunk, for each document that goes on."""
        if lesson.nats is None:
            return
        count = next(iter(self._leaves.values())).shape[0]
        # A sum over documents, so that the gradient of a document does not depend on the others.
        loss = lesson.nats.view(count, -1)[: lesson.learners].mean(dim=1).sum()
        found = torch.autograd.grad(loss, list(self._leaves.values()))
        self._state.step(dict(zip(self._leaves, found, strict=True)), lesson.learners)

    def state(self) -> list[Tensor]:
        """Return the adapters and their moments."""
        return self._state.tensors()


SPLIT_TOKENS = 8192
"""Window tokens of documents that end in a chunk from which on they are scored apart and without gradients:
fewer do not keep a GPU busy. That saves 3.5 % of the backward pass on the project's validation text."""


def batch_turns(batch: DocumentBatch, bounds: tuple[NDArray[np.int64], NDArray[np.int64]]) -> list[Turn]:
    """Return the turns that read a batch of documents, one for each chunk.

    Args:
        batch: from `plan_batches`.
        bounds: starts and lengths of all documents, from `document_bounds`.
    """
    starts, lengths = (of[batch.documents] for of in bounds)
    turns = []
    for chunk in batch.chunks:
        reading = int((lengths > chunk.begin).sum())
        here, ends = starts[:reading], np.minimum(chunk.end, lengths[:reading])
        windows = np.stack((here + chunk.start, here + chunk.begin, here + ends), axis=1)
        width, asked = chunk.end - chunk.start, chunk.end - chunk.begin
        learning = int((lengths > chunk.end).sum())
        parts = [(0, reading)]
        if learning and (reading - learning) * width >= SPLIT_TOKENS:
            parts = [(learning, reading), (0, learning)]
        questions = [Question(windows[a:b], width, asked=asked, lane=a) for a, b in parts]
        last = chunk is batch.chunks[-1]
        turns.append(Turn(questions, begins=chunk.begin == 0, learners=learning, settles=last))
    return turns


def left_over(
    batches: list[DocumentBatch], bounds: tuple[NDArray[np.int64], NDArray[np.int64]], done: Done | None
) -> list[DocumentBatch]:
    """Return the batches that are not done, see `Done`."""
    if done is None:
        return batches

    def windows(batch: DocumentBatch) -> NDArray[np.int64]:
        starts, lengths = (of[batch.documents] for of in bounds)
        return np.stack((starts, starts, starts + lengths), axis=1)

    return [batch for batch in batches if not done(windows(batch))]


def worth_compiling(batches: list[DocumentBatch], model: GPT, dist: Dist) -> bool:
    """Tell whether compiling takes less time than it saves: it depends on the number of GPUs.

    A model that was prepared without compiling stays so; the compiler may not work here.
    """
    if not model.compiled:
        return False
    cost = sum(batch.cost for batch in batches) / dist.devices
    least = COMPOSED_COST if model.heads_name == "composed" else COMPILE_COST
    return dist.device.type == "cuda" and cost >= least


def adapted_pass(
    model: GPT,
    text: ValidationText,
    dist: Dist,
    *,
    bos_id: int,
    context: int,
    config: TttConfig,
    done: Done | None = None,
    compiled: bool | None = None,
) -> Pass:
    """Return the pass of test-time training over a text.

    Args:
        model: prepared on dist.device; it does not change.
        text: the validation text.
        dist: ranks that share the batches; the score does not depend on their number, except for rounding
            (and except with config.warm_a).
        bos_id: the id that starts a document.
        context: tokens of the longest window.
        config: settings.
        done: see `Done`; it is of no use with config.warm_a.
        compiled: see `Adapted`; None: on a GPU if the text is long, see `worth_compiling`.

    Raises:
        ValueError: the text has no documents.
    """
    bounds = document_bounds(text, bos_id)
    whole = plan_batches(bounds[1], context, config, dist.world_size)
    if compiled is None:
        compiled = worth_compiling(whole, model, dist)
    batches = left_over(whole, bounds, done)
    mine = share_batches(batches, dist.rank, dist.world_size)
    room = max((batch.documents.size for batch in mine), default=1)
    plain = uncompiled(model, context=context)
    members = [
        Adapted(plain, replace(config, seed=config.seed + k), documents=room, compiled=compiled)
        for k in range(config.members)
    ]
    predictor: Predictor = members[0] if config.members == 1 else Ensemble(members)
    return Pass(predictor, [turn for batch in mine for turn in batch_turns(batch, bounds)], "ttt")
