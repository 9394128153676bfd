"""stream_mix, forward and forward with backward, compared with torch.compile of the same formula.

The cases are the mixes of pr1855's blocks on 98,304 tokens of width 512 in bfloat16 (float32 on the CPU):
`mix2` is (x, x0) -> u and its norm, `mix3` the same with a skip, `lane3` (lane, skip, x0) -> lane and the
norm of u, `lanes4` the update of both lanes, and `small` is `mix2` on 1,024 tokens. Bytes are counted, each
stream, output and gradient once: n + k tensors forward and 2 n + k backward for n streams and k outputs.
"floor" is the time of these bytes at 3.6 TB/s, which a streaming kernel reaches on an H200. In a block,
torch.compile fuses the mix with what is next to it; `bench/step.py` measures that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.ce_peers import working
from bench.common import Recorder, Sample, only, parser, time_launched, torch_name
from bench.step import MEMORY_RATE, record_settled
from pgolf.ops import stream_mix, stream_mix_ref
from pgolf.ops.stream_mix import Last

WIDTH = 512


class Case(NamedTuple):
    """The sizes of one mix, and which outputs its last sum has."""

    tokens: int
    streams: int
    sums: int
    last: Last


CASES = {
    "small": Case(1024, 2, 1, "both"),
    "mix2": Case(98_304, 2, 1, "both"),
    "mix3": Case(98_304, 3, 1, "both"),
    "lane3": Case(98_304, 3, 2, "norm"),
    "lanes4": Case(98_304, 4, 2, "sum"),
}
QUICK = 1
"""Number of cases, from the first, that only --quick runs."""

Mix = Callable[[list[Tensor], Tensor], tuple[Tensor, ...]]


def mixes(last: Last) -> dict[str, Mix]:
    """Return every implementation."""

    def composed(streams: list[Tensor], coefficients: Tensor) -> tuple[Tensor, ...]:
        return stream_mix_ref(streams, coefficients, last=last)

    return {
        "pgolf": lambda streams, coefficients: stream_mix(streams, coefficients, last=last),
        torch_name("compile"): torch.compile(composed, dynamic=False, fullgraph=True),
        torch_name("eager"): composed,
    }


def measure(recorder: Recorder, name: str, args: argparse.Namespace) -> None:
    """Time one case and record it."""
    case, device = CASES[name], recorder.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rng = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device)

    streams = [random(case.tokens, WIDTH).to(dtype).requires_grad_() for _ in range(case.streams)]
    coefficients = random(case.sums, case.streams, WIDTH).requires_grad_()
    outputs = stream_mix_ref(streams, coefficients, last=case.last)
    upstream = [torch.randn_like(t) for t in outputs]

    def forward(mix: Mix) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return mix(streams, coefficients)

    def both(mix: Mix) -> tuple[Tensor, ...]:
        return torch.autograd.grad(mix(streams, coefficients), (*streams, coefficients), upstream)

    found = only(mixes(case.last), args.only)
    calls = working({label: lambda m=mix: both(m) for label, mix in found.items()})
    forwards = {label: lambda m=found[label]: forward(m) for label in calls}
    passes = case.streams + len(outputs)
    for metric, timed, count in (
        ("ms_fwd", forwards, passes),
        ("ms_fwd_bwd", calls, 2 * passes + case.streams),
    ):
        size = count * streams[0].numel() * streams[0].element_size()
        recorder.add(name, "counted", metric.replace("ms", "gbytes"), Sample(size / 1e9, 0.0, 1), "GB")
        recorder.add(name, "floor", metric, Sample(1e3 * size / MEMORY_RATE, 0.0, 1), "ms")
        if device.type == "cuda":
            record_settled(recorder, name, metric, timed, seconds=0.5 if args.quick else args.seconds)
            continue
        for label, sample in time_launched(timed, device, repeats=args.repeats).items():
            recorder.add(name, label, metric, sample, "ms")


def main() -> None:
    """Parse arguments, measure, write."""
    arguments = parser(__doc__ or "", list(CASES))
    arguments.add_argument(
        "--seconds", type=float, default=3.0, help="seconds of passes before the timed ones, and of those"
    )
    args = arguments.parse_args()
    recorder = Recorder("stream_mix", torch.device(args.device), None if args.quick else args.out)
    args.repeats = 3 if args.quick else args.repeats
    for name in args.cases[:QUICK] if args.quick else args.cases:
        torch.compiler.reset()
        measure(recorder, name, args)
    recorder.write()


if __name__ == "__main__":
    main()
