"""Marks for torch.compile that do not load it, and its limits.

The decorators of `torch.compiler` load torch's compiler, which takes longer than all of pgolf, in every
process, though few compile anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

GRAPHS_OF_A_LAYER = 4
"""Most graphs of one kind of block: to train and to score, for inputs with and without a gradient, and for
sizes that are equal by chance when it is traced."""
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


def room_for_graphs(layers: int) -> None:
    """Let torch.compile keep the graphs of one more model with that many layers.

    By default it refuses a ninth graph of one function. The blocks of all models are the same functions, and
    each kind of layer needs graphs of its own.
    """
    config = torch._dynamo.config
    config.recompile_limit += GRAPHS_OF_A_LAYER * layers
    config.accumulated_recompile_limit += GRAPHS_OF_A_LAYER * layers
