"""Fixtures that every test shares."""

import pytest
import torch


def devices() -> list[object]:
    """Return the devices that operator tests run on: the CPU, and CUDA where there is one."""
    found: list[object] = ["cpu"]
    if torch.cuda.is_available():
        found.append(pytest.param("cuda", marks=pytest.mark.gpu))
    return found


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
