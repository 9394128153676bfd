"""softcap_ce forward, and forward with backward, against eager PyTorch and torch.compile.

bfloat16 logits, cap 30. Traffic floors at 3.0 TB/s for 98304 x 8192: forward 0.54 ms (one read), forward and
backward 1.61 ms (two reads, one write).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.common import Recorder, parser, peak_mib, time_launched, torch_name
from pgolf.ops import softcap_ce, softcap_ce_ref

CAP = 30.0
# case -> (rows, vocab); from the smallest to the largest
CASES = {"n1024_v8192": (1024, 8192), "n98304_v8192": (98304, 8192)}

Loss = Callable[[Tensor, Tensor, float], Tensor]


def losses() -> dict[str, Loss]:
    """Return every implementation."""
    return {
        "pgolf": softcap_ce,
        torch_name("eager"): softcap_ce_ref,
        torch_name("compile"): torch.compile(softcap_ce_ref, dynamic=False, fullgraph=True),
    }


def forward_backward(loss: Loss, logits: Tensor, target: Tensor) -> Tensor:
    """Return the gradient of the mean loss."""
    (grad,) = torch.autograd.grad(loss(logits, target, CAP).mean(), logits)
    return grad


def measure(recorder: Recorder, case: str, repeats: int) -> None:
    """Time one case and record it."""
    rows, vocab = CASES[case]
    device = recorder.device
    g = torch.Generator().manual_seed(0)
    target = torch.randint(vocab, (rows,), generator=g).to(device)
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device=device).normal_(0, 5).requires_grad_()
    frozen = logits.detach()
    implementations = losses()
    forward = {name: lambda f=f: f(frozen, target, CAP) for name, f in implementations.items()}
    both = {name: lambda f=f: forward_backward(f, logits, target) for name, f in implementations.items()}
    for name, sample in time_launched(forward, device, repeats=repeats).items():
        recorder.add(case, name, "ms_fwd", sample, "ms")
    for name, sample in time_launched(both, device, repeats=repeats).items():
        recorder.add(case, name, "ms_fwd_bwd", sample, "ms")
    for name, call in both.items():
        peak = peak_mib(call, device)
        if peak is not None:
            recorder.add(case, name, "peak_mib", peak, "MiB")


def main() -> None:
    """Parse arguments, measure, write."""
    args = parser(__doc__ or "", list(CASES)).parse_args()
    recorder = Recorder("softcap_ce", torch.device(args.device))
    for case in args.cases[:1] if args.quick else args.cases:
        torch.compiler.reset()
        measure(recorder, case, 3 if args.quick else args.repeats)
    if not args.quick:
        recorder.write(args.out)


if __name__ == "__main__":
    main()
