"""The published script of PR #1855 beside pgolf: micro-steps and whole steps, in one process on one GPU.

    python -m bench.script_step records/2026-04-27_.../train_gpt.py

The script is that of github.com/openai/parameter-golf with its log next to it; it is executed, so read it
first. Its model is built with the settings of the log, in the dtypes of its training, with its Triton
kernels, and compiled as it compiles it, as one graph of the whole model. It attends with flash-attn-4, under
the name of FlashAttention 3. pgolf's model is the preset `pr1855` as it trains by default. Both have the same
weights, tokens and documents, those of `bench.step`. Before anything is timed, losses and gradients are
compared: if the two do not compute the same function, the script is not timed.

The only change to the script is that the frequencies of its RoPE stay in float32. It rounds them to bfloat16,
so its tables differ from pgolf's; they are made once, and so this changes no time.

Timed are, for each loop mode, after the clock has settled, and in turns:

- micro-steps, forward and backward, which add to the gradients of two: ms_fwd_bwd, joules of the card, SM
  clock, and peak memory without what the other contender holds; then where their time goes, by family of
  kernels (what is next to attention is in "heads" for pgolf, in "norms_and_mixes" for the script);
- whole steps of two micro-steps: ms_step, joules_step, and in them ms_tail: clip, Muon, AdamW, zeroing, and
  the average, which the script updates in one process without torch.distributed. The host is ahead of the
  device, as in training. Loading and logging are not timed.

Run it first with --compile-only, while the device may do other work: the graphs of the script take minutes.
Compiled code is kept in TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR, so set both to folders that last. Both
runs must have the same --tokens, and only one process may compile: where times decide about a graph, the
first decides for all, and graphs that differ are compiled again. Which of several forms of a kernel was the
fastest is kept, too; the timing run, on an idle device, should choose again:

    find $TORCHINDUCTOR_CACHE_DIR -name '*.best_config' -delete

The exit status is 0 if both were timed, 3 if pgolf was and the script failed (its traceback is printed), 2 if
something is missing that the bench needs, and 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bench.common import RESULTS, Recorder, Sample, versions
from bench.power import find_driver
from bench.published import FEW, error, map_parameters
from bench.published_script import Script, flash_attention_4, load_script
from bench.step import (
    Mark,
    Timed,
    Work,
    ledger,
    make_model,
    make_work,
    record,
    run_for,
    time_passes,
    wait_for,
)
from pgolf.config import Config
from pgolf.data.loader import Batch
from pgolf.dist import Dist
from pgolf.errors import UserError
from pgolf.model.attention import fa4_problem
from pgolf.model.gpt import GPT
from pgolf.optim.ema import Ema
from pgolf.optim.step import Optimizer
from pgolf.peers import installed_version
from pgolf.presets import pr1855
from pgolf.train.captured import Form, MicroSteps

SCRIPT = "script of #1855"
MICRO_STEPS = 2
"""Micro-steps of a step: 196,608 tokens, as in the runs of both in `20261128_baseline_600s_1h200_196k`."""
FRACTION, DECAY = 0.95, 0.9965
"""Of the clock, at which the optimizers are, with the lowest learning rate, because the batch is always the
same; decay of the average, the script's."""
LOSS_LIMIT, GRADIENT_LIMIT = 500.0, 2e5
"""Largest differences in ppm, of the loss and of the norm of one gradient, that bfloat16 explains. On the CPU
it moves each side by up to 120 and 75,000 (`20261129_amd-epyc-x1_published-pr1855.jsonl`), and without the
ends of documents in attention most gradients are 400,000 apart, though losses are only 14."""
LEAD = 0.5
"""Seconds of passes before those that are timed, after the other contender has run."""


class Outcome(NamedTuple):
    """The loss of one micro-step, nats per token, and its gradients, under our names and in our shapes."""

    loss: float
    grads: dict[str, Tensor]


class Contender(Protocol):
    """A model whose steps are timed."""

    def settings(self) -> AbstractContextManager[object]:
        """Return a context with the settings of its process."""

    def micro(self, loop: bool) -> None:
        """Queue one forward and backward pass, which adds to the gradients."""

    def clear(self) -> None:
        """Forget the gradients."""

    def outcome(self) -> Outcome:
        """Return what the micro-steps since `clear` made, of which there was one."""

    def make_tail(self) -> None:
        """Allocate what `tail` needs."""

    def tail(self) -> None:
        """Queue the rest of a step, after `MICRO_STEPS` micro-steps."""


