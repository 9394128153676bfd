"""The forward and backward passes of micro-batches, launched kernel by kernel or replayed as CUDA graphs.

A pass has about a thousand kernels. Launched, each needs the host, and whatever stops the host for longer
than its lead stops the device. Captured, a pass is two launches. There are two graphs and not one, because
the loss goes to the host between them (`steplog.py`).

A graph holds fixed addresses and shapes. So inputs are copied into buffers of its own; gradients are added to
`Parameter.grad`, which must stay the same tensors; and there is a pair of graphs for each form of the pass
and each length of cu_seqlens. A batch with a shorter cu_seqlens takes the next longer pair, in which further
empty segments follow; one with a longer cu_seqlens is launched. Launched and replayed passes can alternate,
because they run the same kernels in the same order and add to the same tensors. A replayed pass equals a
launched one bit for bit, as far as two launched ones equal each other: attention and torch.compile add parts
of some gradients in no fixed order.

All graphs use one memory pool, because no two run at the same time and none reads what another one left.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf import env
from pgolf.data.loader import CU_MULTIPLE, Batch
from pgolf.errors import RunError
from pgolf.graphs import Recorder, Work, first_error, unlike
from pgolf.model.gpt import GPT, Rounding
from pgolf.peers import describe

LOSS = "the loss"


class Form(NamedTuple):
    """What the kernels of a pass depend on, in addition to the length of cu_seqlens."""

    loop: bool
    """With depth recurrence."""
    rounded: bool = False
    """With the matrices as codes of few bits would have them."""


class Pair(NamedTuple):
    """The graphs of one form and one length."""

    forward: Work
    backward: Work


class MicroSteps:
    """Passes whose gradients add up in `Parameter.grad`, and whose losses add up in `total`.

    Attributes:
        total: `()` float32 on the device: the sum of the losses since `begin`, each divided by the number of
            passes.
        pool_bytes: what the graphs hold on the device.
        trace: what Python says of the error that ended `capture`; empty if none did.
    """

    def __init__(
        self, model: GPT, device: torch.device, *, passes: int = 1, rounding: Rounding | None = None
    ) -> None:
        """Make them for `model`, which is prepared and on `device`.

        Args:
            passes: number of passes whose mean loss is differentiated.
            rounding: of `GPT.forward`, for the form that is rounded.
        """
        self._model, self._device, self._passes, self._rounding = model, device, passes, rounding
        self.total, self.pool_bytes, self.trace = torch.zeros((), device=device), 0, ""
        self._lengths: set[int] = set()
        self._loss: Tensor | None = None
        self._replayed: Pair | None = None
        self._static: Batch | None = None
        self._starts: dict[int, Tensor] = {}
        self._graphs: dict[tuple[Form, int], Pair] = {}

    def begin(self) -> None:
        """Begin the sum of the losses."""
        self.total.zero_()

    def forward(self, batch: Batch, form: Form) -> None:
        """Queue the forward pass, which adds its loss to `total`."""
        length = self._captured_length(batch, form)
        self._replayed = None if length is None else self._graphs[form, length]
        if length is None or self._replayed is None:
            self._lengths.add(batch.cu_seqlens.numel())
            self._launch_forward(batch, form)
        else:
            self._take(batch, length)
            self._replayed.forward()

    def backward(self) -> None:
        """Queue the backward pass that belongs to the last forward pass; it adds to the gradients."""
        if self._replayed is None:
            self._launch_backward()
        else:
            self._replayed.backward()

    def capture(self, batches: Sequence[Batch], forms: Iterable[Form]) -> str:
        """Capture the passes of these forms, which `forward` and `backward` replay from then on.

        This is for the warm-up: it runs passes, waits for the device, and changes gradients and `total`.
        Passes of all forms must have been launched before, so that everything is compiled. Captured are the
        lengths of cu_seqlens of those passes and of `batches`, and the next longer one.

        Args:
            batches: on the device; the tokens of the first one are used. Later batches have as many tokens.

        Returns:
            A sentence for the log: what was captured, or why nothing was.
        """
        why = obstacle(self._model, self._device)
        if not why:
            try:
                return self._capture(batches, sorted(set(forms), reverse=True))
            except Exception as e:
                # Whatever the reason is, launched passes compute the same.
                why, self.trace = describe(first_error(e)), traceback.format_exc()
                self._graphs.clear()
                self._loss = None
        return f"passes are launched kernel by kernel and not captured as CUDA graphs: {why}"

    def _capture(self, batches: Sequence[Batch], forms: list[Form]) -> str:
        # An autograd graph of a launched pass that waits for the collector would keep the gradients of a
        # captured pass on the stream of the launched one.
        gc.collect()
        first, recorder = batches[0], Recorder(self._device)
        seen = self._lengths.union(batch.cu_seqlens.numel() for batch in batches)
        lengths = sorted(seen | {max(seen) + CU_MULTIPLE}, reverse=True)
        self._static = replace(first, inputs=first.inputs.clone(), targets=first.targets.clone())
        self._starts = {length: even_starts(first.inputs, length) for length in lengths}
        before = recorder.held()
        # The largest first: what it takes from the pool is enough for the others.
        for form in forms:
            for length in lengths:
                self._graphs[form, length] = self._capture_pair(recorder, form, length)
        self.pool_bytes = recorder.held() - before
        return (
            f"passes of {len(forms)} forms are captured as CUDA graphs, for cu_seqlens of "
            f"{', '.join(map(str, lengths[::-1]))} entries; they hold {self.pool_bytes / 2**20:,.0f} MiB"
        )

    def _capture_pair(self, recorder: Recorder, form: Form, length: int) -> Pair:
        """Capture one form for one length, and replay it once, which sends the graphs to the device.

        Raises:
            RunError: replaying does not compute what launching does.
        """
        assert self._static is not None
        batch = replace(self._static, cu_seqlens=self._starts[length])

        def launch() -> None:
            self._launch_forward(batch, form)
            self._launch_backward()

        launched = self._outcome(lambda: recorder.launch(launch))
        pair = Pair(
            recorder.record(lambda: self._launch_forward(batch, form)),
            recorder.record(self._launch_backward),
        )

        def replay() -> None:
            pair.forward()
            pair.backward()

        replayed = self._outcome(replay)
        if wrong := difference(launched, replayed):
            raise RunError(f"{wrong} differs when {form} is replayed with {length} entries of cu_seqlens")
        return pair

    def _outcome(self, run: Work) -> dict[str, Tensor]:
        """Return copies of the loss and of all gradients that one pass makes."""
        gradients = {n: p.grad for n, p in self._model.named_parameters() if p.grad is not None}
        self.begin()
        for gradient in gradients.values():
            gradient.zero_()
        run()
        return {LOSS: self.total.clone(), **{name: g.clone() for name, g in gradients.items()}}

    def _captured_length(self, batch: Batch, form: Form) -> int | None:
        """Return the length whose graphs run this batch; None: it must be launched."""
        static = self._static
        if static is None or batch.inputs.shape != static.inputs.shape:
            return None
        if batch.max_seqlen != static.max_seqlen:
            return None
        entries = batch.cu_seqlens.numel()
        return min((n for f, n in self._graphs if f == form and n >= entries), default=None)

    def _take(self, batch: Batch, length: int) -> None:
        """Copy a batch into the buffers that the graphs of `length` read."""
        assert self._static is not None
        self._static.inputs.copy_(batch.inputs)
        self._static.targets.copy_(batch.targets)
        starts, entries = self._starts[length], batch.cu_seqlens.numel()
        starts[:entries].copy_(batch.cu_seqlens)
        if entries < length:
            starts[entries:].fill_(batch.inputs.numel())

    def _launch_forward(self, batch: Batch, form: Form) -> None:
        losses = self._model(
            *(batch.inputs, batch.targets, batch.cu_seqlens),
            max_seqlen=batch.max_seqlen,
            loop=form.loop,
            rounding=self._rounding if form.rounded else None,
        )
        # Divided here and not at the end, so that the sum of the gradients is the gradient of the mean.
        self._loss = losses.mean() / self._passes
        self.total += self._loss.detach()

    def _launch_backward(self) -> None:
        loss, self._loss = self._loss, None
        assert loss is not None
        loss.backward()  # type: ignore[no-untyped-call]


def obstacle(model: GPT, device: torch.device) -> str:
    """Return why passes of `model` cannot be captured; empty if nothing is known that forbids it."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if model.attention_name == "sdpa":
        return "the attention sdpa reads the segments on the host, which the other kernels do not"
    if env.check_targets():
        return "with PGOLF_CHECK_TARGETS=1 each loss waits for the device"
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    return f"{missing[0]} has no gradient whose address a graph could hold" if missing else ""


def even_starts(inputs: Tensor, length: int) -> Tensor:
    """Return cu_seqlens `(length,)` of segments of one length, with which the passes are captured.

    The segments are no longer than the longest of any batch whose cu_seqlens has as many entries.
    """
    each = -(-inputs.numel() // (length - 1))
    starts = each * torch.arange(length, dtype=torch.int32, device=inputs.device)
    return starts.clamp(max=inputs.numel())


def difference(wanted: dict[str, Tensor], got: dict[str, Tensor]) -> str:
    """Return which tensor of a replayed pass is not that of a launched one; empty if all are.

    Losses must be equal; for gradients see `unlike`.
    """
    if not torch.equal(wanted[LOSS], got[LOSS]):
        return f"the loss, {float(wanted[LOSS])!r} launched and {float(got[LOSS])!r} replayed,"
    name = unlike({n: t for n, t in wanted.items() if n != LOSS}, got)
    return f"the gradient of {name}" if name else ""
