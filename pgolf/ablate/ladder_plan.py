"""The ladders of a plan: which arms are one change at several learning rates.

    "ladders": {"setting": "optim.muon.lr", "baseline": "base",
                "arms": {"base": ["base_slow", "base", "base_fast"], "ahead": ["slow", "ahead", "fast"]}}

`ladder.py` compares them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pgolf.config import Config, flat, from_dict, to_dict
from pgolf.errors import UserError

FEWEST = 3
"""Rates that a ladder needs for a parabola."""


@dataclass(frozen=True, kw_only=True)
class _LaddersFile:
    """The keys of a plan's ladders."""

    setting: str = "optim.muon.lr"
    baseline: str = ""
    arms: object = None


@dataclass(frozen=True)
class Ladders:
    """The ladders of a plan."""

    setting: str
    baseline: str
    rungs: dict[str, dict[str, float]]
    """By ladder: the value of the setting by arm, rising."""


def read_ladders(value: object, arms: Mapping[str, Config], where: str) -> Ladders | None:
    """Return the ladders of a plan file; None if it has none.

    Raises:
        UserError, UserTypeError: a key is unknown, a ladder has fewer than three rates or one twice, or names
            an arm that is not there.
    """
    if value is None:
        return None
    where = f"{where}: ladders"
    file = from_dict(_LaddersFile, value, where=where)  # type: ignore[arg-type]  # which it checks itself
    if not isinstance(file.arms, dict) or file.baseline not in file.arms:
        raise UserError(f"{where}: arms must be an object of lists of arms, the baseline one of them")
    rungs = {
        name: _rungs(listed, file.setting, arms, f"{where}: {name}") for name, listed in file.arms.items()
    }
    return Ladders(file.setting, file.baseline, rungs)


def _rungs(listed: object, setting: str, arms: Mapping[str, Config], where: str) -> dict[str, float]:
    if not isinstance(listed, list) or len(listed) < FEWEST or not set(listed) <= arms.keys():
        raise UserError(f"{where} must list at least {FEWEST} of the arms {list(arms)}, got {listed!r}")
    found: dict[str, float] = {}
    for arm in listed:
        value = flat(to_dict(arms[arm])).get(setting)
        if not isinstance(value, float) or not value > 0:
            raise UserError(f"{where}: {setting} of arm {arm!r} must be a number above 0, got {value!r}")
        found[arm] = value
    if len(set(found.values())) < len(listed):
        raise UserError(f"{where}: two of its arms have the same {setting}: {found}")
    return dict(sorted(found.items(), key=lambda item: item[1]))
