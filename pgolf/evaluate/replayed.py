"""Steps of test-time training as CUDA graphs, so that the host does not have to launch each of their kernels.

A step has about 1,500 kernels, and launching them takes an H200's host four times as long as running them. A
graph has fixed sizes, but documents end and windows grow, so hardly two steps have the same. So steps are
padded to a few sizes, which `plan_sizes` chooses from the sizes of all steps, known beforehand. Steps that no
size fits well are launched as before.

How a step is padded, without any effect on its losses and gradients:

- Windows: the padding is in front of each window, as a segment of its own, so that nothing attends to it, and
  the chunk still is at the end. It has the tokens of an earlier step, whatever they are.
- Chunks: more of the last tokens of a window are asked for than the chunk has. Nobody reads their losses, and
  the gradient of the loss with respect to them is 0.
- Documents: further windows after the last one, with the tokens of an earlier step, and with the adapters of
  documents that have ended, or of none. The same is true of their losses, and nobody reads their gradients.

There are three graphs for each size: the states (forward), the losses of targets, and the backward pass. The
targets come between the first two, as everywhere (`predictor.py`). The optimizer is not in a graph: it takes
its step on the documents that learn, as always. For autograd, the graphs are one function of the adapters.

This module is not part of the program that scores: `capture` takes a pass that was made without it.
Legend: `N` documents, `W` tokens of a window, `C` of a chunk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pgolf import graphs
from pgolf.errors import RunError
from pgolf.evaluate.ensemble import Ensemble
from pgolf.evaluate.heads import AdaptedHead
from pgolf.evaluate.predictor import Distributions, Inputs, Lesson, Pass, Predictor, Turn
from pgolf.evaluate.ttt import ATTENTION_WIDTH, DOCUMENT_COST, Adapted
from pgolf.graphs import Recorder, Work, first_error, unlike
from pgolf.model.attention import Asked
from pgolf.model.blocks import Context
from pgolf.model.lora import Adapters, bind
from pgolf.peers import describe

LAUNCH_COST = 6e4
"""What the kernels of a step cost that takes as long to run as to launch. On an H200 `pr1855` launches a
compiled step in 73 ms, and kernels take about 1.1 s per million (20261130_nvidia-h200_ttt-profile.txt)."""
CAPTURE_STEPS = 4
"""Steps that take as long to launch as it takes to warm up, capture and check a size (not measured)."""
FORWARD_SHARE = 1 / 3
"""The part of a step's cost that is left if nothing is learned."""
ROW_COST = 0.25
"""Cost of a row of the output projection, in tokens of a window: a tenth of a token's products, and logits in
float32 (not measured)."""
MOST_SIZES = 40
LOSS_NOISE = 0.01
"""Relative difference of the losses of two steps from which on they are not the same."""


class Size(NamedTuple):
    """What the shapes of a step depend on."""

    documents: int
    width: int
    """W, tokens of a window."""
    asked: int
    """C, tokens of a chunk."""

    @property
    def cost(self) -> float:
        """What its kernels take, in the units of `ttt.step_cost`."""
        token = 1 + self.width / ATTENTION_WIDTH
        return self.documents * (self.width * token + ROW_COST * self.asked + DOCUMENT_COST)


class Recording(Protocol):
    """What captures work, see `Recorder`."""

    def launch(self, work: Work) -> None:
        """Run the work where it will be captured."""

    def record(self, work: Work) -> Work:
        """Return what does the work again."""

    def held(self) -> int:
        """Return the bytes that are held on the device."""


def step_sizes(turns: Iterable[Turn]) -> dict[Size, float]:
    """Return how often each size is read; a step without learning counts `FORWARD_SHARE`."""
    uses: Counter[Size] = Counter()
    for turn in turns:
        for number, question in enumerate(turn.questions, 1):
            if question.asked and not question.lane:  # a graph reads the adapters of the first documents
                learns = turn.learners > 0 and number == len(turn.questions)
                size = Size(len(question.windows), question.width, question.asked)
                uses[size] += 1 if learns else FORWARD_SHARE  # type: ignore[assignment]
    return dict(uses)


