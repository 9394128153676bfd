"""Where this process runs: the package's only reader of environment variables, and its sources' commit."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pgolf.errors import RunError, UserError


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
        RuntimeError: only some of torchrun's variables are set, or not to a place among ranks.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    present = [n for n in names if n in os.environ]
    if not present:
        return Launch(rank=0, world_size=1, local_rank=0, distributed=False)
    if len(present) != len(names):
        missing = sorted(set(names) - set(present))
        raise RunError(f"launch: {present} set but not {missing}; start with torchrun, or unset {present}")
    for n in names:
        if not (os.environ[n].isascii() and os.environ[n].isdigit()):
            raise RunError(
                f"launch: {n} must be a whole number >= 0, got {os.environ[n]!r}; start with torchrun, or "
                f"unset {', '.join(names)}"
            )
    rank, world, local = (int(os.environ[n]) for n in names)
    if not rank < world:
        raise RunError(f"launch: RANK must be below WORLD_SIZE={world}, got {rank}; start with torchrun")
    return Launch(rank=rank, world_size=world, local_rank=local, distributed=True)


def main_address() -> str:
    """Return the name or address of rank 0's host, as torchrun tells it; this machine's without torchrun."""
    return os.environ.get("MASTER_ADDR") or "localhost"


def ranks_on_this_host() -> int:
    """Return how many ranks torchrun started on this machine; all of them where it does not say, 1 without.

    Raises:
        RuntimeError: only some of torchrun's variables are set.
    """
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(local) if local.isdigit() and int(local) > 0 else launch().world_size


def check_targets() -> bool:
    """Return whether PGOLF_CHECK_TARGETS asks for targets to be checked on the GPU too.

    Then a target out of range raises and names its row, where it otherwise makes the row's loss NaN. Every
    loss waits for the GPU, and CUDA graphs cannot be captured: for debugging.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    value = os.environ.get("PGOLF_CHECK_TARGETS", "0")
    if value not in ("0", "1"):
        raise UserError(f"PGOLF_CHECK_TARGETS must be 0 or 1, got {value!r}")
    return value == "1"


PARENT = "PGOLF_PARENT"
"""Number of the process that a child shall not outlive, see `follow_parent`."""
_PR_SET_PDEATHSIG = 1


def with_parent(environment: dict[str, str] | None = None) -> dict[str, str]:
    """Return an environment (this process's by default) for children that shall end with this process."""
    return {**(os.environ if environment is None else environment), PARENT: str(os.getpid())}


def follow_parent() -> None:
    """Have the kernel kill this process when its parent ends, if it was started `with_parent`; Linux only.

    The kernel does it whatever this process is busy with and however the parent ended, SIGKILL included. A
    thread that watches a pipe would have to wait for Python's lock, and a handler of the parent's never runs
    when that is killed.

    Raises:
        SystemExit: the parent ended before this was called.
    """
    parent = os.environ.pop(PARENT, "")  # not for children of this process
    if not parent.isdigit() or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):
        raise SystemExit(f"pgolf: process {parent}, which started this one, has ended")


