"""`pgolf.artifact.code` as it is inside of a counted program: the code is the program itself."""

from __future__ import annotations

import sys
from pathlib import Path

from pgolf.artifact.code_rule import CODE_RULE, TRAIN_NAME
from pgolf.config import Coder, Counted

CODE_NAME = TRAIN_NAME
"""Name of the program's file; its rule is `CODE_RULE`."""

__all__ = ["CODE_NAME", "CODE_RULE", "code_bytes", "code_name", "counted_code"]


def code_bytes(coder: Coder = "range", program: Counted = "evaluate") -> int:
    """Return the bytes of the program."""
    return len(counted_code(coder, program))


def code_name(_: Counted = "evaluate") -> str:
    """Return the name of its file."""
    return CODE_NAME


def counted_code(_: Coder = "range", __: Counted = "evaluate") -> bytes:
    """Return the program, which has every coder."""
    return Path(str(sys.modules["__main__"].__file__)).read_bytes()
