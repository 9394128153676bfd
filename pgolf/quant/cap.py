"""The fit of the soft cap and the scale of the logits to documents that the model was not trained on.

A model that has read its training text several times is too confident of it, so the cap and the scale with
which it was trained are not the best for other text. They are fitted after quantization, to the mean loss of

    y = c tanh(s z / c)        with z = hidden table^T, s = model.logit_scale and c = model.softcap,

by Fisher scoring in a = log s and b = log c. With t = tanh(s z / c), y' = dy/da = s z (1 - t^2) and
dy/db = y - y', the gradient of a token's loss is E_p[y'] - y'_target, and the curvature is the covariance of
(dy/da, dy/db) under the model's own probabilities p. The number of passes over the logits does not depend on
the text, so that a rehearsal can time it.

Legend: `R` rows, which are tokens with a target, `V` vocab, `D` width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgolf.config import ModelConfig
from pgolf.data.loader import IGNORED_TARGET, Batch, padded_cu_seqlens
from pgolf.data.shards import Tokens
from pgolf.data.stream import cut_segments, document_starts
from pgolf.dist import Dist
from pgolf.errors import UserError
from pgolf.model.gpt import GPT
from pgolf.model.heads import unrounded_logits
from pgolf.quant.calibrate import set_parameters
from pgolf.quant.quantized import QuantizedState, dequantize_state

PASSES = 10
"""Passes over the logits: one with the numbers as they are, then trials. Five are usually enough."""
FARTHEST = math.log(16.0)
"""Largest change of the logarithm of either number."""
LONGEST = 0.5
"""Largest change in one step."""
CHUNK = 1 << 24
"""Logits that are in memory at a time, in several float32 tensors."""


class Fit(NamedTuple):
    """The numbers that were found, and what they are worth on the text of the fit."""

    softcap: float
    logit_scale: float
    before: float
    """Mean loss with the numbers that the model had, nats per token."""
    after: float
    """Mean loss with these."""
    tokens: int
    """Tokens of the fit."""

    def applied(self, config: ModelConfig) -> ModelConfig:
        """Return the configuration of the model with these numbers."""
        return replace(config, softcap=self.softcap, logit_scale=self.logit_scale)

    def __str__(self) -> str:
        """Return a line for the log."""
        return (
            f"fitted to {self.tokens:,} tokens that were not trained on: softcap {self.softcap:g}, "
            f"logit_scale {self.logit_scale:g}; their loss is {self.after:.4f} nats per token, "
            f"{self.after - self.before:+.5f}"
        )


def fit_quantized(
    model: GPT, state: QuantizedState, documents: Sequence[Tokens], dist: Dist, *, bos_id: int, tokens: int
) -> Fit:
    """Fit cap and scale of a model with quantized weights; it has its own weights again at the end.

    Every rank calls it with the same arguments, reads its share of the batches, and gets the same numbers.

    Args:
        model: prepared.
        state: the quantized weights.
        documents: of the fit, at least one.
        bos_id: the id that starts a document.
        tokens: of a forward pass; that of training, because compiled parts know no other.
    """
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_parameters(model, dequantize_state(state))
    try:
        batches = _batches(documents, bos_id=bos_id, context=model.config.max_context, tokens=tokens)
        return fit_cap(model, batches[dist.rank :: dist.world_size], dist)
    finally:
        set_parameters(model, own)


@torch.no_grad()
def fit_cap(model: GPT, batches: Sequence[Batch], dist: Dist) -> Fit:
    """Return the cap and the scale with the least mean loss over the batches of all ranks.

    If none is better than what the model has, that is returned.

    Args:
        model: prepared, with the weights for which the numbers are to be fitted.
        batches: this rank's, maybe none.
        dist: sums over the ranks.
    Raises:
        UserError: the batches have no targets.
    """
    training = model.training
    model.eval()
    rows = [_states(model, batch, dist) for batch in batches]
    model.train(training)
    table = model.tok_emb.to(model.compute_dtype)
    start = np.log([model.config.logit_scale, model.config.softcap])
    given = best = _measure(rows, table, start, start, dist)
    at, damping = start, 1e-3
    for _ in range(PASSES - 1):
        curvature = best.curvature + np.diag(damping * np.diag(best.curvature) + 1e-12)
        step = -np.linalg.solve(curvature, best.gradient)
        step *= min(1.0, LONGEST / max(np.abs(step).max(), 1e-12))
        # Rounded before they are tried, so that the loss is that of the numbers in the file.
        trial = np.log([_short(x) for x in np.exp(np.clip(at + step, start - FARTHEST, start + FARTHEST))])
        found = _measure(rows, table, trial, start, dist)
        if found.loss < best.loss:
            at, best, damping = trial, found, damping / 4
        else:
            damping *= 16
    config = model.config
    scale, cap = (
        (_short(x) for x in np.exp(at)) if best is not given else (config.logit_scale, config.softcap)
    )
    return Fit(cap, scale, given.loss, best.loss, best.tokens)


class _Measure(NamedTuple):
    """Means over all tokens."""

    loss: float
    gradient: NDArray[np.float64]
    """`(2,)` with respect to log scale and log cap."""
    curvature: NDArray[np.float64]
    """`(2, 2)`, positive semidefinite."""
    tokens: int


def _measure(
    rows: list[tuple[Tensor, Tensor]],
    table: Tensor,
    at: NDArray[np.float64],
    start: NDArray[np.float64],
    dist: Dist,
) -> _Measure:
    """Return the loss and its derivatives at (log scale, log cap); the states have the scale of `start`."""
    ratio, cap = math.exp(at[0] - start[0]), math.exp(at[1])
    sums = torch.zeros(7, dtype=torch.float64, device=dist.device)
    for hidden, targets in _chunks(rows, table.shape[0]):
        z = unrounded_logits(hidden, table).mul_(ratio)
        y = torch.tanh(z / cap)
        by_scale = z.mul_(1 - y * y)
        y.mul_(cap)
        lse = torch.logsumexp(y, dim=-1, keepdim=True)
        p = torch.exp(y - lse)
        nats = lse - y.gather(1, targets)
        by_cap = y.sub_(by_scale)
        means = [(p * d).sum(1, keepdim=True) for d in (by_scale, by_cap)]
        parts = [nats, *(m - d.gather(1, targets) for m, d in zip(means, (by_scale, by_cap), strict=True))]
        for d, e, i, j in ((by_scale, by_scale, 0, 0), (by_scale, by_cap, 0, 1), (by_cap, by_cap, 1, 1)):
            parts.append((p * (d - means[i]) * (e - means[j])).sum(1, keepdim=True))
        sums += torch.stack(
            [torch.full_like(sums[0], len(targets)), *(x.sum(dtype=sums.dtype) for x in parts)]
        )
    # Added on the host in the order of the ranks, so that all of them have the same bits.
    total = np.sum(dist.gather(sums.tolist()), axis=0)
    if not total[0]:
        raise UserError("the documents that the cap is to be fitted to are empty; raise quant.cap_documents")
    loss, a, b, aa, ab, bb = (total[1:] / total[0]).tolist()
    return _Measure(loss, np.array([a, b]), np.array([[aa, ab], [ab, bb]]), int(total[0]))


def _chunks(rows: list[tuple[Tensor, Tensor]], vocab: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield states `(R, D)` and their targets `(R, 1)`, few enough that their logits fit into memory."""
    size = max(1, CHUNK // vocab)
    for hidden, targets in rows:
        for at in range(0, len(hidden), size):
            yield hidden[at : at + size], targets[at : at + size, None]


def _states(model: GPT, batch: Batch, dist: Dist) -> tuple[Tensor, Tensor]:
    """Return the states `(R, D)` of the tokens of a batch that have a target, and the targets `(R,)`."""
    inputs, targets, cu_seqlens = (t.to(dist.device) for t in (batch.inputs, batch.targets, batch.cu_seqlens))
    # Observed, because blocks then run without compilation: a pass without gradients has no graphs yet.
    hidden, _ = model.hidden(
        inputs, cu_seqlens, max_seqlen=batch.max_seqlen, loop=True, observe=lambda *_: None
    )
    asked = targets != IGNORED_TARGET
    return hidden[asked], targets[asked]


def _batches(documents: Sequence[Tokens], *, bos_id: int, context: int, tokens: int) -> list[Batch]:
    """Return all documents, one after another, in batches of the same size; the last one is padded."""
    text = np.concatenate(documents).astype(np.int64)
    batches = []
    for at in range(0, text.size - 1, tokens):
        inputs, targets = text[:-1][at : at + tokens], text[1:][at : at + tokens]
        starts = cut_segments(document_starts(inputs, bos_id), tokens, context)
        padding = (0, tokens - inputs.size)
        batches.append(
            Batch(
                inputs=torch.from_numpy(np.pad(inputs, padding)),
                targets=torch.from_numpy(np.pad(targets, padding, constant_values=IGNORED_TARGET)),
                cu_seqlens=padded_cu_seqlens(starts, tokens),
                max_seqlen=context,
                epoch=0.0,
            )
        )
    return batches


def _short(number: float) -> float:
    """Return a number with six significant digits, which take fewer bytes in a file."""
    return float(f"{number:.6g}")