def plan_sizes(uses: dict[Size, float], *, exact: bool = False, most: int = MOST_SIZES) -> dict[Size, Size]:
    """Return the size to capture for each size of steps; those that are missing are launched.

    Sizes are added one by one, each time the one that saves most, until no further one saves more than it
    takes to capture.

    Args:
        uses: from `step_sizes`.
        exact: chunks must not be padded.
        most: largest number of sizes to capture.
    """
    if not uses:
        return {}
    steps = sorted(uses)
    n, w, c = np.array(steps).T
    often = np.array([uses[step] for step in steps])
    # No padded step has more tokens than the largest one, so that memory suffices.
    limit = int((n * w).max())
    counts = np.unique(n)
    counts = counts[np.unique(np.linspace(0, counts.size - 1, 48).round().astype(int))]
    shapes = sorted({(step.width, step.asked) for step in steps})
    sizes = [Size(int(k), *shape) for k in counts for shape in shapes if k * shape[0] <= limit]
    sizes = sorted({*sizes, *steps})
    costs = np.array([size.cost for size in sizes])
    big_n, big_w, big_c = np.array(sizes).T[:, :, None]
    fits = (n <= big_n) & (w <= big_w) & ((c == big_c) if exact else (c <= big_c))
    replayed = np.where(fits, costs[:, None], np.inf)
    setup = CAPTURE_STEPS * np.maximum(costs, LAUNCH_COST)
    launched = np.maximum([step.cost for step in steps], LAUNCH_COST)

    def total(picked: list[int]) -> float:
        best = np.minimum(launched, replayed[picked].min(axis=0, initial=np.inf))
        return float(best @ often + setup[picked].sum())

    picked: list[int] = []
    for _ in range(most):
        best = np.minimum(launched, replayed[picked].min(axis=0, initial=np.inf))
        saves = np.maximum(best - replayed, 0) @ often - setup
        if saves.max() <= 0:
            break
        picked.append(int(saves.argmax()))
    # Later sizes can leave too little to do to an earlier one.
    for i in list(picked):
        rest = [j for j in picked if j != i]
        if total(rest) < total(picked):
            picked = rest
    if not picked:
        return {}
    nearest = np.array(picked)[replayed[picked].argmin(axis=0)]
    better = replayed[nearest, np.arange(len(steps))] < launched
    return {step: sizes[i] for step, i, good in zip(steps, nearest, better, strict=True) if good}


