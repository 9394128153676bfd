"""Overrides of a plan: settings by dotted name, applied to a configuration and checked like a config.json."""

from __future__ import annotations

import json
from typing import Any

from pgolf.config import Config, from_dict, to_dict
from pgolf.config_versions import present
from pgolf.errors import UserError, UserTypeError

OWNED = {
    "name": "the arm's name",
    "version": "the code",
    "data.dir": "the plan's data",
    "train.seed": "the plan's seeds",
    "train.out": "the plan's out",
    "train.steps": "the plan's steps or seconds",
    "train.seconds": "the plan's steps or seconds",
}
"""Settings that the plan itself gives every cell."""


def override(config: Config, changes: dict[str, Any], *, where: str) -> tuple[Config, list[str]]:
    """Return `config` with dotted settings changed, and a warning for each that had its value already.

    Raises:
        ValueError: an unknown setting (with the nearest known one), one of the plan's, or a bad value.
        TypeError: a value of the wrong type.
    """
    changes = present(changes, where)
    # On the saved form of the configuration, so that a plan is checked exactly as a config.json is.
    before = to_dict(config)
    data = json.loads(json.dumps(before))
    for key, value in changes.items():
        if key in OWNED:
            raise UserError(f"{where}: {key} is given by {OWNED[key]}; take it out of the overrides")
        if isinstance(value, (dict, list)):
            raise UserTypeError(f"{where}: {key} must be one value; write one dotted key for each setting")
        *sections, last = key.split(".")
        node = data
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise UserError(f"{where}: {key}: {section!r} is a setting, not a section")
        if isinstance(node.get(last), dict):
            raise UserError(f"{where}: {key} is a section; name one of {', '.join(node[last])} in it")
        node[last] = value
    try:
        changed = from_dict(Config, data)
    except (ValueError, TypeError) as e:
        raise type(e)(f"{where}: {e}") from e
    after = to_dict(changed)
    idle = [key for key in changes if _get(before, key) == _get(after, key)]
    return changed, [
        f"{where}: {key} = {_get(after, key)!r} changes nothing: it had this value before" for key in idle
    ]


def _get(data: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        data = data[part]
    return data


def read_overrides(value: object, where: str) -> dict[str, Any]:
    """Return a part of a plan file as overrides.

    Raises:
        UserTypeError: it is no JSON object.
    """
    if not isinstance(value, dict):
        raise UserTypeError(f"{where}: expected an object of dotted settings, got {type(value).__name__}")
    return value
