"""Test-time training: adapters learn from the tokens of each document, after those tokens were scored.

All documents start from the same adapters and do not influence each other, so the score of a token depends
only on the artifact and on the tokens before it in its document:
 1. A document is read in chunks. The end of a chunk depends only on its position, not on the document's
 length. 2. The tokens of a chunk are scored by one forward pass over a window of at most `max_context` tokens
 that
    ends with the chunk. `scored_chunks` yields the losses before it uses them for anything else.
 3. Then the mean loss of the chunk, from the same forward pass, gives the document's adapters one step of
    AdamW without momentum. The weights of the model do not change.
Documents of similar length are read together, chunk by chunk, with the longest first in the batch, so that
the documents that are still being read are always the first rows of every tensor. All windows of a batch have
the same length and are packed without padding. A rank gets whole batches, which do not depend on the number
of ranks.

The method comes from PR #1855, with these differences. Chunks grow with the position, from 48 tokens to 256
tokens from position 4,096 on. (With 48 tokens throughout, the longest document of the challenge would take
2,024 sequential steps instead of 410, and this project's validation text 78 million window tokens instead of
31 million.) The matrix A starts again with every document; the start of a window does not depend on where the
document ends; and there are no phases in which the model itself learns from whole documents.
Legend: `N` documents that are read, `C` tokens of a chunk, `W` of a window, `D` width, `V` vocab.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pgolf.config import TttConfig
from pgolf.data.loader import IGNORED_TARGET, ValidationText
from pgolf.dist import Dist
from pgolf.evaluate.bpb import Score, Tally
from pgolf.evaluate.documents import document_bounds
from pgolf.log import Progress
from pgolf.model.gpt import GPT, layer_order, uncompiled
from pgolf.model.lora import Adapters, bind, initial_adapters

CHUNK_MULTIPLE = 16
"""Chunks longer than the shortest have a multiple of this number of tokens, which suits the tensor cores."""


class Chunk(NamedTuple):
    """Positions [begin, end) of a document, which are scored in a window that starts at `start`."""

    start: int
    begin: int
    end: int


class Scored(NamedTuple):
    """The losses of one chunk of N documents, computed before any adapter has learned from its targets."""

    documents: NDArray[np.int64]
    """`(N,)` indices of the documents in the text."""
    begin: int
    """Position of the chunk in each of them."""
    nats: Tensor
    """`(N, C)` float32, 0 after the end of a document."""
    counted: Tensor
    """`(N, C)` bool, whether each is a target of the document."""
    sizes: Tensor
    """`(N, C)` int64, bytes of the targets."""


def plan_chunks(length: int, context: int, config: TttConfig) -> list[Chunk]:
    """Return the chunks of a document of `length` targets; the last chunk may end after the document.

    A chunk at position p has clamp(p / chunk_growth, chunk, chunk_max) tokens, at most `context`.
    """
    chunks, begin = [], 0
    while begin < length:
        size = config.chunk
        if config.chunk_growth:
            grown = begin // config.chunk_growth // CHUNK_MULTIPLE * CHUNK_MULTIPLE
            size = max(size, min(grown, config.chunk_max))
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
    tokens: int
    """Window tokens of all chunks and documents."""


def plan_batches(lengths: NDArray[np.int64], context: int, config: TttConfig) -> list[DocumentBatch]:
    """Group documents of similar length so that a forward pass has at most batch_tokens tokens.

    A batch of a single document may have more.

    Args:
        lengths: `(n,)` number of targets of each document, all >= 1.
        context: tokens of the longest window.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, first = [], 0
    while first < order.size:
        chunks = plan_chunks(int(lengths[order[first]]), context, config)
        widest = max(c.end - c.start for c in chunks)
        count = max(1, min(config.batch_documents, config.batch_tokens // widest))
        documents = order[first : first + count]
        read = [int((lengths[documents] > c.begin).sum()) for c in chunks]
        work = sum(n * (c.end - c.start) for n, c in zip(read, chunks, strict=True))
        batches.append(DocumentBatch(documents, chunks, work))
        first += count
    return batches


def share_batches(batches: list[DocumentBatch], rank: int, world_size: int) -> list[DocumentBatch]:
    """Return this rank's batches; the largest comes first, and each goes to the rank with the least work."""
    load = [0] * world_size
    mine = []
    for batch in sorted(batches, key=lambda b: -b.tokens):
        to = load.index(min(load))
        load[to] += batch.tokens
        if to == rank:
            mine.append(batch)
    return mine


class AdapterState:
    """Float32 adapters of many documents with their second moments, and AdamW on the first ones of them.

    Args:
        model: determines the sizes, the device and the number of executed layers.
        config: rank, learning rate and the other settings.
        documents: largest number of documents.
    """

    def __init__(self, model: GPT, config: TttConfig, documents: int) -> None:
        slots = sum(map(len, layer_order(model.config, loop=True)))
        device = model.tok_emb.device
        self._config = config
        start = initial_adapters(model.config, slots, config.rank, seed=config.seed)
        self._start = {name: t.to(device) for name, t in start.items()}
        self._values = {n: t.new_empty((documents, *t.shape)) for n, t in self._start.items()}
        self._squares = {n: torch.empty_like(t) for n, t in self._values.items()}
        self._steps = 0

    def reset(self) -> None:
        """Set all adapters to their initial values and the moments to zero."""
        for name, start in self._start.items():
            self._values[name].copy_(start.expand_as(self._values[name]))
            self._squares[name].zero_()
        self._steps = 0

    def leaves(self, count: int) -> dict[str, Tensor]:
        """Return the adapters of the first `count` documents as autograd leaves that share their memory."""
        return {n: t[:count].detach().requires_grad_() for n, t in self._values.items()}

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], count: int) -> None:
        """Take one step of AdamW with beta1 = 0 on the adapters of the first `count` documents.

        v <- beta2 v + (1 - beta2) g^2;  p <- (1 - lr wd) p - lr g / (sqrt(v / (1 - beta2^t)) + eps)

        Args:
            gradients: of the `leaves`, `(N, ...)` with N >= count.
            count: number of documents that learn.
        """
        c = self._config
        self._steps += 1
        correction = 1 - c.beta2**self._steps
        for name, gradient in gradients.items():
            g, v, p = gradient[:count], self._squares[name][:count], self._values[name][:count]
            v.mul_(c.beta2).addcmul_(g, g, value=1 - c.beta2)
            p.mul_(1 - c.lr * c.weight_decay)
            p.addcdiv_(g, v.div(correction).sqrt_().add_(c.eps), value=-c.lr)


