"""Text generation: draw a token from the model's distribution, append it to the document, and repeat.

The layers are those of training and scoring (`GPT.layers`), with another attention kernel, which keeps the
keys and values of earlier tokens; so a new token costs one row of every matrix product. The logits equal
those of one forward pass over the same window of tokens.

A model sees at most `max_context` tokens at a time. A document up to that length is seen completely. When the
window is full, it starts again from its last max_context // 2 tokens, whose keys and values are computed
again. So a token of a long document sees between half of max_context and all of it, and how much depends only
on its position, not on where the prompt ended.
Legend: `T` tokens, `V` vocab, `H` query heads, `G` kv heads, `K` head dim, `S` executed layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.config import ModelConfig
from pgolf.data.tokenizer import ESCAPE, Tokenizer
from pgolf.errors import RunError, UserError
from pgolf.model.blocks import Context
from pgolf.model.gpt import GPT, layer_order
from pgolf.model.uncompiled import uncompiled


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits."""

    temperature: float = 0.8
    """The logits are divided by it, >= 0. Below 1, likely tokens become likelier; 0 always takes the
    likeliest."""
    top_p: float = 0.95
    """Draw only from the smallest set of tokens whose probabilities sum to at least this, in (0, 1]; 1 = all
    tokens."""
    top_k: int = 0
    """Draw only from the k likeliest tokens, >= 0; 0 = all tokens."""
    seed: int = 0
    """Seed of the random numbers, >= 0; the same seed gives the same text on the same machine."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be a finite number >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise UserError(f"top_k must be >= 0 (0 = all tokens), got {self.top_k}")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"seed must be in [0, 2^63), got {self.seed}")


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    tokens: int = 256,
    temperature: float = Sampling.temperature,
    top_p: float = Sampling.top_p,
    top_k: int = Sampling.top_k,
    seed: int = Sampling.seed,
) -> Iterator[str]:
    """Yield the text with which the model continues `prompt`, piece by piece, as it is drawn.

    The text ends when the model draws the BOS of another document, or after `tokens` tokens. A piece consists
    of whole characters: the bytes of a character that is not complete are held until it is.

    Args:
        model, tokenizer: as `pgolf.load` returns them.
        prompt: the beginning of the document; if empty, the model writes it from its beginning.
        tokens: largest number of tokens to draw, >= 1.
        temperature, top_p, top_k, seed: see `Sampling`.

    Raises:
        ValueError: a setting is out of range, the prompt is not Unicode text, or the tokenizer's size is not
            that of the model's vocabulary.
        RuntimeError: the model's logits are NaN or infinite; raised while drawing.
    """
    if tokens < 1:
        raise UserError(f"tokens must be >= 1, got {tokens}")
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.vocab_size} tokens, the model has {model.config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    sampling = Sampling(temperature, top_p, top_k, seed)
    try:
        prompt.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"the prompt is not Unicode text: {e.reason} at character {e.start}") from e
    ids = [tokenizer.bos_id, *(int(i) for i in tokenizer.encode_ids([prompt])[0])]
    drawn = draw(model, ids, sampling, tokens=tokens, stop_id=tokenizer.bos_id)
    return text_pieces(tokenizer, ids, drawn)


def draw(model: GPT, ids: Sequence[int], sampling: Sampling, *, tokens: int, stop_id: int) -> Iterator[int]:
    """Yield at most `tokens` ids that continue `ids` (at least one), until `stop_id` is drawn."""
    decoder, rng = Decoder(model), torch.Generator().manual_seed(sampling.seed)
    new: Sequence[int] = ids
    for _ in range(tokens):
        token = sample(decoder.feed(new), sampling, rng)
        if token == stop_id:
            return
        yield token
        new = [token]


def sample(logits: Tensor, sampling: Sampling, rng: torch.Generator) -> int:
    """Draw an id from softmax(logits / temperature), restricted to the top k and then to their top p.

    The arithmetic is float64 on the CPU and takes one random number.

    Args:
        logits: `(V,)`, on any device.
        rng: a generator on the CPU.

    Raises:
        RuntimeError: a logit is NaN or infinite.
    """
    scores = logits.double().cpu()
    if not bool(scores.isfinite().all()):
        raise RunError(
            "the model's logits are NaN or infinite, so its weights are not usable; choose another file of "
            "weights"
        )
    if sampling.temperature == 0:
        return int(scores.argmax())
    # The largest score becomes 0, so that division by a small temperature cannot make it infinite.
    scores, order = (scores - scores.max()).sort(descending=True, stable=True)
    likely = torch.softmax(scores[: sampling.top_k or None] / sampling.temperature, dim=0)
    before = likely.cumsum(0) - likely  # of all likelier tokens
    sums = likely[before < sampling.top_p].cumsum(0)
    u = torch.rand((), dtype=torch.float64, generator=rng)
    index = int(torch.searchsorted(sums, u * sums[-1], right=True))
    return int(order[min(index, sums.numel() - 1)])


class Decoder:
    """A model that reads one document token by token and returns the logits of the next token.

    Args:
        model: the decoder shares its weights, which must not change while the decoder is used.
    """

    def __init__(self, model: GPT) -> None:
        self._cache = KeyValueCache(model.config)
        self._model = uncompiled(model, self._cache)
        self._weights = self._model.layer_weights()
        self._table = self._model.tok_emb.to(self._model.compute_dtype)
        self._ids: list[int] = []
        self._start = 0

    @torch.inference_mode()
    def feed(self, ids: Sequence[int]) -> Tensor:
        """Append `ids` (at least one) to the document; return the logits `(V,)` float32 of the next token."""
        if not ids:
            raise UserError("feed needs at least one id; a document begins with the tokenizer's BOS")
        self._ids += ids
        start = window_start(len(self._ids), self._model.config.max_context)
        if start != self._start or len(self._ids) == len(ids):
            self._start = start
            self._cache.clear()
            ids = self._ids[start:]
        hidden = self._advance(ids)
        cap = self._model.config.softcap
        return cap * torch.tanh(F.linear(hidden[-1], self._table).float() / cap)

    def _advance(self, ids: Sequence[int]) -> Tensor:
        """Run the layers on the window's new tokens `(T,)`; return their final states `(T, D)`."""
        model, cache, new = self._model, self._cache, len(ids)
        cache.make_room(new, model)
        # The smear gate needs the embedding of the token before, and its bigram the one before that.
        before = self._ids[-new - min(2, cache.length) : -new]
        device = self._table.device
        inputs = torch.tensor([*before, *ids], device=device)
        segment = torch.tensor([0, inputs.numel()], dtype=torch.int32, device=device)
        x = model.embed(inputs, self._table, segment)[len(before) :]
        cos, sin = model.rope(cache.length + new)
        values = model.values(inputs[len(before) :])
        ctx = Context(x, (cos[cache.length :], sin[cache.length :]), segment, values)
        hidden = model.scaled(model.layers(self._weights, ctx, True))
        cache.length += new
        return hidden


