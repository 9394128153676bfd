"""Assignment of parameters to optimizers; every trained parameter belongs to exactly one group.

Banks, which are stacks of matrices, go to Muon. The embedding goes to AdamW with its own settings. All other
parameters, called scalars, go to AdamW with theirs; those of MUDD connections have another learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from pgolf.config import ModelConfig
from pgolf.errors import UserTypeError


@dataclass(frozen=True)
class Groups:
    """Trained parameters by optimizer, in the order of `named_parameters`; keys are the full dotted names."""

    banks: dict[str, nn.Parameter]
    """`(matrices, rows, cols)` float32, for Muon."""
    embed: dict[str, nn.Parameter]
    """Embeddings, float32, for AdamW with the embedding's learning rate."""
    scalars: dict[str, nn.Parameter]
    """All other parameters (gains, gates, mixes, projections of tables), float32, for AdamW with the scalars'
    learning rate."""
    mudd: dict[str, nn.Parameter]
    """Parameters of MUDD connections, float32, for AdamW as the scalars, with their own learning rate."""


def split_parameters(model: nn.Module) -> Groups:
    """Put each parameter with requires_grad into one group by the model's `bank_names` and `embed_names`.

    A model may have `mudd_names`, too.

    Raises:
        TypeError: the model lacks one of the two tuples of names, or a parameter is not float32 (bfloat16
            weights would lose small updates).
        ValueError: a name is not a trained parameter of the model or is listed twice, or a bank is not 3-D.
    """
    names: dict[str, tuple[str, ...]] = {}
    for attribute in ("bank_names", "embed_names"):
        value = getattr(model, attribute, None)
        if not isinstance(value, tuple):
            raise TypeError(
                f"{type(model).__name__}.{attribute} must be a tuple of parameter names, "
                f"got {type(value).__name__}"
            )
        names[attribute] = value
    mudd: tuple[str, ...] = getattr(model, "mudd_names", ())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    listed = names["bank_names"] + names["embed_names"]
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if twice:
        raise ValueError(
            f"each parameter may be named once in bank_names and embed_names; named twice: {', '.join(twice)}"
        )
    unknown = [name for name in listed if name not in trained]
    if unknown:
        raise ValueError(
            f"not trained parameters of {type(model).__name__}: {', '.join(unknown)}; "
            "bank_names and embed_names must name parameters with requires_grad "
            "(name a tied parameter by its first name)"
        )
    groups = Groups(
        banks={name: trained[name] for name in names["bank_names"]},
        embed={name: trained[name] for name in names["embed_names"]},
        scalars={name: p for name, p in trained.items() if name not in listed + mudd},
        mudd={name: p for name, p in trained.items() if name in mudd},
    )
    _check(groups, trained)
    return groups


class Blocks(NamedTuple):
    """Matrices of a bank that are iterated in blocks of rows."""

    matrices: int
    """The first so many of the bank."""
    rows: int
    """Of a block; divides those of a matrix."""


def head_blocks(model: nn.Module, pairs: str) -> dict[str, Blocks]:
    """Return what optim.muon.head_pairs asks for, by bank of `GPT`; nothing if it is off.

    `qo_bank` has the projections to queries of all layers first, `kv_bank` those to keys.

    Raises:
        TypeError: the model has no `config` that says how many heads there are.
    """
    if pairs == "off":
        return {}
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        raise UserTypeError(f"optim.muon.head_pairs={pairs} needs a GPT, got {type(model).__name__}")
    rows = 2 * config.width // config.heads
    found = {"qo_bank": Blocks(config.layers, rows)} if "q" in pairs else {}
    return found | {"kv_bank": Blocks(config.layers * (2 if "v" in pairs else 1), rows)}


def _check(groups: Groups, trained: dict[str, nn.Parameter]) -> None:
    for name, p in trained.items():
        if p.dtype != torch.float32:
            raise TypeError(f"parameter {name} must be float32, got {p.dtype}; cast it where it is used")
    for name, p in groups.banks.items():
        if p.dim() != 3:
            raise ValueError(f"bank {name} must be (matrices, rows, cols), got shape {tuple(p.shape)}")
