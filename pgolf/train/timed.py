"""Steps that are timed outside of a run: what a configuration costs, without its training."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from pgolf.config import Config
from pgolf.dist import Dist
from pgolf.log import RunLog
from pgolf.train.setup import set_up
from pgolf.train.trainer import Trainer, open_loader


class Timed:
    """A model with its optimizer that takes steps to be timed; its weights are of no use afterwards."""

    def __init__(self, config: Config, dist: Dist, folder: Path) -> None:
        """Set up and compile; `folder` gets the log.

        Raises:
            FileNotFoundError, UserError: as a run raises them before it begins.
        """
        self._config, self._dist = config, dist
        folder.mkdir(parents=True, exist_ok=True)
        made = set_up(config, dist, resume=None, train=True)
        self._loader = open_loader(config, made.data, dist)
        self._trainer = Trainer(config, made.model, made.optimizer, made.ema, self._loader, dist)
        self._trainer.warm_up(RunLog(folder, is_main=dist.is_main))

    def milliseconds(self, steps: int) -> tuple[float, float | None]:
        """Return the milliseconds per step of `steps` steps in a row, without and with depth recurrence.

        The second is None for a network without recurrence.
        """
        off = self._milliseconds(steps, loop=False)
        repeats = self._config.model.recurrence_repeats
        return off, self._milliseconds(steps, loop=True) if repeats else None

    def _milliseconds(self, steps: int, *, loop: bool) -> float:
        self._trainer.take_steps(1, loop=loop)  # what the last arm left in the caches is not this one's
        self._synchronize()
        began = time.perf_counter()
        self._trainer.take_steps(steps, loop=loop)
        self._synchronize()
        return 1000 * (time.perf_counter() - began) / steps

    def close(self) -> None:
        """Stop the loader."""
        self._loader.close()

    def _synchronize(self) -> None:
        if self._dist.device.type == "cuda":
            torch.cuda.synchronize(self._dist.device)
