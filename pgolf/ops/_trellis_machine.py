"""The state machine of the trellis; csrc/kernels/trellis.h specifies it."""

from __future__ import annotations

from torch import Tensor

STATES, CHAIN = 256, 256
"""Number of states of the machine; number of codes in a chain, after which the machine starts again."""
SIDE_TAPS, INPUT_TAPS = 0o362 >> 1, 0o515 >> 1


def parity(x: Tensor) -> Tensor:
    """Return whether the number of ones in the low eight bits is odd."""
    for shift in (4, 2, 1):
        x = x ^ x >> shift
    return x & 1
