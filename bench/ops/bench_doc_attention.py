"""The backward pass of causal attention in packed documents, compared with flash-attn-4 and torch.

The heads are those of pr1855: 8 query heads and 4 kv heads of 64 columns, and v is columns of a wider matrix.
`model` has 98,304 tokens, `small` 1,024, in documents of real lengths (`document_lengths.json`) cut at 2,048
tokens, and as many empty ones as a training run pads with. In bfloat16 (float32 on the CPU). pgolf and
flash-attn-4 get the output and the logsumexp of the reference, torch's operator those of its forward pass.
pgolf's dq is float32, that of the others bfloat16.

`ms_bwd` is the backward pass alone. `tflops` are its counted operations per second: five products of 2 K
operations per head and pair of a token with one that it attends to, without what tiles waste. `error_dq`,
`error_dk` and `error_dv` are relative to the norm of the gradients in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from bench.ce_peers import working
from bench.common import Recorder, Sample, only, parser, time_graph, time_launched, torch_name
from bench.heads import CASES, GROUPS, HEADS, QUICK, WIDTH, random
from bench.step import real_lengths
from pgolf.data.loader import padded_cu_seqlens
from pgolf.model.attention import find_fa4
from pgolf.ops import doc_attention_backward, doc_attention_backward_ref, doc_attention_ref

Gradients = tuple[Tensor, Tensor, Tensor]


def flash_attn_4(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Gradients:
    """Return the gradients of flash-attn-4; `rest` is y, lse, cu_seqlens and the tokens of the longest."""
    dq, dk, dv = torch.ops.pgolf.fa4_backward(grad, q, k, v, *rest)
    return dq, dk, dv


def torch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int
) -> Callable[[], Gradients]:
    """Return the backward pass alone of torch's variable-length attention."""
    ops, sizes = torch.ops.aten, (cu_seqlens, cu_seqlens, longest, longest, 0.0, True)
    y, lse, state, unused, _ = ops._flash_attention_forward(q, k, v, *sizes, False)
    return lambda: ops._flash_attention_backward(grad, q, k, v, y, lse, *sizes, state, unused)


def contenders(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], cu_seqlens: Tensor, longest: int
) -> dict[str, Callable[[], Gradients]]:
    """Return every implementation; `inputs` are the gradient of y, q, k and v."""
    y, lse = doc_attention_ref(*inputs[1:], cu_seqlens)
    found: dict[str, Callable[[], Gradients]] = {
        "pgolf": lambda: doc_attention_backward(*inputs, y, lse, cu_seqlens)
    }
    if y.device.type != "cuda":
        return found
    peer = find_fa4()
    if peer.usable:
        found[f"flash-attn-4 {peer.version}"] = lambda: flash_attn_4(*inputs, y, lse, cu_seqlens, longest)
    else:
        print(f"flash-attn-4 {peer.problem}")
    try:
        found[torch_name("varlen")] = torch_backward(*inputs, cu_seqlens, longest)
    except (RuntimeError, ValueError, TypeError) as e:  # its operators are private and differ by version
        print(f"torch's attention: {e}")
    return found


def operations(cu_seqlens: Tensor) -> float:
    """Return the operations of the five products of the backward pass, over the causal pairs of tokens."""
    lengths = cu_seqlens.diff().double()
    return 5 * 2 * WIDTH * HEADS * float((lengths * (lengths + 1) / 2).sum())


def measure(recorder: Recorder, case: str, args: argparse.Namespace) -> None:
    """Time one case, compare it with float64, and record both."""
    tokens, device = CASES[case], recorder.device
    grad, q = (random(recorder, tokens, HEADS, WIDTH, seed=seed) for seed in (0, 1))
    both = random(recorder, tokens, 2 * GROUPS, WIDTH, seed=2)
    inputs = grad, q, both[:, :GROUPS], both[:, GROUPS:]
    cu_seqlens = padded_cu_seqlens(real_lengths(tokens), tokens).to(device)
    longest = int(cu_seqlens.diff().max())
    flop = operations(cu_seqlens)
    recorder.add(case, "counted", "tflop", Sample(flop / 1e12, 0.0, 1), "TFLOP")

    found = working(only(contenders(inputs, cu_seqlens, longest), args.only))
    wide = [t.double() for t in inputs]
    truth = doc_attention_backward_ref(*wide, *doc_attention_ref(*wide[1:], cu_seqlens), cu_seqlens)
    for label, call in found.items():
        for name, got, true in zip(("dq", "dk", "dv"), call(), truth, strict=True):
            error = float((got.double() - true).norm() / true.norm())
            recorder.add(case, label, f"error_{name}", Sample(error, 0.0, 1), "1")
    del wide, truth

    repeats = args.repeats
    samples = time_graph(found, device, repeats=repeats) or time_launched(found, device, repeats=repeats)
    for label, sample in samples.items():
        recorder.add(case, label, "ms_bwd", sample, "ms")
        rate = flop / sample.value / 1e9
        spread = rate * sample.spread / sample.value
        recorder.add(case, label, "tflops", Sample(rate, spread, sample.n), "TFLOP/s")


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
