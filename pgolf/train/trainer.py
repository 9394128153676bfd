"""The training loop: warm-up outside the clock, then steps until the clock says stop.

A step is batch_tokens / (micro_tokens * world size) forward and backward passes on each rank and one
optimizer step. Which numbers of a step are known when is explained in `steplog.py`.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf.config import Config, DataConfig
from pgolf.data.loader import TrainLoader
from pgolf.dist import Dist
from pgolf.errors import UserError
from pgolf.evaluate.validation import DataFolder
from pgolf.log import Progress, RunLog
from pgolf.model.fake_quant import FakeQuant
from pgolf.model.gpt import GPT
from pgolf.optim.ema import Ema
from pgolf.optim.schedule import context_at, ema_decay, fake_quant_on, loop_on, swa_decay, took_snapshot
from pgolf.optim.step import Optimizer
from pgolf.train.budget import Clock, Tick
from pgolf.train.captured import Form, MicroSteps
from pgolf.train.checkpoint import Parts
from pgolf.train.origin import Origin
from pgolf.train.position import Position, TrainResult
from pgolf.train.saver import Saver
from pgolf.train.steplog import DeviceNumbers, Known, StepLog
from pgolf.train.timing import DeviceTimer
from pgolf.train.trace import Traces
from pgolf.train.weights import clone_parameters, copy_parameters


def passes_per_step(data: DataConfig, world_size: int) -> int:
    """Return the forward and backward passes of one rank in a step.

    Raises:
        UserError: the batch does not divide into equal passes.
    """
    per_pass = data.micro_tokens * world_size
    if data.batch_tokens % per_pass:
        raise UserError(
            f"data.batch_tokens={data.batch_tokens} must be a multiple of data.micro_tokens="
            f"{data.micro_tokens} x world size {world_size} = {per_pass}; "
            f"lower data.micro_tokens or change the number of processes"
        )
    return data.batch_tokens // per_pass


BACKWARD_SHARE = 0.7
"""Fraction of a pass that its backward half takes, rounded up: about 2/3, as it has two products for each of
the forward pass."""


@contextmanager
def frozen_objects() -> Iterator[None]:
    """Keep Python's garbage collector from looking at the objects that exist now.

    With torch, its compiler and the compiled model loaded there are more than a million of them, and a full
    collection that visits them all stops the host, and soon the device, for 0.2 to 0.6 s.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Mode(NamedTuple):
    """How the forward and backward passes of a step run."""

    loop: bool = False
    """With depth recurrence."""
    rounded: bool = False
    """With the matrices as 6-bit codes would have them."""
    context: int | None = None
    """Tokens of the longest segment; None: model.max_context."""


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
        origin: Origin = Origin(),  # noqa: B008 - frozen
    ) -> None:
        """Train `model`, which goes on from `origin`; its state comes with `restore`."""
        self._origin = origin
        self._config, self._model, self._optimizer = config, model, optimizer
        self._ema, self._loader, self._dist = ema, loader, dist
        self._passes = passes_per_step(config.data, dist.world_size)
        rounding = FakeQuant(config.quant.attn_clip, config.quant.mlp_clip).__call__
        self._micro = MicroSteps(model, dist.device, passes=self._passes, rounding=rounding)
        self._last = Mode()

    def warm_up(self, log: RunLog, *, capture: bool = True) -> None:
        """Compile and run steps of both loop modes, then restore all state.

        Args:
            capture: capture the passes, if train.capture says so; False where no steps follow.
        """
        began = time.perf_counter()
        weights = clone_parameters(self._model)
        # Each mode has its own graphs. All are compiled now, not at the step that switches one on.
        repeats, steps = self._config.model.recurrence_repeats > 0, self._config.train.warmup_steps
        modes = [(False, False), (True, False)] if repeats else [(False, False)]
        if self._config.train.fake_quant_from:
            modes.append((repeats, True))
        progress = Progress(
            "warm-up", max(1, len(modes) * steps * self._passes), is_main=self._dist.is_main, every_s=10.0
        )
        for loop, rounded in modes:
            for _ in range(steps):
                self._accumulate(Mode(loop, rounded), progress=progress)
                self._optimizer.step(0.0, ema_decay=None if self._ema is None else 0.5)
            self._synchronize()
            mode = f"loop {'on' if loop else 'off'}{', rounded' if rounded else ''}"
            log.line(f"warm-up: {mode} ready at {time.perf_counter() - began:.1f} s")
        if capture and self._config.train.capture:
            note = self._capture(modes)
            log.line(f"warm-up: {note}, at {time.perf_counter() - began:.1f} s")
        # From here on the run equals one that was never warmed up, bit for bit (tests/e2e/test_run.py).
        # Parameters are overwritten in place, because the optimizer and compiled code hold on to them.
        copy_parameters(self._model, weights)
        self._optimizer.reset()
        if self._ema is not None:
            self._ema.load_state_dict(weights)
        self._loader.restart()
        self._synchronize()

    def _capture(self, modes: list[tuple[bool, bool]]) -> str:
        """Capture the passes of these modes; return a sentence for the log."""
        # Shorter segments are more of them.
        contexts = [None, *(tokens for tokens, _ in self._config.train.stages)]
        batches = [self._loader.next(context) for context in contexts]
        return self._micro.capture(batches, [Form(loop, rounded) for loop, rounded in modes])

    def take_steps(self, steps: int, *, loop: bool) -> None:
        """Take whole steps, as in the middle of a run, of which only the time is of interest."""
        decay = None if self._ema is None else 0.5
        for _ in range(steps):
            self._accumulate(Mode(loop))
            self._optimizer.step(0.5, ema_decay=decay)

    def parts(self) -> Parts:
        """Return the live tensors that the next step depends on, for a checkpoint."""
        whole, sharded = self._optimizer.live_state()
        whole = {f"optim.{name}": t for name, t in whole.items()}
        whole |= {f"weights.{name}": p.detach() for name, p in self._model.named_parameters()}
        if self._ema is not None:
            whole |= {f"ema.{name}": t for name, t in self._ema.tensors.items()}
        return Parts(whole, {f"optim.{name}": shard for name, shard in sharded.items()})

    def restore(self, tensors: dict[str, Tensor], position: Position) -> None:
        """Take over the tensors of a checkpoint and go to its place in the text, on any number of ranks.

        Raises:
            ValueError: they are of another model or optimizer.
        """
        groups: dict[str, dict[str, Tensor]] = {"weights": {}, "ema": {}, "optim": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind not in groups:
                raise UserError(f"the checkpoint holds {name}, which no part of a run has")
            groups[kind][rest] = tensor
        copy_parameters(self._model, groups["weights"])
        self._optimizer.load_state_dict(groups["optim"])
        if self._ema is not None:
            self._ema.load_state_dict(groups["ema"])
        self.seek(position.steps)
        self._synchronize()

    def seek(self, steps: int) -> None:
        """Go to the place in the text at which the run is after `steps` steps of its own."""
        # In passes of this run; where those of the run before were other ones, less than a pass is left out.
        per_pass = self._config.data.micro_tokens * self._dist.world_size
        self._loader.restart(at=-(-self._origin.tokens // per_pass) + steps * self._passes)

    def run(
        self,
        clock: Clock,
        log: RunLog,
        result: TrainResult,
        saver: Saver,
        *,
        traces: Traces,
        start: Position | None = None,
        validate: Callable[[Tick], float] | None = None,
    ) -> int:
        """Train until the clock stops the run; `result` is kept up to date all along.

        Args:
            saver: writes checkpoints and knows of signals.
            traces: told of each step.
            start: where to go on, with the tensors that belong to it restored; None: at the beginning.
            validate: called before a step, returns the seconds that it took: on the clock, in no step's time.
        Returns:
            0, or the number of the signal that asked some rank to stop: then the last step is saved.
        Raises:
            Diverged: the loss, or the gradient of several steps in a row, is not finite (on every rank,
                naming the step).
        """
        config, optimizer = self._config, self._optimizer
        start = start or Position()
        before = Known(start.last_loss, float(optimizer.grad_norm), start.skipped)
        numbers = DeviceNumbers(self._dist.device, before)
        steps, timer = StepLog(log, config, result, start.row), DeviceTimer(self._dist.device)
        # With a clock, work that was lost moved the fraction on: the average then skips the first step, as it
        # does in a new run. With fixed steps the fraction is exactly what it would have been.
        frac = start.frac if not (config.train.seconds and start.steps) else None
        ahead = BACKWARD_SHARE / self._passes if self._dist.device.type == "cuda" else 0.0
        try:
            while True:
                # Every rank waits for its own passes and then, in `tick`, for the slowest rank. All get the
                # same tick and decide by it alone, so no rank takes a step that another one does not.
                known = numbers.wait()
                tick = clock.tick(
                    result.steps,
                    last_loss=known.loss,
                    ahead=ahead,
                    signal=saver.signals.requested,
                    writer=saver.state,
                )
                steps.norm_arrived(known.grad_norm, known.skipped)
                steps.loss_arrived(tick)
                # Between two steps the state is whole: a checkpoint copies it before the next step moves it.
                saver.attend(tick, self._position(result, tick, frac, steps))
                if tick.signal or tick.stop:
                    break
                tick = self._pause(tick, clock, validate)
                loop = loop_on(tick.frac, config.optim) and config.model.recurrence_repeats > 0
                if loop and result.loop_step is None:
                    result.loop_step = tick.step
                traces.begin(tick.step, loop=loop)
                self._accumulate(self._mode(tick, loop, log), numbers)
                with timer.span():
                    decay = self._decay(tick, frac, result.snapshots)
                    delta = None if frac is None else tick.frac - frac
                    optimizer.step(tick.frac, ema_decay=decay, delta=delta)
                # A step that the device skips, which the host learns later, counts as well.
                result.snapshots += took_snapshot(tick.frac, self._origin.steps + tick.step, config.optim)
                steps.begun(tick, loop=loop, delta=delta)
                result.steps += 1
                result.tokens += config.data.batch_tokens
                frac = tick.frac
            self._synchronize()
            result.optimizer_ms = timer.read()
            steps.norm_arrived(float(optimizer.grad_norm), int(optimizer.skipped))
        finally:
            traces.end()
            # After an error the norm of the last step will never arrive, but its loss is worth keeping.
            steps.norm_arrived(math.nan, result.skipped)
        result.seconds = clock.elapsed
        return tick.signal

    def _mode(self, tick: Tick, loop: bool, log: RunLog) -> Mode:
        """Return how the passes of this step run; say in the log what is new."""
        train = self._config.train
        mode = Mode(loop, fake_quant_on(tick.frac, train), context_at(tick.frac, train))
        if mode.rounded and not self._last.rounded:
            log.line(f"from step {tick.step} on forward passes round the matrices to 6 bits")
        if mode.context != self._last.context:
            tokens = mode.context or self._config.model.max_context
            log.line(f"from step {tick.step} on segments have up to {tokens} tokens")
        self._last = mode
        return mode

    def _pause(self, tick: Tick, clock: Clock, validate: Callable[[Tick], float] | None) -> Tick:
        """Let `validate` score between two steps; return the tick with which the step then begins."""
        if validate is None or not tick.step:
            return tick
        self._synchronize()  # or the rest of the last step would count as part of the validation
        with self._optimizer.at_weights():
            seconds = validate(tick)
        clock.leave_out(seconds)
        return replace(tick, elapsed=tick.elapsed + seconds)

    def _position(self, result: TrainResult, tick: Tick, frac: float | None, steps: StepLog) -> Position:
        """Return where the loop is before step `tick`, the last one having begun at `frac`."""
        return Position(
            steps=result.steps,
            tokens=result.tokens,
            loop_step=result.loop_step,
            last_loss=result.last_loss,
            elapsed=tick.elapsed,
            frac=frac,
            skipped=result.skipped,
            snapshots=result.snapshots,
            row=steps.row,
        )

    def _decay(self, tick: Tick, before: float | None, snapshots: int) -> float | None:
        """Return the decay of the average; None: it stays, or the length of the last step is not known."""
        if self._config.optim.average == "swa":
            return swa_decay(tick.frac, self._origin.steps + tick.step, snapshots, self._config.optim)
        if self._ema is None or before is None:
            return None
        return ema_decay(tick.frac - before, self._config.optim)

    def _accumulate(
        self, mode: Mode, numbers: DeviceNumbers | None = None, progress: Progress | None = None
    ) -> None:
        """Run this rank's forward and backward passes of one step.

        Args:
            mode: how the passes run.
            numbers: gets the mean loss once the last forward pass is done. The last backward pass follows
                while the host, which has waited for these numbers, prepares the next step.
            progress: told of every pass.
        """
        micro, form = self._micro, Form(mode.loop, mode.rounded)
        micro.begin()
        for index in range(self._passes):
            micro.forward(self._loader.next(mode.context), form)
            if numbers is not None and index == self._passes - 1:
                numbers.send(micro.total, self._optimizer.grad_norm, self._optimizer.skipped)
            micro.backward()
            if progress is not None:
                progress.advance(1)

    def _synchronize(self) -> None:
        if self._dist.device.type == "cuda":
            torch.cuda.synchronize(self._dist.device)


def open_loader(config: Config, data_folder: DataFolder, dist: Dist) -> TrainLoader:
    """Return this rank's training loader."""
    return TrainLoader(
        config.data,
        vocab_size=config.model.vocab_size,
        bos_id=data_folder.tokenizer.bos_id,
        max_context=config.model.max_context,
        seed=config.train.seed,
        rank=dist.rank,
        world_size=dist.world_size,
        device=dist.device,
        shorter=tuple(sorted({length for length, _ in config.train.stages})),
        leave_out=config.quant.cap_documents,
    )
