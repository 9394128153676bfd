"""Fixtures that every test shares."""

import os
from pathlib import Path

# Set before torch is loaded, because threads that spin at barriers slow down other processes, also of the
# tests.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# Programs that tests start must find this tree's pgolf even if it was built in place and not installed.
ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def devices() -> list[object]:
    """Return the devices on which operator tests run: the CPU, and CUDA if there is a GPU."""
    found: list[object] = ["cpu"]
    if torch.cuda.is_available():
        found.append(pytest.param("cuda", marks=pytest.mark.gpu))
    return found


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
