"""Fixtures of the operators' tests."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def all_cores() -> Iterator[None]:
    """Let operators use as many threads as there are cores, also in one worker of several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, len(os.sched_getaffinity(0))))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def operator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the public functions of the test file's MODULE call its operators on the CPU, too."""
    monkeypatch.setattr(request.module.MODULE, "_takes", lambda *_: True)
