"""Forward+backward of pr1855's model on one GPU: ms per micro-step, tokens/s, peak memory, warm-up seconds.

Documents have log-normal lengths (mean about 712 tokens, at most 2,048), as in web text. The tail of a step
(clip, Muon, AdamW, average, zeroing) is timed too, as launched.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.common import RESULTS, Recorder, Sample, time_launched
from pgolf.dist import Dist
from pgolf.model.gpt import GPT
from pgolf.optim.ema import Ema
from pgolf.optim.step import Optimizer
from pgolf.presets import pr1855

BOS = 1


def synthetic_batch(tokens: int, vocab: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed random documents `(tokens,)` and their cu_seqlens, padded to a multiple of 64 entries."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocab, (tokens,), generator=rng)
    lengths = torch.empty(4 * tokens // 712).log_normal_(6.1, 1.0, generator=rng).clamp(16, 2048).int()
    starts = torch.cat((torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()))
    starts = starts[starts < tokens]
    ids[starts.long()] = BOS
    size = -(-(len(starts) + 1) // 64) * 64
    cu_seqlens = torch.full((size,), tokens, dtype=torch.int32)
    cu_seqlens[: len(starts)] = starts
    return ids.to(device), cu_seqlens.to(device)


@dataclass(frozen=True)
class Times:
    """The times of one case, in milliseconds."""

    forward: list[float]
    both: list[float]
    peak_mib: float
    warm_up: float


def time_case(model: GPT, ids: torch.Tensor, cu: torch.Tensor, *, loop: bool, repeats: int) -> Times:
    """Warm up one loop mode and time it with CUDA events."""

    def forward() -> torch.Tensor:
        return model(ids, ids.roll(-1), cu, max_seqlen=model.config.max_context, loop=loop).mean()

    began = time.perf_counter()
    for _ in range(3):
        forward().backward()
    torch.cuda.synchronize()
    warm_up = time.perf_counter() - began
    torch.cuda.reset_peak_memory_stats()
    fwd, both = [], []
    for _ in range(repeats):
        a, b, c = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        a.record()
        loss = forward()
        b.record()
        loss.backward()
        c.record()
        torch.cuda.synchronize()
        fwd.append(a.elapsed_time(b))
        both.append(a.elapsed_time(c))
    return Times(fwd, both, torch.cuda.max_memory_allocated() / 2**20, warm_up)


def record_case(recorder: Recorder, impl: str, case: str, t: Times, tokens: int) -> None:
    """Record the measurements of one case."""
    both = Sample.of(t.both)
    recorder.add(case, impl, "ms_fwd", Sample.of(t.forward), "ms")
    recorder.add(case, impl, "ms_fwd_bwd", both, "ms")
    recorder.add(case, impl, "tokens_per_s", Sample.of([1000 * tokens / ms for ms in t.both]), "1/s")
    recorder.add(case, impl, "peak_mib", Sample(t.peak_mib, 0.0, 1), "MiB")
    recorder.add(case, impl, "warm_up_s", Sample(t.warm_up, 0.0, 1), "s")


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


def main() -> None:
    """Parse arguments, time both loop modes with each chosen attention kernel, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attention", nargs="+", default=["varlen"], help="kernels: varlen fa4")
    parser.add_argument("--compile", default="blocks", choices=("off", "blocks", "model"))
    parser.add_argument("--tokens", type=int, default=98_304, help="tokens per micro-step")
    parser.add_argument("--repeats", type=int, default=10, help="timed passes per case")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one loop-on pass")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args()
    device = torch.device("cuda")
    recorder = Recorder("step", device, args.out)
    config = pr1855().model
    ids, cu = synthetic_batch(args.tokens, config.vocab_size, device)
    for attention in args.attention:
        model = GPT(config).prepare(device, attention=attention, compile=args.compile)
        for loop in (False, True):
            t = time_case(model, ids, cu, loop=loop, repeats=args.repeats)
            record_case(
                recorder,
                f"pgolf {attention} {args.compile}",
                f"record_loop_{'on' if loop else 'off'}",
                t,
                args.tokens,
            )
        if args.profile:
            profile(model, ids, cu)
    optimizer_tail(recorder, model, args.repeats)
    recorder.write()


def profile(model: GPT, ids: torch.Tensor, cu: torch.Tensor) -> None:
    """Print the device time of one loop-on forward+backward by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as prof:
        model(ids, ids.roll(-1), cu, max_seqlen=model.config.max_context, loop=True).mean().backward()
        torch.cuda.synchronize()
    print(prof.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90))


if __name__ == "__main__":
    main()
