"""Causal attention in packed documents, forward and backward, compared with flash-attn-4 and torch.

The heads are those of pr1855: 8 query heads and 4 kv heads of 64 columns, and v is columns of a wider matrix.
`model` has 98,304 tokens, `small` 1,024, in documents of real lengths (`document_lengths.json`) cut at 2,048
tokens, and as many empty ones as a training run pads with. In bfloat16 (float32 on the CPU). Backward, pgolf
and flash-attn-4 get the output and the logsumexp of the reference, torch's operator those of its forward
pass. pgolf's dq is float32, that of the others bfloat16.

`ms_fwd` and `ms_bwd` are each pass alone, as a CUDA graph. `tflops_fwd` and `tflops_bwd` are its counted
operations per second: two products forward and five backward, of 2 K operations per head and pair of a token
with one that it attends to, without what tiles waste. `error_y`, `error_dq`, `error_dk` and `error_dv` are
relative to the norm of the result in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.ce_peers import working
from bench.common import Recorder, Sample, only, parser, time_graph, time_launched, torch_name
from bench.heads import CASES, GROUPS, HEADS, QUICK, WIDTH, random
from bench.step import real_lengths
from pgolf.data.loader import padded_cu_seqlens
from pgolf.model.attention import find_fa4
from pgolf.ops import doc_attention, doc_attention_backward, doc_attention_backward_ref, doc_attention_ref

Call = Callable[[], tuple[Tensor, ...]]
PRODUCTS = {"fwd": 2, "bwd": 5}
RESULTS = {"fwd": ("y",), "bwd": ("dq", "dk", "dv")}


class Problem(NamedTuple):
    """What is attended to, the gradient of the output, and what the reference makes of it."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    cu_seqlens: Tensor
    longest: int
    y: Tensor
    lse: Tensor


def of_pgolf(p: Problem) -> dict[str, Call]:
    """Return both passes of pgolf's operators."""
    return {
        "fwd": lambda: doc_attention(p.q, p.k, p.v, p.cu_seqlens),
        "bwd": lambda: doc_attention_backward(p.grad, p.q, p.k, p.v, p.y, p.lse, p.cu_seqlens),
    }


def of_fa4(p: Problem) -> dict[str, Call]:
    """Return both passes of flash-attn-4."""
    ops, lengths = torch.ops.pgolf, (p.cu_seqlens, p.longest)
    return {
        "fwd": lambda: ops.fa4_forward(p.q, p.k, p.v, *lengths),
        "bwd": lambda: ops.fa4_backward(p.grad, p.q, p.k, p.v, p.y, p.lse, *lengths),
    }


def of_torch(p: Problem) -> dict[str, Call]:
    """Return both passes of torch's variable-length attention."""
    ops, sizes = torch.ops.aten, (p.cu_seqlens, p.cu_seqlens, p.longest, p.longest, 0.0, True)

    def forward() -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = ops._flash_attention_forward(p.q, p.k, p.v, *sizes, False)
        return found

    y, lse, state, unused, _ = forward()
    tail = y, lse, *sizes, state, unused
    return {"fwd": forward, "bwd": lambda: ops._flash_attention_backward(p.grad, p.q, p.k, p.v, *tail)}


def contenders(p: Problem) -> dict[str, dict[str, Call]]:
    """Return both passes of every implementation that can be used here."""
    found = {"pgolf": of_pgolf(p)}
    if p.q.device.type != "cuda":
        return found
    peer = find_fa4()
    if peer.usable:
        found[f"flash-attn-4 {peer.version}"] = of_fa4(p)
    else:
        print(f"flash-attn-4 {peer.problem}")
    try:
        found[torch_name("varlen")] = of_torch(p)
    except (RuntimeError, ValueError, TypeError) as e:  # its operators are private and differ by version
        print(f"torch's attention: {e}")
    return found


def operations(cu_seqlens: Tensor, products: int) -> float:
    """Return the operations of some products of a pass, over the causal pairs of tokens."""
    lengths = cu_seqlens.diff().double()
    return products * 2 * WIDTH * HEADS * float((lengths * (lengths + 1) / 2).sum())


def truth_of(p: Problem) -> dict[str, tuple[Tensor, ...]]:
    """Return the results of both passes in float64."""
    q, k, v, grad = (t.double() for t in p[:4])
    y, lse = doc_attention_ref(q, k, v, p.cu_seqlens)
    return {"fwd": (y,), "bwd": doc_attention_backward_ref(grad, q, k, v, y, lse, p.cu_seqlens)}


def measure(recorder: Recorder, case: str, args: argparse.Namespace) -> None:
    """Time one case, compare it with float64, and record both."""
    tokens, device = CASES[case], recorder.device
    grad, q = (random(recorder, tokens, HEADS, WIDTH, seed=seed) for seed in (0, 1))
    both = random(recorder, tokens, 2 * GROUPS, WIDTH, seed=2)
    k, v = both[:, :GROUPS], both[:, GROUPS:]
    cu_seqlens = padded_cu_seqlens(real_lengths(tokens), tokens).to(device)
    longest = int(cu_seqlens.diff().max())
    problem = Problem(q, k, v, grad, cu_seqlens, longest, *doc_attention_ref(q, k, v, cu_seqlens))
    found, truth = contenders(problem), truth_of(problem)
    for way, products in PRODUCTS.items():
        flop = operations(cu_seqlens, products)
        recorder.add(case, "counted", f"tflop_{way}", Sample(flop / 1e12, 0.0, 1), "TFLOP")
        calls = working(only({label: both[way] for label, both in found.items()}, args.only))
        for label, call in calls.items():
            for name, got, true in zip(RESULTS[way], call(), truth[way], strict=False):
                error = float((got.double() - true).norm() / true.norm())
                recorder.add(case, label, f"error_{name}", Sample(error, 0.0, 1), "1")
        repeats = args.repeats
        samples = time_graph(calls, device, repeats=repeats) or time_launched(calls, device, repeats=repeats)
        for label, sample in samples.items():
            recorder.add(case, label, f"ms_{way}", sample, "ms")
            rate = flop / sample.value / 1e9
            spread = rate * sample.spread / sample.value
            recorder.add(case, label, f"tflops_{way}", Sample(rate, spread, sample.n), "TFLOP/s")


def main() -> None:
    """Parse arguments, measure, write."""
    args = parser(__doc__ or "", list(CASES)).parse_args()
    recorder = Recorder("doc_attention", torch.device(args.device), None if args.quick else args.out)
    args.repeats = 3 if args.quick else args.repeats
    for name in args.cases[:QUICK] if args.quick else args.cases:
        measure(recorder, name, args)
    recorder.write()


if __name__ == "__main__":
    main()
