"""The settings of the groups of `pgolf.optim.Muon`: which there are, and what values they may have."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pgolf.ops._compiler import constant_result
from pgolf.optim.mesh import Box, check_placed, mesh_of
from pgolf.optim.polar import Coefficients, check_converges, coefficients
from pgolf.optim.update_rules import square_size

ADJUST = (None, "original", "match_rms_adamw")
HEADS_ALONG = ("rows", "columns")
ADAM_EPS = 1e-8  # the default of torch.optim.AdamW; Muon's eps, 1e-7, is added to a norm instead
SQUARE = "update_square"  # name of NorMuon's state
MAX_STEPS = 10  # iterations that newton_schulz accepts
SETTINGS = {
    "lr",
    "weight_decay",
    "momentum",
    "nesterov",
    "ns_coefficients",
    "eps",
    "ns_steps",
    "adjust_lr_fn",
    "row_normalize",
    "normalize",
    "cautious",
    "update_floor",
    "momentum_bits",
    "master_weights",
    "use_muon",
    "split_sizes",
    "num_heads",
    "heads_along",
    "betas",
}
ADDED = {
    "normalize": 0.0,
    "cautious": False,
    "update_floor": 0.0,
    "momentum_bits": None,
    "master_weights": None,
}
"""Settings that the first pickled optimizers do not have, and their defaults."""
FORMS = ("momentum_bits", "master_weights")
"""Settings that say in which form the state is kept; a loaded state does not change them."""


def matrices(tensor: Tensor, group: Mapping[str, Any]) -> list[Tensor]:
    """Return views of the matrices in a parameter; the weight of a convolution keeps its dimensions."""
    stack = list(tensor.unbind()) if tensor.dim() == 3 else [tensor]
    if group["num_heads"] is not None:
        dim = HEADS_ALONG.index(group["heads_along"])
        stack = [head for matrix in stack for head in torch.chunk(matrix, group["num_heads"], dim)]
    if group["split_sizes"] is None:
        return stack
    return [piece for matrix in stack for piece in torch.split(matrix, list(group["split_sizes"]))]


def boxes(shape: Sequence[int], group: Mapping[str, Any]) -> list[Box]:
    """Return where the `matrices` of a parameter of this shape are in it, in the same order."""
    depth, rows = (shape[0], shape[1]) if len(shape) == 3 else (1, shape[0])
    cols = math.prod(shape) // (depth * rows)
    heads = group["num_heads"] or 1
    down, across = (heads, 1) if group["heads_along"] == "rows" else (1, heads)
    height, width = rows // down, cols // across
    ends = list(itertools.accumulate(group["split_sizes"] or [height], initial=0))
    return [
        Box(b, b + 1, i * height + start, i * height + end, j * width, (j + 1) * width)
        for b in range(depth)
        for i in range(down)
        for j in range(across)
        for start, end in itertools.pairwise(ends)
    ]


def square_sizes(shape: Sequence[int], group: Mapping[str, Any]) -> list[int]:
    """Return the number of mean squares of each matrix of a parameter of this shape, in order."""
    return [square_size(*box.shape) for box in boxes(shape, group)]


@constant_result  # would be traced for a minute
def table_of(ns_coefficients: Any, steps: int) -> tuple[Coefficients, ...]:
    """Return one triple per iteration, from a triple, a list of triples or the name of a table."""
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"Muon: ns_steps must be in [1, {MAX_STEPS}], got {steps}")
    if isinstance(ns_coefficients, str):
        return coefficients(ns_coefficients, steps)
    rows = list(ns_coefficients)
    if len(rows) == 3 and not any(isinstance(row, Sequence) for row in rows):
        rows = [rows] * steps
    if any(not isinstance(row, Sequence) or len(row) != 3 for row in rows):
        raise ValueError(
            "Muon: ns_coefficients must be a triple (a, b, c), a list of triples or a table's name, "
            f"got {ns_coefficients}"
        )
    if len(rows) != steps:
        raise ValueError(
            f"Muon: ns_coefficients has {len(rows)} triples, but ns_steps={steps}; pass ns_steps={len(rows)}"
        )
    table = tuple((float(a), float(b), float(c)) for a, b, c in rows)
    check_converges(table)
    return table


def check_numbers(settings: dict[str, Any]) -> None:
    """Raise unless each setting is a finite number >= 0, or a tensor with one such element."""
    for name, value in settings.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Muon: a tensor {name} must have one element, got shape {tuple(value.shape)}")
        complex_ = isinstance(value, Tensor) and value.is_complex()
        if isinstance(value, bool | str | bytes | complex) or complex_ or not hasattr(value, "__float__"):
            raise TypeError(f"Muon: {name} must be a number >= 0, got {value!r}")
        if not 0 <= float(value) < math.inf:
            raise ValueError(f"Muon: {name} must be >= 0, got {value}")


def check_options(group: Mapping[str, Any]) -> None:
    """Raise ValueError if an option that other optimizers of torch have cannot be used."""
    if group.get("maximize"):
        raise ValueError("Muon: maximize is not supported; negate the loss")
    if group.get("differentiable"):
        raise ValueError("Muon: differentiable is not supported; the iteration has no derivative")
    if group.get("foreach") and group.get("fused"):
        raise ValueError("Muon: foreach and fused cannot both be True; set one of them")


def fill_missing(defaults: MutableMapping[str, Any], groups: Sequence[MutableMapping[str, Any]]) -> None:
    """Give an unpickled optimizer the defaults of settings that it does not have, in place."""
    for settings in (defaults, *groups):
        for name, value in ADDED.items():
            settings.setdefault(name, value)


def check_squares(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Mapping[str, Any]]) -> None:
    """Raise ValueError if a group was changed so that the mean squares of NorMuon are of other matrices."""
    for i, group in enumerate(groups):
        if not (group["use_muon"] and group["normalize"]):
            continue
        for name, p in zip(_names(group), group["params"], strict=True):
            square = state[p].get(SQUARE) if p in state else None
            if square is None or square.numel() == (wanted := sum(square_sizes(p.shape, group))):
                continue
            raise ValueError(
                f"Muon: parameter {name} of group {i} has {square.numel()} mean squares of normalize, but "
                f"num_heads={group['num_heads']}, heads_along={group['heads_along']!r} and split_sizes="
                f"{group['split_sizes']} cut it into matrices with {wanted}; keep these settings as they "
                f"were in the steps before, or delete state[p][{SQUARE!r}], to begin anew"
            )


def _names(group: Mapping[str, Any]) -> Sequence[object]:
    """Return the names in messages of a group's parameters."""
    return group.get("param_names") or range(len(group["params"]))


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError or TypeError if a setting or a parameter of the group cannot be used."""
    check_numbers({name: group[name] for name in ("lr", "weight_decay", "eps")})
    check_options(group)
    _check_forms(group)
    if not group["use_muon"]:
        betas = group["betas"]
        if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
            raise ValueError(f"Muon: betas must be two numbers in [0, 1), got {betas}")
        return
    check_numbers({name: group[name] for name in ("momentum", "normalize", "update_floor")})
    if not 0 <= group["momentum"] <= 1:
        raise ValueError(f"Muon: momentum must be in [0, 1], got {group['momentum']}")
    if group["normalize"] >= 1:
        raise ValueError(f"Muon: normalize must be in [0, 1), got {group['normalize']}")
    if not isinstance(group["cautious"], bool):
        raise TypeError(f"Muon: cautious must be True or False, got {group['cautious']!r}")
    if group["adjust_lr_fn"] not in ADJUST:
        raise ValueError(f"Muon: adjust_lr_fn must be one of {ADJUST}, got {group['adjust_lr_fn']!r}")
    table_of(group["ns_coefficients"], group["ns_steps"])
    heads = group["num_heads"]
    if heads is not None and (not isinstance(heads, int) or heads < 1):
        raise ValueError(f"Muon: num_heads must be a whole number >= 1 or None, got {heads!r}")
    if group["heads_along"] not in HEADS_ALONG:
        raise ValueError(f"Muon: heads_along must be one of {HEADS_ALONG}, got {group['heads_along']!r}")
    for name, p in zip(_names(group), group["params"], strict=True):
        _check_matrix(f"Muon: parameter {name} of shape {tuple(p.shape)}", p, group)


def _check_forms(group: Mapping[str, Any]) -> None:
    if group["momentum_bits"] not in (None, 8):
        raise ValueError(f"Muon: momentum_bits must be 8 or None, got {group['momentum_bits']!r}")
    if group["master_weights"] not in (None, "split"):
        raise ValueError(f"Muon: master_weights must be 'split' or None, got {group['master_weights']!r}")
    if group["master_weights"] is None:
        return
    for name, p in zip(_names(group), group["params"], strict=True):
        if p.dtype.itemsize < 4 and p.dtype != torch.bfloat16:
            raise ValueError(
                f"Muon: parameter {name} of shape {tuple(p.shape)} is {p.dtype}, and master_weights='split' "
                "is for torch.bfloat16 parameters; convert the model with model.bfloat16(), or use "
                "master_weights=None"
            )


def _check_matrix(what: str, p: Tensor, group: Mapping[str, Any]) -> None:
    if p.is_complex():
        raise TypeError(f"{what} is {p.dtype}, expected a real dtype; put it in a group with use_muon=False")
    if not 2 <= p.dim() <= 5:
        raise ValueError(
            f"{what} is not a matrix: Muon takes 2-D (m, n), 3-D stacks (b, m, n) and 4-D or 5-D "
            "convolutions; put it in a group with use_muon=False"
        )
    _check_dtensor(what, p, group)
    rows, cols = p.shape[1:] if p.dim() == 3 else p.shape[:2]
    heads, along, split_sizes = group["num_heads"], group["heads_along"], group["split_sizes"]
    if heads is not None and along == "columns" and p.dim() > 3:
        raise ValueError(f"{what} is a convolution, whose columns are not heads; use heads_along='rows'")
    if heads is not None and (size := rows if along == "rows" else cols) % heads:
        raise ValueError(f"{what} has {size} {along}; num_heads must divide that number, got {heads}")
    if heads is not None and along == "rows":
        what, rows = what.replace("Muon: ", "Muon: each head of ", 1), rows // heads
    if split_sizes is not None and (sum(split_sizes) != rows or min(split_sizes) < 1):
        raise ValueError(
            f"{what} has {rows} rows; split_sizes must be numbers >= 1 that add up to it, got "
            f"{list(split_sizes)}"
        )


def check_dtensors(group: Mapping[str, Any]) -> None:
    """Raise ValueError if a Muon group has DTensors that an option is not for."""
    for name, p in zip(_names(group), group["params"], strict=True):
        _check_dtensor(f"Muon: parameter {name} of shape {tuple(p.shape)}", p, group)


def _check_dtensor(what: str, p: Tensor, group: Mapping[str, Any]) -> None:
    if mesh_of(p) is None:
        return
    check_placed(what, p)
    whole = 2 if p.dim() == 3 else 1  # dimensions whose parts are whole rows
    cut = [s.dim for s in p.placements if s.is_shard() and s.dim >= whole]  # type: ignore[attr-defined]
    if group["momentum_bits"] and cut:
        raise ValueError(
            f"{what} is a DTensor that is sharded along dimension {cut[0]}, and momentum_bits=8 has "
            "scales for parts of whole rows; shard it along dimension 0, or use momentum_bits=None"
        )
    if group["update_floor"] and cut:
        raise ValueError(
            f"{what} is a DTensor that is sharded along dimension {cut[0]}, and update_floor compares whole "
            "rows; shard it along dimension 0, or use update_floor=0"
        )
