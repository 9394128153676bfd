"""Parts that a network may gain in the middle of its training without another function at that moment.

A run that starts from the weights of another one may have parts that the other one lacks. Each part below has
a neutral start: with it the network computes what it computed without the part, and at least one of the new
parameters has a gradient. Exact in float32 and bfloat16, because what is added is 0 and what is multiplied is
1, or a power of two that another parameter takes back.

    part                             starts at
    smear gate by token              strength 0
    bigram hash                      table 0
    value embeddings                 table 0
    head gate `out`                  weights 0: the gate is 2 * sigmoid(0) = 1
    head gate `sparse`, `dense`      weights 0: the gate is 1/2, and attn_scale is doubled
    mix with the first embedding     factors 1 and 0
    weighted skips                   weights 0
    MUDD connections                 second matrices and biases 0
    strength of XSA per head         0 beyond the 1 that it was

Other settings have no neutral start: a gated skip would need a gate of infinity, a smear gate by channel too,
and a setting without parameters of its own (xsa_layers, softcap, logit_scale) changes the function at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from pgolf.config import ModelConfig
from pgolf.errors import UserError
from pgolf.model.parameters import parameter_shapes


class Part(NamedTuple):
    """A part of the network that can be added."""

    settings: tuple[str, ...]
    """Settings of `ModelConfig` that may differ where the part is new; the first one switches it on."""
    absent: Callable[[ModelConfig], bool]
    neutral: Callable[[ModelConfig], bool]
    """Whether the part, as it is set, has a neutral start."""
    zeros: tuple[str, ...] = ()
    """Parameters that start at 0 instead of at what a new network has; the part's others start as there."""


PARTS = (
    Part(
        ("smear_gate", "smear_kind", "smear_window", "smear_over_bos", "gate_window"),
        absent=lambda c: not c.smear_gate,
        neutral=lambda c: c.smear_kind == "token",
    ),
    Part(
        ("bigram_buckets", "bigram_width"),
        absent=lambda c: not c.bigram_buckets,
        neutral=lambda _: True,
    ),
    Part(
        ("value_embed_layers", "value_embed_width"),
        absent=lambda c: not c.value_embed_layers,
        neutral=lambda _: True,
        zeros=("value_table",),
    ),
    Part(
        ("head_gate", "gate_window", "sparse_gate_scale"),
        absent=lambda c: c.head_gate == "none",
        neutral=lambda _: True,
        zeros=("head_gate",),
    ),
    Part(("resid_mix",), absent=lambda c: not c.resid_mix, neutral=lambda _: True),
    Part(
        ("skip",),
        absent=lambda c: c.skip == "none",
        neutral=lambda c: c.skip == "weighted",
        zeros=("skip_weights",),
    ),
    Part(("mudd",), absent=lambda c: not c.mudd, neutral=lambda _: True),
    Part(("xsa_strength",), absent=lambda c: not c.xsa_strength, neutral=lambda _: True),
)
"""Every part with a neutral start."""


class Added(NamedTuple):
    """What a network has that the one whose weights it takes over lacks."""

    names: tuple[str, ...] = ()
    """Of the new parameters."""
    zeros: tuple[str, ...] = ()
    """Those of them that start at 0; the others start as in a new network."""
    factors: dict[str, float] = {}  # noqa: RUF012 - never written to
    """By which parameters of the other network are multiplied."""

    def __str__(self) -> str:
        """Say how the new parameters start, for the log."""
        scaled = "".join(f"; {name} is multiplied by {factor:g}" for name, factor in self.factors.items())
        return f"{', '.join(self.names)} are new and start so that the function is the same{scaled}"


def additions(config: ModelConfig, other: ModelConfig, *, where: str) -> Added:
    """Return what `config` adds to the network `other`.

    Args:
        where: what an error calls the other network, for example "train.init=runs/a/raw.safetensors".

    Raises:
        UserError: the networks differ in something that has no neutral start; names each setting.
    """
    new = [part for part in PARTS if part.absent(other) and not part.absent(config)]
    allowed = {setting for part in new if part.neutral(config) for setting in part.settings}
    ours, theirs = dataclasses.asdict(config), dataclasses.asdict(other)
    different = [key for key in ours if ours[key] != theirs[key] and key not in allowed]
    before, now = parameter_shapes(other), parameter_shapes(config)
    # Settings that parts share (gate_window) may be new for one part and not for another.
    told = [f"model.{k} is {theirs[k]} there and {ours[k]} here" for k in different]
    told = told or [
        f"{name} has the shape {before[name]} there and {now[name]} here"
        for name in now
        if before.get(name, now[name]) != now[name]
    ]
    if told:
        raise UserError(
            f"{where} is of another model: {', '.join(told)}; give this run the same settings or start from "
            "another one. Parts that may be new are listed in pgolf/model/neutral.py"
        )
    names = tuple(name for name in now if name not in before)
    zeros = tuple(name for part in new for name in part.zeros)
    halves = other.head_gate == "none" and config.head_gate in ("sparse", "dense")
    return Added(names, zeros, {"attn_scale": 2.0} if halves else {})
