"""The documents of a validation text, and the beginning of a text as a smaller text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pgolf.data.loader import ValidationText, validation_segments
from pgolf.errors import UserError


def document_bounds(text: ValidationText, bos_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the start and the number of the inputs of each document, `(n,)` each.

    The target of a document's last input is the BOS of the next document, so every token of the text except
    for the first one is a target exactly once.

    Raises:
        ValueError: the text has no BOS, or fewer than two tokens.
    """
    return validation_segments(text.tokens, bos_id=bos_id, max_context=max(text.tokens.size, 1))


def first_documents(text: ValidationText, bos_id: int, count: int) -> ValidationText:
    """Return the first `count` documents (all if there are fewer) and the BOS after them.

    Raises:
        ValueError: count < 1, or the text has no BOS, or fewer than two tokens.
    """
    if count < 1:
        raise UserError(f"documents must be at least 1, got {count}")
    starts, lengths = document_bounds(text, bos_id)
    end = int((starts + lengths)[min(count, starts.size) - 1]) + 1
    return ValidationText(text.tokens[:end], text.bytes[:end])
