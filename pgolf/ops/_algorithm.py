"""Names of the implementations of the polar iteration, and the numbers by which the operators know them."""

from __future__ import annotations

from typing import Literal

Algorithm = Literal["auto", "standard", "gram"]

ALGORITHMS: tuple[Algorithm, ...] = ("auto", "standard", "gram")
"""In the order of `NsAlgorithm` (csrc/kernels/newton_schulz.h): the operators take the place in this tuple.
The stable ABI of torch 2.11 to 2.13 leaks a string's memory at every call, so they take a number. The
argument has no default: torch.compile leaves defaults out of what it keeps on disk, and would then use
those of another version of pgolf."""


def algorithm_number(op: str, algorithm: str) -> int:
    """Return the number by which the operators know an algorithm.

    Raises:
        ValueError: an unknown name.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"{op}: algorithm must be 'auto', 'standard' or 'gram', got {algorithm!r}")
    return ALGORITHMS.index(algorithm)
