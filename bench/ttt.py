"""Speed, score and memory of the costly ways to score, with eager and with compiled blocks side by side.

`python -m bench.ttt MODEL.pgolf --data SHARDS` scores the whole validation text, or its first `--documents`,
with adapters, with the published phased recipe (PR #1855) and with a sliding window of stride 64. The case
`sliding64_stream` is that window as the scripts of the challenge had it, on one rank: over the whole text as
if it were one document, so that every 64 tokens have a window of full length, most of them with tokens of
other documents before them. Its bits per byte are not comparable. Every case is measured in the `--forms`,
by default eager, then compiled. `seconds` is the wall time of the whole score, so it has the time of
compiling in it. With `--again` the compiled form runs a second time in the same process, which gives
`seconds_again`, without compiling. `tokens_per_s` is scored tokens per second and GPU; `peak_mib` is the
largest GPU memory that torch held. Both forms must give the same bits per byte up to rounding; the difference
is printed. Within a case, what comes after the first compiled form finds its graphs compiled. On a CPU only
the eager form is measured. Under torchrun all ranks score together, and rank 0 writes.

With `--profile FIRST COUNT` nothing is scored to its end. Of the cases with adapters, COUNT steps from step
FIRST on are profiled, and as many after them once more, with what the host does: milliseconds of a step by
family of kernels (`ms_...`, also `ms_idle`) and by the operator that launched them (`ms_of_...`). The longest
documents come first, so that a late step of the first batch has windows of full length.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import RESULTS, Recorder, Sample
from bench.step import Kernel, families
from pgolf.artifact.read import Artifact, build_model, read_artifact
from pgolf.config import EvaluateConfig, PhasesConfig, TttConfig
from pgolf.data.loader import ValidationText
from pgolf.dist import Dist
from pgolf.errors import UserError
from pgolf.evaluate.bpb import Score
from pgolf.evaluate.phases import phased_pass
from pgolf.evaluate.predictor import Distributions, Inputs, Lesson, Pass, Predictor, evaluating, read
from pgolf.evaluate.sliding import Fixed, sliding_windows, window_pass, window_questions
from pgolf.evaluate.ttt import adapted_pass
from pgolf.evaluate.validation import DataFolder, widened
from pgolf.model.gpt import GPT

STREAM = "sliding64_stream"
CASES = ("plain", "record_adapters", "record_phased", "sliding64", STREAM)
"""`plain` is what the others are compared with."""
ADAPTED = CASES[1:3]
"""Those whose steps can be profiled."""
NAMES = {"eager": "pgolf eager", "compiled": "pgolf"}
"""What result files call the forms."""


@dataclass(frozen=True)
class Bench:
    """What all cases share."""

    artifact: Artifact
    text: ValidationText
    dist: Dist
    bos_id: int
    tokens: int
    """Tokens per forward pass of windows."""
    settings: EvaluateConfig
    shared: bool = False
    """Whether other programs ran on the same GPU."""
    context: int = 0
    """Tokens of the longest window; 0 = the model's."""

    def longest(self, model: GPT) -> int:
        """Return the tokens of the longest window."""
        return self.context or model.config.max_context

    def model(self, *, compiled: bool) -> GPT:
        """Return the model, prepared."""
        model = build_model(self.artifact, self.dist.device)
        return model.prepare(self.dist.device, compile="blocks" if compiled else "off")

    def start(self, case: str, model: GPT, *, compiled: bool) -> Pass:
        """Return the pass of a case."""
        context = self.longest(model)
        where: dict[str, Any] = {"bos_id": self.bos_id, "context": context}
        if case == "record_adapters":
            config = self.settings.adapters
            return adapted_pass(model, self.text, self.dist, config=config, compiled=compiled, **where)
        if case == "record_phased":
            phases = self.settings.phases
            return phased_pass(model, self.text, self.dist, phases=phases, compiled=compiled, **where)
        where |= {"stride": context if case == "plain" else 64, "batch_tokens": self.tokens}
        return window_pass(model, self.text, self.dist, **where)

    def stream(self, model: GPT) -> Score:
        """Return the score of windows over the whole text, see the top of the file."""
        if self.dist.world_size > 1:
            raise UserError(f"{STREAM} is measured on one rank; start the bench without torchrun")
        context, began = self.longest(model), time.perf_counter()
        ends = np.array([self.text.tokens.size - 1])
        windows = sliding_windows(np.array([0]), ends, context=context, stride=64)
        sizes: dict[str, Any] = {"context": context, "batch_tokens": max(self.tokens, context)}
        total, predictor = torch.zeros((), dtype=torch.float64, device=self.dist.device), Fixed(model)
        for question in window_questions(windows, **sizes, device=self.dist.device):
            inputs, targets = question.tensors(self.text, self.dist.device)
            with torch.no_grad():
                total += predictor.predict(inputs).nats(targets).sum(dtype=torch.float64)
        nats, tokens, size = float(total), int(ends[0]), int(self.text.bytes[1:].sum())
        seconds = time.perf_counter() - began
        return Score(nats, tokens, size, nats / math.log(2) / size, nats / tokens, seconds)

    def score(self, case: str, model: GPT, form: str) -> tuple[Score, float, float]:
        """Return the score, the seconds with all preparation, and MiB of GPU memory (0 on a CPU)."""
        device = self.dist.device
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        with evaluating(model), widened(model, self.context):
            if case == STREAM:
                found = self.stream(model)
            else:
                run = self.start(case, model, compiled=form != "eager")
                found = read(run, self.text, self.dist, bos_id=self.bos_id)
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated(device) / 2**20 if cuda else 0.0
        return found, seconds, peak


