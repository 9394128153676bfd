"""`pgolf.model.threads` in the counted program that scores, whose passes with gradients are not compiled."""

from __future__ import annotations

from typing import Any


def threaded(_: Any) -> None:
    """Return None: autograd adds the gradients of streams."""
