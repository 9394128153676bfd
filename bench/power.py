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
from typing import Any, NamedTuple

import torch

from pgolf.peers import Peer, try_peer

EVERY = 0.02
"""Seconds between two readings of the clock."""


class Driver(NamedTuple):
    """The driver's view of one GPU."""

    nvml: Any
    handle: Any

    def energy(self) -> float:
        """Return the joules that the card has used since the driver was loaded."""
        return float(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1000

    def clock(self) -> float:
        """Return the clock of the multiprocessors in MHz."""
        return float(self.nvml.nvmlDeviceGetClockInfo(self.handle, self.nvml.NVML_CLOCK_SM))


def find_driver(device: torch.device) -> Peer:
    """Look for nvidia-ml-py and read both figures once; `found` of the result is a `Driver`."""

    def load() -> Driver:
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
        # By UUID, because CUDA_VISIBLE_DEVICES renumbers torch's devices and not the driver's.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        driver = Driver(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
        driver.energy(), driver.clock()
        return driver

    return try_peer("nvidia-ml-py", load)


@dataclass
class Meter:
    """A context in which one GPU is watched; its figures are there once the context ends.

    The device is idle at the start and at the end: both wait for it. On the CPU only time is measured.
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
        self._gpu = self.device.type == "cuda"
        self._driver: Driver | None = find_driver(self.device).found if self._gpu else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self._gpu:
            torch.cuda.synchronize(self.device)
        if self._driver is not None:
            self._before = self._driver.energy()
            self._thread.start()
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._gpu:
            torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - self.began
        if self._driver is not None:
            self.joules = self._driver.energy() - self._before
            self._stop.set()
            self._thread.join()

    @property
    def sm_mhz(self) -> float | None:
        """Median SM clock; None without readings."""
        return median(self.clocks) if self.clocks else None

    def _watch(self) -> None:
        assert self._driver is not None
        while not self._stop.wait(EVERY):
            self.clocks.append(self._driver.clock())