class Ours:
    """pgolf as it trains by default."""

    def __init__(self, model: GPT, config: Config, work: Work, device: torch.device) -> None:
        """Take a model that is prepared."""
        self._model, self._config, self._device = model, config, device
        self._batch = Batch(work.ids, work.targets, work.cu, config.model.max_context, 0.0)
        self._micro = MicroSteps(model, device, passes=MICRO_STEPS)
        self._optimizer: Optimizer | None = None
        for p in model.parameters():
            p.grad = torch.zeros_like(p)  # as in training, so that all passes add to them

    def settings(self) -> AbstractContextManager[object]:
        """Return a context that changes nothing."""
        return nullcontext()

    def micro(self, loop: bool) -> None:
        """Queue one forward and backward pass."""
        self._micro.forward(self._batch, Form(loop))
        self._micro.backward()

    def clear(self) -> None:
        """Zero gradients and loss in place."""
        self._micro.begin()
        for p in self._model.parameters():
            if p.grad is not None:
                p.grad.zero_()

    def outcome(self) -> Outcome:
        """Return loss and gradients of the micro-step since `clear`."""
        grads = {n: p.grad for n, p in self._model.named_parameters() if p.grad is not None}
        return Outcome(MICRO_STEPS * float(self._micro.total), grads)

    def make_tail(self) -> None:
        """Make optimizer and average."""
        ema = Ema(dict(self._model.named_parameters()))
        self._optimizer = Optimizer(self._model, self._config.optim, Dist.start(self._device.type), ema=ema)

    def tail(self) -> None:
        """Queue clip, update, average and zeroing, which training replays as a CUDA graph."""
        assert self._optimizer is not None
        self._optimizer.step(FRACTION, ema_decay=DECAY)
        self._micro.begin()


