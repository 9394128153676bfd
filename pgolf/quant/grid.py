"""Symmetric quantization grids: a scale per row, and per column where that pays; codes and back.

This module owns the SDClip scale, the logarithmic grid of scales, rounding to the nearest code, and the int8
rows of the gates. `gptq.py` chooses the codes where the inputs of a matrix are known. All functions take
stacks of matrices; the last dimension holds the columns.
Legend: `B` matrices of a stack, `R` rows, `C` columns, `Q` largest code 2^(bits-1) - 1.
Source: SDClip of parameter-golf PR #1394: the scale follows the spread of a row, not its maximum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pgolf.errors import UserError, UserTypeError
from pgolf.ops import trellis_values

MIN_SCALE = 2.0**-24
"""Smallest positive float16 (subnormal); the floor of PR #1394, 1e-10, would round to 0."""
MAX_SCALE = 65504.0
"""Largest finite float16."""
SCALES_PER_OCTAVE = 8
"""Scales on the logarithmic grid are 2^(n/8), 9 % apart: a file stores the small integer n for each."""
LEAST_EXPONENT, MOST_EXPONENT = -160, 127
"""Range of n: from 2^-20 on, neighbours are different float16 numbers, and 2^(127/8) is finite in float16."""


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes on a grid with one scale per row: w = codes * scales[..., None] * columns[..., None, :]."""

    codes: Tensor
    """`(..., C)` int8 in [-Q, Q]; the shape of the parameter."""
    scales: Tensor
    """`(...)` float16, the scale of each row, > 0."""
    bits: int
    """Width of the codes, 4 to 8 bits."""
    columns: Tensor | None = None
    """`(..., C)` float16 without the row dimension, the factor on the scale of each column; None means 1."""
    trellis: bool = False
    """Whether a code means the value of `pgolf.ops.trellis_values`, a quarter more or less than the code."""

    def dequantize(self) -> Tensor:
        """Return the weights, float32, in the shape of the parameter; see the function `dequantize`."""
        return dequantize(self.codes, self.scales, self.columns, trellis=self.trellis)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """Return the same on `device`."""
        columns = None if self.columns is None else self.columns.to(device)
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device), columns=columns)

    def reshaped(self, shape: torch.Size) -> QuantizedTensor:
        """Return a stack of matrices on the CPU in the shape of its parameter, `(B, R, C)` or `(R, C)`."""
        columns = None if self.columns is None else self.columns.reshape(*shape[:-2], shape[-1])
        shaped = replace(
            self, codes=self.codes.reshape(shape), scales=self.scales.reshape(shape[:-1]), columns=columns
        )
        return shaped.to("cpu")


def max_code(bits: int) -> int:
    """Return Q = 2^(bits-1) - 1, the largest code of a symmetric grid.

    Raises:
        ValueError: bits outside 2 to 8 (codes are int8).
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"grid: bits must be in [2, 8] (codes are int8), got {bits}")
    return (1 << (bits - 1)) - 1


def sdclip_scales(weight: Tensor, *, bits: int, clip: float) -> Tensor:
    """Return the scale of each row so that the grid ends at `clip` standard deviations.

    s_r = fp16(max(clip * std(w_r) / Q, 2^-24)), std unbiased (N - 1), at most 65504.
    Equals `(clip * weight.std(-1) / Q).clamp(2**-24, 65504).half()`.

    Args:
        weight: `(..., C)` floating point, C >= 2.
        bits: width of the grid.
        clip: standard deviations at the largest code, > 0. PR #1855 uses 11.5 to 14.
    Returns:
        `(...)` float16, positive and finite.
    Raises:
        ValueError: fewer than 2 columns, clip <= 0, NaN or infinity in the weights.
        TypeError: weights that are not floating point.
    Source: parameter-golf PR #1394, whose floor is 1e-10, which is 0 in float16.
    """
    if not weight.is_floating_point():
        raise UserTypeError(f"sdclip_scales: weight must be floating point, got {weight.dtype}")
    if weight.dim() < 1 or weight.shape[-1] < 2:
        raise ValueError(
            "sdclip_scales: expected (..., C) with C >= 2 (a standard deviation needs two columns), "
            f"got {tuple(weight.shape)}"
        )
    if not clip > 0:
        raise ValueError(f"sdclip_scales: clip must be > 0 standard deviations, got {clip}")
    if not bool(torch.isfinite(weight).all()):
        raise UserError("sdclip_scales: weight holds NaN or infinity; training diverged before quantization")
    scales = weight.float().std(dim=-1) * (clip / max_code(bits))
    return scales.clamp(MIN_SCALE, MAX_SCALE).half()


