"""The training loop: warm-up outside the clock, then steps until the clock says stop.

A step is batch_tokens / (micro_tokens * world size) forward/backward passes on each rank and one optimizer
step. The host waits, once a step, for the end of the previous backward pass, never for the optimizer behind
it: the queue of the device does not run dry, the clock is right to a few milliseconds, and the previous
loss is there to print. What the optimizer found (gradient norm, skipped steps) arrives one step later still,
so a step's line in metrics.jsonl is written when the next one is reported.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgolf.config import Config, DataConfig
from pgolf.data.loader import TrainLoader
from pgolf.dist import Dist
from pgolf.errors import RanksFailed
from pgolf.evaluate.validation import DataFolder
from pgolf.log import RunLog
from pgolf.model.gpt import GPT
from pgolf.optim.ema import Ema
from pgolf.optim.schedule import ema_decay, loop_on, lr_multiplier, muon_momentum
from pgolf.optim.step import Optimizer
from pgolf.train.budget import Clock, Tick
from pgolf.train.checkpoint import Parts
from pgolf.train.saver import Saver
from pgolf.train.timing import DeviceTimer
from pgolf.train.weights import clone_parameters, copy_parameters
from pgolf.errors import UserError

MAX_SKIPPED_IN_A_ROW = 2
"""Steps with non-finite gradients, one after another, that end a run: weights that stay gave them all."""

ADVICE = (
    "lower optim.muon.lr or optim.adam.embed_lr, or check the data with `pgolf data inspect`; nothing was "
    "quantized"
)


class Diverged(RanksFailed):
    """The loss or the gradients are not finite: on every rank, with the same words."""


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
    optimizer_ms: list[float] = field(default_factory=list)
    """Milliseconds of every optimizer step on rank 0's device, from the end of its backward passes: with
    several ranks, the averaging of gradients (none of it is hidden) and the wait for the slowest rank too."""
    losses: list[float] = field(default_factory=list)
    """Rank 0's loss of every step, nats per token."""
    skipped: int = 0
    """Steps whose gradient was not finite: they changed nothing."""

    def take_up(self, position: Position, rows: list[dict[str, Any]]) -> None:
        """Become the result of a run that was interrupted at `position`, whose metrics are `rows`."""
        self.steps, self.tokens = position.steps, position.tokens
        self.loop_step, self.last_loss, self.skipped = (
            position.loop_step,
            position.last_loss,
            position.skipped,
        )
        self.seconds = position.elapsed
        for row in [*rows, *([position.row] if position.row else [])]:
            if row.get("loss") is None or row.get("ms") is None:
                continue
            self.losses.append(row["loss"])
            if row["step"] and row["step"] != self.loop_step:
                self.step_ms["loop_on" if row["loop"] else "loop_off"].append(row["ms"])


@dataclass(frozen=True)
class Position:
    """Where the loop is between two steps, as a checkpoint's index keeps it: plain JSON data.

    With the tensors of `Trainer.parts` it is all that the following steps depend on.
    """

    steps: int = 0
    tokens: int = 0
    loop_step: int | None = None
    last_loss: float = math.nan
    """Of the last step, nats per token."""
    elapsed: float = 0.0
    """Seconds on the clock."""
    frac: float | None = None
    """Fraction of the run at the start of the last step; None: there was none."""
    skipped: int = 0
    row: dict[str, Any] = field(default_factory=dict)
    """The line of metrics.jsonl that is still to be written."""

    def to_facts(self) -> dict[str, Any]:
        """Return the fields as strict JSON data (a NaN becomes null)."""
        loss = self.last_loss if math.isfinite(self.last_loss) else None
        return {**vars(self), "last_loss": loss}

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Position:
        """Return the position in a checkpoint's facts.

        Raises:
            ValueError: a field is missing or of the wrong type.
        """
        try:
            loss, loop_step, frac = facts["last_loss"], facts["loop_step"], facts["frac"]
            if not (math.isfinite(facts["elapsed"]) and facts["elapsed"] >= 0 and facts["steps"] >= 0):
                raise UserError(f"elapsed is {facts['elapsed']}, steps is {facts['steps']}")
            if frac is not None and not 0 <= frac <= 1:
                raise UserError(f"frac is {frac}")
            return cls(
                steps=int(facts["steps"]),
                tokens=int(facts["tokens"]),
                loop_step=None if loop_step is None else int(loop_step),
                last_loss=math.nan if loss is None else float(loss),
                elapsed=float(facts["elapsed"]),
                frac=None if frac is None else float(frac),
                skipped=int(facts["skipped"]),
                row=dict(facts["row"]),
            )
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"the checkpoint does not say where training was: {type(e).__name__} {e}") from e


