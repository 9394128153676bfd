"""Matrices as their quantized selves in the forward pass, and a gradient that ignores the rounding.

Training with it (quantization-aware training, "late QAT" in parameter-golf) moves the weights to where their
rounded values are good. The rounding is that of the package's int6 operators: SDClip scales, nearest codes.
Legend: `B` matrices of a bank, `R` rows, `C` columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgolf.ops import quantize_pack_sdclip, unpack_dequantize

BITS = 6
"""Bits of the codes, as in the pull requests that train this way."""


class FakeQuant(NamedTuple):
    """The grids of the matrices: how many standard deviations of its row the largest code means."""

    attn_clip: float
    mlp_clip: float

    def __call__(self, name: str, bank: Tensor) -> Tensor:
        """Return the bank of this name as its codes have it; the `rounding` of a forward pass."""
        return fake_quantize(bank, self.mlp_clip if name.startswith("mlp") else self.attn_clip)


class _StraightThrough(torch.autograd.Function):
    """Quantize and dequantize in the forward pass; pass the gradient on in the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, clip: float) -> Tensor:
        del ctx
        packed, scales = quantize_pack_sdclip(weight, clip, BITS)
        return unpack_dequantize(packed, scales, weight.shape[-1], BITS).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, None]:
        del ctx
        return gradients[0], None


def fake_quantize(weight: Tensor, clip: float) -> Tensor:
    """Return the values that `weight` has after 6-bit quantization, with the gradient of `weight` itself.

    w' = bfloat16(clamp(round(w / s), -31, 31) s) with s = float16(clip std(w_r) / 31) for each row r;
    dL/dw = dL/dw', also where the code was clamped.

    Args:
        weight: `(B, R, C)` float32, C >= 2.
        clip: standard deviations of the row, > 0.

    Returns:
        `(B, R, C)` float32.
    """
    out: Tensor = _StraightThrough.apply(weight, clip)  # type: ignore[no-untyped-call]
    return out
