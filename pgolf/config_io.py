"""Settings as JSON: conversion between dataclasses and plain dicts, and reading of JSON files.

The conversion works for any dataclass. What is special about the saved form of a class (which version wrote
it, what a missing key meant then) is defined by that class, see `from_dict`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pgolf.errors import UserError, UserTypeError

T = TypeVar("T")

DEEPEST = 64
"""Largest depth of a JSON file of settings; those of this package have four levels."""


class DuplicateKeyError(UserError):
    """A JSON object has a key twice, of which the format does not say which one is valid."""


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object with these pairs; used as `object_pairs_hook` of json.

    Raises:
        DuplicateKeyError: a key is given twice.
    """
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted(key for key in result if keys.count(key) > 1)
        raise DuplicateKeyError(f"given twice: {', '.join(map(repr, twice))}; give every key once")
    return result


def read_json(path: Path) -> Any:
    """Return the contents of the JSON file at `path`; a byte order mark at its beginning is skipped.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not UTF-8 or not JSON, has a key twice or a number with too many digits, or is
            nested too deeply.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_pairs)
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start}); save it as UTF-8") from e
    except json.JSONDecodeError as e:
        raise UserError(f"{path} is not JSON: {e}") from e
    except DuplicateKeyError as e:
        raise UserError(f"{path}: {e}") from e
    except ValueError as e:  # Python's limit on the digits of an integer
        raise UserError(f"{path}: a number in it cannot be read: {e}") from e
    except RecursionError as e:
        raise UserError(_too_deep(path)) from e
    level, depth = [node for node in (data,) if isinstance(node, dict | list)], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise UserError(_too_deep(path))
        inner = [node.values() if isinstance(node, dict) else node for node in level]
        level = [node for nodes in inner for node in nodes if isinstance(node, dict | list)]
    return data


def _too_deep(path: Path) -> str:
    return f"{path} is nested more than {DEEPEST} levels deep, so it is not a file of settings; name another"


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass of settings as a dict for JSON, in which paths are strings.

    If the class has a `VERSION`, the first key is "version".
    """

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            version = {"version": value.VERSION} if hasattr(value, "VERSION") else {}
            return {**version, **{f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}}
        return str(value) if isinstance(value, Path) else value

    result: dict[str, Any] = plain(config)
    return result


def from_dict(cls: type[T], data: dict[str, Any], *, where: str = "config") -> T:
    """Return the dataclass of settings `cls` with the values of a plain dict.

    Missing keys have their defaults. If the class has a function `completed(data, where)`, its result is read
    instead of `data`.

    Args:
        where: name of the settings in error messages.

    Raises:
        ValueError: a key is unknown (the message suggests the most similar one), or a value out of range.
        TypeError: a value has the wrong type.
    """
    if not isinstance(data, dict):
        raise UserTypeError(f"{where}: expected an object, got {type(data).__name__}")
    completed = getattr(cls, "completed", None)
    if completed is not None:
        data = completed(data, where)
    known = _field_types(typing.cast(typing.Hashable, cls))
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(sorted(known))}"
            raise UserError(f"{where}: unknown key {key!r}{hint}")
        values[key] = _parse(known[key], value, f"{where}.{key}")
    return cls(**values)


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)  # takes 1 ms, because it compiles every annotation
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _parse(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, where=where)
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _parse(next(a for a in typing.get_args(kind) if a is not type(None)), value, where)
    if origin is Literal:
        if value not in typing.get_args(kind):
            raise UserError(f"{where} must be one of {typing.get_args(kind)}, got {value!r}")
        return value
    if kind is Path:
        if not isinstance(value, str | Path):
            raise UserTypeError(f"{where}: expected a path, got {type(value).__name__} {value!r}")
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return _float(value, where)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserTypeError(f"{where}: expected {kind.__name__}, got {type(value).__name__} {value!r}")
    return value


def _float(value: int, where: str) -> float:
    try:
        return float(value)
    except OverflowError as e:
        raise UserError(f"{where}: a number of {len(str(value))} digits is out of range") from e


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name."""

    def walk(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(inner, f"{name}.{key}" if name else key)
        else:
            yield name, value

    return dict(walk(settings, prefix))


MAY_CHANGE = (
    "data.dir",
    "data.micro_tokens",
    "data.prefetch",
    "data.verify",
    "train.device",
    "train.compile",
    "train.attention",
    "train.capture",
    "train.checkpoint_every",
    "train.rank_timeout",
    "train.out",
    "train.track",
    "train.profile",
    "evaluate.",
)
"""Settings that may change when a run is resumed; an entry that ends in a dot means all settings below it."""


def run_hash(config: Any) -> str:
    """Return the hash of the settings that must not change when a run is resumed, see `MAY_CHANGE`."""

    def kept(value: Any, name: str) -> Any:
        if not isinstance(value, dict):
            return value
        inner = {key: f"{name}{key}" for key in value}
        return {
            key: kept(value[key], f"{full}.")
            for key, full in inner.items()
            if not full.startswith(MAY_CHANGE) and f"{full}." not in MAY_CHANGE
        }

    return config_hash(kept(to_dict(config), ""))


def config_hash(config: Any) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of the complete configuration."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:16]
