"""Helpers: a small model, artificial documents, and the loss of every token in each way of scoring."""

from dataclasses import replace

import numpy as np
import torch

from pgolf.config import EvaluateConfig, ModelConfig, PhasesConfig, SgdConfig, SlotConfig, TttConfig
from pgolf.data.loader import ValidationText
from pgolf.evaluate.bpb import Score
from pgolf.evaluate.predictor import Pass, evaluating, read
from pgolf.evaluate.validation import start_pass, widened
from pgolf.model.gpt import GPT
from pgolf.presets import tiny

BOS, VOCAB, CONTEXT = 1, 24, 32
ALONE = ("plain", "sliding", "local", "ttt", "causal_slot")
"""The ways to score in which documents do not influence each other."""
MODES = (*ALONE, "sgd")
"""The ways to score that meet the strict reading of the rules."""
TTT = TttConfig(rank=4, alpha=8.0, lr=0.02, chunk=8, chunk_growth=1, chunk_max=16, batch_tokens=128)
"""Settings with which a few chunks change the model visibly, and chunks grow within short documents."""
SGD = SgdConfig(lr=0.2, epochs=2, chunk_tokens=40, batch_tokens=CONTEXT)
SLOT = SlotConfig(steps=4, lr=0.1)
PHASES = PhasesConfig(documents=4, count=2, lr=0.2, chunk_tokens=40, batch_tokens=CONTEXT)


class FakeDist:
    """A rank whose peers' sums are added on each all_reduce, as a process group would."""

    device = torch.device("cpu")

    def __init__(self, rank=0, world_size=1, others=()):
        self.rank, self.world_size, self.is_main = rank, world_size, rank == 0
        self.devices = world_size
        self.others, self.seen = list(others), []

    def all_reduce(self, tensor):
        self.seen.append(tensor.clone())
        if self.others:
            tensor += self.others.pop(0)
        return tensor

    def check(self, error):
        if error is not None:
            raise error

    def gather_ints(self, values):
        return [values]


def small_config(**changes) -> ModelConfig:
    sizes = {"vocab_size": VOCAB, "width": 32, "heads": 4, "kv_heads": 2, "rope_dims": 4}
    layers = {"layers": 4, "xsa_layers": 4, "parallel_from": 3}
    recurrence = {"recurrence_start": 1, "recurrence_end": 2, "recurrence_repeats": 1}
    return replace(tiny().model, max_context=CONTEXT, **{**sizes, **layers, **recurrence, **changes})


def small_model(seed: int = 0, shape: ModelConfig | None = None) -> GPT:
    """A model in which the parts that start at zero are random, so that every path has an effect."""
    model = GPT(shape or small_config(), seed=seed).prepare(torch.device("cpu"))
    rng = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=rng)
    return model


def shallow_model() -> GPT:
    """A model of two layers, for tests that run a way to score often."""
    return small_model(
        shape=small_config(layers=2, xsa_layers=2, parallel_from=2, recurrence_start=0, recurrence_end=0)
    )


def make_text(documents: list[list[int]], seed: int = 0) -> ValidationText:
    """Documents (without BOS) one after another, each token of 0 to 6 bytes, and a last BOS as a target."""
    tokens = np.array([t for d in documents for t in (BOS, *d)] + [BOS], dtype=np.uint16)
    sizes = np.random.default_rng(seed).integers(0, 7, tokens.size)
    sizes[0] = 0
    return ValidationText(tokens, sizes)


def random_documents(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB, n).tolist() for n in lengths]


def settings(config: TttConfig = TTT, *, stride: int = 5, **changes) -> EvaluateConfig:
    phases = replace(PHASES, adapters=replace(config, members=1))
    return EvaluateConfig(adapters=config, stride=stride, sgd=SGD, phases=phases, slot=SLOT, **changes)


def make_pass(
    mode: str, model: GPT, text: ValidationText, dist=None, *, batch_tokens: int = 3 * CONTEXT, **changes
) -> Pass:
    whole, done = changes.pop("whole", 0), changes.pop("done", None)
    return start_pass(
        mode,
        model,
        text,
        dist or FakeDist(),
        bos_id=BOS,
        batch_tokens=batch_tokens,
        settings=settings(**changes),
        whole=whole,
        done=done,
    )


def run_pass(mode: str, model: GPT, text: ValidationText, dist=None, **changes) -> Score:
    """The score, as `score_as` finds it."""
    dist = dist or FakeDist()
    with evaluating(model), widened(model, changes.get("context", 0)):
        return read(make_pass(mode, model, text, dist, **changes), text, dist, bos_id=BOS)


def token_losses(mode: str, model: GPT, text: ValidationText, **changes) -> np.ndarray:
    """The loss of every token as a target, `(n,)`, NaN for the first one."""
    with evaluating(model), widened(model, changes.get("context", 0)):
        return losses_of(make_pass(mode, model, text, **changes), text)


def losses_of(run: Pass, text: ValidationText, dist=None) -> np.ndarray:
    losses = np.full(text.tokens.size, np.nan)

    def put(question, distributions, nats) -> None:
        for row, first, count in question.rows():
            losses[first + 1 : first + 1 + count] = nats[row : row + count].double().cpu().numpy()

    read(run, text, dist or FakeDist(), bos_id=BOS, observe=put)
    return losses