class KeyValueCache:
    """An attention kernel for one document that keeps the keys and values of the tokens it has seen.

    Every forward pass calls it once per executed layer, always in the same order, so the number of the call
    identifies the layer. A repeated layer has separate keys and values for each of its executions.

    Attributes:
        length: number of tokens whose keys and values are kept.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._slots = sum(map(len, layer_order(config, loop=True)))
        self._kept: Tensor | None = None  # (S, 2, G, capacity, K)
        self._slot = 0
        self.length = 0

    def clear(self) -> None:
        """Remove all tokens."""
        self.length = 0

    def make_room(self, tokens: int, model: GPT) -> None:
        """Prepare a forward pass of `tokens` new tokens, with the dtype and on the device of `model`."""
        self._slot = 0
        config, needed = self._config, self.length + tokens
        if self._kept is not None and self._kept.shape[3] >= needed:
            return
        # The size doubles, so that a long document is copied only a few times.
        size = min(config.max_context, max(1 << (needed - 1).bit_length(), 256))
        shape = (self._slots, 2, config.kv_heads, size, config.head_dim)
        kept = torch.empty(shape, dtype=model.compute_dtype, device=model.tok_emb.device)
        if self._kept is not None:
            kept[:, :, :, : self.length] = self._kept[:, :, :, : self.length]
        self._kept = kept

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Attend from new tokens to the kept ones and to themselves, causally; keep their keys and values.

        Args:
            q: `(T, H, K)`.
            k, v: `(T, G, K)`.
            cu_seqlens, max_seqlen: not used, because there is one segment.

        Returns:
            `(T, H, K)`.
        """
        del cu_seqlens, max_seqlen
        assert self._kept is not None
        kept, end = self._kept[self._slot], self.length + q.shape[0]
        self._slot += 1
        kept[0, :, self.length : end] = k.transpose(0, 1)
        kept[1, :, self.length : end] = v.transpose(0, 1)
        keys, values = kept[:, None, :, :end]
        several, first = q.shape[0] > 1, self.length == 0  # a single token sees all keys and needs no mask
        mask = None
        if several and not first:
            mask = torch.ones(q.shape[0], end, dtype=torch.bool, device=q.device).tril(self.length)
        y = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys,
            values,
            attn_mask=mask,
            is_causal=several and first,
            enable_gqa=True,
        )
        return y[0].transpose(0, 1)


def window_start(tokens: int, context: int) -> int:
    """Return where the window of the last token begins, in a document of `tokens` tokens (>= 1).

    The start moves by context - context // 2 tokens whenever the window would be longer than `context`.
    """
    step = context - context // 2
    return max(0, -(-(tokens - context) // step) * step)


_OPEN_END = re.compile(f"{ESCAPE}?\ufffd{{0,3}}\\Z")
"""The end of a text that a later token may change: bytes of an incomplete character, or part of an escape."""
_WORD_END = re.compile("[A-Za-z]\\Z")


def text_pieces(tokenizer: Tokenizer, ids: Sequence[int], drawn: Iterable[int]) -> Iterator[str]:
    """Yield the text of the `drawn` ids, which continue `ids`, in whole characters as they become final.

    The ids are decoded together, because the text of a token may depend on the token before it.
    """
    known = list(ids)
    done = len(tokenizer.decode(known))
    text = ""
    for token in drawn:
        known.append(token)
        text = tokenizer.decode(known)
        found = _OPEN_END.search(text)
        certain = found.start() if found is not None else len(text)
        if certain > done:
            yield text[done:certain]
            done = certain
        # 64 tokens before the next one are enough, unless they are all of one word: an operator of CaseOps at
        # its beginning may apply to its end.
        if done == len(text) and len(known) > 256 and not _WORD_END.search(text):
            known = known[-64:]
            text = tokenizer.decode(known)
            done = len(text)
    if len(text) > done:
        yield text[done:]
