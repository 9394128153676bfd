"""Marks for torch.compile that do not load it.

The decorators of `torch.compiler` load torch's compiler, which takes longer than all of pgolf, in every
process, though few compile anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def constant_result(function: F) -> F:
    """Mark a function as `torch.compiler.assume_constant_result` does: a compiled caller keeps its result."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def not_compiled(function: F) -> F:
    """Keep torch.compile out of a function, as `torch.compiler.disable` does from the first call on."""

    disabled = None

    @functools.wraps(function)
    def call(*arguments: Any, **settings: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return disabled(*arguments, **settings)

    return call  # type: ignore[return-value]
