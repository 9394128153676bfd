"""The polar iteration with symmetric products in Triton, as in public speedruns, for comparison.

One kernel computes both symmetric products of an iteration, C = alpha A A^T + beta A: programs of tiles below
the diagonal return at once, the others write their tile and its transpose. cuBLAS computes the last product.
The kernel was written from the description of that design (modded-nanogpt, Dion), so that the bench needs
only Triton. Tile sizes are tuned at the first call of a shape.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.polar_peers import Table

CONFIGS = [
    triton.Config({"tile": tile, "depth": depth}, num_stages=stages, num_warps=warps)
    for tile, depth, stages, warps in ((128, 64, 4, 8), (128, 64, 4, 4), (128, 32, 4, 4), (64, 64, 4, 4))
]


@triton.autotune(configs=CONFIGS, key=["rows", "cols"])
@triton.jit
def _symmetric(a, c, rows, cols, alpha, beta, add: tl.constexpr, tile: tl.constexpr, depth: tl.constexpr):
    """Write C = alpha A A^T (+ beta A) for contiguous matrices (rows, cols); the grid is (tiles^2, batch)."""
    tiles = tl.cdiv(rows, tile)
    i = tl.program_id(0) // tiles
    j = tl.program_id(0) % tiles
    if j < i:
        return
    a += tl.program_id(1).to(tl.int64) * rows * cols
    c += tl.program_id(1).to(tl.int64) * rows * rows
    down = i * tile + tl.arange(0, tile)
    across = j * tile + tl.arange(0, tile)
    k = tl.arange(0, depth)
    total = tl.zeros((tile, tile), dtype=tl.float32)
    for start in range(0, cols, depth):
        inside = (start + k) < cols
        left = tl.load(
            a + down[:, None] * cols + (start + k)[None, :],
            mask=(down < rows)[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            a + across[:, None] * cols + (start + k)[None, :],
            mask=(across < rows)[:, None] & inside[None, :],
            other=0.0,
        )
        total = tl.dot(left, right.T, total)
    result = alpha * total
    inside = (down < rows)[:, None] & (across < rows)[None, :]
    if add:
        own = tl.load(a + down[:, None] * cols + across[None, :], mask=inside, other=0.0)
        result += beta * own.to(tl.float32)
    value = result.to(c.dtype.element_ty)
    tl.store(c + down[:, None] * rows + across[None, :], value, mask=inside)
    if i != j:
        tl.store(c + across[:, None] * rows + down[None, :], value.T, mask=inside.T)


def symmetric(a: Tensor, alpha: float, beta: float | None = None) -> Tensor:
    """Return alpha A A^T, or with `beta` alpha A A^T + beta A for symmetric A; `a` is (batch, rows, cols)."""
    batch, rows, cols = a.shape
    a = a.contiguous()
    out = torch.empty((batch, rows, rows), dtype=a.dtype, device=a.device)
    _symmetric[lambda meta: (triton.cdiv(rows, meta["tile"]) ** 2, batch)](
        a, out, rows, cols, alpha, beta or 0.0, beta is not None
    )
    return out


def triton_newton_schulz(x: Tensor, table: Table) -> Tensor:
    """Return the polar iteration of a `(batch, m, n)` tensor, computed in its dtype (bfloat16 on GPUs)."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = (x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)).to(x.dtype).contiguous()
    for a, b, c in table:
        gram = symmetric(x, 1.0)
        x = torch.baddbmm(x, symmetric(gram, c, b), x, beta=a)
    return x.mT if tall else x
