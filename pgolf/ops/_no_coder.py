"""`pgolf.ops.range_coder` in a counted program whose model file has no stream of the range coder."""

from __future__ import annotations

from typing import Any

from pgolf.errors import UserError


def decode_codes(*_: Any, **__: Any) -> Any:
    """Refuse a stream of the range coder.

    Raises:
        UserError: always.
    """
    raise UserError(
        "this model file is written with pgolf's range coder, which this program left out; take the program "
        "that `pgolf artifact code FOLDER` writes"
    )
