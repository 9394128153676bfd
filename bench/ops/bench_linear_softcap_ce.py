"""linear_softcap_ce, forward and forward with backward, compared with other losses from hidden states.

Hidden states and weight are bfloat16 (float32 on the CPU), cap 30, mean loss, both gradients. `_fast` cases
are compared with implementations that hold all logits, `_memory` cases (memory="low") with those that hold a
part. The three matrix products of 98304 x 8192 x 512 need at least 3.09 ms at 800 TFLOP/s and 3.81 ms at 650
TFLOP/s. Peak memory does not include inputs and gradients.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bench import ce_peers
from bench.common import Recorder, only, parser, peak_mib, time_graph, time_launched, torch_name
from pgolf.ops import linear_softcap_ce, linear_softcap_ce_ref

CAP = 30.0
# By shape: (rows, vocab, width), from the smallest to the largest.
SHAPES = {
    "n1024_v8192_d512": (1024, 8192, 512),
    "n98304_v8192_d512": (98304, 8192, 512),
    "n32768_v50304_d768": (32768, 50304, 768),
    "n4096_v128256_d4096": (4096, 128256, 4096),
    "n8192_v131072_d4096": (8192, 131072, 4096),
}
CASES = [f"{shape}_{mode}" for shape in SHAPES for mode in ("fast", "memory")]
QUICK = 2
"""Number of cases, from the first, that only --quick runs, so that a whole run takes at most a minute."""


def compiled_chunks(rows_each: int) -> ce_peers.FromHidden:
    """Return the compiled loss in chunks of rows, each of which the backward pass computes again."""
    from torch.utils.checkpoint import checkpoint

    def part(x: Tensor, w: Tensor, y: Tensor, cap: float) -> Tensor:
        return linear_softcap_ce_ref(x, w, y, cap, reduction="sum")

    jit = torch.compile(part, dynamic=False, fullgraph=True)

    def loss(x: Tensor, w: Tensor, y: Tensor, cap: float) -> Tensor:
        parts = zip(x.split(rows_each), y.split(rows_each), strict=True)
        sums = [checkpoint(jit, xs, w, ys, cap, use_reentrant=False) for xs, ys in parts]
        return torch.stack(sums).sum() / len(y)

    return loss


def losses(mode: str, rows: int) -> dict[str, ce_peers.FromHidden]:
    """Return every implementation of one mode."""
    if mode == "fast":
        return {
            "pgolf": linear_softcap_ce,
            torch_name("compile"): torch.compile(linear_softcap_ce_ref, dynamic=False, fullgraph=True),
            **ce_peers.materialising(),
        }
    return {
        "pgolf": lambda x, w, y, cap: linear_softcap_ce(x, w, y, cap, memory="low"),
        torch_name("compile, 4 chunks"): compiled_chunks(rows // 4),
        **ce_peers.chunked(),
    }


def forward(loss: ce_peers.FromHidden, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Return the mean loss, without a graph."""
    with torch.no_grad():
        return loss(hidden, weight, target, CAP)


def forward_backward(
    loss: ce_peers.FromHidden, hidden: Tensor, weight: Tensor, target: Tensor
) -> tuple[Tensor, ...]:
    """Return both gradients of the mean loss."""
    return torch.autograd.grad(loss(hidden, weight, target, CAP), (hidden, weight))


def measure(recorder: Recorder, case: str, repeats: int, peers: list[str]) -> None:
    """Time one case and record it."""
    shape, mode = case.rsplit("_", 1)
    rows, vocab, width = SHAPES[shape]
    device = recorder.device
    g = torch.Generator().manual_seed(0)
    target = torch.randint(vocab, (rows,), generator=g).to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.empty(rows, width, dtype=dtype, device=device).normal_().requires_grad_()
    weight = torch.empty(vocab, width, dtype=dtype, device=device).normal_(0, 5 / width**0.5)
    inputs = (hidden, weight.requires_grad_(), target)
    implementations = only(losses(mode, rows), peers)
    calls = {n: lambda f=f: forward_backward(f, *inputs) for n, f in implementations.items()}
    both = ce_peers.working(calls, recorder.first_calls(case))
    forwards = {n: lambda n=n: forward(implementations[n], *inputs) for n in both}
    for metric, timed in (("ms_fwd", forwards), ("ms_fwd_bwd", both)):
        for name, sample in time_launched(timed, device, repeats=repeats, warm_up=1).items():
            recorder.add(case, name, metric, sample, "ms")
    # A graph shows the kernels alone, as if the queue were full; a launched call starts on an idle device.
    for name, sample in time_graph(both, device, repeats=repeats).items():
        recorder.add(case, name, "ms_fwd_bwd_graph", sample, "ms")
    gradients = sum(t.numel() * t.element_size() for t in (hidden, weight)) / 2**20
    for name, call in both.items():
        peak = peak_mib(call, device)
        if peak is not None:
            recorder.add(case, name, "peak_mib", replace(peak, value=peak.value - gradients), "MiB")


def main() -> None:
    """Parse arguments, measure, write."""
    args = parser(__doc__ or "", CASES).parse_args()
    recorder = Recorder("linear_softcap_ce", torch.device(args.device), None if args.quick else args.out)
    chosen = args.cases[:QUICK] if args.quick else args.cases
    for case in chosen[QUICK:] if chosen == CASES else chosen:
        torch.compiler.reset()
        if recorder.device.type == "cuda":
            torch.cuda.empty_cache()
        # The largest shape takes 20 times as long as PR #1855's.
        repeats = 3 if args.quick else args.repeats if "d4096" not in case else max(args.repeats // 4, 3)
        measure(recorder, case, repeats, args.only)
    recorder.write()


if __name__ == "__main__":
    main()