class Reader:
    """Scores chunks and lets the adapters learn, on one device; the model is not compiled.

    Args:
        model: prepared; its weights are shared and do not change.
        text: the validation text.
        bounds: its documents, from `document_bounds`.
        config: settings.
        documents: largest number of documents per batch.
    """

    def __init__(
        self,
        model: GPT,
        text: ValidationText,
        bounds: tuple[NDArray[np.int64], NDArray[np.int64]],
        config: TttConfig,
        *,
        documents: int,
    ) -> None:
        self._model = uncompiled(model)
        device = model.tok_emb.device
        self._tokens = torch.from_numpy(text.tokens.astype(np.int64)).to(device)
        self._sizes = torch.from_numpy(np.asarray(text.bytes, dtype=np.int64)).to(device)
        self._starts, self._lengths = bounds
        self._config = config
        self._state = AdapterState(model, config, documents)

    def scored_chunks(self, batch: DocumentBatch) -> Iterator[Scored]:
        """Yield the losses of one chunk after another; the adapters learn from a chunk after it was yielded.

        Every target of the batch's documents is scored once, from left to right.
        """
        self._state.reset()
        lengths = self._lengths[batch.documents]
        for chunk in batch.chunks:
            reading = int((lengths > chunk.begin).sum())
            learning = int((lengths > chunk.end).sum())
            documents = batch.documents[:reading]
            leaves = self._state.leaves(reading)
            with torch.set_grad_enabled(learning > 0):
                nats, counted, sizes = self._score(documents, chunk, leaves)
            yield Scored(documents, chunk.begin, nats.detach(), counted, sizes)
            if learning:
                # A sum over documents, so that the gradient of a document does not depend on the others.
                loss = nats[:learning].mean(dim=1).sum()
                found = torch.autograd.grad(loss, list(leaves.values()))
                del nats, loss
                self._state.step(dict(zip(leaves, found, strict=True)), learning)

    def _score(
        self, documents: NDArray[np.int64], chunk: Chunk, leaves: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses of a chunk, whether each target counts, and its bytes, all `(N, C)`."""
        model, device = self._model, self._tokens.device
        count, width = documents.size, chunk.end - chunk.start
        starts = torch.from_numpy(self._starts[documents]).to(device)[:, None]
        lengths = torch.from_numpy(self._lengths[documents]).to(device)[:, None]
        within = torch.arange(chunk.start, chunk.end, device=device)
        inside = within < lengths  # (N, W)
        at = (starts + within).clamp_max(self._tokens.numel() - 2)
        inputs = torch.where(inside, self._tokens[at], 0)
        counted, at = (t[:, chunk.begin - chunk.start :] for t in (inside, at))
        targets = torch.where(counted, self._tokens[at + 1], IGNORED_TARGET)
        cu_seqlens = torch.arange(0, (count + 1) * width, width, dtype=torch.int32, device=device)
        config = self._config
        adapters = bind(leaves, model.compute_dtype, scale=config.alpha / config.rank)
        hidden, table = model.hidden(
            inputs.flatten(), cu_seqlens, max_seqlen=width, loop=True, adapters=adapters
        )
        last = hidden.view(count, width, -1)[:, chunk.begin - chunk.start :].flatten(0, 1)
        nats = _losses(last, table, adapters, targets.flatten(), cap=model.config.softcap)
        return nats.view(count, -1), counted, self._sizes[at + 1]


def _losses(hidden: Tensor, table: Tensor, adapters: Adapters, targets: Tensor, *, cap: float) -> Tensor:
    """Return the losses `(T,)`, in nats, of final states `(T, D)`, with the adapters of the head.

    The fused loss cannot be used, because the adapters add to the logits. PyTorch operators are fast enough,
    as a chunk has few rows compared with its window.
    """
    logits = (F.linear(hidden, table) + adapters.head(hidden)).float()
    capped = cap * torch.tanh(logits / cap)
    return F.cross_entropy(capped, targets, ignore_index=IGNORED_TARGET, reduction="none")


def score_adapted(model: GPT, text: ValidationText, dist: Dist, *, bos_id: int, config: TttConfig) -> Score:
    """Return the score with test-time training; every token except for the first one is scored once.

    Args:
        model: prepared on dist.device; it does not change.
        text: the validation text.
        dist: ranks that share the batches; the score does not depend on their number, except for rounding.
        bos_id: the id that starts a document.
        config: settings.

    Raises:
        ValueError: the text has no documents, or another number of tokens or bytes was scored.
        RuntimeError: a loss is NaN or infinite.
    """
    tally = Tally(dist)
    bounds = document_bounds(text, bos_id)
    batches = plan_batches(bounds[1], model.config.max_context, config)
    mine = share_batches(batches, dist.rank, dist.world_size)
    if mine:
        room = max(batch.documents.size for batch in mine)
        reader = Reader(model, text, bounds, config, documents=room)
        progress = Progress("ttt", sum(batch.tokens for batch in mine), is_main=dist.is_main)
        for batch in mine:
            for scored, chunk in zip(reader.scored_chunks(batch), batch.chunks, strict=True):
                tally.add(scored.nats, scored.counted, scored.sizes)
                work = scored.documents.size * (chunk.end - chunk.start)
                progress.advance(work, lambda: f"{tally.so_far():.4f} bpb")
    return tally.total(expected_tokens=text.tokens.size - 1, expected_bytes=int(text.bytes.sum()))
