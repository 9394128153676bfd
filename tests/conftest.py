"""Fixtures that every test shares."""

import os
from pathlib import Path

# Before torch is loaded: threads that spin at barriers slow a busy machine, and the tests' children with it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# Programs that tests start find this tree's pgolf too where it was built in place, not installed.
ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def devices() -> list[object]:
    """Return the devices that operator tests run on: the CPU, and CUDA where there is one."""
    found: list[object] = ["cpu"]
    if torch.cuda.is_available():
        found.append(pytest.param("cuda", marks=pytest.mark.gpu))
    return found


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
