"""`pgolf.artifact.code` as it is inside of a counted program: the code is the program itself."""

from __future__ import annotations

import sys
from pathlib import Path

from pgolf.artifact.code_rule import CODE_RULE, TRAIN_NAME

CODE_NAME = TRAIN_NAME
"""Name of the program's file; its rule is `CODE_RULE`."""

__all__ = ["CODE_NAME", "CODE_RULE", "code_bytes", "code_program"]


def code_bytes() -> int:
    """Return the bytes of the program."""
    return len(code_program())


def code_program() -> bytes:
    """Return the program."""
    return Path(str(sys.modules["__main__"].__file__)).read_bytes()