class Theirs:
    """A published script as it trains, but on the CPU without its kernels."""

    def __init__(
        self,
        script: Script,
        config: Config,
        ours: GPT,
        work: Work,
        device: torch.device,
        *,
        trained: bool | None = None,
    ) -> None:
        """Build it with the weights of `ours`.

        Args:
            trained: in the dtypes of its training and compiled; None: on a GPU. Otherwise in float32.
        """
        self._script, self._device = script, device
        # Tensors of its own: pgolf marks the length of its cu_seqlens as one that may change.
        ids, targets, cu = (t.clone() for t in (work.ids, work.targets, work.cu))
        self._inputs = {"input_ids": ids[None], "target_ids": targets[None], "cu_seqlens": cu}
        gpu = device.type == "cuda"
        self._trained = gpu if trained is None else trained
        model = script.model()
        rotary = [m for m in model.modules() if hasattr(m, "inv_freq")]
        exact = [m.inv_freq.clone() for m in rotary]
        self._model = script.as_trained(model.to(device)) if self._trained else model.to(device)
        for m, frequencies in zip(rotary, exact, strict=True):
            m.inv_freq = frequencies.to(device)
        named = dict(self._model.named_parameters())
        self._map = map_parameters(config, named)
        for name, p in ours.named_parameters():
            self._map[name].scatter(p.detach(), named)
        self._model.train(gpu)
        if hasattr(self._model, "fused_ce_enabled"):
            self._model.fused_ce_enabled = gpu
        for m in self._model.modules():
            if hasattr(m, "_cos_cached"):  # as its warm-up does, for the tokens of a step
                m(MICRO_STEPS * work.ids.numel(), device, torch.bfloat16)
        # As it does, so that there is one graph for each loop mode and each length of cu_seqlens.
        self._run: Callable[..., Tensor] = (
            torch.compile(self._model, dynamic=False, fullgraph=True) if self._trained else self._model
        )
        self._total, self._passes = torch.zeros((), device=device), 0
        self._step: Callable[[], None] | None = None
        self._averages: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Set for a while what the script sets for its process; torch compiles again if the first changes."""
        if not self._trained:
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            with torch._dynamo.config.patch(optimize_ddp=False, recompile_limit=64):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def micro(self, loop: bool) -> None:
        """Queue one forward and backward pass; the first of a step has no gradients to add to."""
        if hasattr(self._model, "looping_active"):
            self._model.looping_active = loop
        if self._passes % MICRO_STEPS == 0:
            self._model.zero_grad(set_to_none=True)
        self._passes += 1
        longest = int(self._script.settings.train_seq_len)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._trained):
            loss = self._run(**self._inputs, max_seqlen=longest)
        self._total += loss.detach()
        (loss / MICRO_STEPS).backward()

    def clear(self) -> None:
        """Forget gradients and loss."""
        self._passes = 0
        self._total.zero_()
        self._model.zero_grad(set_to_none=True)

    def outcome(self) -> Outcome:
        """Return loss and gradients of the micro-step since `clear`."""
        named = dict(self._model.named_parameters())
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}
        return Outcome(float(self._total), {name: m.gather(grads) for name, m in self._map.items()})

    def make_tail(self) -> None:
        """Make its optimizers and the averages of all that its state has."""
        self._step = self._script.optimizer_step(self._model, FRACTION)
        live = self._model.state_dict(keep_vars=True).values()
        self._averages = [(t.detach().float().clone(), t) for t in live]

    def tail(self) -> None:
        """Queue clip, update, zeroing, and the average, which takes two kernels for each tensor."""
        assert self._step is not None
        self._step()
        with torch.no_grad():
            for average, live in self._averages:
                average.mul_(DECAY).add_(live.detach(), alpha=1 - DECAY)
        self._total.zero_()


def compare(ours: Outcome, theirs: Outcome, case: str) -> str:
    """Print how far two outcomes are apart; return what bfloat16 does not explain, empty if it explains all.

    Gradients of fewer than `FEW` numbers are not judged: the error of one sum is one draw, large or small.
    """
    loss = 1e6 * abs(ours.loss / theirs.loss - 1)
    apart = {name: error(ours.grads[name], grad) for name, grad in theirs.grads.items()}
    judged = {name: ppm for name, ppm in apart.items() if theirs.grads[name].numel() >= FEW}
    worst = max(judged, key=lambda name: judged[name])
    print(
        f"{case}: loss of pgolf {ours.loss:.6f}, of the script {theirs.loss:.6f}, {loss:.1f} ppm apart; "
        f"gradients {min(judged.values()):,.0f} to {judged[worst]:,.0f} ppm of their norms apart ({worst})",
        flush=True,
    )
    problems = [f"the losses are {loss:.1f} ppm apart, expected at most {LOSS_LIMIT:.0f}"]
    problems = problems if not loss <= LOSS_LIMIT else []
    problems += [
        f"the gradients of {name} are {ppm:,.0f} ppm apart, expected at most {GRADIENT_LIMIT:,.0f}"
        for name, ppm in judged.items()
        if not ppm <= GRADIENT_LIMIT
    ]
    return "; ".join(problems)


class NotTheSame(Exception):
    """The script and pgolf do not compute the same function."""


class Bench:
    """Both contenders; what goes wrong with the script leaves pgolf alone."""

    def __init__(
        self, recorder: Recorder, tokens: int, *, settle: float, seconds: float, turns: int, top: int
    ) -> None:
        """Begin without contenders.

        Args:
            tokens: of a micro-step.
            settle: seconds of passes before the first ones that are timed.
            seconds: of timed passes for each contender, in `turns` turns.
            top: how many of the slowest kernels `profile` prints.
        """
        self._recorder, self._device, self._tokens = recorder, recorder.device, tokens
        self._settle, self._seconds, self._turns, self._top = settle, seconds, turns, top
        self._contenders: dict[str, Contender] = {}
        self._held: dict[str, int] = {}
        self._warm_up: dict[tuple[str, bool], float] = {}
        self.failed = False

    def add(self, name: str, make: Callable[[], Contender]) -> None:
        """Make a contender, which may fail if it is the script."""
        with self._guarded(name):
            before = allocated(self._device)
            self._contenders[name] = make()
            self._held[name] = allocated(self._device) - before

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Print what goes wrong with the script, and go on without it.

        Raises:
            RuntimeError: it has left the GPU unusable for this process.
        """
        try:
            yield
        except Exception as e:
            if name != SCRIPT or isinstance(e, UserError):
                raise
            traceback.print_exc()
            print(f"{SCRIPT}: not measured, see above", file=sys.stderr, flush=True)
            self._contenders.pop(SCRIPT, None)
            self.failed = True
            wait_for(self._device)

    def _each(self, calls: Callable[[Contender], Any]) -> dict[str, Any]:
        """Call a function with every contender, in its settings; return the results by name."""
        found = {}
        for name in sorted(self._contenders):
            with self._guarded(name), self._contenders[name].settings():
                found[name] = calls(self._contenders[name])
        return found

    def warm(self, loop: bool) -> None:
        """Compile for one loop mode, compare the contenders, and remember what each holds."""
        case = case_of(loop)

        def first(contender: Contender) -> tuple[float, Outcome]:
            began = time.perf_counter()
            contender.clear()
            contender.micro(loop)
            wait_for(self._device)
            return time.perf_counter() - began, contender.outcome()

        found = self._each(first)
        for name, (seconds, _) in found.items():
            self._warm_up[name, loop] = seconds
            print(f"{case}, {name}: the first micro-step took {seconds:.1f} s", flush=True)
        with self._guarded(SCRIPT):
            if SCRIPT in found:
                wrong = compare(found["pgolf"][1], found[SCRIPT][1], case)
                if wrong:
                    raise NotTheSame(wrong)
        self._each(lambda contender: contender.clear())

    def time_micro(self, loop: bool) -> None:
        """Time micro-steps in turns, and record them."""
        case = case_of(loop)
        found = self._alternate(lambda contender: lambda: contender.micro(loop))
        for name, timed in found.items():
            others = sum(held for other, held in self._held.items() if other != name)
            timed = replace(
                timed, peak_mib=timed.peak_mib - others / 2**20, warm_up=self._warm_up[name, loop]
            )
            record(self._recorder, case, name, timed, self._tokens)
        self._ratio(case, "a micro-step", found)

    def time_steps(self, loop: bool) -> None:
        """Time whole steps in turns, and record them and their tails."""
        tails: dict[int, list[tuple[Mark, Mark]]] = {}

        def of(contender: Contender) -> Callable[[], None]:
            marks = tails[id(contender)] = []

            def step() -> None:
                for _ in range(MICRO_STEPS):
                    contender.micro(loop)
                begun = Mark(self._device)
                contender.tail()
                marks.append((begun, Mark(self._device)))

            return step

        found, case = self._alternate(of), case_of(loop)
        for name, timed in found.items():
            ms = [a.ms_to(b) for a, b in tails[id(self._contenders[name])]]
            self._recorder.add(case, name, "ms_step", Sample.of(timed.ms), "ms")
            self._recorder.add(case, name, "ms_tail", Sample.of(ms), "ms")
            if timed.joules is not None:
                self._recorder.add(case, name, "joules_step", Sample(timed.joules, 0.0, len(timed.ms)), "J")
        self._ratio(case, "a whole step", found)

    def _alternate(self, of: Callable[[Contender], Callable[[], None]]) -> dict[str, Timed]:
        """Time what a function makes of each contender, in turns, which all begin with `LEAD`."""
        steps = {name: of(contender) for name, contender in self._contenders.items()}
        turns: dict[str, list[Timed]] = {name: [] for name in steps}
        each, settle = self._seconds / self._turns, self._settle
        for turn in range(self._turns):
            # There and back again, so that a drift of the clock is the same for both.
            for name in sorted(steps, reverse=turn % 2 == 1):
                if name not in self._contenders:
                    continue
                with self._guarded(name), self._contenders[name].settings():
                    run_for(steps[name], settle + min(LEAD, each), self._device)
                    turns[name].append(time_passes(steps[name], self._device, each))
                    self._contenders[name].clear()
                    settle = 0.0
        return {name: merged(turns[name]) for name in self._contenders}

    def _ratio(self, case: str, what: str, found: dict[str, Timed]) -> None:
        if SCRIPT not in found:
            return
        ours, theirs = found["pgolf"], found[SCRIPT]
        ms = Sample.of(theirs.ms).value / Sample.of(ours.ms).value
        words = f"{case}: {what} of the script takes {ms:.3f} times as long as pgolf's"
        if ours.joules and theirs.joules:
            words += f" and {theirs.joules / ours.joules:.3f} times the energy"
        print(f"{words}; above 1, pgolf is better", flush=True)

    def profile(self, loop: bool) -> None:
        """Record where the time of a micro-step goes."""
        for name, contender in list(self._contenders.items()):
            with self._guarded(name), contender.settings():
                ledger(self._recorder, case_of(loop), name, lambda c=contender: c.micro(loop), top=self._top)
                contender.clear()

    def warm_tails(self, loop: bool) -> None:
        """Make the optimizers, and run three steps with each, which compile and capture."""

        def first(contender: Contender) -> float:
            began = time.perf_counter()
            contender.make_tail()
            for _ in range(3):
                for _ in range(MICRO_STEPS):
                    contender.micro(loop)
                contender.tail()
            wait_for(self._device)
            return time.perf_counter() - began

        for name, seconds in self._each(first).items():
            print(f"{name}: three steps and their tails took {seconds:.1f} s", flush=True)


