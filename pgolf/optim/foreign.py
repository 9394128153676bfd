"""Checks of a saved optimizer state before `pgolf.optim.Muon` loads it.

`torch.optim.Optimizer.load_state_dict` loads any state: with the state of another optimizer, foreign settings
replace those of a group, and the moments are stored under names that are never read. The checks here cover
the whole state before any of it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pgolf.optim.mesh import mesh_of
from pgolf.optim.momentum import BUFFER, CODES, SCALES, scales_shape
from pgolf.optim.muon_settings import SQUARE, square_sizes
from pgolf.optim.split_weights import REST, is_split

TORCH_MUON = {"lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps"}
TORCH_ADAMW = {"lr", "weight_decay", "betas", "eps", "amsgrad"}
MUON_STATE, CODED_STATE, ADAMW_STATE = {BUFFER}, {CODES, SCALES}, {"step", "exp_avg", "exp_avg_sq"}
DTYPES = {SQUARE: torch.float32, CODES: torch.int8, SCALES: torch.float32, REST: torch.int8}
"""Of state that does not have the dtype of its parameter."""


def check_saved(state_dict: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless a state_dict fits `groups`.

    It may come from `pgolf.optim.Muon`, `torch.optim.Muon` or `torch.optim.AdamW`. It must have the same
    number of groups and of parameters per group, in the same order, and each group must be of the same kind
    (Muon or AdamW). The state of a parameter must be empty, or complete for its kind and of its shape; for a
    DTensor it is either whole or placed like the parameter.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            "Muon: expected a state_dict with the keys 'state' and 'param_groups'; pass the value that "
            "state_dict() returned"
        )
    saved, states = state_dict["param_groups"], dict(state_dict["state"])
    sizes, ours = ([len(g["params"]) for g in found] for found in (saved, groups))
    if sizes != ours:
        raise ValueError(
            f"Muon: the saved state has groups of {sizes} parameters, this optimizer has groups of {ours}; "
            "build the optimizer with the same groups as the one that was saved"
        )
    for i, (group, own) in enumerate(zip(saved, groups, strict=True)):
        muon = _is_muon(group, i)
        if muon != own["use_muon"]:
            kinds = [("AdamW", "Muon")[kind] for kind in (muon, own["use_muon"])]
            raise ValueError(
                f"Muon: group {i} was saved by {kinds[0]}, but uses {kinds[1]} in this optimizer; set "
                f"use_muon={muon} for it, or do not load this state"
            )
        names = own.get("param_names") or range(len(own["params"]))
        for name, key, p in zip(names, group["params"], own["params"], strict=True):
            what = f"Muon: parameter {name} of group {i}"
            _check_state(what, states.pop(key, {}), p, {**own, **group})
    if states:
        raise ValueError(
            f"Muon: the saved state has entries {sorted(map(str, states))[:5]} that belong to no parameter"
        )


def restore_exact(
    state: MutableMapping[Any, Any], groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]
) -> None:
    """Put saved tensors that torch rounds to the dtype of their parameter into `state`, which it has loaded.

    These are mean squares, codes, scales and rests, and the momentum and the moments of split weights and
    those that are encoded next.
    """
    for own, saved in zip(groups, state_dict["param_groups"], strict=True):
        for p, key in zip(own["params"], saved["params"], strict=True):
            split = is_split(p, own)
            wide = split or (own["use_muon"] and own["momentum_bits"] == 8)
            for name, value in state_dict["state"].get(key, {}).items():
                if name in DTYPES or (wide and name != "step"):
                    dtype = DTYPES.get(name, torch.float32)
                    state[p][name] = value.detach().to(p.device, dtype, copy=True)
            if not split and p in state:
                state[p].pop(REST, None)


def fit_moments(state: MutableMapping[str, Any], p: Tensor, group: Mapping[str, Any]) -> None:
    """Give a parameter of AdamW moments of the right dtype: convert those that it has, or begin at 0."""
    dtype = torch.float32 if is_split(p, group) else p.dtype
    if "step" not in state:
        state["step"] = zero_step(p, group)
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in state:
            state[name] = torch.zeros_like(p, dtype=dtype)
        elif state[name].dtype != dtype:
            state[name] = state[name].to(dtype)


def zero_step(p: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return a step count of 0 in the dtype and on the device that `torch.optim.AdamW` would use."""
    wide = torch.get_default_dtype() == torch.float64 and not group.get("fused")
    device = p.device if group.get("fused") or group.get("capturable") else None
    return torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=device)


