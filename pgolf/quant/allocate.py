"""The scale of every row and column: by the spread of the row (SDClip), or by what its error costs the loss.

With many bits, a code of scale s costs s^2 / 12 in squared error and takes log2(sigma / s) bits. Let a
squared error in weight (r, j) cost g_r d_j. Then the least total cost for a given number of bits has
g_r d_j s_rj^2 equal for every weight of the model (reverse water-filling), so s_rj = sqrt(theta / (g_r d_j))
with one theta for the model. Here d_j is the variance of input j given the inputs that are rounded after it,
which is what GPTQ leaves of H (the product of the d_j is det H in any order), and g_r is the sensitivity of
output r.
Legend: `B` matrices of a bank, `R` rows, `C` columns.
Source: Cover and Thomas, Elements of Information Theory, 10.3.3; scales of columns for GPTQ as in WaterSIC
(arXiv 2603.04956).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pgolf.quant.gptq import Factored
from pgolf.quant.grid import log_scales

TABLE_LOW, TABLE_HIGH, TABLE_POINTS = -6.0, 8.0, 64
"""The entropy table: its range of log2(deviation / scale), and its points per octave."""


@dataclass(frozen=True)
class Grid:
    """The scales of a stack of matrices: the weight in row r and column j has scales[r] * columns[j]."""

    scales: Tensor
    """`(B, R)` float16."""
    columns: Tensor | None = None
    """`(B, C)` float16, or None for 1."""


def balanced_grid(row_weight: Tensor, column_weight: Tensor | None, common: float) -> Grid:
    """Return s_rj = common / sqrt(g_r d_j), on the logarithmic grid of scales.

    Args:
        row_weight: g `(B, R)`.
        column_weight: d `(B, C)`; None gives the columns no scales of their own.
        common: sqrt(theta).
    """
    g = row_weight.double()
    g = g.clamp(min=1e-300)
    columns = None
    if column_weight is not None:
        columns, middle = column_factors(column_weight)
        g = g * middle
    return Grid(log_scales(common * g.rsqrt()), columns)


def column_factors(column_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 / sqrt(d) over its geometric mean, float16 `(B, C)`, and that mean of d, float64 `(B, 1)`."""
    d = column_weight.double().clamp(min=1e-300)
    middle = d.log().mean(-1, keepdim=True).exp()
    return log_scales((middle / d).sqrt()), middle


def column_weights(factored: Factored) -> Tensor:
    """Return d `(B, C)` float32 in the units of H; a column without input gets the least d of the others."""
    d = factored.conditional()
    least = d.masked_fill(factored.dead, torch.inf).amin(-1, keepdim=True)
    return torch.where(factored.dead, torch.where(least.isinf(), torch.ones_like(least), least), d)


def code_deviations(weight: Tensor, grid: Grid) -> Tensor:
    """Return log2 of the expected deviation of each code `(B, R, C)`: row spread times column spread."""
    x = weight.float() / grid.scales.float().unsqueeze(-1)
    if grid.columns is not None:
        x = x / grid.columns.float().unsqueeze(-2)
    square = x.square_()
    rows, columns = square.mean(-1, keepdim=True), square.mean(-2, keepdim=True)
    product = rows * columns / square.mean((-1, -2), keepdim=True).clamp(min=1e-30)
    return 0.5 * product.clamp(min=1e-30).log2()


def gaussian_bits(log2_deviation: Tensor) -> Tensor:
    """Return the entropy in bits of a Gaussian rounded to integers, from log2 of its deviation."""
    table = _entropy_table().to(log2_deviation.device)
    at = ((log2_deviation.double() - TABLE_LOW) * TABLE_POINTS).clamp(0, len(table) - 1.001)
    low = at.floor().long()
    return table[low] + (table[low + 1] - table[low]) * (at - low)


def mean_bits(histogram: Tensor, log2_wider: float) -> float:
    """Return the mean bits per code if all scales were 2^log2_wider times as wide; see `histogram_of`."""
    centers = TABLE_LOW + (torch.arange(len(histogram), dtype=torch.float64) + 0.5) / TABLE_POINTS
    return float((histogram * gaussian_bits(centers - log2_wider)).sum() / histogram.sum())


def histogram_of(log2_deviation: Tensor) -> Tensor:
    """Count log2 deviations in bins of the width of the entropy table; float64 on the CPU."""
    bins = round((TABLE_HIGH - TABLE_LOW) * TABLE_POINTS)
    at = ((log2_deviation - TABLE_LOW) * TABLE_POINTS).clamp(0, bins - 1).long()
    return torch.bincount(at.flatten(), minlength=bins).double().cpu()


def widening_for(histogram: Tensor, target: float) -> float:
    """Return log2 of the factor on all scales that gives `target` mean bits per code, by bisection."""
    low, high = -16.0, 16.0
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if mean_bits(histogram, middle) > target else (low, middle)
    return 0.5 * (low + high)


@cache
def _entropy_table() -> Tensor:
    count = round((TABLE_HIGH - TABLE_LOW) * TABLE_POINTS) + 1
    deviation = torch.exp2(TABLE_LOW + torch.arange(count, dtype=torch.float64) / TABLE_POINTS)
    edges = (torch.arange(0, 1400, dtype=torch.float64) + 0.5)[None] / deviation[:, None]
    above = 0.5 * torch.erfc(edges / 2**0.5)
    centre = 1 - 2 * above[:, :1]
    p = torch.cat([centre, (above[:, :-1] - above[:, 1:])], dim=1)
    bits = -torch.where(p > 0, p * p.clamp(min=1e-300).log2(), 0.0)
    return bits[:, 0] + 2 * bits[:, 1:].sum(-1)
