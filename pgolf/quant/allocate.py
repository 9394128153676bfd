"""Which step every row and column gets: by its spread (SDClip), or by what its error costs the loss.

At many bits a code of step s costs s^2 / 12 in squared error and log2(sigma / s) bits. If a squared error in
weight (r, j) costs g_r d_j, the least total cost at a given total of bits has g_r d_j s_rj^2 the same for
every weight of the model (reverse water-filling): s_rj = sqrt(theta / (g_r d_j)). Here d_j is the variance of
input j given the inputs rounded after it (what GPTQ leaves of H; its product is det H in any order) and g_r
the sensitivity of output r. Against steps by spread this gains half the log of the arithmetic over the
geometric mean of g d s^2. Legend: `B` matrices of a bank, `R` rows, `C` columns.
Source: Cover and Thomas, Elements of Information Theory, 10.3.3; per-column steps for GPTQ as in WaterSIC.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pgolf.quant.gptq import Factored
from pgolf.quant.grid import log_steps

TABLE_LOW, TABLE_HIGH, TABLE_STEPS = -6.0, 8.0, 64
"""Range of log2(deviation in steps) of the entropy table, and its points an octave."""


@dataclass(frozen=True)
class Grid:
    """The steps of a stack of matrices: row r, column j has step scales[r] * columns[j]."""

    scales: Tensor
    """`(B, R)` float16."""
    columns: Tensor | None = None
    """`(B, C)` float16, or None for 1."""


def balanced_grid(row_weight: Tensor, column_weight: Tensor | None, step: float) -> Grid:
    """Return s_rj = step / sqrt(g_r d_j), on the logarithmic grid of steps.

    Args:
        row_weight: g `(B, R)`. column_weight: d `(B, C)`; None gives columns no steps of their own.
        step: sqrt(theta); the cost of an error of one step is its square.
    """
    g = row_weight.double()
    g = g.clamp(min=1e-300)
    columns = None
    if column_weight is not None:
        columns, middle = column_factors(column_weight)
        g = g * middle
    return Grid(log_steps(step * g.rsqrt()), columns)


def column_factors(column_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 / sqrt(d) over its geometric mean, float16 `(B, C)`, and that mean of d, float64 `(B, 1)`."""
    d = column_weight.double().clamp(min=1e-300)
    middle = d.log().mean(-1, keepdim=True).exp()
    return log_steps((middle / d).sqrt()), middle


def column_weights(factored: Factored) -> Tensor:
    """Return d `(B, C)` float32, H's units; a dead column gets the smallest live one."""
    d = factored.conditional()
    least = d.masked_fill(factored.dead, torch.inf).amin(-1, keepdim=True)
    return torch.where(factored.dead, torch.where(least.isinf(), torch.ones_like(least), least), d)


def code_deviations(weight: Tensor, grid: Grid) -> Tensor:
    """Return `(B, R, C)` log2 of the expected deviation of each code: row spread times column spread."""
    x = weight.float() / grid.scales.float().unsqueeze(-1)
    if grid.columns is not None:
        x = x / grid.columns.float().unsqueeze(-2)
    square = x.square_()
    rows, columns = square.mean(-1, keepdim=True), square.mean(-2, keepdim=True)
    product = rows * columns / square.mean((-1, -2), keepdim=True).clamp(min=1e-30)
    return 0.5 * product.clamp(min=1e-30).log2()


def gaussian_bits(log2_deviation: Tensor) -> Tensor:
    """Return the entropy, bits, of a Gaussian rounded to integers, from log2 of its deviation."""
    table = _entropy_table().to(log2_deviation.device)
    at = ((log2_deviation.double() - TABLE_LOW) * TABLE_STEPS).clamp(0, len(table) - 1.001)
    low = at.floor().long()
    return table[low] + (table[low + 1] - table[low]) * (at - low)


def mean_bits(histogram: Tensor, log2_wider: float) -> float:
    """Return the mean bits of a code when all steps are 2^log2_wider times as wide; see `histogram_of`."""
    centers = TABLE_LOW + (torch.arange(len(histogram), dtype=torch.float64) + 0.5) / TABLE_STEPS
    return float((histogram * gaussian_bits(centers - log2_wider)).sum() / histogram.sum())


def histogram_of(log2_deviation: Tensor) -> Tensor:
    """Return counts float64 on the CPU of log2 deviations in bins of the entropy table's width."""
    bins = round((TABLE_HIGH - TABLE_LOW) * TABLE_STEPS)
    at = ((log2_deviation - TABLE_LOW) * TABLE_STEPS).clamp(0, bins - 1).long()
    return torch.bincount(at.flatten(), minlength=bins).double().cpu()


def widening_for(histogram: Tensor, target: float) -> float:
    """Return log2 of the factor on all steps that gives `target` mean bits a code; bisection."""
    low, high = -16.0, 16.0
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if mean_bits(histogram, middle) > target else (low, middle)
    return 0.5 * (low + high)


@cache
def _entropy_table() -> Tensor:
    count = round((TABLE_HIGH - TABLE_LOW) * TABLE_STEPS) + 1
    deviation = torch.exp2(TABLE_LOW + torch.arange(count, dtype=torch.float64) / TABLE_STEPS)
    edges = (torch.arange(0, 1400, dtype=torch.float64) + 0.5)[None] / deviation[:, None]
    above = 0.5 * torch.erfc(edges / 2**0.5)
    centre = 1 - 2 * above[:, :1]
    p = torch.cat([centre, (above[:, :-1] - above[:, 1:])], dim=1)
    bits = -torch.where(p > 0, p * p.clamp(min=1e-300).log2(), 0.0)
    return bits[:, 0] + 2 * bits[:, 1:].sum(-1)
