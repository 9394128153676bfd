"""Forward and backward pass of pr1855's model on one GPU, as in the middle of a training run.

The weights are random in every part (a fresh model's output projections are zero, and products of zeros take
less power, which a power-limited GPU turns into a clock that no training run sees), the documents have the
lengths of real ones (`document_lengths.json`), and the clock has settled before anything is timed.

For each contender and loop mode: milliseconds, joules, SM clock and memory of a micro-step, then where its
time goes by family of kernels, next to what was counted: operations of the matrix products and of attention,
bytes between them, and the floor that these set. The tail of a step (clip, Muon, AdamW, average) is timed
too. `--attention doc fa4` compares pgolf's own attention, "pgolf", with flash-attn-4, "pgolf flash-attn-4";
until commit 2fc973a "pgolf" was flash-attn-4. `--capture off on` compares launched passes with passes that
are replayed as CUDA graphs; then peak_mib holds the memory of the graphs. `bench/script_step.py` times the
published script of PR #1855 beside pgolf.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.common import RESULTS, Recorder, Sample, time_launched
from bench.power import Meter, find_driver
from pgolf.config import ModelConfig
from pgolf.data.loader import Batch, padded_cu_seqlens
from pgolf.data.stream import cut_segments
from pgolf.dist import Dist
from pgolf.model.gpt import GPT, layer_order
from pgolf.optim.ema import Ema
from pgolf.optim.step import Optimizer
from pgolf.presets import pr1855
from pgolf.train.captured import Form, MicroSteps

BOS = 1
LENGTHS = Path(__file__).with_name("document_lengths.json")
OUT_STD, DOWN_STD = 0.03, 0.02
"""Standard deviation of the weights of both output projections, which are zero in a fresh model."""
PRODUCT_RATE = 660e12
"""Operations per second of bfloat16 products that cuBLAS reaches at these shapes on an H100 or H200 at its
power limit; the floor of the products."""
MEMORY_RATE = 3.6e12
"""Bytes per second that a streaming kernel reaches on an H200 (2.9e12 on an H100)."""
LEAST_STREAMS = 22
"""Tensors `(T, D)` that must move between the products of a block, forward and backward, if everything next
to a product is fused with it; torch.compile moves about 85."""


def real_lengths(tokens: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the starts of the segments of one micro-batch of documents with real lengths."""
    quantiles = json.loads(LENGTHS.read_text())["quantiles"]
    lengths = np.random.default_rng(0).permutation(np.array(quantiles, dtype=np.int64))
    starts = np.concatenate(([0], np.cumsum(np.tile(lengths, 1 + tokens // int(lengths.sum())))))
    return cut_segments(starts[starts < tokens], tokens, pr1855().model.max_context)


class Work(NamedTuple):
    """One micro-batch on the device."""

    ids: torch.Tensor
    targets: torch.Tensor
    cu: torch.Tensor
    squares: float
    """Sum of the squared lengths of the segments, in tokens^2: what attention costs grows with it."""


def make_work(tokens: int, vocab: int, device: torch.device) -> Work:
    """Return random tokens in segments of real lengths."""
    starts = real_lengths(tokens)
    ids = torch.randint(4, vocab, (tokens,), generator=torch.Generator().manual_seed(0))
    ids[torch.from_numpy(starts)] = BOS
    squares = float(np.square(np.diff(starts, append=tokens)).sum())
    ids = ids.to(device)
    return Work(ids, ids.roll(-1), padded_cu_seqlens(starts, tokens).to(device), squares)


def make_model(config: ModelConfig) -> GPT:
    """Return a model none of whose parts is zero."""
    model, rng = GPT(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.qo_bank[config.layers :].normal_(std=OUT_STD, generator=rng)
        model.mlp_down_bank.normal_(std=DOWN_STD, generator=rng)
        for name, p in model.named_parameters():
            if name not in (*GPT.bank_names, *GPT.embed_names):
                p.add_(torch.randn(p.shape, generator=rng), alpha=0.05)
    return model


class Counts(NamedTuple):
    """What one micro-step must do, forward and backward."""

    products: float
    """Operations of the matrix products."""
    attention: float
    """Operations of attention's products, without what its tiles waste."""
    streams: float
    """Bytes between the products of the blocks if everything next to a product is fused with it."""

    @property
    def floor_ms(self) -> float:
        """Milliseconds of the three, one after another, at the rates above."""
        return 1e3 * ((self.products + self.attention) / PRODUCT_RATE + self.streams / MEMORY_RATE)


def count(config: ModelConfig, work: Work, *, loop: bool) -> Counts:
    """Count one micro-step: a product takes 2 operations per weight and token, its backward twice that."""
    blocks, tokens = sum(map(len, layer_order(config, loop=loop))), work.ids.numel()
    qkvo = config.width * (2 * config.width + 2 * config.kv_width)
    weights = blocks * (qkvo + 2 * config.width * config.hidden) + config.vocab_size * config.width
    # Scores and values: 2 products of 2 operations, half of the pairs are in the future; the backward pass
    # has 5 products where the forward pass has 2.
    attention = blocks * config.width * work.squares * 2 * (1 + 2.5)
    return Counts(6.0 * tokens * weights, attention, blocks * LEAST_STREAMS * tokens * config.width * 2.0)


FAMILIES = (
    ("attention", r"flash|fmha|attention|Flash"),
    ("loss", r"pgolf::.*(CeEpilogue|HiddenEpilogue|forward_kernel|loss_kernel|factor_kernel|scale_rows)"),
    ("loss", r"^_softcapped_ce_"),  # of published scripts, as the next
    ("mlp", r"^linear_leaky_relu_square_kernel"),
    ("products", r"nvjet|gemm|cublas|splitK|cutlass"),
    ("norms_and_mixes", r"triton_|pgolf::mix_"),
    ("heads", r"pgolf::.*(qk_norm_rope|QkvRopeEpilogue|sum_gain|head_mix)"),
    ("mlp", r"pgolf::.*(UpEpilogue|DactEpilogue|norm_mlp|rho_kernel)"),
    ("pgolf", r"pgolf::"),
)
"""Name of a family and the names of its kernels; attention first, because its names hold cutlass too."""


def family(kernel: str) -> str:
    """Return the family of a kernel by its name."""
    return next((name for name, pattern in FAMILIES if re.search(pattern, kernel)), "other")


class Kernel(NamedTuple):
    """One kernel, copy or fill on the device, in microseconds."""

    name: str
    start: float
    end: float


def families(kernels: list[Kernel]) -> dict[str, tuple[float, int]]:
    """Return (milliseconds, launches) by family, and as "idle" the time in which nothing ran."""
    table: dict[str, list[float]] = defaultdict(list)
    idle, last = [], kernels[0].start if kernels else 0.0
    for kernel in sorted(kernels, key=lambda k: k.start):
        table[family(kernel.name)].append(kernel.end - kernel.start)
        if kernel.start > last:
            idle.append(kernel.start - last)
        last = max(last, kernel.end)
    return {name: (sum(times) / 1000, len(times)) for name, times in {**table, "idle": idle}.items()}


@dataclass(frozen=True)
class Timed:
    """What was measured of one contender in one loop mode."""

    ms: list[float]
    joules: float | None
    sm_mhz: float | None
    peak_mib: float
    warm_up: float = 0.0
    """Seconds of the first passes, which compile."""


class Mark:
    """A moment in the work of the device, or on the CPU of the program; `ms_to` needs `wait` on the later."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()
        self._at = time.perf_counter()

    def wait(self) -> None:
        """Wait until the device is there."""
        if self._event is not None:
            self._event.synchronize()

    def ms_to(self, later: Mark) -> float:
        """Return the milliseconds between two moments."""
        if self._event is None or later._event is None:
            return 1000 * (later._at - self._at)
        return float(self._event.elapsed_time(later._event))


def wait_for(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_for(step: Callable[[], object], seconds: float, device: torch.device) -> None:
    """Run passes back to back for some seconds."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(4):
            step()
        wait_for(device)


def time_step(step: Callable[[], object], device: torch.device, *, settle: float, seconds: float) -> Timed:
    """Compile, let the clock settle, and time passes that follow each other without a gap."""
    began = time.perf_counter()
    for _ in range(3):
        step()
    wait_for(device)
    warm_up = time.perf_counter() - began
    run_for(step, settle, device)
    return replace(time_passes(step, device, seconds), warm_up=warm_up)


def time_passes(step: Callable[[], object], device: torch.device, seconds: float) -> Timed:
    """Time passes that follow each other without a gap."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    marks: list[Mark] = []
    with Meter(device) as meter:
        while not marks or time.perf_counter() - meter.began < seconds:
            # The device is two passes behind at most, so the host's lead is that of a training step.
            if len(marks) > 2:
                marks[-2].wait()
            marks.append(Mark(device))
            step()
        marks.append(Mark(device))
    ms = [a.ms_to(b) for a, b in itertools.pairwise(marks)]
    joules = None if meter.joules is None else meter.joules / len(ms)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Timed(ms, joules, meter.sm_mhz, peak / 2**20)


def record_settled(
    recorder: Recorder, case: str, metric: str, calls: dict[str, Callable[[], object]], *, seconds: float
) -> None:
    """Time each call as `time_step` does, and record `metric`, which begins with "ms", and joules."""
    for name, call in calls.items():
        result = time_step(call, recorder.device, settle=seconds, seconds=seconds)
        recorder.add(case, name, metric, Sample.of(result.ms), "ms")
        if result.joules is not None:
            joules = Sample(result.joules, 0.0, len(result.ms))
            recorder.add(case, name, metric.replace("ms", "joules"), joules, "J")


def profile(step: Callable[[], None], passes: int) -> list[Kernel]:
    """Return what runs on the device in some passes."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(passes):
            step()
        torch.cuda.synchronize()
    return [
        Kernel(e.name, e.time_range.start, e.time_range.end)
        for e in found.events()
        if e.device_type == DeviceType.CUDA and e.time_range.end > e.time_range.start
    ]


def record(recorder: Recorder, case: str, impl: str, timed: Timed, tokens: int) -> None:
    """Record the figures of one contender in one loop mode."""
    recorder.add(case, impl, "ms_fwd_bwd", Sample.of(timed.ms), "ms")
    recorder.add(case, impl, "tokens_per_s", Sample.of([1000 * tokens / ms for ms in timed.ms]), "1/s")
    if timed.joules is not None:
        recorder.add(case, impl, "joules", Sample(timed.joules, 0.0, len(timed.ms)), "J")
    if timed.sm_mhz is not None:
        recorder.add(case, impl, "sm_mhz", Sample(timed.sm_mhz, 0.0, 1), "MHz")
    recorder.add(case, impl, "peak_mib", Sample(timed.peak_mib, 0.0, 1), "MiB")
    recorder.add(case, impl, "warm_up_s", Sample(timed.warm_up, 0.0, 1), "s")


def ledger(recorder: Recorder, case: str, impl: str, step: Callable[[], None], *, top: int) -> None:
    """Record milliseconds by family of kernels; print the slowest kernels."""
    passes = 3
    kernels = profile(step, passes)
    for name, (ms, launches) in sorted(families(kernels).items()):
        recorder.add(case, impl, f"ms_{name}", Sample(ms / passes, 0.0, passes), "ms")
        print(f"    {name}: {launches / passes:.0f} launches")
    slow: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        slow[kernel.name].append((kernel.end - kernel.start) / 1000)
    for name, times in sorted(slow.items(), key=lambda item: -sum(item[1]))[:top]:
        each = 1000 * sum(times) / len(times)
        print(f"    {sum(times) / passes:7.3f} ms {len(times) / passes:4.0f} x {each:7.1f} us  {name[:120]}")


def optimizer_tail(recorder: Recorder, model: GPT, repeats: int) -> None:
    """Time the tail of a step: reduce, clip, AdamW, Muon, zeroing, average."""
    config = pr1855()
    ema = Ema(dict(model.named_parameters()))
    for metric, capture in (("ms_launched", False), ("ms_graph", True)):
        optimizer = Optimizer(model, config.optim, Dist.start("cuda"), ema=ema, capture=capture)

        def tail(step: Callable[..., None] = optimizer.step) -> None:
            step(0.5, ema_decay=0.99)

        for name, sample in time_launched({"pgolf": tail}, recorder.device, repeats=repeats).items():
            recorder.add("record_1gpu", name, metric, sample, "ms")


FORMS = {"blocks": "pgolf", "model": f"torch.compile {torch.__version__}", "off": "eager"}
"""train.compile -> the name of the contender: one graph of the whole model is the form of the published
scripts, with the same mathematics."""

ATTENTION = {"doc": "doc_attention", "fa4": "flash-attn-4", "varlen": "varlen"}
"""train.attention -> its kernel in the name of the contender."""

BLOCKS = {"thread": None, "plain": False}
"""Form of the blocks -> `threads` of `GPT.prepare`: what adds the gradients of streams with several readers,
the blocks (if they are compiled one by one) or autograd."""


def main() -> None:
    """Parse arguments, time every contender in both loop modes, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--attention", nargs="+", default=["doc"], choices=tuple(ATTENTION), help="attention kernels"
    )
    parser.add_argument("--compile", nargs="+", default=["blocks"], choices=tuple(FORMS), help="forms")
    parser.add_argument(
        "--mlp", nargs="+", default=["auto"], choices=("auto", "composed"), help="form of the MLP"
    )
    parser.add_argument(
        "--mix", nargs="+", default=["composed"], choices=("auto", "composed"), help="form of the mixes"
    )
    parser.add_argument(
        "--heads",
        nargs="+",
        default=["auto"],
        choices=("auto", "plain", "composed"),
        help="form of the heads",
    )
    parser.add_argument(
        "--capture", nargs="+", default=["off"], choices=("off", "on"), help="passes as CUDA graphs"
    )
    parser.add_argument(
        "--form", nargs="+", default=["thread"], choices=tuple(BLOCKS), help="what adds gradients of streams"
    )
    parser.add_argument("--tokens", type=int, default=98_304, help="tokens per micro-step")
    parser.add_argument("--settle", type=float, default=5.0, help="seconds of passes before the timed ones")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds of timed passes")
    parser.add_argument("--top", type=int, default=0, help="print this many of the slowest kernels")
    parser.add_argument("--no-tail", action="store_true", help="leave the optimizer out")
    parser.add_argument("--name", default="", help="added to the name of the result file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args()
    device, config = torch.device("cuda"), pr1855().model
    recorder = Recorder("step", device, args.out, file=f"step{args.name and '-' + args.name}")
    driver = find_driver(device)
    if driver.problem:
        print(f"no joules and clocks: nvidia-ml-py is {driver.problem}")
    work = make_work(args.tokens, config.vocab_size, device)
    model = None
    contenders = itertools.product(args.compile, args.attention, args.mlp, args.mix, args.heads, args.form)
    for form, attention, mlp, mix, heads, blocks in contenders:
        model = make_model(config).prepare(
            device,
            attention=attention,
            compile=form,
            mlp=mlp,
            mix=mix,
            heads=heads,
            threads=BLOCKS[blocks],
        )
        # The default has the plain name.
        plain = (form, attention) == ("blocks", "doc")
        impl = "pgolf" if plain else f"{FORMS[form]} {ATTENTION[attention]}"
        impl += (mlp != "auto") * f", {mlp} mlp" + (mix == "auto") * ", stream_mix"
        impl += (heads != "auto") * f", {heads} heads"
        impl += (blocks != "thread") * f", {blocks}"
        for capture in args.capture:
            measure(recorder, model, work, impl, args, capture=capture == "on")
            gc.collect()
        torch._dynamo.reset()
    if model is not None and not args.no_tail:
        optimizer_tail(recorder, model, 20)
    recorder.write()


def measure(
    recorder: Recorder, model: GPT, work: Work, impl: str, args: argparse.Namespace, *, capture: bool
) -> None:
    """Time one contender in both loop modes."""
    batch = Batch(work.ids, work.targets, work.cu, model.config.max_context, 0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # as in training, so that all passes add to them
    micro = MicroSteps(model, recorder.device)

    def take(form: Form) -> None:
        micro.forward(batch, form)
        micro.backward()

    if capture:
        for loop in (False, True):
            take(Form(loop))
        began = time.perf_counter()
        print(micro.capture([batch], [Form(False), Form(True)]))
        if not micro.pool_bytes:
            print(micro.trace)
            return
        seconds, impl = time.perf_counter() - began, f"{impl}, captured"
        recorder.add("record_real", impl, "capture_s", Sample(seconds, 0.0, 1), "s")
    for loop in (False, True):
        case = f"record_real_{'on' if loop else 'off'}"

        def step(form: Form = Form(loop)) -> None:  # noqa: B008 - frozen
            take(form)

        timed = time_step(step, recorder.device, settle=args.settle, seconds=args.seconds)
        timed = replace(timed, peak_mib=timed.peak_mib + micro.pool_bytes / 2**20)
        record(recorder, case, impl, timed, work.ids.numel())
        ledger(recorder, case, impl, step, top=args.top)
        counts = count(model.config, work, loop=loop)
        print(
            f"    counted: {counts.products / 1e12:.2f} TFLOP of products, {counts.attention / 1e12:.2f} of "
            f"attention, {counts.streams / 1e9:.1f} GB between them; floor {counts.floor_ms:.1f} ms"
        )


if __name__ == "__main__":
    main()
