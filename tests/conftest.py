"""Fixtures that every test shares."""

import os
from collections.abc import Iterator
from pathlib import Path

# Set before torch is loaded, because threads that spin at barriers slow down other processes, also of the
# tests.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Workers share the cores: threads of several of them on one core wait for each other at every small operator.
# Tests of operators use all cores, see tests/ops/conftest.py.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(workers))))

import pytest
import torch

# Programs that tests start must find this tree's pgolf even if it was built in place and not installed.
ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


# Each marks a test or a parameter that needs such a machine; elsewhere it is skipped. `-m gpu` selects all.
requires_gpu = pytest.mark.gpu
requires_hopper = pytest.mark.gpu(hopper=True)
requires_two_gpus = pytest.mark.gpu(count=2)

LONG = {"e2e", "distributed", "ablate"}
"""Folders of the files that take longest, each of which one worker runs, so it must not start last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest files come first; the others keep their order."""
    items.sort(key=lambda item: item.path.parent.name not in LONG)


DEVICES = ["cpu", pytest.param("cuda", marks=requires_gpu)]
"""For tests that show on a machine without a GPU that they would run on one, too."""


def missing(*, count: int = 1, hopper: bool = False) -> str:
    """Return what this machine lacks of these GPUs, "" if nothing."""
    if not torch.cuda.is_available():
        return "needs a Hopper GPU" if hopper else "needs a CUDA device"
    if torch.cuda.device_count() < count:
        return f"needs {count} CUDA devices"
    return "needs a Hopper GPU" if hopper and torch.cuda.get_device_capability()[0] != 9 else ""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine has no GPU for, and begin with the same random numbers."""
    for mark in item.iter_markers("gpu"):
        if what := missing(**mark.kwargs):
            pytest.skip(what)
    # Before any fixture is made: numbers must not depend on which files this worker was given before.
    torch.manual_seed(0)


def devices() -> list[object]:
    """Return the devices on which operator tests run: the CPU, and CUDA if there is a GPU."""
    found: list[object] = ["cpu"]
    if torch.cuda.is_available():
        found.append(pytest.param("cuda", marks=requires_gpu))
    return found


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run torch with one thread, as a process does whose result must be equal bit for bit.

    Sums that several threads share are rounded differently.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
