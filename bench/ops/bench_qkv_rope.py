"""qkv_rope, forward, compared with the product and qk_norm_rope one after another.

The sizes are those of pr1855: a width of 512, 8 query heads and 4 kv heads of 64 columns, 16 of them
rotated; `model` has 98,304 tokens, `small` 1,024. In bfloat16 (float32 on the CPU), as CUDA graphs where
there is a GPU. Bytes are counted, each tensor once: the input, the product, q and k. "floor" is the longer of
the time of these bytes at 3.6 TB/s, which a streaming kernel reaches on an H200, and that of the product at
660 TFLOP/s, which cuBLAS reaches at such shapes. The backward pass is the same in both ways.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ce_peers import working
from bench.common import Recorder, Sample, only, parser, time_graph, time_launched
from bench.heads import CASES, DIMS, GROUPS, HEADS, QUICK, WIDTH, random
from bench.step import MEMORY_RATE, PRODUCT_RATE
from pgolf.model.rope import rope_tables
from pgolf.ops import qk_norm_rope, qkv_rope

DEPTH = 512


def measure(recorder: Recorder, name: str, args: argparse.Namespace) -> None:
    """Time one case and record it."""
    tokens, columns, device = CASES[name], (HEADS + 2 * GROUPS) * WIDTH, recorder.device
    n = random(recorder, tokens, DEPTH)
    weight = random(recorder, columns, DEPTH, seed=1) / DEPTH**0.5
    gain = random(recorder, HEADS, seed=2).float()
    cos, sin = rope_tables(tokens, DIMS, base=10_000.0, device=device)

    def fused() -> tuple[Tensor, ...]:
        return qkv_rope(n, weight, gain, cos, sin, WIDTH)

    def separate() -> tuple[Tensor, ...]:
        qkv = F.linear(n, weight)
        return qkv, *qk_norm_rope(qkv, gain, cos, sin, WIDTH)

    counted = tokens * (DEPTH + columns + (HEADS + GROUPS) * WIDTH) * n.element_size()
    floor = 1e3 * max(counted / MEMORY_RATE, 2.0 * tokens * DEPTH * columns / PRODUCT_RATE)
    recorder.add(name, "counted", "gbytes_fwd", Sample(counted / 1e9, 0.0, 1), "GB")
    recorder.add(name, "floor", "ms_fwd", Sample(floor, 0.0, 1), "ms")
    contenders = {
        "pgolf": fused,
        "F.linear, qk_norm_rope": separate,
        "F.linear": lambda: F.linear(n, weight),
    }
    calls = working(only(contenders, args.only))
    samples = time_graph(calls, device, repeats=args.repeats) or time_launched(
        calls, device, repeats=args.repeats
    )
    for label, sample in samples.items():
        recorder.add(name, label, "ms_fwd", sample, "ms")


def main() -> None:
    """Parse arguments, measure, write."""
    args = parser(__doc__ or "", list(CASES)).parse_args()
    recorder = Recorder("qkv_rope", torch.device(args.device), None if args.quick else args.out)
    args.repeats = 3 if args.quick else args.repeats
    with torch.no_grad():
        for name in args.cases[:QUICK] if args.quick else args.cases:
            measure(recorder, name, args)
    recorder.write()


if __name__ == "__main__":
    main()