def merged(turns: list[Timed]) -> Timed:
    """Return several turns as one."""
    ms = [one for timed in turns for one in timed.ms]
    joules = [timed.joules * len(timed.ms) for timed in turns if timed.joules is not None]
    clocks = [timed.sm_mhz for timed in turns if timed.sm_mhz is not None]
    return Timed(
        ms,
        sum(joules) / len(ms) if len(joules) == len(turns) else None,
        mean(clocks) if clocks else None,
        max(timed.peak_mib for timed in turns),
    )


def case_of(loop: bool) -> str:
    """Return the name of a loop mode in the result lines."""
    return f"record_real_{'on' if loop else 'off'}"


def allocated(device: torch.device) -> int:
    """Return the bytes that torch has given out on the GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def load(path: Path, log: Path | None, config: Config, device: torch.device) -> Script:
    """Return the script, on a GPU with flash-attn-4.

    Raises:
        UserError: the script, its log or flash-attn-4 is missing or is not what was expected.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file; expected train_gpt.py of PR #1855 with its log, which a clone "
            "of github.com/openai/parameter-golf has in records/track_10min_16mb/2026-04-27_SP8192_LQER_*"
        )
    if device.type != "cuda":
        return load_script(path, log)
    c = config.model
    attention = flash_attention_4()
    problem = fa4_problem(device, c.heads, c.kv_heads, c.head_dim)
    if problem:
        raise UserError(f"the script attends with flash-attn-4, which cannot be used here: {problem}")
    return load_script(path, log, attention=attention)