def _is_muon(group: Mapping[str, Any], i: int) -> bool:
    """Return whether a saved group belongs to Muon (True) or to AdamW (False).

    Raises:
        ValueError: it belongs to another optimizer, or uses an option that is not supported here.
    """
    keys = group.keys()
    if group.get("maximize"):
        raise ValueError(
            f"Muon: group {i} of the saved state has maximize=True, which is not supported; negate the loss"
        )
    if "use_muon" in keys or keys >= TORCH_MUON:
        return bool(group.get("use_muon", True))
    if not keys >= TORCH_ADAMW:
        raise ValueError(
            f"Muon: group {i} of the saved state belongs to another optimizer, with the settings "
            f"{sorted(set(keys) - {'params'})}; only states of this class, torch.optim.Muon and "
            "torch.optim.AdamW can be loaded"
        )
    unsupported = [name for name in ("amsgrad", "differentiable") if group.get(name)]
    if not group.get("decoupled_weight_decay", True) and group["weight_decay"]:
        unsupported.append("weight decay as torch.optim.Adam has it (not decoupled)")
    if unsupported:
        raise ValueError(
            f"Muon: group {i} of the saved state uses {' and '.join(unsupported)}, which the AdamW groups of "
            "this optimizer do not support"
        )
    return False


def _check_state(what: str, state: Any, p: Tensor, group: Mapping[str, Any]) -> None:
    """Raise ValueError unless `state` is empty or has all entries of its kind, of the shapes for `p`."""
    muon = group["use_muon"]
    found = set(state) if isinstance(state, Mapping) else {f"a {type(state).__name__}"}
    wanted = ADAMW_STATE if not muon else CODED_STATE if CODES in found else MUON_STATE
    # Mean squares that are missing start at 0, and those that the settings do not need stay unused.
    if found and found - ({SQUARE, REST} if muon else {REST}) != wanted:
        raise ValueError(
            f"{what}: the saved state has the entries {sorted(map(str, found))}, expected those of "
            f"{'Muon' if muon else 'AdamW'}: {sorted(wanted)}"
        )
    for name in found:
        value, shape = state[name], torch.Size() if name == "step" else p.shape
        if name == SQUARE:
            shape = torch.Size([sum(square_sizes(p.shape, group))])
        if name in (SCALES, REST):
            shape = scales_shape(p.shape) if name == SCALES else torch.Size([*p.shape, 2])
        if name == "step" and not isinstance(value, Tensor):
            value = torch.tensor(float(value))
        whole = DTYPES[name] if name in (CODES, REST) else None
        fits = isinstance(value, Tensor) and value.shape == shape
        fits = fits and (value.dtype == whole if whole else value.is_floating_point())
        if not fits and not (isinstance(value, Tensor) and value.is_complex() and p.is_complex()):
            got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            kind = whole or "floats"
            raise ValueError(f"{what}: the saved {name} is {got}, expected {kind} of shape {tuple(shape)}")
        if (mesh := mesh_of(value)) is not None and not (
            mesh == mesh_of(p) and value.placements == p.placements  # type: ignore[attr-defined]
        ):
            raise ValueError(
                f"{what}: the saved {name} is a DTensor that is not placed like the parameter; load it with "
                "torch.distributed.checkpoint, which moves the parts, or save it whole (full_tensor())"
            )
