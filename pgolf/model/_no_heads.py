"""`pgolf.model.heads` in the counted programs, which have no compiled operators."""

from __future__ import annotations

from typing import Any

from pgolf.model.attention import attention_branch


def select_branch(*_: Any) -> Any:
    """Return `attention_branch` with its name."""
    return "composed", attention_branch, ""
