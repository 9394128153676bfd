"""Range checks that the settings share, and the largest values that whole numbers may have."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

from pgolf.errors import UserError


def require(ok: bool, message: str) -> None:
    """Raise UserError with `message` if a condition does not hold."""
    if not ok:
        raise UserError(message)


MOST = {
    "model.layers": 1024,
    "model.width": 65_536,
    "model.mlp_mult": 256,
    "model.max_context": 2**24,
    "model.bigram_buckets": 2**24,
    "model.bigram_width": 65_536,
    "model.value_embed_width": 65_536,
    "model.recurrence_repeats": 64,
    "data.prefetch": 1024,
    "train.warmup_steps": 1000,
    "train.seed": 2**63 - 1,
    "quant.lqer_rank": 65_536,
    "quant.lqer_top": 65_536,
    "quant.calibration_batches": 2**20,
    "quant.gradient_batches": 2**20,
    "ttt.rank": 65_536,
    "ttt.seed": 2**63 - 1,
    "ttt.members": 1024,
}
"""Largest whole numbers that settings may have. Larger ones have no use and would hang or crash the run."""
MOST_ELSE = 2**40
"""Largest value of all other whole-number settings, for example of tokens and steps."""


def check_finite(section: str, config: Any) -> None:
    """Raise UserError if a setting is NaN or infinite, or a whole number beyond `MOST`."""
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), f"{section}.{f.name}"
        if isinstance(value, float):
            require(math.isfinite(value), f"{name} must be a finite number, got {value}")
        elif isinstance(value, int):
            most = MOST.get(name, MOST_ELSE)
            require(value <= most, f"{name} must be at most {most:,}, got {shown(value)}")


def shown(value: int) -> str:
    """Return a whole number in digits, or its number of bits if it is too long for that."""
    return str(value) if value.bit_length() < 1000 else f"a number of {value.bit_length()} bits"


def check_name(name: str, of: str) -> None:
    """Check a name that is part of `of` ("a folder's name", for example).

    Raises:
        ValueError: a file name cannot contain it, or the file would be hidden or hard to name in a command.
    """
    plain = name.isprintable() and not set(name) & set("/\\") and not name.startswith((".", "-", " "))
    require(
        bool(name) and plain and len(name.encode("utf-8", "replace")) <= 128,
        f"name is part of {of}: 1 to 128 bytes, printable, no / or \\, and no '.', '-' or space at "
        f"its beginning, got {name!r}",
    )


def parse_stages(text: str, name: str) -> tuple[tuple[int, float], ...]:
    """Return the pairs of a text such as "1024@0.1,2048@0.7": a length, and the fraction at which it ends.

    Args:
        name: of the setting, for errors.

    Raises:
        ValueError: a pair is not `length@fraction`, a length is below 1, or the fractions do not rise within
            (0, 1].
    """
    stages = []
    for part in text.split(",") if text else ():
        length, _, end = part.partition("@")
        try:
            stages.append((int(length), float(end)))
        except ValueError as e:
            raise UserError(f"{name} must look like 1024@0.1,2048@0.7, got {part!r} in {text!r}") from e
    ends = [0.0, *(end for _, end in stages)]
    require(
        all(before < end <= 1 for before, end in itertools.pairwise(ends)) and all(n >= 1 for n, _ in stages),
        f"{name}: lengths must be >= 1 and fractions must rise within (0, 1], got {text!r}",
    )
    return tuple(stages)


def parse_fractions(text: str, name: str, *, most: float) -> tuple[float, ...]:
    """Return the numbers of a text such as "0.7,0.75".

    Args:
        name: of the setting, for errors. most: largest fraction that is allowed.

    Raises:
        ValueError: a part is no number, or they do not rise within (0, most].
    """
    try:
        found = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError as e:
        raise UserError(f"{name} must look like 0.7,0.75, got {text!r}") from e
    require(
        all(before < value <= most for before, value in itertools.pairwise((0.0, *found))),
        f"{name}: fractions must rise within (0, {most:g}], got {text!r}",
    )
    return found


def parse_sizes(text: str, name: str) -> tuple[int, ...]:
    """Return the whole numbers of a text such as "8,16,24".

    Args:
        name: of the setting, for errors.

    Raises:
        ValueError: a part is no whole number.
    """
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as e:
        raise UserError(f"{name} must look like 8,16,24, got {text!r}") from e