class _Seen(NamedTuple):
    """What the host knows of the device at the end of a backward pass."""

    loss: float
    """Of the step of that pass."""
    grad_norm: float
    """Of the step before."""
    skipped: int
    """Steps before this one that were skipped."""


class _HostValues:
    """The scalars of the last step, on their way to the host without a sync of the device."""

    def __init__(self, device: torch.device, before: _Seen) -> None:
        self._cuda = device.type == "cuda"
        self._values = torch.tensor(before, dtype=torch.float32, pin_memory=self._cuda)
        self._event: Any = torch.cuda.Event(blocking=True) if self._cuda else None  # type: ignore[no-untyped-call]

    def send(self, loss: Tensor, grad_norm: Tensor, skipped: Tensor) -> None:
        """Queue the copy; `wait` returns it once the device has come this far."""
        self._values.copy_(torch.stack((loss, grad_norm, skipped)), non_blocking=True)
        if self._event is not None:
            self._event.record()

    def wait(self) -> _Seen:
        """Wait until the device has finished everything queued before `send`, and return what was sent."""
        if self._event is not None:
            self._event.synchronize()
        loss, grad_norm, skipped = self._values.tolist()
        return _Seen(loss, grad_norm, int(skipped))


class _Rows:
    """The lines of metrics.jsonl: each is started with its loss and finished with its gradient norm."""

    def __init__(self, log: RunLog, row: dict[str, Any]) -> None:
        self.log = log
        self.row = row
        """Of the last step whose loss is known: waits for its gradient norm."""
        self._skipped_in_a_row = 0

    def start(self, **fields: Any) -> None:
        """Keep what is known of a step when its loss has arrived."""
        self.row = fields

    def finish(self, grad_norm: float, skipped: int, result: TrainResult) -> None:
        """Write the line that was started, if any; say so if its step was skipped.

        Raises:
            Diverged: the last steps were all skipped (the same on every rank).
        """
        if not self.row:
            return
        row, self.row = self.row, {}
        self.log.metric(**row, grad_norm=grad_norm, skipped=skipped)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped > result.skipped else 0
        result.skipped = skipped
        if not self._skipped_in_a_row:
            return
        self.log.line(
            f"step {row['step']:5d}  the gradient's norm is {grad_norm}: step skipped, {skipped} so far"
        )
        if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise Diverged(
                f"the loss is {row['loss']:.4f} at step {row['step']}, but the gradient was not finite in "
                f"{self._skipped_in_a_row} steps in a row: the run has diverged; {ADVICE}"
            )


