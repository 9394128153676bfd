"""The package's only reader of environment variables: the launcher's ranks, and one debugging switch."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """What `torchrun` said about this process; one process without it."""

    rank: int
    world_size: int
    local_rank: int
    distributed: bool


def launch() -> Launch:
    """Return this process's place among the ranks.

    Raises:
        RuntimeError: only some of torchrun's variables are set.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    present = [n for n in names if n in os.environ]
    if not present:
        return Launch(rank=0, world_size=1, local_rank=0, distributed=False)
    if len(present) != len(names):
        missing = sorted(set(names) - set(present))
        raise RuntimeError(
            f"launch: {present} set but not {missing}; start with torchrun, or unset {present}"
        )
    rank, world, local = (int(os.environ[n]) for n in names)
    return Launch(rank=rank, world_size=world, local_rank=local, distributed=True)


def check_targets() -> bool:
    """Return whether PGOLF_CHECK_TARGETS asks for targets to be checked on the GPU too.

    Then a target out of range raises and names its row, where it otherwise makes the row's loss NaN. Every
    loss waits for the GPU, and CUDA graphs cannot be captured: for debugging.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    value = os.environ.get("PGOLF_CHECK_TARGETS", "0")
    if value not in ("0", "1"):
        raise ValueError(f"PGOLF_CHECK_TARGETS must be 0 or 1, got {value!r}")
    return value == "1"
