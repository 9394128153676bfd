"""Evaluators that break a condition of a valid submission, as published ones did, on a real model."""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from pgolf.data.loader import ValidationText
from pgolf.evaluate.documents import document_bounds
from pgolf.evaluate.heads import Head
from pgolf.evaluate.predictor import Pass, Question, Turn
from pgolf.evaluate.sliding import Fixed
from pgolf.evaluate.ttt import Adapted, batch_turns, plan_batches
from pgolf.model.uncompiled import uncompiled
from tests.evaluate.legal_helpers import BOS, CONTEXT, TTT, VOCAB, FakeDist, make_pass


@dataclass
class Vectors:
    """Distributions by their logarithms `(R, V)`."""

    log_p: torch.Tensor

    def nats(self, targets):
        picked = self.log_p.gather(1, targets.clamp_min(0)[:, None])[:, 0]
        return torch.where(targets < 0, 0.0, -picked)

    def log_probabilities(self, rows):
        return self.log_p[rows]


class Slot(Fixed):
    """PR #1298: a shift of the states, fitted to all targets of the windows, also those to be scored."""

    def predict(self, inputs):
        head = super().predict(inputs)
        shift = torch.zeros_like(head.hidden[0], requires_grad=True)
        adam = torch.optim.AdamW([shift], lr=0.1, weight_decay=0.0)
        with torch.enable_grad():
            for _ in range(8):
                moved = Head(head.hidden.detach() + shift, head.weight.detach(), head.cap)
                adam.zero_grad()
                moved.nats(inputs.ids.roll(-1)).mean().backward()
                adam.step()
        return Head(head.hidden + shift.detach(), head.weight, head.cap)


class LearnsFirst(Adapted):
    """Adapters that learn from a chunk before it is scored."""

    def predict(self, inputs):
        with torch.enable_grad():
            head = super().predict(inputs)
            count = inputs.ids.numel() // inputs.width
            targets = inputs.ids.view(count, -1).roll(-1, 1)[:, inputs.width - inputs.asked :]
            loss = head.nats(targets.flatten()).mean()
            found = torch.autograd.grad(loss, list(self._leaves.values()))
        self._state.step(dict(zip(self._leaves, found, strict=True)), count)
        return super().predict(inputs)


class Hides(Adapted):
    """Adapters that are not among what the predictor says it keeps."""

    def state(self):
        return []


class ByteMixture(Fixed):
    """PR #1877: mixed with a model of bytes, whose probabilities do not sum to 1 over tokens."""

    def predict(self, inputs):
        p = super().predict(inputs).log_probabilities(torch.arange(inputs.ids.numel())).exp()
        lengths = torch.arange(VOCAB) % 3 + 1
        return Vectors((0.8 * p + 0.2 * 256.0**-lengths).log())


class HashRatio(Fixed):
    """A cache that is looked up with the hash of context and target, used as if it were a probability."""

    def predict(self, inputs):
        p = super().predict(inputs).log_probabilities(torch.arange(inputs.ids.numel())).exp()
        keys = (inputs.ids[:, None] * 31 + torch.arange(VOCAB) * 17) % 7
        return Vectors((0.9 * p + 0.1 * (keys == 0)).log())


class WithinWord(Fixed):
    """A channel of n-grams that is switched by whether the next token begins a word, which it looks up."""

    def predict(self, inputs):
        z = super().predict(inputs).log_probabilities(torch.arange(inputs.ids.numel()))
        inside = inputs.ids.roll(-1) % 2 == 1
        boost = F.one_hot(inputs.ids, VOCAB) * 3.0
        return Vectors(torch.log_softmax(torch.where(inside[:, None], z + boost, z), dim=-1))


def on_windows(kind):
    def make(model):
        return lambda text: make_pass("sliding", model, text)._replace(predictor=kind(model))

    return make


def on_adapters(kind, **settings):
    def make(model):
        predictor = kind(uncompiled(model), replace(TTT, **settings), documents=128)
        return lambda text: make_pass("ttt", model, text, config=replace(TTT, **settings))._replace(
            predictor=predictor
        )

    return make


def chunks_by_length(model):
    """Chunks whose size depends on the length of their document."""

    def make(text):
        bounds, turns = document_bounds(text, BOS), []
        for chunk, wanted in ((4, lambda n: n < 40), (16, lambda n: n >= 40)):
            config = replace(TTT, chunk=chunk, chunk_max=16, batch_documents=1)
            batches = plan_batches(bounds[1], CONTEXT, config)
            mine = [b for b in batches if wanted(int(bounds[1][b.documents[0]]))]
            turns += [turn for batch in mine for turn in batch_turns(batch, bounds)]
        return Pass(Adapted(uncompiled(model), TTT, documents=128), turns, "")

    return make


def end_aligned(model):
    """The last window of a document is moved so that it ends with the document and has its full length."""

    def make(text: ValidationText):
        turns = []
        for start, length in zip(*(of.tolist() for of in document_bounds(text, BOS)), strict=True):
            for first in range(0, length, CONTEXT):
                end = min(first + CONTEXT, length)
                begin = max(0, end - CONTEXT)
                window = np.array([[start + begin, start + first, start + end]])
                turns.append(Turn([Question(window, CONTEXT, size=CONTEXT)]))
        return Pass(Fixed(model), turns, "")

    return make


def twice(model):
    """Every question is asked a second time, for the better of both losses."""

    def make(text):
        run = make_pass("plain", model, text)
        return run._replace(turns=[*run.turns, *run.turns])

    return make


def undeclared_phases(model):
    config = replace(TTT, batch_documents=1)
    return lambda text: make_pass("phased", model, text, FakeDist(), config=config)


def published_slot(model):
    return lambda text: make_pass("slot", model, text)


VIOLATORS = {
    "slot": (on_windows(Slot), "C1"),
    "published_slot": (published_slot, "C1"),
    "learns_first": (on_adapters(LearnsFirst), "C3"),
    "hides": (on_adapters(Hides), "C3"),
    "byte_mixture": (on_windows(ByteMixture), "C2"),
    "hash_ratio": (on_windows(HashRatio), "C2"),
    "within_word": (on_windows(WithinWord), "C1"),
    "chunks_by_length": (chunks_by_length, "C1"),
    "end_aligned": (end_aligned, "C1"),
    "warm_a": (on_adapters(Adapted, warm_a=True, batch_documents=1), "C1"),
    "undeclared_phases": (undeclared_phases, "C1"),
    "twice": (twice, "C4"),
}
"""Name -> what makes the evaluator from a model, and the condition that must be found to fail."""
