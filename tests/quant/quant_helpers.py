"""References of the quantizer that only tests need."""

import torch

from pgolf.ops import trellis_round
from pgolf.quant.gptq import factorize, gptq_on_grid, row_errors
from pgolf.quant.grid import QuantizedTensor, sdclip_scales


def gptq(weight, hessian, *, bits, clip, damp=0.01, block=128):
    """Quantize with the baseline script's scales, clip standard deviations at the largest code."""
    scales = sdclip_scales(weight, bits=bits, clip=clip)
    return gptq_on_grid(weight, factorize(hessian, damp=damp), scales, bits=bits, block=block)


def round_to_grid(weight, scales, *, bits, columns=None, rate=0.0, trellis=False):
    """Round each weight by itself: the least (x - q)^2 + rate q^2 / v, v the mean of x^2 over the column."""
    x = weight.float() / scales.float()[:, :, None]
    if columns is not None:
        x = weight.float() / columns.float()[:, None] / scales.float()[:, :, None]
    square = x.square().mean(1, keepdim=True)
    largest = 2 ** (bits - 1) - 1
    x = x * torch.where(square > 0, square / (square + rate), 1.0) if rate else x
    if trellis:  # along the columns; a value is less than 1 from its code
        x = trellis_round(x.clamp(1 - largest, largest - 1).mT.contiguous()).mT
    codes = x.round().clamp(-largest, largest).to(torch.int8).contiguous()
    return QuantizedTensor(codes, scales, bits, columns, trellis)


def hessian_error(weight, approx, hessian):
    """Return tr(E H E^T) `(B,)` float64, E = weight - approx, of each matrix of a stack."""
    return row_errors(weight, approx, hessian).sum(-1)
