"""One stack of matrices on its way to codes: what is known of it, its steps, its codes.

Between calibration and rounding: `prepare` gathers a bank's weights, factored Hessians and row sensitivities;
`common_step` finds the one cost of a step that all banks share; `Matrices.quantize` makes the codes.
Legend: `B` matrices of a bank, `R` rows, `C` columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf.config import QuantConfig
from pgolf.quant.allocate import (
    Grid,
    balanced_grid,
    code_deviations,
    column_factors,
    column_weights,
    histogram_of,
    mean_bits,
    widening_for,
)
from pgolf.quant.gptq import Factored, factorize, gptq_on_grid, row_errors
from pgolf.quant.grid import QuantizedTensor, log_steps, max_code, sdclip_scales
from pgolf.quant.sensitivity import Curvature, unit_trace

TRELLIS_FROM = 2.0
"""Bits a code from which on a bank takes the trellis. A Gaussian of equal steps breaks even near 1.1 bits and
gains a quarter of the error at 3; rows and columns of a bank differ, and those of few bits lose."""

TRELLIS_DEVIATION = 0.5
"""Steps that the weights of a row or column deviate by at least on a trellis, where a code of 0 means a
quarter of a step: a row that hardly matters to the calibration has wide steps, and would become noise louder
than itself. A tiny model with a layer of zeros lost 0.73 bpb so."""


@dataclass(frozen=True)
class Matrices:
    """One parameter that GPTQ takes."""

    weight: Tensor
    """`(B, R, C)` float32."""
    factored: Factored
    row_weight: Tensor | None
    """`(B, R)`, the loss's curvature along each output; None where steps follow the spread."""
    bits: int
    clip: float

    def grid(self, step: float, config: QuantConfig) -> Grid:
        """Return the steps: `step` is a factor on the clip, or with row weights the cost of a step's root."""
        d = column_weights(self.factored)
        if self.row_weight is not None:
            mean = d.mean(-1, keepdim=True)
            equal = balanced_grid(self.row_weight * mean, None, step)
            return self._inside(balanced_grid(self.row_weight, d, step) if config.column_steps else equal)
        if not config.column_steps:
            return Grid(sdclip_scales(self.weight, bits=self.bits, clip=self.clip * step))
        columns, _ = column_factors(d)
        scales = sdclip_scales(
            self.weight / columns.float().unsqueeze(1), bits=self.bits, clip=self.clip * step
        )
        return Grid(log_steps(scales), columns)

    def error(self, index: int, quantized: QuantizedTensor) -> tuple[Tensor, Tensor]:
        """Return W - W' `(R, C)` of one matrix of the bank, and its inputs' power `(C,)`."""
        approx = quantized.dequantize().reshape(self.weight.shape)[index].to(self.weight.device)
        return self.weight[index] - approx, self.factored.hessian[index].diagonal()

    def errors(self, quantized: QuantizedTensor) -> Tensor:
        """Return `(B,)` float64, each matrix's error in the H norm, times the weight of its rows if known."""
        approx = quantized.dequantize().reshape(self.weight.shape).to(self.weight.device)
        rows = row_errors(self.weight, approx, self.factored.hessian)
        return rows.sum(-1) if self.row_weight is None else (rows * self.row_weight).sum(-1)

    def _inside(self, grid: Grid) -> Grid:
        """Return the grid with steps wide enough for the largest weight of each row."""
        unit = self.weight if grid.columns is None else self.weight / grid.columns.float().unsqueeze(1)
        least = unit.abs().amax(-1) / (max_code(self.bits) - 1)  # a trellis may go up by almost 1
        # log_steps rounds to the nearest: half a grid step more, so that it never rounds below.
        return Grid(torch.maximum(grid.scales, log_steps(least * 2.0 ** (1 / 16))), grid.columns)

    def _fine_enough(self, grid: Grid) -> Grid:
        """Return the grid with columns and rows that deviate by `TRELLIS_DEVIATION` steps or more.

        But for rows whose largest weight would be clipped. Steps by spread are fine enough as they are.
        """
        if self.row_weight is None:
            return grid
        scales, columns = grid.scales, grid.columns
        x = self.weight / scales.float().unsqueeze(-1)
        if columns is not None:
            deviation = (x / columns.float().unsqueeze(1)).square().mean(1).sqrt()
            columns = _finer(columns, deviation)
            x = x / columns.float().unsqueeze(1)
        return self._inside(Grid(_finer(scales, x.square().mean(-1).sqrt()), columns))

    def quantize(self, step: float, config: QuantConfig) -> QuantizedTensor:
        """Return codes `(B, R, C)`, scales `(B, R)` and columns `(B, C)`; a trellis only where it pays."""
        grid = self.grid(step, config)
        bits = mean_bits(histogram_of(code_deviations(self.weight, grid)), 0.0)
        trellis = config.trellis and bits >= TRELLIS_FROM
        if trellis:
            grid = self._fine_enough(grid)
        return gptq_on_grid(
            self.weight,
            self.factored,
            grid.scales,
            bits=self.bits,
            columns=grid.columns,
            rate=config.rate,
            trellis=trellis,
        )


def _finer(steps: Tensor, deviation: Tensor) -> Tensor:
    """Return steps of which nothing deviates by less than TRELLIS_DEVIATION, on the logarithmic grid."""
    finer = log_steps(steps.float() * deviation / TRELLIS_DEVIATION)
    return torch.where(deviation < TRELLIS_DEVIATION, torch.minimum(steps, finer), steps)


def prepare(
    weight: Tensor, hessian: Tensor, kind: str, config: QuantConfig, curvature: Curvature | None
) -> Matrices:
    """Gather what quantizing one bank `(B, R, C)`, or one matrix `(R, C)`, needs, on the Hessian's device.

    Args:
        weight: the parameter. hessian: `(B, C, C)`.
        kind: of its inputs; "mlp_*", "attn_*" or "head" chooses clip and bits.
        curvature: of the parameter, needed for config.row_steps = "loss".
    Raises:
        ValueError: no curvature although config asks for it; NaN or infinity.
    """
    family = kind.split("_")[0]
    stack = weight.detach().to(hessian.device).reshape(hessian.shape[0], -1, weight.shape[-1]).float()
    g = None
    if config.row_steps == "loss":
        if curvature is None:
            raise ValueError("quant.row_steps=loss needs the curvature of collect_curvature, got none")
        # The gradients' gram matrix weighs the x x^T of a token by how much the loss minds that token: exact
        # for a tied embedding, whose rows are inputs too, and a noisier estimate than H for all others.
        hessian = unit_trace(curvature.gram.to(hessian.device) if family == "head" else hessian)
        g = curvature.rows.to(hessian.device)
        floor = config.embed_floor if family == "head" else config.row_floor
        g = g.clamp(min=floor * g.mean(-1, keepdim=True))
    clips = {"mlp": config.mlp_clip, "attn": config.attn_clip, "head": config.embed_clip}
    return Matrices(
        weight=stack,
        factored=factorize(hessian, damp=config.damp),
        row_weight=g,
        bits=config.embed_bits if family == "head" else config.matrix_bits,
        clip=clips[family],
    )


def common_step(banks: list[Matrices], config: QuantConfig) -> float:
    """Return the root of the cost of a step at which the codes of all banks average config.mean_bits bits."""
    step = 1.0
    for _ in range(3):  # the first grid may end outside the range of steps; the last is near the target
        histograms = [histogram_of(code_deviations(b.weight, b.grid(step, config))) for b in banks]
        step *= 2.0 ** widening_for(torch.stack(histograms).sum(0), config.mean_bits)
    return step
