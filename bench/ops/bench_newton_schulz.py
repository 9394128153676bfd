"""newton_schulz on the model's weight banks and on large matrices, compared with torch and public kernels.

`bank66` is all 66 matrices of preset pr1855, `eighth` the share of one rank of eight. Input and output are
bfloat16, with the coefficients of `polar_express_golf`. A call iterates the whole set of banks. The contender
`pgolf standard` is the portable kernel. sv_min and sv_max are the extreme singular values of the first matrix
of each bank after the iteration. For large squares, `tflops` is the rate of products at settled clocks: that
of pgolf, counted as 4 n^3 operations per iteration (those of the standard form if half of its two symmetric
products is computed), and that of cuBLAS for as many operations in plain products of the same matrices. More
is better.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.ce_peers import working
from bench.common import Recorder, Sample, only, parser, time_graph, time_launched, torch_name
from bench.polar_peers import Table, each, others, torch_iteration
from pgolf.ops import newton_schulz_banks
from pgolf.optim.polar import coefficients

Banks = list[Tensor]

BANK66 = [(22, 512, 512), (22, 256, 512), (11, 2048, 512), (11, 512, 2048)]
EIGHTH = [(3, 512, 512), (3, 256, 512), (2, 2048, 512), (2, 512, 2048)]
# Large squares; three matrices of Kimi-K3, 1536 x 7168, 18432 x 1536 and 12288 x 7168; 384 experts of a
# mixture; the up-projections of 24 blocks. Their cases are named `BxMxN`.
LARGE = [(1, 1536, 7168), (1, 18432, 1536), (24, 1024, 4096), (16, 2048, 2048), (4, 4096, 4096)]
LARGE += [(384, 768, 2048), (1, 12288, 7168)]
# Sides that the portable kernel pads, small matrices and a long side, whose numerics are tested, too.
ODD = [(5, 257, 511), (7, 320, 1000), (64, 128, 128), (9, 2048, 64)]
# Small squares, few and many, and a longer side: which of the two kernels of a Hopper GPU should take them
# (`kNsPortableSide` of csrc/kernels/newton_schulz_sm90.h).
SMALL = [(64, side, side) for side in (32, 64, 96, 160, 192, 256)]
SMALL += [(8, 128, 128), (512, 128, 128), (64, 64, 128), (64, 128, 256)]
# By case: (bank shapes, iterations), from the smallest to the largest.
CASES = {
    "tiny_steps5": ([(4, 64, 64), (4, 32, 64), (2, 256, 64), (2, 64, 256)], 5),
    "eighth_steps4": (EIGHTH, 4),
    "eighth_steps5": (EIGHTH, 5),
    "bank66_steps4": (BANK66, 4),
    "bank66_steps5": (BANK66, 5),
} | {f"{b}x{m}x{n}": ([(b, m, n)], 5) for b, m, n in LARGE + ODD + SMALL}
QUICK = "tiny_steps5"
"""The case that only --quick runs, because a CPU takes minutes for an eighth in bfloat16."""
SETTLING_CALLS = 40
"""Calls in one measurement of a rate."""
SQUARE = 2048
"""Smallest side of the squares whose rate is measured."""
LARGEST_SPECTRUM = 2048
"""Largest short side for which singular values are computed; above it they take longer than the bench."""


def baddbmm(x: Tensor, table: Table) -> Tensor:
    """The iteration as three cuBLAS calls per iteration, with the scaling fused into the products."""
    tall = x.shape[-2] > x.shape[-1]
    X = x.mT if tall else x
    X = (X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(torch.bfloat16)
    for a, b, c in table:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if tall else X


def eager(x: Tensor, table: Table) -> Tensor:
    """The iteration as implementations of Muon usually write it."""
    tall = x.shape[-2] > x.shape[-1]
    X = x.mT if tall else x
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in table:
        A = X @ X.mT
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.mT if tall else X


def contenders(banks: Banks, table: Table) -> dict[str, Callable[[], Banks]]:
    """Return every implementation as a call over all banks."""
    hopper = banks[0].is_cuda and torch.cuda.get_device_capability(banks[0].device)[0] == 9
    hopper = hopper and all(side % 8 == 0 for x in banks for side in x.shape[1:])
    compiled = torch.compile(eager, dynamic=False, fullgraph=True)
    found = others(table) | torch_iteration(table)
    standard = {"pgolf standard": lambda: newton_schulz_banks(banks, table, algorithm="standard")}
    return {
        "pgolf": lambda: newton_schulz_banks(banks, table),
        **({"pgolf gram": lambda: newton_schulz_banks(banks, table, algorithm="gram")} if hopper else {}),
        **(standard if banks[0].is_cuda else {}),
        torch_name("eager"): lambda: [eager(x, table) for x in banks],
        torch_name("baddbmm"): lambda: [baddbmm(x, table) for x in banks],
        torch_name("compile"): lambda: [compiled(x, table) for x in banks],
        **{name: each(call, banks) for name, call in found.items()},
    }


def singular_values(outputs: Banks) -> tuple[float, float]:
    """Return the extreme singular values of the first matrices of all banks."""
    # Of the smaller Gram matrix in float64: the singular values of 1536 x 7168 themselves take seconds.
    firsts = [x[0].double() for x in outputs]
    grams = [x @ x.mT if x.shape[0] <= x.shape[1] else x.mT @ x for x in firsts]
    values = torch.cat([torch.linalg.eigvalsh(gram) for gram in grams]).clamp(min=0).sqrt()
    return values.min().item(), values.max().item()


def rates(recorder: Recorder, case: str, x: Tensor, table: Table, repeats: int) -> None:
    """Record the rate of products of pgolf and of cuBLAS on squares `(b, n, n)`, timed in turns."""
    b, n, _ = x.shape
    out = torch.empty_like(x)
    products = 2 * len(table)  # of 2 n^3 operations each
    calls: dict[str, Callable[[], object]] = {
        "pgolf": lambda: newton_schulz_banks([x], table),
        torch_name("bmm"): lambda: [torch.bmm(x, x, out=out) for _ in range(products)],
    }
    # Long measurements, because the clock falls within the first tenths of a second at full power.
    for name, ms in time_launched(calls, recorder.device, repeats=repeats, calls=SETTLING_CALLS).items():
        rate = products * 2 * b * n**3 / ms.value / 1e9
        recorder.add(case, name, "tflops", Sample(rate, rate * ms.spread / ms.value, ms.n), "TFLOP/s")


def measure(recorder: Recorder, case: str, repeats: int, peers: list[str]) -> None:
    """Time one case in both ways and record it."""
    shapes, steps = CASES[case]
    table = coefficients("polar_express_golf", steps)
    g = torch.Generator().manual_seed(0)
    device = recorder.device
    banks = [torch.randn(s, generator=g).to(device, torch.bfloat16) for s in shapes]
    calls = working(only(contenders(banks, table), peers), recorder.first_calls(case))
    for name, sample in time_launched(calls, device, repeats=repeats).items():
        recorder.add(case, name, "ms_launched", sample, "ms")
    for name, sample in time_graph(calls, device, repeats=repeats).items():
        recorder.add(case, name, "ms_graph", sample, "ms")
    if all(m == n >= SQUARE for _, m, n in shapes):
        rates(recorder, case, banks[0], table, repeats)
    if max(min(shape[1:]) for shape in shapes) > LARGEST_SPECTRUM:
        return
    for name, call in calls.items():
        low, high = singular_values(call())
        recorder.add(case, name, "sv_min", Sample(low, 0.0, 1), "1")
        recorder.add(case, name, "sv_max", Sample(high, 0.0, 1), "1")


@torch.no_grad()
def main() -> None:
    """Parse arguments, measure, write."""
    args = parser(__doc__ or "", [case for case in CASES if case != QUICK]).parse_args()
    recorder = Recorder("newton_schulz", torch.device(args.device), None if args.quick else args.out)
    for case in [QUICK] if args.quick else args.cases:
        torch.compiler.reset()
        measure(recorder, case, 3 if args.quick else args.repeats, args.only)
    recorder.write()


if __name__ == "__main__":
    main()
