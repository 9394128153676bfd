"""head_mix, forward and backward, compared with torch.compile of its reference.

The sizes are those of pr1855: 8 query heads and 4 kv heads of 64 columns, the sparse gate, and v as columns
of the product of q, k and v; `model` has 98,304 tokens, `small` 1,024. In bfloat16 (float32 on the CPU).
`ms_bwd` is `head_mix_backward`, against torch.compile of its reference; `ms_fwd_bwd` goes through autograd.
Bytes are counted, each tensor once. "floor" is the time of these bytes at 3.6 TB/s, which a streaming kernel
reaches on an H200. In a block, torch.compile fuses with what is next to it; `bench/step.py` measures that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from bench.common import Recorder, parser
from bench.heads import CASES, GROUPS, HEADS, QUICK, WIDTH, Pass, compiled, random, record_passes
from pgolf.ops import head_mix, head_mix_backward, head_mix_backward_ref, head_mix_ref


def measure(recorder: Recorder, name: str, args: argparse.Namespace) -> None:
    """Time one case and record it."""
    tokens = CASES[name]
    y, z, grad = (
        random(recorder, tokens, HEADS, *more, seed=i) for i, more in enumerate(((WIDTH,), (), (WIDTH,)))
    )
    qkv = random(recorder, tokens, HEADS + 2 * GROUPS, WIDTH, seed=3)
    v = qkv[:, HEADS + GROUPS :]
    leaves = [t.detach().requires_grad_() for t in (y, v, z)]
    rest = 0.5, 1  # scale and kind

    def both(fn: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(fn(*leaves, *rest), leaves, grad)

    forward, backward = compiled(head_mix_ref), compiled(head_mix_backward_ref)
    # Columns of a token: those of y, of v, of z, of which there is one per head, and of delta, which is one
    # float32 per head.
    of_y, of_v, of_delta = HEADS * WIDTH, GROUPS * WIDTH, HEADS * 4 // y.element_size()
    first, second = 2 * of_y + of_v + HEADS, 3 * of_y + 2 * of_v + 2 * HEADS + of_delta
    found = [
        Pass("ms_fwd", lambda: head_mix(y, v, z, *rest), lambda: forward(y, v, z, *rest), first),
        Pass(
            "ms_bwd",
            lambda: head_mix_backward(grad, y, v, z, *rest),
            lambda: backward(grad, y, v, z, *rest),
            second,
        ),
        Pass("ms_fwd_bwd", both(head_mix), both(forward), first + second),
    ]
    record_passes(recorder, name, found, repeats=args.repeats, parts=args.only)


def main() -> None:
    """Parse arguments, measure, write."""
    args = parser(__doc__ or "", list(CASES)).parse_args()
    recorder = Recorder("head_mix", torch.device(args.device), None if args.quick else args.out)
    args.repeats = 3 if args.quick else args.repeats
    for name in args.cases[:QUICK] if args.quick else args.cases:
        torch.compiler.reset()
        measure(recorder, name, args)
    recorder.write()


if __name__ == "__main__":
    main()