def passes_per_step(data: DataConfig, world_size: int) -> int:
    """Return the forward/backward passes of one rank in a step.

    Raises:
        ValueError: the batch does not divide into equal passes.
    """
    per_pass = data.micro_tokens * world_size
    if data.batch_tokens % per_pass:
        raise UserError(
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
        modes = (False, True) if self._config.model.recurrence_repeats else (False,)
        for loop in modes:
            for _ in range(self._config.train.warmup_steps):
                self._accumulate(loop=loop)
                self._optimizer.step(0.0, ema_decay=None if self._ema is None else 0.5)
            self._synchronize()
            log.line(f"warm-up: loop {'on' if loop else 'off'} ready at {time.perf_counter() - began:.1f} s")
        copy_parameters(self._model, weights)
        self._optimizer.reset()
        if self._ema is not None:
            self._ema.load_state_dict(weights)
        self._loader.restart()
        self._synchronize()
        return time.perf_counter() - began

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
        self._loader.restart(at=position.steps * self._passes)
        self._synchronize()

    def run(
        self,
        clock: Clock,
        log: RunLog,
        result: TrainResult,
        saver: Saver,
        *,
        start: Position | None = None,
        validate: Callable[[Tick], float] | None = None,
    ) -> int:
        """Train until the clock stops the run; `result` is kept up to date all along.

        Args:
            saver: writes checkpoints and knows of signals.
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
        known = _Seen(start.last_loss, float(optimizer.grad_norm), start.skipped)
        host, log_rows = _HostValues(self._dist.device, known), _Rows(log, start.row)
        timer = DeviceTimer(self._dist.device)
        previous: tuple[Tick, bool] | None = None
        # With a clock, work that was lost moved the fraction on: the average then skips the first step, as it
        # does in a new run. With fixed steps the fraction is exactly what it would have been.
        frac = start.frac if not config.train.seconds else None
        try:
            while True:
                seen = host.wait()
                tick = clock.tick(
                    result.steps, last_loss=seen.loss, signal=saver.signals.requested, writer=saver.state
                )
                loop = loop_on(tick.frac, config.optim) and config.model.recurrence_repeats > 0
                log_rows.finish(seen.grad_norm, seen.skipped, result)
                if previous is not None:
                    self._report(*previous, tick, result, log_rows)
                saver.attend(tick, self._position(result, tick, frac, log_rows.row))
                if tick.signal or tick.stop:
                    break
                if validate is not None and result.steps:
                    pause = validate(tick)
                    clock.leave_out(pause)
                    tick = replace(tick, elapsed=tick.elapsed + pause)
                if loop and result.loop_step is None:
                    result.loop_step = tick.step
                host.send(self._accumulate(loop=loop), optimizer.grad_norm, optimizer.skipped)
                with timer.span():
                    optimizer.step(tick.frac, ema_decay=self._decay(tick, frac))
                result.steps += 1
                result.tokens += config.data.batch_tokens
                previous, frac = (tick, loop), tick.frac
            self._synchronize()
            result.optimizer_ms = timer.read()
            log_rows.finish(float(optimizer.grad_norm), int(optimizer.skipped), result)
        finally:
            log_rows.finish(math.nan, result.skipped, result)
        result.seconds = clock.elapsed
        return tick.signal

    def _position(self, result: TrainResult, tick: Tick, frac: float | None, row: dict[str, Any]) -> Position:
        """Return where the loop is before step `tick`, the last one having begun at `frac`."""
        return Position(
            steps=result.steps,
            tokens=result.tokens,
            loop_step=result.loop_step,
            last_loss=result.last_loss,
            elapsed=tick.elapsed,
            frac=frac,
            skipped=result.skipped,
            row=row,
        )

    def _decay(self, tick: Tick, before: float | None) -> float | None:
        """Return the decay of the average, or None where the length of the last step is not known."""
        if self._ema is None or before is None:
            return None
        return ema_decay(tick.frac - before, self._config.optim)

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

    def _report(self, tick: Tick, loop: bool, after: Tick, result: TrainResult, rows: _Rows) -> None:
        """Log step `tick`, whose loss and end time are known now that the clock shows `after`."""
        loss, seconds, config = after.last_loss, after.elapsed - tick.elapsed, self._config
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {tick.step} ({tick.elapsed:.1f} s); {ADVICE}")
        mode = "loop_on" if loop else "loop_off"
        if tick.step and tick.step != result.loop_step:
            result.step_ms[mode].append(1000 * seconds)
        result.losses.append(loss)
        result.last_loss = loss
        rate = config.data.batch_tokens / seconds
        lr = lr_multiplier(tick.frac, config.optim)
        rows.start(
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
        rows.log.line(
            f"step {tick.step:5d}  loss {loss:7.4f}  {1000 * seconds:8.1f} ms  {rate / 1e3:8.1f} ktok/s  "
            f"lr x{lr:.3f}  {'loop  ' if loop else ''}{to_go}"
        )

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
    )
