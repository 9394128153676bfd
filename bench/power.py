"""What the GPU spends while something runs: energy, power and SM clock, read from the driver.

A kernel that is limited by power runs faster when the rest of a step moves fewer bytes, so a bench of a whole
step reports joules next to milliseconds. The readings need the package nvidia-ml-py; without it a bench says
so and leaves them out.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from statistics import median

import torch

from pgolf.peers import Peer, try_peer

EVERY = 0.02
"""Seconds between two readings of the clock."""


def find_driver() -> Peer:
    """Look for nvidia-ml-py; `found` of the result is its module."""

    def load() -> object:
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
        return pynvml

    return try_peer("nvidia-ml-py", load)


@dataclass
class Meter:
    """A context in which one GPU is watched; its figures are there once the context ends.

    The device is idle at the start and at the end: both wait for it.
    """

    device: torch.device
    joules: float | None = None
    """Energy of the whole card, its memory included; None without nvidia-ml-py."""
    seconds: float = 0.0
    began: float = 0.0
    """When it began, by `time.perf_counter`."""
    clocks: list[float] = field(default_factory=list)
    """SM clock in MHz, every `EVERY` seconds."""

    def __enter__(self) -> Meter:
        driver = find_driver()
        self._driver = None if driver.problem else driver.found
        self._stop = threading.Event()
        torch.cuda.synchronize(self.device)
        if self._driver is not None:
            # By UUID, because CUDA_VISIBLE_DEVICES renumbers torch's devices and not the driver's.
            uuid = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
            self._handle = self._driver.nvmlDeviceGetHandleByUUID(uuid)
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
            self._before = self._energy()
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - self.began
        if self._driver is not None:
            self.joules = self._energy() - self._before
            self._stop.set()
            self._thread.join()

    @property
    def sm_mhz(self) -> float | None:
        """Median SM clock; None without readings."""
        return median(self.clocks) if self.clocks else None

    def _energy(self) -> float:
        return float(self._driver.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000

    def _watch(self) -> None:
        while not self._stop.wait(EVERY):
            clock = self._driver.nvmlDeviceGetClockInfo(self._handle, self._driver.NVML_CLOCK_SM)
            self.clocks.append(float(clock))
