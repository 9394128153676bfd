"""MUDD connections at the end of the network: late states take up earlier ones, token by token.

There are two places: before the last executed layer, into the stream that its attention reads, and before the
last norm. The state x of a token becomes

    x + sum_j a_j h_j   with   a = 0.1 (W2 gelu(W1 rms(x)) + b),

where the sources h_j are the first embedding, the states after a few earlier layers, and x itself. W2 and b
start at 0, so nothing is added at first, and W2 and b have gradients. Each source is the state after the last
execution of a physical layer, so that the sources are the same with depth recurrence off and on; where the
layer has two lanes, it is their mean.
Legend: `T` tokens, `D` width, `W` width of the small network, `S` sources of a place.
Source: arXiv 2502.12170, in the form of modded-nanogpt #259 without its connections into the values. Differs:
the small network reads the normed state; the norm has no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pgolf.config import ModelConfig
from pgolf.model.attention import Asked, asked_rows
from pgolf.model.gates import rms_norm

SCALE = 0.1
"""Factor on the coefficients, from modded-nanogpt #259: Adam's steps, whose size does not depend on the
gradient's, change them more slowly."""

NAMES = ("mudd_in", "mudd_out", "mudd_bias")
"""The parameters: W1 of both places; W2 and b of the first place, then those of the second one."""


class Mudd(NamedTuple):
    """The parameters of one place in the compute dtype."""

    inner: Tensor  # (W, D), W1
    outer: Tensor  # (S, W), W2
    bias: Tensor  # (S,)


def source_layers(config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the physical layers whose states are sources before the last layer, and before the last norm.

    They are those a third and two thirds through the network (with lanes the last one before the lanes
    instead of the second), and for the last norm the last but one, too. Before the last layer, that one's
    state is x itself. 11 layers with lanes from layer 8 on have (3, 7) and (3, 7, 9).
    """
    later = config.parallel_from - 1 if config.lanes else 2 * config.layers // 3
    last = config.layers - 2
    first = tuple(sorted(i for i in {config.layers // 3, later} if i < last))
    return first, (*first, last)


def mudd_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters, see `NAMES`."""
    rows = sum(len(layers) + 2 for layers in source_layers(config))
    return dict(zip(NAMES, ((2, config.mudd, config.width), (rows, config.mudd), (rows,)), strict=True))


def add_sources(weights: Mudd, *states: Tensor) -> Tensor:
    """Return x + sum_j a_j h_j `(T, D)`.

    Args:
        weights: of the place.
        states: the sources h_j, `(T, D)` each, of which the last one is x.
    """
    total = x = states[-1]
    hidden = F.gelu(F.linear(rms_norm(x), weights.inner))
    coefficients = SCALE * F.linear(hidden, weights.outer, weights.bias)  # (T, S)
    for a, h in zip(coefficients.unbind(-1), states, strict=True):
        total = total + a[:, None] * h
    return total


class Tail:
    """The MUDD connections of one forward pass, and the states that it keeps for them; none if mudd is 0."""

    def __init__(self, model: nn.Module, config: ModelConfig, x0: Tensor, add: Callable[..., Tensor]) -> None:
        """Take the parameters from `model`, the first embedding `(T, D)`, and `add_sources` or its graph."""
        self._places: tuple[tuple[int, ...], ...] = source_layers(config) if config.mudd else ()
        self._kept = {-1: x0}
        self._add = add
        self._model = model

    def keep(self, layer: int, lane0: Tensor, lane1: Tensor | None = None) -> None:
        """Keep the state after an execution of a physical layer, if it is a source."""
        if any(layer in layers for layers in self._places):
            self._kept[layer] = lane0 if lane1 is None else 0.5 * (lane0 + lane1)

    def before_last(self, x: Tensor) -> Tensor:
        """Return the stream `(T, D)` that the last layer reads in place of `x`."""
        return self._added(0, x) if self._places else x

    def before_norm(self, lane0: Tensor, lane1: Tensor, asked: Asked | None) -> tuple[Tensor, Tensor]:
        """Return the lanes whose mean is normed; with connections both are the sum.

        Args:
            lane0, lane1: the rows `(R, D)` that are asked for, or all.
            asked: which rows these are.
        """
        if not self._places:
            return lane0, lane1
        x = self._added(1, 0.5 * (lane0 + lane1), asked)
        return x, x.view(x.shape)

    def _added(self, place: int, x: Tensor, asked: Asked | None = None) -> Tensor:
        sources = [asked_rows(self._kept[layer], asked) for layer in (-1, *self._places[place])]
        first = len(self._places[0]) + 2
        rows = slice(first) if place == 0 else slice(first, None)
        inner, outer, bias = (getattr(self._model, name).to(x.dtype) for name in NAMES)
        return self._add(Mudd(inner[place], outer[rows], bias[rows]), *sources, x)
