"""The documents of a validation split, and its beginning as a smaller split."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pgolf.data.loader import ValidationText, validation_segments
from pgolf.errors import UserError


def document_bounds(text: ValidationText, bos_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each document's inputs start and how many there are, `(n,)` each.

    A document's last input has the next document's BOS as its target, so every token of the split but the
    first is a target exactly once.

    Raises:
        ValueError: no BOS, or fewer than two tokens.
    """
    return validation_segments(text.tokens, bos_id=bos_id, max_context=max(text.tokens.size, 1))


def first_documents(text: ValidationText, bos_id: int, count: int) -> ValidationText:
    """Return the split's first `count` documents (all if there are fewer), the BOS after them included.

    Raises:
        ValueError: count < 1, no BOS, or fewer than two tokens.
    """
    if count < 1:
        raise UserError(f"documents must be at least 1, got {count}")
    starts, lengths = document_bounds(text, bos_id)
    end = int((starts + lengths)[min(count, starts.size) - 1]) + 1
    return ValidationText(text.tokens[:end], text.bytes[:end])
