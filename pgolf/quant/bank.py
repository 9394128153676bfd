"""One bank, a stack of matrices of one shape, between calibration and codes.

`prepare` gathers the weights of a bank, its factored Hessians and the sensitivities of its rows;
`common_scale` finds the one number from which the scales of all banks follow; `Bank.quantize` makes the
codes.
Legend: `B` matrices of a bank, `R` rows, `C` columns.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from pgolf.quant.gptq import Factored, drift_corrected, factorize, gptq_on_grid, row_errors
from pgolf.quant.grid import QuantizedTensor, log_scales, max_code, sdclip_scales
from pgolf.quant.lqer import Correction
from pgolf.quant.sensitivity import Curvature, unit_trace

TRELLIS_FROM = 2.0
"""Bits per code from which on a bank is rounded along a trellis. With equal scales a trellis breaks even near
1.1 bits; the rows and columns of a bank differ, and those of few bits lose."""

TRELLIS_DEVIATION = 0.5
"""Least deviation of a row or column on a trellis, in scales. A code of 0 means a quarter of a scale there,
and a row that hardly matters to the calibration gets a wide scale: it would become noise louder than
itself."""


MOST_GAIN = 0.5
"""Limit of the gains' distance from 1, for rows whose codes have next to nothing of their weights."""


@dataclass(frozen=True)
class Bank:
    """A parameter that GPTQ quantizes, with what is known of it."""

    weight: Tensor
    """`(B, R, C)` float32. It and its Hessians `factored` decide the scales."""
    factored: Factored
    row_weight: Tensor | None
    """`(B, R)`, the curvature of the loss along each output; None where scales follow the spread."""
    bits: int
    clip: float
    goal: Tensor
    """`(B, R, C)` float32, what the codes approximate: the weight, or the weight corrected for drift."""
    inputs: Factored
    """Hessians of the inputs on which they do: `factored`, or those of the quantized model."""

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
        """Return goal - W' `(R, C)` of one matrix of the bank, and its inputs' power `(C,)`."""
        approx = self._values(quantized)[index]
        return self.goal[index] - approx, self.inputs.hessian[index].diagonal()

    def errors(self, quantized: QuantizedTensor) -> Tensor:
        """Return `(B,)` float64, each matrix's error in the H norm, times the weight of its rows if known."""
        rows = row_errors(self.goal, self._values(quantized), self.inputs.hessian)
        return rows.sum(-1) if self.row_weight is None else (rows * self.row_weight).sum(-1)

    def gains(self, quantized: QuantizedTensor, corrections: Mapping[int, Correction]) -> Tensor:
        """Return t `(B, R)` float32, the factor on each row of W' with the least error of its outputs.

        t_r = w_r H w'_r^T / w'_r H w'_r^T with w of the goal, between 1 - MOST_GAIN and 1 + MOST_GAIN; 1
        where w'_r H w'_r^T is 0.

        Args:
            quantized: the codes of W'.
            corrections: matrix of the bank -> what is added to its W'.
        """
        approx, gains = self._values(quantized), []
        for i, correction in corrections.items():
            approx[i] += correction.dequantize().to(approx.device)
        for goal, mine, hessian in zip(self.goal, approx, self.inputs.hessian, strict=True):
            moved = mine.double() @ hessian.double()
            power = (moved * mine).sum(-1)
            gains.append(torch.where(power > 0, (moved * goal).sum(-1) / power, 1.0))
        return torch.stack(gains).clamp(1 - MOST_GAIN, 1 + MOST_GAIN).float()

    def _values(self, quantized: QuantizedTensor) -> Tensor:
        """Return W' `(B, R, C)` float32."""
        return quantized.dequantize().reshape(self.weight.shape).to(self.weight.device)

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
            self.goal,
            self.inputs,
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
    weight: Tensor,
    hessian: Tensor,
    kind: str,
    config: QuantConfig,
    curvature: Curvature | None,
    drift: tuple[Tensor, Tensor] | None = None,
) -> Bank:
    """Gather what quantizing a bank `(B, R, C)`, or one matrix `(R, C)`, needs, on the Hessian's device.

    Args:
        weight: the parameter.
        hessian: `(B, C, C)`.
        kind: of its inputs; "mlp_*", "attn_*" or "head" chooses clip and bits.
        curvature: of the parameter, needed where the scales of rows follow the loss.
        drift: of its inputs, the two tensors `(B, C, C)` of `Drift`; None leaves the weights as they are.
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
    factored = inputs = factorize(hessian, damp=config.damp)
    goal = stack
    if drift is not None:
        moved, shift = (t.to(hessian.device) for t in drift)
        # lerp returns `hessian` itself, to the bit, where both are equal.
        inputs = factorize(torch.lerp(hessian, moved, config.drift), damp=config.damp)
        goal = drift_corrected(stack, inputs, config.drift * shift)
    return Bank(
        weight=stack,
        factored=factored,
        row_weight=g,
        bits=config.embed_bits if family == "head" else config.matrix_bits,
        clip=clips[family],
        goal=goal,
        inputs=inputs,
    )


def common_scale(banks: list[Bank], config: QuantConfig) -> float:
    """Return the `common` of `Bank.grid` at which the codes of all banks average config.mean_bits bits."""
    common = 1.0
    for _ in range(3):  # the first grid may end outside the range of scales; the last is near the target
        histograms = [histogram_of(code_deviations(b.weight, b.grid(common, config))) for b in banks]
        common *= 2.0 ** widening_for(torch.stack(histograms).sum(0), config.mean_bits)
    return common
