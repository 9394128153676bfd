"""Where this process runs: the package's only reader of environment variables, and its sources' commit."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path


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


<<<<<<< HEAD
def main_address() -> str:
    """Return the name or address of rank 0's host, as torchrun tells it; this machine's without torchrun."""
    return os.environ.get("MASTER_ADDR") or "localhost"
=======
def ranks_on_this_host() -> int:
    """Return how many ranks torchrun started on this machine; all of them where it does not say, 1 without.

    Raises:
        RuntimeError: only some of torchrun's variables are set.
    """
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(local) if local.isdigit() and int(local) > 0 else launch().world_size
>>>>>>> work-mem


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


def share_of_cores(processes: int) -> dict[str, str]:
    """Return the environment of one of so many processes side by side: its share of the cores as threads.

    OMP_NUM_THREADS for torch, TORCHINDUCTOR_COMPILE_THREADS for its compiler; one that is set already stays.
    """
    share = str(max(1, len(os.sched_getaffinity(0)) // processes))
    return {"OMP_NUM_THREADS": share, "TORCHINDUCTOR_COMPILE_THREADS": share} | os.environ


def source_commit() -> tuple[str, bool]:
    """Return the commit of this package's tree and whether files differ; ("unknown", True) outside of git.

    A tree that was copied without its history (to a GPU machine) carries the commit in a file `.commit`,
    written by `git rev-parse HEAD > .commit` from a clean tree.
    """
    root = Path(__file__).resolve().parents[1]
    copied = root / ".commit"
    if copied.is_file():
        return copied.read_text().strip(), False

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True


def commit_name(digits: int = 40) -> str:
    """Return the first `digits` of `source_commit`, with -dirty where files differ; "" where nobody knows."""
    commit, dirty = source_commit()
    return "" if commit == "unknown" else commit[:digits] + ("-dirty" if dirty else "")
