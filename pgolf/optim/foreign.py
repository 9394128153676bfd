"""What a saved optimizer state must be before the drop-in Muon takes it over.

`torch.optim.Optimizer.load_state_dict` takes what it is given: settings of another optimizer rule the group,
its state lies under names that nobody reads. Here all of it is checked before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

TORCH_MUON = {"lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps"}
TORCH_ADAMW = {"lr", "weight_decay", "betas", "eps", "amsgrad"}
MUON_STATE, ADAMW_STATE = {"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}


def check_saved(state_dict: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless a state_dict is one of ours, torch.optim.Muon's or AdamW's that fits `groups`.

    Groups and parameters must be as many, in the same order and of the same kind (Muon or AdamW), the state
    of each parameter be that of its kind, complete and of its shape.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            "Muon: a state_dict has the keys 'state' and 'param_groups'; pass what state_dict() gave"
        )
    saved, states = state_dict["param_groups"], dict(state_dict["state"])
    sizes, ours = ([len(g["params"]) for g in found] for found in (saved, groups))
    if sizes != ours:
        raise ValueError(
            "Muon: the saved state has a different number of parameter groups or of parameters in them: "
            f"{sizes}, this optimizer {ours}; build it with the groups that it was saved with"
        )
    for i, (group, own) in enumerate(zip(saved, groups, strict=True)):
        muon = _is_muon(group, i)
        if muon != own["use_muon"]:
            kinds = [("AdamW", "Muon")[kind] for kind in (muon, own["use_muon"])]
            raise ValueError(
                f"Muon: group {i} of the saved state is of {kinds[0]}, here it is of {kinds[1]}; set "
                f"use_muon={muon} for it, or begin with a fresh state"
            )
        names = own.get("param_names") or range(len(own["params"]))
        for name, key, p in zip(names, group["params"], own["params"], strict=True):
            _check_state(f"Muon: parameter {name} of group {i}", states.pop(key, {}), p, muon=muon)
    if states:
        raise ValueError(f"Muon: the saved state has entries {sorted(map(str, states))[:5]} of no parameter")


def _is_muon(group: Mapping[str, Any], i: int) -> bool:
    """Return the kind of a saved group: whether Muon, else AdamW."""
    keys = group.keys()
    if group.get("maximize"):
        raise ValueError(f"Muon: group {i} of the saved state has maximize=True, which is not supported")
    if "use_muon" in keys or keys >= TORCH_MUON:
        return bool(group.get("use_muon", True))
    if not keys >= TORCH_ADAMW:
        raise ValueError(
            f"Muon: group {i} of the saved state is of another optimizer, with the settings "
            f"{sorted(set(keys) - {'params'})}; only states of this class, torch.optim.Muon and "
            "torch.optim.AdamW load"
        )
    unsupported = [name for name in ("amsgrad", "differentiable") if group.get(name)]
    if not group.get("decoupled_weight_decay", True) and group["weight_decay"]:
        unsupported.append("weight decay as torch.optim.Adam has it (not decoupled)")
    if unsupported:
        raise ValueError(
            f"Muon: group {i} of the saved state has {' and '.join(unsupported)}; AdamW here has not"
        )
    return False


def _check_state(what: str, state: Any, p: Tensor, *, muon: bool) -> None:
    """Raise ValueError unless `state` is empty, or what a step of this kind leaves behind for `p`."""
    wanted = MUON_STATE if muon else ADAMW_STATE
    found = set(state) if isinstance(state, Mapping) else {f"a {type(state).__name__}"}
    if found and found != wanted:
        raise ValueError(
            f"{what}: the saved state has {sorted(map(str, found))}, where {'Muon' if muon else 'AdamW'} has "
            f"{sorted(wanted)}"
        )
    for name in found:
        value, shape = state[name], torch.Size() if name == "step" else p.shape
        if name == "step" and not isinstance(value, Tensor):
            value = torch.tensor(float(value))
        fits = isinstance(value, Tensor) and value.shape == shape and value.is_floating_point()
        if not fits and not (isinstance(value, Tensor) and value.is_complex() and p.is_complex()):
            got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{what}: the saved {name} is {got}, expected {tuple(shape)} of floats")