class Graphs:
    """The states, the losses and the backward pass of one size, and the tensors that they read and write.

    Args:
        adapted: whose model and adapters are used; it has room for the documents of the size.
        size: of the padded step.
    """

    head: AdaptedHead
    """Distributions of all rows of the padded step."""
    _nats: Tensor
    _gradients: tuple[Tensor, ...]
    _rope: tuple[Tensor, Tensor]

    def __init__(self, adapted: Adapted, size: Size) -> None:
        self._adapted, self.size = adapted, size
        device = adapted._model.tok_emb.device
        shape = (size.documents, size.asked)
        self._ids = torch.zeros(size.documents, size.width, dtype=torch.int64, device=device)
        self._targets = torch.zeros(shape, dtype=torch.int64, device=device)
        self._upstream = torch.zeros(shape, device=device)
        # Padding is a segment before each window: if it has p tokens, starts are 0, p, W, W + p, ..., N W.
        count = torch.arange(2 * size.documents + 1, dtype=torch.int32, device=device)
        self._edges, self._padding = count // 2 * size.width, count % 2
        self._cu_seqlens = self._edges.clone()
        self._leaves = adapted._state.leaves(size.documents)
        self._losses_of: Tensor | None = None
        self.forward: Work = self._launch_forward
        self._losses: Work = self._launch_losses
        self._backward: Work = self._launch_backward

    def record(self, recorder: Recording) -> None:
        """Launch all three, capture them, and replay them, which sends the graphs to the device.

        Raises:
            RunError: replaying does not compute what launching does.
        """
        rng = torch.Generator().manual_seed(0)
        for ids in (self._ids, self._targets):
            ids.copy_(torch.randint(self._adapted._model.config.vocab_size, ids.shape, generator=rng))
        self._upstream.fill_(1 / self.size.asked)
        self._pad((self.size.width - self.size.asked) // 2)

        def outcome(run: Callable[[Work], None]) -> tuple[Tensor, dict[str, Tensor]]:
            for work in (self.forward, self._losses, self._backward):
                run(work)
            gradients = zip(self._leaves, self._gradients, strict=True)
            return self._nats.detach().clone(), {name: g.clone() for name, g in gradients}

        nats, gradients = outcome(recorder.launch)
        self.forward = recorder.record(self._launch_forward)
        self._losses = recorder.record(self._launch_losses)
        self._backward = recorder.record(self._launch_backward)
        found, others = outcome(lambda work: work())
        wrong = "loss" if (found - nats).norm() > LOSS_NOISE * nats.norm() else unlike(gradients, others)
        if wrong:
            raise RunError(f"the {wrong} differs when a step of {self.size} is replayed")
        # The graph of autograd is of no use any more, and would hold memory.
        self.head = self.head._replace(hidden=self.head.hidden.detach())
        self._nats = self._nats.detach()

    def take(self, ids: Tensor, count: int, width: int) -> None:
        """Copy windows `(N * W,)` of `count` documents to their places; they have `width` tokens each."""
        pad = self.size.width - width
        self._ids[:count, pad:].copy_(ids.view(count, width))
        self._pad(pad)

    def _pad(self, tokens: int) -> None:
        torch.add(self._edges, self._padding, alpha=tokens, out=self._cu_seqlens)

    def nats(self, targets: Tensor, count: int) -> Tensor:
        """Return a copy of the losses of targets `(N * C,)` of the first `count` documents."""
        self._rows(self._targets, targets, count).copy_(targets.view(count, -1))
        self._losses()
        self._losses_of = targets
        return self._rows(self._nats.detach().view(self._targets.shape), targets, count).flatten().clone()

    def gradients(self, targets: Tensor, upstream: Tensor, count: int) -> list[Tensor]:
        """Return the gradients of the adapters of the first `count` documents, until the next replay.

        Args:
            targets: whose losses are differentiated.
            upstream: `(N * C,)` gradients of these losses.
        """
        if self._losses_of is not targets:
            self.nats(targets, count)
        self._upstream.zero_()
        self._rows(self._upstream, targets, count).copy_(upstream.view(count, -1))
        self._backward()
        return [g[:count] for g in self._gradients]

    def _rows(self, padded: Tensor, targets: Tensor, count: int) -> Tensor:
        """Return the places of `targets` of the first `count` documents in a padded tensor."""
        return padded[:count, self.size.asked - targets.numel() // count :]

    @torch.enable_grad()
    def _launch_forward(self) -> None:
        adapted = self._adapted
        model, scale = adapted._model, adapted._config.alpha / adapted._config.rank
        adapters = bind(self._leaves, model.config, model.compute_dtype, scale=scale)
        hidden, table = self._states(adapters)
        self.head = AdaptedHead(hidden, table, model.config.softcap, adapted._caps, adapters)

    def _states(self, adapters: Adapters) -> tuple[Tensor, Tensor]:
        """Return what `GPT.hidden` does, for windows that have padding before them."""
        (_, width, asked), ids, cu = self.size, self._ids.flatten(), self._cu_seqlens
        chunk_gradient = self._adapted._chunk_gradient
        in_chunk = chunk_gradient is not None and asked < width
        model = chunk_gradient._first if chunk_gradient is not None and in_chunk else self._adapted._model
        self._rope = model.rope(ids.numel())  # kept, because the model replaces the tables by larger ones
        if chunk_gradient is not None and in_chunk:
            return chunk_gradient.hidden(ids, cu, max_seqlen=width, adapters=adapters, asked=asked)
        rows = Asked.last(asked, width, self._edges[::2], self._rope)
        table = model.tok_emb.to(model.compute_dtype)
        x0, values = model.embed(ids, table, cu), model.values(ids)
        ctx = Context(x0, self._rope, cu, values, rows)
        return model.layers(model.layer_weights(), ctx, True, None, adapters), table

    @torch.enable_grad()
    def _launch_losses(self) -> None:
        self._nats = self.head.nats(self._targets.flatten())

    def _launch_backward(self) -> None:
        leaves = list(self._leaves.values())
        self._gradients = torch.autograd.grad(self._nats, leaves, self._upstream.flatten())


class _Losses(torch.autograd.Function):
    """The losses as a function of the adapters."""

    @staticmethod
    def forward(ctx: Any, head: ReplayedHead, targets: Tensor, *_leaves: Tensor) -> Tensor:
        ctx.head, ctx.targets = head, targets
        return head.replay(targets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.head.differentiate(ctx.targets, grad)


class ReplayedHead:
    """Distributions whose states are in the tensors of `Graphs`, until its predictor is asked again."""

    def __init__(self, predictor: Replayed, graphs: Graphs, count: int, asked: int) -> None:
        self._predictor, self._graphs, self._count, self._asked = predictor, graphs, count, asked
        self._turn = predictor.turn

    def nats(self, targets: Tensor) -> Tensor:
        """Return the losses of targets, see `Distributions`."""
        if not torch.is_grad_enabled():
            return self.replay(targets)
        losses: Tensor = _Losses.apply(self, targets, *self._predictor.leaves())  # type: ignore[no-untyped-call]
        return losses

    @torch.no_grad()
    def log_probabilities(self, rows: Tensor) -> Tensor:
        """Return the logarithms of all probabilities, see `Distributions`."""
        self._check()
        each = self._graphs.size.asked
        return self._graphs.head.log_probabilities(
            rows // self._asked * each + each - self._asked + rows % self._asked
        )

    def replay(self, targets: Tensor) -> Tensor:
        """Return the losses without a graph of autograd."""
        self._check()
        return self._graphs.nats(targets, self._count)

    def differentiate(self, targets: Tensor, upstream: Tensor) -> list[Tensor]:
        """Return the gradients of the adapters, see `Graphs.gradients`."""
        self._check()
        return self._graphs.gradients(targets, upstream, self._count)

    def _check(self) -> None:
        if self._turn != self._predictor.turn:
            raise RuntimeError("the predictor was asked again, which replaced these distributions")


class Replayed:
    """A predictor that replays the steps of `Adapted` whose sizes are captured, and launches the others.

    Args:
        adapted: the predictor.
        plan: from `plan_sizes`.
        recorder: captures, and has its own memory: several predictors take turns within a step.
    """

    def __init__(self, adapted: Adapted, plan: dict[Size, Size], recorder: Recording) -> None:
        self._adapted, self._plan, self.turn = adapted, plan, 0
        # B is 0 at first, and then A has no gradient that could be checked.
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, t in adapted._state.leaves(max(size.documents for size in plan.values())).items():
                if name.endswith("_b"):
                    t.copy_(0.02 * torch.randn(t.shape[1:], generator=rng))
        self._graphs: dict[Size, Graphs] = {}
        # The largest first: what it takes from the memory pool is enough for the others.
        for size in sorted(set(plan.values()), key=lambda size: -size.cost):
            self._graphs[size] = Graphs(adapted, size)
            self._graphs[size].record(recorder)
        adapted._state.reset(warm=False)

    def begin(self) -> None:
        """Start other documents."""
        self._adapted.begin()

    def predict(self, inputs: Inputs) -> Distributions:
        """Return the distributions in the last tokens of each document's window."""
        count = inputs.ids.numel() // inputs.width
        size = self._plan.get(Size(count, inputs.width, inputs.asked))
        self.turn += 1
        if size is None or inputs.lane:
            return self._adapted.predict(inputs)
        graphs = self._graphs[size]
        graphs.take(inputs.ids, count, inputs.width)
        graphs.forward()
        self._adapted._leaves = self._adapted._state.leaves(count)
        return ReplayedHead(self, graphs, count, inputs.asked)

    def leaves(self) -> list[Tensor]:
        """Return the adapters of the documents that are read."""
        return list(self._adapted._leaves.values())

    def learn(self, lesson: Lesson) -> None:
        """Let the adapters learn."""
        self._adapted.learn(lesson)

    def state(self) -> list[Tensor]:
        """Return what changes."""
        return self._adapted.state()


def capture(run: Pass, start: Callable[[torch.device], Recording] | None = None) -> tuple[Pass, str]:
    """Return a pass of test-time training whose steps are replayed where that saves time.

    Args:
        run: from `adapted_pass` or `phased_pass`, of which nothing was read yet. If nothing can be captured,
            it is as it was.
        start: makes what captures; None: `Recorder`, if nothing forbids that.

    Returns:
        The pass, and a sentence that says what was captured, or why nothing was.
    """
    asked = run.predictor
    members = asked._members if isinstance(asked, Ensemble) else [asked]
    adapted = [member for member in members if isinstance(member, Adapted)]
    why = obstacle(adapted, any_device=start is not None)
    if not why:
        uses = step_sizes(run.turns)
        plan = plan_sizes(uses, exact=adapted[0]._chunk_gradient is not None)
        why = "" if plan else "no size is read often enough"
    if not why:
        try:
            return _captured(run, adapted, plan, uses, start or Recorder)
        except Exception as e:  # whatever the reason is, launched steps compute the same
            why = describe(first_error(e))
            for member in adapted:
                member._state.reset(warm=False)
    return run, f"steps of test-time training are launched kernel by kernel: {why}"


def _captured(
    run: Pass,
    adapted: list[Adapted],
    plan: dict[Size, Size],
    uses: dict[Size, float],
    start: Callable[[torch.device], Recording],
) -> tuple[Pass, str]:
    device = adapted[0]._model.tok_emb.device
    recorders = [start(device) for _ in adapted]
    before = recorders[0].held()
    replayed = [Replayed(*each) for each in zip(adapted, [plan] * len(adapted), recorders, strict=True)]
    held = recorders[0].held() - before
    predictor: Predictor = replayed[0] if len(replayed) == 1 else Ensemble(replayed)
    steps, padding = shares(plan, uses)
    return run._replace(predictor=predictor), (
        f"{steps:.0%} of the steps of test-time training are replayed as CUDA graphs of "
        f"{len(set(plan.values()))} sizes, with {padding:.1%} more work; they hold {held / 2**20:,.0f} MiB"
    )


def shares(plan: dict[Size, Size], uses: dict[Size, float]) -> tuple[float, float]:
    """Return the part of the steps that is replayed, and what padding adds to the cost of all steps."""
    more = sum(often * (plan[size].cost - size.cost) for size, often in uses.items() if size in plan)
    steps = sum(often for size, often in uses.items() if size in plan)
    return steps / sum(uses.values()), more / sum(often * size.cost for size, often in uses.items())


def obstacle(adapted: Sequence[Adapted], *, any_device: bool = False) -> str:
    """Return why the steps of these predictors cannot be captured; "" if nothing is known that forbids it.

    Args:
        adapted: of a pass.
        any_device: do not ask for a CUDA device and its attention.
    """
    if not adapted:
        return "the pass has no adapters"
    model = adapted[0]._model
    if model.config.smear_gate and model.config.smear_over_bos:
        return "with model.smear_over_bos, a window depends on what is before it"
    return "" if any_device else graphs.obstacle(model.tok_emb.device, model.attention_name)