def main() -> int:
    """Parse arguments, compile, compare, time both in turns, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", type=Path, help="the train_gpt.py of PR #1855; it is executed")
    parser.add_argument("--log", type=Path, help="of a run of the script; default: train*.log next to it")
    parser.add_argument("--compile-only", action="store_true", help="compile, compare, and time nothing")
    parser.add_argument(
        "--loop",
        nargs="+",
        default=["off", "on"],
        choices=("off", "on"),
        help="loop modes to compile or time",
    )
    parser.add_argument(
        "--settle", type=float, default=3.0, help="seconds of passes before the first timed ones"
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="seconds of timed passes of each contender"
    )
    parser.add_argument("--turns", type=int, default=2, help="turns into which these seconds are divided")
    parser.add_argument("--tokens", type=int, default=98_304, help="tokens per micro-step")
    parser.add_argument("--top", type=int, default=0, help="print this many of the slowest kernels")
    parser.add_argument("--no-tail", action="store_true", help="leave whole steps out")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    where = "where to measure; on the CPU the script has none of its kernels, and times say nothing"
    parser.add_argument("--device", default=found, choices=("cpu", "cuda"), help=where)
    parser.add_argument("--name", default="", help="added to the name of the result file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args()
    if args.turns < 1 or args.seconds <= 0 or args.tokens < 1:
        parser.error("--turns, --seconds and --tokens must be positive")
    try:
        return measure(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def measure(args: argparse.Namespace) -> int:
    """Compile, compare and time, and write the results; return the exit status."""
    began, device, config = time.perf_counter(), torch.device(args.device), pr1855()
    gpu, loops = device.type == "cuda", [loop == "on" for loop in dict.fromkeys(args.loop)]
    script = load(args.script, args.log, config, device)
    if gpu and (problem := find_driver(device).problem):
        print(f"no joules and clocks: nvidia-ml-py is {problem}")
    recorder = Recorder("step", device, args.out, file=f"step-script{args.name and '-' + args.name}")
    bench = Bench(
        recorder, args.tokens, settle=args.settle, seconds=args.seconds, turns=args.turns, top=args.top
    )
    work = make_work(args.tokens, config.model.vocab_size, device)
    model = make_model(config.model).prepare(device, compile="blocks" if gpu else "off")
    bench.add("pgolf", lambda: Ours(model, config, work, device))
    bench.add(SCRIPT, lambda: Theirs(script, config, model, work, device))
    found = versions() | {"flash-attn-4": installed_version("flash-attn-4") or "not installed"}
    print(", ".join(f"{name} {version}" for name, version in found.items()))
    print(f"loaded in {time.perf_counter() - began:.1f} s", flush=True)
    for loop in loops:
        bench.warm(loop)
    if not args.compile_only:
        for loop in loops:
            bench.time_micro(loop)
            if gpu:
                bench.profile(loop)
    if not args.no_tail:
        bench.warm_tails(loops[0])
        if not args.compile_only:
            for loop in loops:
                bench.time_steps(loop)
    if not args.compile_only:
        recorder.write()
    print(f"done in {time.perf_counter() - began:.1f} s", flush=True)
    return 3 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
