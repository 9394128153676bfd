"""norm_mlp, forward and forward with backward, compared with torch.compile and quack.

y = x + leaky_relu(rms_norm(x) up^T, 0.5)^2 down^T in bfloat16 (float32 on the CPU), with random inputs and
weights. Its products take most of the GPU's power, so each contender runs for some seconds before it is
timed, until the clock has settled, and passes follow each other without a gap. Peak memory does not include
inputs and gradients. The six products of 98304 x 512 x 2048 need at least 1.55 ms at 800 TFLOP/s and 1.87 ms
at 660 TFLOP/s, the two of the forward pass a third of that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ce_peers import find, working
from bench.common import Recorder, only, parser, peak_mib, time_launched, torch_name
from bench.step import record_settled
from pgolf.ops import norm_mlp, norm_mlp_ref

SLOPE = 0.5
# By case: (tokens, width, hidden width).
SHAPES = {"t1024_d512_m2048": (1024, 512, 2048), "t98304_d512_m2048": (98_304, 512, 2048)}
QUICK = 1
"""Number of cases, from the first, that only --quick runs."""

Branch = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, up, down) -> x and what the branch adds to it."""


def branches() -> dict[str, Branch]:
    """Return every implementation."""

    def composed(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return norm_mlp_ref(x, up, down, x, slope=SLOPE)

    found: dict[str, Branch] = {
        "pgolf": lambda x, up, down: norm_mlp(x, up, down, x, slope=SLOPE),
        torch_name("compile"): torch.compile(composed, dynamic=False, fullgraph=True),
        torch_name("eager"): composed,
    }
    # It has no leaky form; relu^2 is less work in the epilogue and the same between the products.
    if quack := find("quack, relu^2", "quack-kernels", "quack.mlp", "mlp_func"):
        name, mlp_func = quack
        norm = torch.compile(lambda x: F.rms_norm(x, x.shape[-1:]), dynamic=False, fullgraph=True)
        # Tuning takes minutes, see the bench of linear_softcap_ce.
        found[f"{name}, untuned"] = lambda x, up, down: (
            x + mlp_func(norm(x), up, down, activation="relu_sq", tuned=False)
        )
    return found


def measure(recorder: Recorder, case: str, args: argparse.Namespace) -> None:
    """Time one case and record it."""
    tokens, width, hidden = SHAPES[case]
    device = recorder.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    g = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int, std: float) -> Tensor:
        return torch.empty(rows, columns).normal_(0, std, generator=g).to(device, dtype)

    inputs = tuple(
        t.requires_grad_()
        for t in (
            random(tokens, width, 1.0),
            random(hidden, width, width**-0.5),
            random(width, hidden, hidden**-0.5),
        )
    )
    upstream = random(tokens, width, 1.0)

    def forward(branch: Branch) -> Tensor:
        with torch.no_grad():
            return branch(*inputs)

    def both(branch: Branch) -> tuple[Tensor, ...]:
        return torch.autograd.grad(branch(*inputs), inputs, upstream)

    found = only(branches(), args.only)
    calls = working({name: lambda b=branch: both(b) for name, branch in found.items()})
    forwards = {name: lambda b=found[name]: forward(b) for name in calls}
    gradients = sum(t.numel() * t.element_size() for t in inputs) / 2**20
    for name, call in calls.items():
        peak = peak_mib(call, device)
        if peak is not None:
            recorder.add(case, name, "peak_mib", replace(peak, value=peak.value - gradients), "MiB")
    for metric, timed in (("ms_fwd", forwards), ("ms_fwd_bwd", calls)):
        if device.type != "cuda":
            for name, sample in time_launched(timed, device, repeats=args.repeats).items():
                recorder.add(case, name, metric, sample, "ms")
            continue
        record_settled(recorder, case, metric, timed, seconds=0.5 if args.quick else args.seconds)


def main() -> None:
    """Parse arguments, measure, write."""
    arguments = parser(__doc__ or "", list(SHAPES))
    arguments.add_argument(
        "--seconds", type=float, default=3.0, help="seconds of passes before the timed ones, and of those"
    )
    args = arguments.parse_args()
    recorder = Recorder("norm_mlp", torch.device(args.device), None if args.quick else args.out)
    chosen = args.cases[:QUICK] if args.quick else args.cases
    args.repeats = 3 if args.quick else args.repeats
    for case in chosen:
        torch.compiler.reset()
        measure(recorder, case, args)
    recorder.write()


if __name__ == "__main__":
    main()
