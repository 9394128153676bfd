"""What roundings the portable kernel of newton_schulz can afford, emulated on the CPU.

Three forms of the iteration: `bfloat16` with every operand and intermediate in bfloat16, as the kernel was
before 2026-11-30; `float16` with the scaling of the Hopper kernel; and `remainders`, which the kernel does:
float16, and X keeps what its rounding took away while the later iterations would enlarge it. Prints, by shape
and kind of matrix, the largest difference of a singular value from the exact map of the input's singular
values. The kinds:

- `gaussian`: independent normal elements.
- `flat`: all singular values equal, which is worst where the composed polynomial is steep at that value.
- `i^-1`, `i^-1.5`: power laws.
- `rank`: a third of full rank, singular values i^-0.5. Rounding to 16 bits makes small singular values of its
  zeros.
- `exact`: a product of two random matrices of that rank with elements -1, 0 and 1, exact in every dtype.

Run from the repository: python -m bench.portable_emulation [--seeds N]
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from pgolf.optim.polar import Coefficients, coefficients

REST_SCALE = 2048.0
"""Factor of a remainder, `kRestScale` of csrc/kernels/batched_product.cuh."""
MOST_GROWTH = 16.0
"""`kMostGrowth` of csrc/kernels/newton_schulz_cuda.cu."""
KINDS = ("gaussian", "flat", "i^-1", "i^-1.5", "rank", "exact")
FORMS = ("bfloat16", "float16", "remainders")
SHAPES = ((257, 511), (320, 1000), (128, 128), (2048, 64), (512, 512), (105, 105), (65, 33), (16, 16), (5, 7))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def make_matrix(kind: str, rows: int, cols: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Return a `(rows, cols)` matrix of one of KINDS."""
    g = torch.Generator().manual_seed(seed)
    small = min(rows, cols)
    rank = max(small // 3, 1)
    if kind == "gaussian":
        return torch.randn(rows, cols, generator=g).to(dtype)
    if kind == "exact":
        left = torch.randint(-1, 2, (rows, rank), generator=g).float()
        return (left @ torch.randint(-1, 2, (rank, cols), generator=g).float()).to(dtype)
    u, _ = torch.linalg.qr(torch.randn(rows, small, generator=g, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(cols, small, generator=g, dtype=torch.float64))
    i = torch.arange(1, small + 1, dtype=torch.float64)
    s = {"flat": i**0, "i^-1": 1 / i, "i^-1.5": i**-1.5, "rank": (i <= rank) / i.sqrt()}[kind]
    return (u * s @ v.mT).to(dtype)


def deviation(got: Tensor, x: Tensor, table: tuple[Coefficients, ...]) -> float:
    """Return the largest difference of a singular value of `got` from the exact map of those of `x`."""
    s = torch.linalg.svdvals(x.double())
    p = s / s.square().sum(-1, keepdim=True).sqrt()
    for a, b, c in table:
        p = a * p + b * p**3 + c * p**5
    return (torch.linalg.svdvals(got.double()) - p.sort(descending=True).values).abs().max().item()


def has_rest(table: tuple[Coefficients, ...], step: int) -> bool:
    """Return whether the X that iteration `step` starts from has a remainder."""
    return math.prod(abs(a) for a, _, _ in table[step:]) > MOST_GROWTH


def emulate(x: Tensor, table: tuple[Coefficients, ...], form: str) -> Tensor:
    """Iterate one matrix with the roundings of a form; sums are float32."""
    wide = x if x.shape[0] <= x.shape[1] else x.mT
    out = _in_bfloat16(wide, table) if form == "bfloat16" else _in_float16(wide, table, form == "remainders")
    return (out if x.shape[0] <= x.shape[1] else out.mT).to(x.dtype)


def _in_bfloat16(x: Tensor, table: tuple[Coefficients, ...]) -> Tensor:
    X = (x.float() / (x.double().norm().float() + 1e-7)).bfloat16().float()
    for a, b, c in table:
        A = (X @ X.mT).bfloat16().float()
        B = (b * A + c * (A @ A)).bfloat16().float()
        X = (a * X + B @ X).bfloat16().float()
    return X


def _in_float16(x: Tensor, table: tuple[Coefficients, ...], remainders: bool) -> Tensor:
    norm = x.double().norm().item()
    scale = 2.0 ** (4 - math.floor(math.log2(norm)))
    exact, sigma = x.float() * scale, 1 / ((norm + 1e-7) * scale)
    for step, (a, b, c) in enumerate(table):
        X = exact.half().float()
        D = X
        if remainders and has_rest(table, step):
            D = X + ((exact - X) * REST_SCALE).half().float() / REST_SCALE
        A = (X @ X.mT).half().float()
        B = (b * sigma**2 * A + c * sigma**4 * (A @ A)).half().float()
        exact = a * sigma * D + sigma * (B @ X)
        sigma = 1.0
    return exact


def main() -> None:
    """Print the tables."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--seeds", type=int, default=3, help="matrices of each kind; the largest value counts")
    seeds = args.parse_args().seeds
    table = coefficients("polar_express_golf", 5)
    print(f"python -m bench.portable_emulation --seeds {seeds}: polar_express_golf, five iterations")
    print("largest |singular value - exact|, less is better, of the forms " + ", ".join(FORMS))
    for dtype in DTYPES:
        print(f"\ninput {dtype}".replace("torch.", ""))
        print(f"{'shape':>12}" + "".join(f"{kind:>23}" for kind in KINDS))
        for rows, cols in SHAPES:
            cells = []
            for kind in KINDS:
                matrices = [make_matrix(kind, rows, cols, dtype, seed) for seed in range(seeds)]
                worst = [
                    max(deviation(emulate(x, table, form), x, table) for x in matrices) for form in FORMS
                ]
                cells.append("  " + " ".join(f"{value:.4f}" for value in worst))
            print(f"{f'{rows} x {cols}':>12}" + "".join(f"{cell:>23}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