def log_scales(scales: Tensor) -> Tensor:
    """Return the nearest scales on the logarithmic grid: float16(2^(n/8)), n an integer in [-160, 127].

    Args:
        scales: any shape, positive; 0 and less become the smallest scale.
    Returns:
        float16 of the same shape. `scale_exponents` gives n back.
    """
    n = (scales.double().clamp(min=2.0**-64).log2() * SCALES_PER_OCTAVE).round()
    return from_exponents(n.clamp(LEAST_EXPONENT, MOST_EXPONENT))


def scale_exponents(scales: Tensor) -> Tensor:
    """Return n, int16, of scales that are float16(2^(n/8)).

    Raises:
        ValueError: a scale that is not on the grid.
    """
    n = (scales.double().log2() * SCALES_PER_OCTAVE).round()
    if not torch.equal(from_exponents(n), scales):
        raise ValueError("scale_exponents: a scale is not float16(2^(n/8)); take it from log_scales")
    return n.to(torch.int16)


def from_exponents(exponents: Tensor) -> Tensor:
    """Return float16(2^(n/8)), computed in float64, so that every machine rounds to the same float16."""
    return torch.exp2(exponents.double() / SCALES_PER_OCTAVE).half()


def quantize(weight: Tensor, scales: Tensor, *, bits: int) -> Tensor:
    """Round every weight to the nearest code of the grid of its row (ties to even, in float32).

    q = clamp(round(w / s), -Q, Q).

    Args:
        weight: `(..., C)` floating point.
        scales: `(...)` float16, positive, one per row.
        bits: width of the codes.
    Returns:
        `(..., C)` int8.
    Raises:
        ValueError: scales do not match the rows.
    """
    if scales.shape != weight.shape[:-1]:
        raise ValueError(
            f"quantize: expected one scale per row {tuple(weight.shape[:-1])}, got {tuple(scales.shape)}"
        )
    q = max_code(bits)
    return (weight.float() / scales.float().unsqueeze(-1)).round_().clamp_(-q, q).to(torch.int8)


def dequantize(
    codes: Tensor, scales: Tensor, columns: Tensor | None = None, *, trellis: bool = False
) -> Tensor:
    """Return w = (q s) c in float32; on a trellis w = (v s) c, where v are the values of the codes.

    Args:
        codes: `(..., R, C)` int8. scales: `(..., R)` float16, of the rows.
        columns: `(..., C)` float16, column factors; None means 1.
        trellis: whether the codes of each column are on a trellis, see `pgolf.ops.trellis_values`.
    """
    values = trellis_values(codes) if trellis else codes.float()
    weight = values * scales.float().unsqueeze(-1)
    return weight if columns is None else weight * columns.float().unsqueeze(-2)


def quantize_gate_rows(weight: Tensor) -> QuantizedTensor:
    """Quantize small gate matrices to int8 with the scale at the row's maximum: s = fp16(max|w_r| / 127).

    Args:
        weight: `(..., C)` floating point.
    Returns:
        Codes, scales and bits = 8.
    Raises:
        ValueError: NaN or infinity in the weights.
    Source: parameter-golf PR #1855.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            "quantize_gate_rows: weight holds NaN or infinity; training diverged before quantization"
        )
    scales = (weight.float().abs().amax(dim=-1) / max_code(8)).clamp(MIN_SCALE, MAX_SCALE).half()
    return QuantizedTensor(quantize(weight, scales, bits=8), scales, 8)
