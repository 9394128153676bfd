"""The training loop: warm-up outside the clock, then steps until the clock says stop.

A step is batch_tokens / (micro_tokens * world size) forward/backward passes on each rank and one optimizer
step. The host waits, once a step, for the end of the previous backward pass, never for the optimizer behind
it: the queue of the device does not run dry, the clock is right to a few milliseconds, and the previous
loss is there to print.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pgolf.config import Config, DataConfig
from pgolf.data.loader import TrainLoader
from pgolf.dist import Dist
from pgolf.log import RunLog
from pgolf.model.gpt import GPT
from pgolf.optim.ema import Ema
from pgolf.optim.schedule import ema_decay, loop_on, lr_multiplier, muon_momentum
from pgolf.optim.step import Optimizer
from pgolf.train.budget import Clock, Tick
from pgolf.train.state import clone_parameters, copy_parameters


@dataclass
class TrainResult:
    """What the loop measured."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loop_step: int | None = None
    """First step with the loop on."""
    last_loss: float = math.nan
    step_ms: dict[str, list[float]] = field(default_factory=lambda: {"loop_off": [], "loop_on": []})
    """Milliseconds of every step, by loop mode, without the first step of a mode."""
    losses: list[float] = field(default_factory=list)
    """Rank 0's loss of every step, nats per token."""


class _HostLoss:
    """The loss of the last step, on its way to the host without a sync of the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._value = torch.full((), math.nan, pin_memory=self._cuda)
        self._event: Any = torch.cuda.Event(blocking=True) if self._cuda else None  # type: ignore[no-untyped-call]

    def send(self, loss: Tensor) -> None:
        """Queue the copy; `wait` returns it once the device has come this far."""
        self._value.copy_(loss, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def wait(self) -> float:
        """Wait until the device has finished everything queued before `send`, and return the loss."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._value)


def passes_per_step(data: DataConfig, world_size: int) -> int:
    """Return the forward/backward passes of one rank in a step.

    Raises:
        ValueError: the batch does not divide into equal passes.
    """
    per_pass = data.micro_tokens * world_size
    if data.batch_tokens % per_pass:
        raise ValueError(
            f"data.batch_tokens={data.batch_tokens} must be a multiple of data.micro_tokens="
            f"{data.micro_tokens} x world size {world_size} = {per_pass}; "
            f"lower data.micro_tokens or change the number of processes"
        )
    return data.batch_tokens // per_pass


class Trainer:
    """Owns what a step needs; `warm_up` once, then `run`."""

    def __init__(
        self,
        config: Config,
        model: GPT,
        optimizer: Optimizer,
        ema: Ema | None,
        loader: TrainLoader,
        dist: Dist,
    ) -> None:
        self._config, self._model, self._optimizer = config, model, optimizer
        self._ema, self._loader, self._dist = ema, loader, dist
        self._passes = passes_per_step(config.data, dist.world_size)

    def warm_up(self, log: RunLog) -> float:
        """Compile and run steps of both loop modes, then restore all state; return the seconds."""
        began = time.perf_counter()
        weights = clone_parameters(self._model)
        modes = (False, True) if self._config.model.loops else (False,)
        for loop in modes:
            for _ in range(self._config.train.warmup_steps):
                self._accumulate(loop=loop)
                self._optimizer.step(0.0)
                if self._ema is not None:
                    self._ema.update(0.5)
            self._synchronize()
            log.line(f"warm-up: loop {'on' if loop else 'off'} ready at {time.perf_counter() - began:.1f} s")
        copy_parameters(self._model, weights)
        self._optimizer.reset()
        if self._ema is not None:
            self._ema.load_state_dict(weights)
        self._loader.restart()
        self._synchronize()
        return time.perf_counter() - began

    def run(self, clock: Clock, log: RunLog, result: TrainResult) -> None:
        """Train until the clock stops the run; `result` is kept up to date all along.

        Raises:
            RuntimeError: the loss is not finite (on every rank, naming the step).
        """
        config = self._config
        host_loss = _HostLoss(self._dist.device)
        previous: tuple[Tick, bool] | None = None
        while True:
            tick = clock.tick(result.steps, last_loss=host_loss.wait())
            loop = loop_on(tick.frac, config.optim) and config.model.loops > 0
            if previous is not None:
                self._report(*previous, tick, result, log)
            if tick.stop:
                break
            if loop and result.loop_step is None:
                result.loop_step = tick.step
            host_loss.send(self._accumulate(loop=loop))
            self._optimizer.step(tick.frac)
            if self._ema is not None and previous is not None:
                self._ema.update(ema_decay(tick.frac - previous[0].frac, config.optim))
            result.steps += 1
            result.tokens += config.data.batch_tokens
            previous = (tick, loop)
        self._synchronize()
        result.seconds = clock.elapsed

    def _accumulate(self, *, loop: bool) -> Tensor:
        """Run this rank's forward/backward passes of one step; return their mean loss (on the device)."""
        total = torch.zeros((), device=self._dist.device)
        for _ in range(self._passes):
            batch = self._loader.next()
            losses = self._model(
                batch.inputs, batch.targets, batch.cu_seqlens, max_seqlen=batch.max_seqlen, loop=loop
            )
            loss = losses.mean() / self._passes
            loss.backward()
            total += loss.detach()
        return total

    def _report(self, tick: Tick, loop: bool, after: Tick, result: TrainResult, log: RunLog) -> None:
        """Log step `tick`, whose loss and end time are known now that the clock shows `after`."""
        loss, seconds, config = after.last_loss, after.elapsed - tick.elapsed, self._config
        if not math.isfinite(loss):
            raise RuntimeError(
                f"the loss is {loss} at step {tick.step} ({tick.elapsed:.1f} s); lower optim.muon.lr or "
                f"optim.adam.embed_lr, or check the data with `pgolf data inspect`; nothing was quantized"
            )
        mode = "loop_on" if loop else "loop_off"
        if tick.step and tick.step != result.loop_step:
            result.step_ms[mode].append(1000 * seconds)
        result.losses.append(loss)
        result.last_loss = loss
        rate = config.data.batch_tokens / seconds
        lr = lr_multiplier(tick.frac, config.optim)
        log.metric(
            step=tick.step,
            loss=loss,
            elapsed=after.elapsed,
            ms=1000 * seconds,
            frac=tick.frac,
            lr=lr,
            momentum=muon_momentum(tick.frac, config.optim.muon),
            loop=loop,
            tokens=(tick.step + 1) * config.data.batch_tokens,
        )
        left = after.left
        to_go = (
            f"{left:6.1f} s left"
            if math.isfinite(left)
            else f"{config.train.steps - tick.step - 1} steps left"
        )
        log.line(
            f"step {tick.step:5d}  loss {loss:7.4f}  {1000 * seconds:8.1f} ms  {rate / 1e3:8.1f} ktok/s  "
            f"lr x{lr:.3f}  {'loop  ' if loop else ''}{to_go}"
        )

    def _synchronize(self) -> None:
        if self._dist.device.type == "cuda":
            torch.cuda.synchronize(self._dist.device)