FAMILIES = (
    ("adam", r"[Aa]dam"),
    ("copies", r"Memcpy|Memset|copy|CatArray|[Ff]ill"),
    ("elementwise", r"elementwise|vectorized|reduce"),
)
"""Families of kernels that `bench.step` has no name for."""


class Enough(Exception):
    """All steps that were to be profiled are."""


class Profiled:
    """A predictor of which some steps are profiled, first what runs on the device, then the host as well.

    It raises `Enough` after them.

    Args:
        predictor: whose steps are profiled.
        first: the step, from 0, with which that begins.
        count: steps of each of the two profiles.
    """

    def __init__(self, predictor: Predictor, first: int, count: int, device: torch.device) -> None:
        self._predictor, self._device = predictor, device
        self._edges = first, first + count, first + 2 * count
        self._step = 0
        self._open: Any = None
        self.events: list[list[Any]] = []
        """Of both profiles."""
        self.windows: list[tuple[int, int]] = []
        """(tokens of all windows, tokens of each) of every question in the profiles."""
        self.begin, self.state = predictor.begin, predictor.state

    def predict(self, inputs: Inputs) -> Distributions:
        """Return the distributions of the predictor."""
        if self._open is None and self._step == self._edges[0]:
            self._turn()
        if self._open is not None:
            self.windows.append((inputs.ids.numel(), inputs.width))
        return self._predictor.predict(inputs)

    def learn(self, lesson: Lesson) -> None:
        """Let the predictor learn, which ends a step."""
        self._predictor.learn(lesson)
        self._step += 1
        if self._step in self._edges[1:]:
            self._turn()

    def _turn(self) -> None:
        """End the profile that is under way, and begin the next one."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._open is not None:
            self._open.stop()
            self.events.append(self._open.events())
        if len(self.events) == 2:
            raise Enough
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            device = torch.profiler.ProfilerActivity.CUDA
            activities = [*activities, device] if self.events else [device]
        self._open = torch.profiler.profile(activities=activities)
        self._open.start()


def by_family(kernels: list[Kernel]) -> dict[str, float]:
    """Return milliseconds by family of kernels."""
    found = {name: ms for name, (ms, _) in families(kernels).items() if name != "other"}
    others: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        if "other" in families([kernel]):
            name = next((name for name, names in FAMILIES if re.search(names, kernel.name)), "other")
            others[name] += (kernel.end - kernel.start) / 1000
    return found | others


def by_operator(events: list[Any], device: torch.device) -> dict[str, float]:
    """Return milliseconds of kernels by the operator that launched them; without a GPU, of operators."""
    found: dict[str, float] = defaultdict(float)
    for event in events:
        if device.type != "cuda":
            found[event.name] += event.self_cpu_time_total / 1000
        for kernel in event.kernels:
            found[event.name] += kernel.duration / 1000
    return found


def profile(
    bench: Bench, case: str, form: str, recorder: Recorder, name: str, steps: tuple[int, int]
) -> None:
    """Profile some steps of a case with adapters; record them, the most costly first."""
    from torch.autograd import DeviceType

    first, count = steps
    model = bench.model(compiled=form != "eager")
    with evaluating(model), widened(model, bench.context):
        run = bench.start(case, model, compiled=form != "eager")
        profiled = Profiled(run.predictor, first, count, bench.dist.device)
        try:
            read(run._replace(predictor=profiled), bench.text, bench.dist, bos_id=bench.bos_id)
        except Enough:
            pass
        else:
            raise UserError(f"the text has fewer than {first + 2 * count} steps; lower --profile")
    kernels = [
        Kernel(e.name, e.time_range.start, e.time_range.end)
        for e in profiled.events[0]
        if e.device_type == DeviceType.CUDA and e.time_range.end > e.time_range.start
    ]
    tables = by_family(kernels), by_operator(profiled.events[1], bench.dist.device)
    if bench.dist.is_main:
        tokens, widths = zip(*profiled.windows, strict=True)
        print(f"windows of {min(widths):,} to {max(widths):,} tokens", flush=True)
        window_tokens = Sample(sum(tokens) / (2 * count), 0.0, 2 * count)
        recorder.add(name, NAMES[form], "window_tokens", window_tokens, "1")
        for prefix, table in zip(("ms_", "ms_of_"), tables, strict=True):
            for what, ms in sorted(table.items(), key=lambda item: -item[1]):
                if ms / count >= LEAST_MS:
                    recorder.add(name, NAMES[form], prefix + what, Sample(ms / count, 0.0, count), "ms")


LEAST_MS = 0.01
"""What takes less time of a step is left out."""


def measure(
    bench: Bench, case: str, recorder: Recorder, name: str, forms: list[str], *, again: bool, note: str = ""
) -> None:
    """Measure one case in these forms, and print by how much their scores differ from the first one's.

    Args:
        note: what the names of the contenders say in addition.
    """
    scores = {}
    for form in forms:
        model = bench.model(compiled=form != "eager")
        found, seconds, peak = bench.score(case, model, form)
        scores[form] = found
        gpus = bench.dist.devices
        processes = bench.dist.world_size // gpus
        impl = NAMES[form] + (f", {processes} processes" if processes > 1 else "")
        impl += note + (", shared GPU" if bench.shared else "")
        rate = found.tokens / gpus
        values = {
            "seconds": (seconds, "s"),
            "tokens_per_s": (rate / seconds, "1/s"),
            "bpb": (found.bpb, "bits/byte"),
        }
        if peak:
            values["peak_mib"] = (peak, "MiB")
        if again and form != "eager":
            _, warm, _ = bench.score(case, model, form)
            values |= {"seconds_again": (warm, "s"), "tokens_per_s_again": (rate / warm, "1/s")}
        for metric, (value, unit) in values.items() if bench.dist.is_main else ():
            recorder.add(name, impl, metric, Sample(value, 0.0, 1), unit)
        del model
    for form in forms[1:] if bench.dist.is_main else ():
        gap = scores[form].bpb - scores[forms[0]].bpb
        print(f"{name}: {form} minus {forms[0]} {gap:+.6f} bits per byte", flush=True)


def batches_of(word: str) -> tuple[int, int]:
    """Return the two numbers of TOKENSxDOCUMENTS.

    Raises:
        ValueError: another form.
    """
    tokens, _, documents = word.partition("x")
    return int(tokens), int(documents)


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path, help="the model file, .pgolf")
    parser.add_argument("--data", type=Path, required=True, help="folder of shards and tokenizer")
    parser.add_argument("--documents", type=int, default=0, help="score the first n documents; 0 = all")
    parser.add_argument("--text", default="wiki_val", help="name of the text, in the names of the cases")
    parser.add_argument("--shared", action="store_true", help="say that other programs ran on the same GPU")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--context", type=int, default=0, help="tokens of the longest window; 0 = those of the model"
    )
    parser.add_argument("--rank", type=int, default=TttConfig.rank, help="rank of the adapters")
    parser.add_argument("--tokens", type=int, default=98_304, help="tokens per forward pass of windows")
    parser.add_argument("--forms", nargs="+", choices=tuple(NAMES), default=["eager", "compiled"])
    parser.add_argument(
        "--batches",
        nargs="+",
        type=batches_of,
        metavar="TOKENSxDOCUMENTS",
        default=[(TttConfig.batch_tokens, TttConfig.batch_documents)],
        help="most tokens of a step and most documents of a batch, for adapters; each in turn",
    )
    parser.add_argument(
        "--profile", nargs=2, type=int, metavar=("FIRST", "COUNT"), help="profile steps with adapters"
    )
    parser.add_argument("--again", action="store_true", help="also time the compiled form without compiling")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--file", default="ttt", help="name of the result file")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS, help="folder of the result file")
    args = parser.parse_args()
    artifact = read_artifact(args.artifact)
    dist = Dist.start(args.device, share_gpus=True)
    folder = DataFolder.open(args.data, vocab_size=artifact.header.model.vocab_size)
    published = PhasesConfig().adapters
    phases = PhasesConfig(adapters=replace(published, rank=args.rank))
    text = folder.validation(documents=args.documents)
    recorder = Recorder("ttt", dist.device, args.out, file=args.file)
    suffix = f"_{args.text}" + (f"_first{args.documents}" if args.documents else "")
    suffix += f"_context{args.context}" if args.context else ""
    # No graph holds the attention that CPUs have.
    forms = args.forms if dist.device.type == "cuda" else ["eager"]
    for case in [c for c in args.cases if args.profile is None or c in ADAPTED]:
        torch.compiler.reset()
        for tokens, documents in args.batches if case == "record_adapters" else args.batches[:1]:
            adapters = TttConfig(rank=args.rank, batch_tokens=tokens, batch_documents=documents)
            settings = EvaluateConfig(adapters=adapters, phases=phases)
            bos_id, more = folder.tokenizer.bos_id, {"shared": args.shared, "context": args.context}
            bench = Bench(artifact, text, dist, bos_id, args.tokens, settings, **more)
            note = f", {tokens:,} tokens" if len(args.batches) > 1 and case == "record_adapters" else ""
            if args.profile is None:
                measure(bench, case, recorder, case + suffix, forms, again=args.again, note=note)
                continue
            for form in forms:
                profile(bench, case, form, recorder, case + suffix, tuple(args.profile))
    if dist.is_main:
        recorder.write()
    dist.close()


if __name__ == "__main__":
    main()
