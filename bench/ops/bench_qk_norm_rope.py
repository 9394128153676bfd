"""qk_norm_rope, forward and backward, compared with torch.compile of its reference.

The sizes are those of pr1855: 8 query heads and 4 kv heads of 64 columns, 16 of them rotated; `model` has
98,304 tokens, `small` 1,024. In bfloat16 (float32 on the CPU). `ms_bwd` is `qk_norm_rope_backward` with two
gradients of v, against torch.compile of its reference; `ms_fwd_bwd` goes through autograd, without a gradient
of v. Bytes are counted, each tensor once. "floor" is the time of these bytes at 3.6 TB/s, which a streaming
kernel reaches on an H200. In a block, torch.compile fuses with what is next to it; `bench/step.py` measures
that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from bench.common import Recorder, parser
from bench.heads import CASES, DIMS, GROUPS, HEADS, QUICK, WIDTH, Pass, compiled, random, record_passes
from pgolf.model.rope import rope_tables
from pgolf.ops import (
    qk_norm_rope,
    qk_norm_rope_backward,
    qk_norm_rope_backward_ref,
    qk_norm_rope_ref,
)


def measure(recorder: Recorder, name: str, args: argparse.Namespace) -> None:
    """Time one case and record it."""
    tokens = CASES[name]
    qkv = random(recorder, tokens, (HEADS + 2 * GROUPS) * WIDTH).requires_grad_()
    gain = random(recorder, HEADS).float().requires_grad_()
    cos, sin = rope_tables(tokens, DIMS, base=10_000.0, device=recorder.device)
    rest = cos, sin, WIDTH
    dq, dk, *dv = (
        random(recorder, tokens, n, WIDTH, seed=i + 1) for i, n in enumerate((HEADS, GROUPS, GROUPS, GROUPS))
    )
    plain = qkv.detach(), gain.detach()

    def both(fn: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(fn(qkv, gain, *rest), (qkv, gain), (dq, dk))

    forward, backward = compiled(qk_norm_rope_ref), compiled(qk_norm_rope_backward_ref)
    rotated = (HEADS + GROUPS) * WIDTH
    found = [
        Pass(
            "ms_fwd",
            lambda: qk_norm_rope(*plain, *rest),
            lambda: forward(*plain, *rest),
            2 * rotated,
        ),
        Pass(
            "ms_bwd",
            lambda: qk_norm_rope_backward(dq, dk, dv, *plain, *rest),
            lambda: backward(dq, dk, dv, *plain, *rest),
            3 * rotated + 3 * GROUPS * WIDTH,
        ),
        Pass("ms_fwd_bwd", both(qk_norm_rope), both(forward), 5 * rotated + GROUPS * WIDTH),
    ]
    record_passes(recorder, name, found, repeats=args.repeats, parts=args.only)


def main() -> None:
    """Parse arguments, measure, write."""
    args = parser(__doc__ or "", list(CASES)).parse_args()
    recorder = Recorder("qk_norm_rope", torch.device(args.device), None if args.quick else args.out)
    args.repeats = 3 if args.quick else args.repeats
    for name in args.cases[:QUICK] if args.quick else args.cases:
        torch.compiler.reset()
        measure(recorder, name, args)
    recorder.write()


if __name__ == "__main__":
    main()
