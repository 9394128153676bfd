"""One bank, a stack of matrices of one shape, between calibration and codes.

`prepare` gathers the weights of a bank, its factored Hessians and the sensitivities of its rows;
`common_scale` finds the one number from which the scales of all banks follow; `Bank.quantize` makes the
codes.
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
from pgolf.quant.grid import QuantizedTensor, log_scales, max_code, sdclip_scales
from pgolf.quant.sensitivity import Curvature, unit_trace

TRELLIS_FROM = 2.0
"""Bits per code from which on a bank is rounded along a trellis. With equal scales a trellis breaks even near
1.1 bits; the rows and columns of a bank differ, and those of few bits lose."""

TRELLIS_DEVIATION = 0.5
"""Least deviation of a row or column on a trellis, in scales. A code of 0 means a quarter of a scale there,
and a row that hardly matters to the calibration gets a wide scale: it would become noise louder than
itself."""


@dataclass(frozen=True)
class Bank:
    """A parameter that GPTQ quantizes, with what is known of it."""

    weight: Tensor
    """`(B, R, C)` float32."""
    factored: Factored
    row_weight: Tensor | None
    """`(B, R)`, the curvature of the loss along each output; None where scales follow the spread."""
    bits: int
    clip: float

    def grid(self, common: float, config: QuantConfig) -> Grid:
        """Return the scales.

        Args:
            common: a factor on the clips; where the rows have weights, the argument of `balanced_grid`.
        """
        d = column_weights(self.factored)
        if self.row_weight is not None:
            mean = d.mean(-1, keepdim=True)
            equal = balanced_grid(self.row_weight * mean, None, common)
            return self._inside(balanced_grid(self.row_weight, d, common) if config.column_scales else equal)
        if not config.column_scales:
            return Grid(sdclip_scales(self.weight, bits=self.bits, clip=self.clip * common))
        columns, _ = column_factors(d)
        scales = sdclip_scales(
            self.weight / columns.float().unsqueeze(1), bits=self.bits, clip=self.clip * common
        )
        return Grid(log_scales(scales), columns)

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
        """Return the grid with every row's scale wide enough for its largest weight."""
        unit = self.weight if grid.columns is None else self.weight / grid.columns.float().unsqueeze(1)
        least = unit.abs().amax(-1) / (max_code(self.bits) - 1)  # a trellis may go up by almost 1
        # log_scales rounds to the nearest: a sixteenth of an octave more, so that it never rounds below.
        return Grid(torch.maximum(grid.scales, log_scales(least * 2.0 ** (1 / 16))), grid.columns)

    def _fine_enough(self, grid: Grid) -> Grid:
        """Return the grid with scales so fine that rows and columns deviate by `TRELLIS_DEVIATION` of them.

        A row whose largest weight would be clipped keeps a wider scale. Scales by spread stay as they are.
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

    def quantize(self, common: float, config: QuantConfig) -> QuantizedTensor:
        """Return codes `(B, R, C)`, scales `(B, R)`, columns `(B, C)`; on a trellis only where that pays."""
        grid = self.grid(common, config)
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


def _finer(scales: Tensor, deviation: Tensor) -> Tensor:
    """Return finer scales, on the logarithmic grid, where `deviation` is below TRELLIS_DEVIATION."""
    finer = log_scales(scales.float() * deviation / TRELLIS_DEVIATION)
    return torch.where(deviation < TRELLIS_DEVIATION, torch.minimum(scales, finer), scales)


def prepare(
    weight: Tensor, hessian: Tensor, kind: str, config: QuantConfig, curvature: Curvature | None
) -> Bank:
    """Gather what quantizing a bank `(B, R, C)`, or one matrix `(R, C)`, needs, on the Hessian's device.

    Args:
        weight: the parameter.
        hessian: `(B, C, C)`.
        kind: of its inputs; "mlp_*", "attn_*" or "head" chooses clip and bits.
        curvature: of the parameter, needed where the scales of rows follow the loss.
    Raises:
        ValueError: no curvature although `config` asks for it; NaN or infinity.
    """
    family = kind.split("_")[0]
    stack = weight.detach().to(hessian.device).reshape(hessian.shape[0], -1, weight.shape[-1]).float()
    g = None
    if config.row_scales == "loss":
        if curvature is None:
            raise ValueError("quant.row_scales=loss needs the curvature of collect_curvature, got none")
        # The gradients' gram matrix weighs the x x^T of a token by how much the loss minds that token: exact
        # for a tied embedding, whose rows are inputs too, and a noisier estimate than H for all others.
        hessian = unit_trace(curvature.gram.to(hessian.device) if family == "head" else hessian)
        g = curvature.rows.to(hessian.device)
        floor = config.embed_floor if family == "head" else config.row_floor
        g = g.clamp(min=floor * g.mean(-1, keepdim=True))
    clips = {"mlp": config.mlp_clip, "attn": config.attn_clip, "head": config.embed_clip}
    return Bank(
        weight=stack,
        factored=factorize(hessian, damp=config.damp),
        row_weight=g,
        bits=config.embed_bits if family == "head" else config.matrix_bits,
        clip=clips[family],
    )


def common_scale(banks: list[Bank], config: QuantConfig) -> float:
    """Return the `common` of `Bank.grid` at which the codes of all banks average config.mean_bits bits."""
    common = 1.0
    for _ in range(3):  # the first grid may end outside the range of scales; the last is near the target
        histograms = [histogram_of(code_deviations(b.weight, b.grid(common, config))) for b in banks]
        common *= 2.0 ** widening_for(torch.stack(histograms).sum(0), config.mean_bits)
    return common