def share_of_cores(processes: int) -> dict[str, str]:
    """Return the environment of one of so many processes side by side: its share of the cores as threads.

    OMP_NUM_THREADS for torch, TORCHINDUCTOR_COMPILE_THREADS for its compiler; one that is set already stays.
    """
    share = str(max(1, usable_cores() // processes))
    given = {key: value for key, value in os.environ.items() if key not in _SETTLED}
    return {"OMP_NUM_THREADS": share, "TORCHINDUCTOR_COMPILE_THREADS": share} | given


_SETTLED: set[str] = set()
"""Variables that `settle_threads` set, not the user."""
CGROUP_LIMITS = (Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))
"""Where a container's share of the processor stands: "quota period" of cgroup 2, quota alone of cgroup 1."""


def usable_cores() -> int:
    """Return how many cores this process may keep busy: its affinity, or its container's quota if less."""
    cores = len(os.sched_getaffinity(0))
    for path in CGROUP_LIMITS:
        try:
            words = path.read_text().split()
            period = words[1] if len(words) > 1 else path.with_name("cpu.cfs_period_us").read_text()
            quota = int(words[0]) / int(period)
        except (OSError, ValueError, IndexError, ZeroDivisionError):
            continue  # no limit ("max"), or no such file
        if quota > 0:
            cores = min(cores, max(1, int(quota)))
    return cores


def settle_threads() -> None:
    """Let OpenMP wait passively and take this process's share of the cores; call it before torch is imported.

    By default threads that wait for each other spin, on cores that other processes want: two trainings side
    by side slow each other many times. OMP_WAIT_POLICY=PASSIVE sleeps instead. Where several processes of a
    launch share this host, or a container has fewer cores than it sees, OMP_NUM_THREADS becomes the share
    (elsewhere torch knows better: it leaves out the second threads of cores). What is set already stays
    (torchrun sets OMP_NUM_THREADS to 1). OpenMP reads both when it is loaded; later calls change nothing.
    """
    if "torch" in sys.modules:
        return
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    processes = int(here) if here.isascii() and here.isdigit() and int(here) else 1
    share = usable_cores() // processes
    if not os.environ.get("OMP_NUM_THREADS") and share < len(os.sched_getaffinity(0)):
        os.environ["OMP_NUM_THREADS"] = str(max(1, share))
        _SETTLED.add("OMP_NUM_THREADS")


def threads_note(threads: int) -> str:
    """Return the sentence on cores and waiting for a run's log.

    Args:
        threads: that torch uses, `torch.get_num_threads()`.
    """
    cores = usable_cores()
    spin = {name: os.environ[name] for name in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME") if name in os.environ}
    passive = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
    waiting = "sleep while they wait" if passive else "spin while they wait (OMP_WAIT_POLICY)"
    waiting = ", ".join(f"wait with {k}={v}" for k, v in spin.items()) or waiting
    text = f"threads: {threads} on {cores} usable cores; they {waiting}"
    try:
        load = os.getloadavg()[0]
    except OSError:
        return text
    busy = load > max(0.5 * cores, 1.0)
    return text + (f"; other work keeps {load:.1f} cores busy, the run will be slower for it" if busy else "")


BUILD_INFO = "_build_info.json"
"""Beside this file in an installed package and in an sdist: the commit that `setup.py` built from."""


PACKAGE = Path(__file__).resolve().parent
"""Folder of the package."""


def source_commit(package: Path = PACKAGE) -> tuple[str, bool]:
    """Return the commit of the package's sources and whether files differ; ("unknown", True) if nobody knows.

    A source tree (also an editable install) asks git, if the tree is the top of its repository: a package
    inside somebody's repository does not have that one's commit. A tree that was copied without its history
    (to a GPU machine) carries the commit in a file `.commit`, written by `git rev-parse HEAD > .commit` from
    a clean tree. An installed package and an sdist have it from their build.

    Args:
        package: the folder of the package, whose parent may be a source tree.
    """
    root = package.parent
    if is_source_tree(root):
        copied = root / ".commit"
        if copied.is_file():
            return copied.read_text().strip(), False
        if (root / ".git").exists():
            return _git_commit(root)
    try:
        info = json.loads((package / BUILD_INFO).read_text())
        return str(info["commit"]), bool(info["dirty"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown", True


def is_source_tree(root: Path) -> bool:
    """Return whether `root` is the top folder of this project's sources."""
    try:
        return (root / "setup.py").is_file() and 'name = "pgolf"' in (root / "pyproject.toml").read_text()
    except (OSError, ValueError):
        return False


def _git_commit(root: Path) -> tuple[str, bool]:
    """Return git's word on the tree at `root`, if that is the top of a repository."""
    # Inside a hook, git's own variables name another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return "unknown", True
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True


def commit_name(digits: int = 40) -> str:
    """Return the first `digits` of `source_commit`, with -dirty where files differ; "" where nobody knows."""
    commit, dirty = source_commit()
    return "" if commit == "unknown" else commit[:digits] + ("-dirty" if dirty else "")
