"""softcap_ce, forward and forward with backward, compared with PyTorch, torch.compile and other libraries.

Logits are bfloat16, cap 30, mean loss. At 3.0 TB/s, 98304 x 8192 logits need at least 0.54 ms for forward
(one read) and, for forward and backward, 1.07 ms in one pass (one read, one write) or 1.61 ms in two. `pgolf
none` is the form with two passes, which accepts any upstream gradient. Peak memory includes the gradient but
not the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench import ce_peers
from bench.common import Recorder, only, parser, peak_mib, time_graph, time_launched, torch_name
from pgolf.ops import softcap_ce, softcap_ce_ref

CAP = 30.0
# By case: (rows, vocab), from the smallest to the largest.
CASES = {"n1024_v8192": (1024, 8192), "n98304_v8192": (98304, 8192)}


def losses() -> dict[str, ce_peers.FromLogits]:
    """Return every implementation."""
    return {
        "pgolf": softcap_ce,
        "pgolf inplace": lambda x, y, cap: softcap_ce(x, y, cap, inplace=True),
        "pgolf none": lambda x, y, cap: softcap_ce(x, y, cap, reduction="none").mean(),
        torch_name("eager"): softcap_ce_ref,
        torch_name("compile"): torch.compile(softcap_ce_ref, dynamic=False, fullgraph=True),
        **ce_peers.from_logits(),
    }


def forward(loss: ce_peers.FromLogits, logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean loss, without a graph."""
    with torch.no_grad():
        return loss(logits, target, CAP)


def forward_backward(loss: ce_peers.FromLogits, logits: Tensor, target: Tensor) -> Tensor:
    """Return the gradient of the mean loss."""
    (grad,) = torch.autograd.grad(loss(logits, target, CAP), logits)
    return grad


def measure(recorder: Recorder, case: str, repeats: int, peers: list[str]) -> None:
    """Time one case and record it."""
    rows, vocab = CASES[case]
    device = recorder.device
    g = torch.Generator().manual_seed(0)
    target = torch.randint(vocab, (rows,), generator=g).to(device)
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device=device).normal_(0, 5).requires_grad_()
    # For implementations that overwrite their input. The time of a kernel does not depend on the values.
    scratch = logits.detach().clone().requires_grad_()
    implementations = only(losses(), peers)
    inputs = {n: scratch if "inplace" in n or "liger" in n else logits for n in implementations}
    both = ce_peers.working(
        {n: lambda f=f, n=n: forward_backward(f, inputs[n], target) for n, f in implementations.items()}
    )
    forwards = {
        n: lambda n=n: forward(implementations[n], inputs[n], target) for n in both if "inplace" not in n
    }
    for metric, calls in (("ms_fwd", forwards), ("ms_fwd_bwd", both)):
        for name, sample in time_launched(calls, device, repeats=repeats).items():
            recorder.add(case, name, metric, sample, "ms")
    # A launched call starts on an idle device, so the time until the host starts the kernels counts; a graph
    # shows the kernels alone, as if the queue were full.
    for name, sample in time_graph(both, device, repeats=repeats).items():
        recorder.add(case, name, "ms_fwd_bwd_graph", sample, "ms")
    for name, call in both.items():
        peak = peak_mib(call, device)
        if peak is not None:
            recorder.add(case, name, "peak_mib", peak, "MiB")


def main() -> None:
    """Parse arguments, measure, write."""
    args = parser(__doc__ or "", list(CASES)).parse_args()
    recorder = Recorder("softcap_ce", torch.device(args.device), None if args.quick else args.out)
    for case in args.cases[:1] if args.quick else args.cases:
        torch.compiler.reset()
        measure(recorder, case, 3 if args.quick else args.repeats, args.only)
    recorder.write()


if __name__ == "__main__":
    main()
