"""Helpers: a small model, artificial documents, and the loss of every token in each way of scoring."""

from dataclasses import replace

import numpy as np
import torch

from pgolf.config import ModelConfig, TttConfig
from pgolf.data.loader import ValidationText
from pgolf.evaluate.documents import document_bounds
from pgolf.evaluate.sliding import sliding_windows, window_batches
from pgolf.evaluate.ttt import Reader, plan_batches
from pgolf.model.gpt import GPT
from pgolf.presets import tiny

BOS, VOCAB, CONTEXT = 1, 24, 32
MODES = ("plain", "sliding", "ttt")
TTT = TttConfig(rank=4, alpha=8.0, lr=0.02, chunk=8, chunk_growth=1, chunk_max=16, batch_tokens=128)
"""Settings with which a few chunks change the model visibly, and chunks grow within short documents."""


def small_config(**changes) -> ModelConfig:
    sizes = {"vocab_size": VOCAB, "width": 32, "heads": 4, "kv_heads": 2, "rope_dims": 4}
    layers = {"layers": 4, "xsa_layers": 4, "parallel_from": 3}
    recurrence = {"recurrence_start": 1, "recurrence_end": 2, "recurrence_repeats": 1}
    return replace(tiny().model, max_context=CONTEXT, **sizes, **layers, **recurrence, **changes)


def small_model(seed: int = 0, shape: ModelConfig | None = None) -> GPT:
    """A model in which the parts that start at zero are random, so that every path has an effect."""
    model = GPT(shape or small_config(), seed=seed).prepare(torch.device("cpu"))
    rng = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=rng)
    return model


def make_text(documents: list[list[int]], seed: int = 0) -> ValidationText:
    """Documents (without BOS) one after another, each token of 0 to 6 bytes, and a last BOS as a target."""
    tokens = np.array([t for d in documents for t in (BOS, *d)] + [BOS], dtype=np.uint16)
    sizes = np.random.default_rng(seed).integers(0, 7, tokens.size)
    sizes[0] = 0
    return ValidationText(tokens, sizes)


def random_documents(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB, n).tolist() for n in lengths]


def token_losses(
    mode: str, model: GPT, text: ValidationText, *, config: TttConfig = TTT, stride: int = 5
) -> np.ndarray:
    """The loss of every token as a target, `(n,)`, NaN for the first one; fails if one is scored twice."""
    losses = np.full(text.tokens.size, np.nan)
    starts, lengths = document_bounds(text, BOS)

    def put(at: np.ndarray, nats: torch.Tensor) -> None:
        assert np.isnan(losses[at]).all() and np.unique(at).size == at.size, "a token is scored twice"
        losses[at] = nats.double().numpy()

    if mode == "ttt":
        reader = Reader(model, text, (starts, lengths), config, documents=config.batch_documents)
        for batch in plan_batches(lengths, CONTEXT, config):
            for s in reader.scored_chunks(batch):
                at = starts[s.documents][:, None] + s.begin + 1 + np.arange(s.nats.shape[1])
                put(at[s.counted.numpy()], s.nats[s.counted])
        return losses
    step = CONTEXT if mode == "plain" else stride
    windows = sliding_windows(starts, lengths, context=CONTEXT, stride=step)
    where = iter(windows.tolist())
    for batch in window_batches(text, windows, context=CONTEXT, batch_tokens=3 * CONTEXT):
        with torch.no_grad():
            nats = model(batch.inputs, batch.targets, batch.cu_seqlens, max_seqlen=CONTEXT, loop=True)
        counted, done = batch.targets != -100, 0
        while done < batch.tokens:
            _, scored, end = next(where)
            put(np.arange(scored + 1, end + 1), nats[counted][done : done + end - scored])
            done += end - scored
    assert next(where, None) is None
    return losses
