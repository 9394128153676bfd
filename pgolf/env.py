"""The surroundings of this process: environment variables, cores, and the commit of the sources.

No other module of the package reads environment variables.
"""

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
    """This process's place among the ranks, as `torchrun` set it; one single process without torchrun."""

    rank: int
    world_size: int
    local_rank: int
    distributed: bool


def launch() -> Launch:
    """Return this process's place among the ranks.

    Raises:
        RuntimeError: only some of torchrun's variables are set, or their values make no sense.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    present = [n for n in names if n in os.environ]
    if not present:
        return Launch(rank=0, world_size=1, local_rank=0, distributed=False)
    if len(present) != len(names):
        missing = sorted(set(names) - set(present))
        raise RunError(
            f"launch: {present} are set, but {missing} are not; start with torchrun, or unset {present}"
        )
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
    """Return the name or address of rank 0's host, as torchrun set it; "localhost" without torchrun."""
    return os.environ.get("MASTER_ADDR") or "localhost"


def ranks_on_this_host() -> int:
    """Return the number of ranks on this machine, as torchrun set it; if that is unknown, of all ranks.

    Raises:
        RuntimeError: only some of torchrun's variables are set.
    """
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(local) if local.isdigit() and int(local) > 0 else launch().world_size


def check_targets() -> bool:
    """Return whether the variable PGOLF_CHECK_TARGETS is 1, so that targets are checked on the GPU too.

    A target out of range then raises an error that names its row; without the check the loss of the row
    becomes NaN. The check is for debugging: every loss waits for the GPU, and CUDA graphs cannot be captured.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    value = os.environ.get("PGOLF_CHECK_TARGETS", "0")
    if value not in ("0", "1"):
        raise UserError(f"PGOLF_CHECK_TARGETS must be 0 or 1, got {value!r}")
    return value == "1"


def compiler() -> tuple[str, dict[str, str]]:
    """Return the command of the C++ compiler, the variable CXX or g++, and the environment to start it in.

    A compiler finds its linker by PATH, so that is set even where this process has none.
    """
    return os.environ.get("CXX") or "g++", {"PATH": os.defpath, **os.environ}


PARENT = "PGOLF_PARENT"
"""Variable with the id of the parent process, with which a child ends; see `follow_parent`."""
_PR_SET_PDEATHSIG = 1


def with_parent(environment: dict[str, str] | None = None) -> dict[str, str]:
    """Return an environment (default: this process's) for child processes that end with this process."""
    return {**(os.environ if environment is None else environment), PARENT: str(os.getpid())}


def follow_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, if it was started `with_parent`.

    This works on Linux only. The kernel does it at any time, and also if the parent is killed by SIGKILL. A
    thread that watches a pipe would have to wait for Python's lock, and the parent cannot do anything when it
    is killed.

    Raises:
        SystemExit: the parent ended before this was called.
    """
    parent = os.environ.pop(PARENT, "")  # removed, because it is not meant for children of this process
    if not parent.isdigit() or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):
        raise SystemExit(f"pgolf: process {parent}, which started this one, has ended")


def share_of_cores(processes: int) -> dict[str, str]:
    """Return the environment of one of `processes` processes that run at the same time on this machine.

    OMP_NUM_THREADS (for torch) and TORCHINDUCTOR_COMPILE_THREADS (for its compiler) are set to a process's
    share of the cores, except for variables that the user has set.
    """
    share = str(max(1, usable_cores() // processes))
    given = {key: value for key, value in os.environ.items() if key not in _SETTLED}
    return {"OMP_NUM_THREADS": share, "TORCHINDUCTOR_COMPILE_THREADS": share} | given


_SETTLED: set[str] = set()
"""Variables that `settle_threads` has set (not the user)."""
CGROUP_LIMITS = (Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))
"""Files with a container's share of the processor: cgroup 2 has "quota period", cgroup 1 the quota alone."""


def usable_cores() -> int:
    """Return the number of cores this process may use: its affinity, or the container's quota if smaller."""
    cores = len(os.sched_getaffinity(0))
    for path in CGROUP_LIMITS:
        try:
            words = path.read_text().split()
            period = words[1] if len(words) > 1 else path.with_name("cpu.cfs_period_us").read_text()
            quota = int(words[0]) / int(period)
        except (OSError, ValueError, IndexError, ZeroDivisionError):
            continue  # there is no limit ("max"), or no such file
        if quota > 0:
            cores = min(cores, max(1, int(quota)))
    return cores


def settle_threads() -> None:
    """Set the variables by which OpenMP chooses its threads; call it before torch is imported.

    By default, threads that wait for each other spin, on cores that other processes could use; two runs on
    one machine then slow each other down many times. OMP_WAIT_POLICY=PASSIVE makes them sleep instead. If
    several processes of a launch share this host, or a container may use fewer cores than it sees,
    OMP_NUM_THREADS is set to this process's share; in other cases torch chooses better, because it uses one
    thread per physical core. Variables that are already set keep their values (torchrun sets OMP_NUM_THREADS
    to 1). OpenMP reads them when it is loaded, so later calls have no effect.
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


def keep_kernels() -> None:
    """Let flash-attn-4 keep its compiled kernels on disk for later processes; call it before it is imported.

    It keeps them apart by its version, and only if this variable is set; a user's value stays.
    """
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")


def threads_note(threads: int) -> str:
    """Return a sentence for the log of a run: threads, usable cores, and how threads wait.

    Args:
        threads: number of threads that torch uses, `torch.get_num_threads()`.
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
    return text + (f"; other programs keep {load:.1f} cores busy, which slows this run" if busy else "")


BUILD_INFO = "_build_info.json"
"""File next to this one in an installed package and in an sdist: the commit from which `setup.py` built."""


PACKAGE = Path(__file__).resolve().parent
"""Folder of the package."""


def source_commit(package: Path = PACKAGE) -> tuple[str, bool]:
    """Return the commit of the package's sources, and whether files differ from it; ("unknown", True) if not.

    For a source tree (also of an editable install) git is asked, but only if the tree is the top of its
    repository, because a package inside another repository does not have that repository's commit. A tree
    that was copied without its history (to a GPU machine) may contain the commit in a file `.commit`, written
    by `git rev-parse HEAD > .commit` in a clean tree. An installed package and an sdist contain it from their
    build.

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
    """Return git's commit of the tree at `root`, the top of a repository, and whether files differ."""
    # Inside a hook, git's own variables may name another repository.
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
    """Return the first `digits` digits of the commit, with -dirty if files differ; empty if it is unknown."""
    commit, dirty = source_commit()
    return "" if commit == "unknown" else commit[:digits] + ("-dirty" if dirty else "")
