"""Packed codes: int6 as four values in three bytes, and quantizing or dequantizing on the way, 4 to 8 bits.

Owns the Python face of `torch.ops.pgolf.pack_int6`, `unpack_int6`, `quantize_pack`, `quantize_pack_sdclip`
and `unpack_dequantize`. The bit layout is drawn in csrc/kernels/int6.h and lives nowhere else but in the
`_ref` functions, which state it a second time as the check.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pgolf.ops._extension  # noqa: F401  (registers the operators)
from pgolf.ops._derivatives import refuse_derivatives, refuse_transforms

GROUP = {4: 2, 5: 8, 6: 4, 7: 8, 8: 1}
"""Codes that share bytes, by bits."""


def pack_int6(codes: Tensor) -> Tensor:
    """Pack codes of six bits, four to three bytes, along the last dimension.

    v = u0 | u1 << 6 | u2 << 12 | u3 << 18 with u = code & 63, stored as three little-endian bytes; the last
    group of a row is filled with zeros.

    Args:
        codes: `(..., n)` int8, each in [-32, 31]. On CUDA values outside wrap to their low six bits (checking
            them would stall the stream).

    Returns:
        `(..., 3 * ceil(n / 4))` uint8.

    Raises:
        ValueError: no dimension, or (CPU only) a code outside [-32, 31].
        TypeError: not int8.

    Source: csrc/kernels/int6.h.
    """
    packed: Tensor = torch.ops.pgolf.pack_int6(codes)
    return packed


def unpack_int6(packed: Tensor, n: int) -> Tensor:
    """Undo `pack_int6`.

    Args:
        packed: `(..., 3 * ceil(n / 4))` uint8.
        n: codes in a row, >= 0.

    Returns:
        `(..., n)` int8 in [-32, 31].

    Raises:
        ValueError: n < 0, or the last dimension is not 3 * ceil(n / 4).
        TypeError: not uint8.

    Source: csrc/kernels/int6.h.
    """
    codes: Tensor = torch.ops.pgolf.unpack_int6(packed, n)
    return codes


def pack_int6_ref(codes: Tensor) -> Tensor:
    """Compute what `pack_int6` computes with integer arithmetic."""
    u = torch.nn.functional.pad(codes.to(torch.int32) & 63, (0, -codes.shape[-1] % 4))
    v = u[..., 0::4] | u[..., 1::4] << 6 | u[..., 2::4] << 12 | u[..., 3::4] << 18
    groups = torch.stack((v & 255, v >> 8 & 255, v >> 16 & 255), dim=-1)
    return groups.to(torch.uint8).flatten(-2)


def unpack_int6_ref(packed: Tensor, n: int) -> Tensor:
    """Compute what `unpack_int6` computes with integer arithmetic."""
    b = packed.to(torch.int32)
    v = b[..., 0::3] | b[..., 1::3] << 8 | b[..., 2::3] << 16
    u = torch.stack((v & 63, v >> 6 & 63, v >> 12 & 63, v >> 18 & 63), dim=-1).flatten(-2)
    return ((u ^ 32) - 32).to(torch.int8)[..., :n]


def quantize_pack(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Quantize rows with given scales and pack the codes, in one pass over the weights.

    q = clamp(round(w / s), -Q, Q), ties to even, Q = 2^(bits-1) - 1; packed as `bits` bits each.
    For 6 bits equals `pack_int6(pgolf.quant.grid.quantize(weight, scales, bits=6))`.

    Args:
        weight: `(..., n)` float32, finite (NaN becomes Q).
        scales: `(...)` float16, > 0, one per row.
        bits: 4 to 8.

    Returns:
        `(..., bytes of a row)` uint8, the same bytes on CPU and CUDA.

    Raises:
        ValueError: bits out of range, scales of another shape or device.
        TypeError: other dtypes.

    Source: csrc/kernels/int6.h.
    """
    refuse_transforms("quantize_pack", weight, scales)
    packed: Tensor = torch.ops.pgolf.quantize_pack(weight, scales, bits)
    return packed


def quantize_pack_sdclip(weight: Tensor, clip: float, bits: int) -> tuple[Tensor, Tensor]:
    """Quantize and pack rows; the largest code means `clip` standard deviations of the row (SDClip).

    s = float16(clamp(clip * std(w) / Q, 2^-24, 65504)), std unbiased: `pgolf.quant.grid.sdclip_scales` but
    for the last bit, as the sums here are sums of integers (weights to 14 bits of the row's largest), which
    are the same in any order. Then as `quantize_pack`.

    Args:
        weight: `(..., n)` float32, 2 <= n <= 2^20; a row that is not finite gets the scale NaN.
        clip: > 0.
        bits: 4 to 8.

    Returns:
        packed `(..., bytes of a row)` uint8 and scales `(...)` float16, the same on CPU and CUDA.

    Raises:
        ValueError: bits, clip or n out of range.
        TypeError: not float32.

    Source: csrc/kernels/int6.h; SDClip of parameter-golf PR #1394.
    """
    refuse_transforms("quantize_pack_sdclip", weight)
    packed, scales = torch.ops.pgolf.quantize_pack_sdclip(weight, clip, bits)
    return packed, scales


def unpack_dequantize(packed: Tensor, scales: Tensor, n: int, bits: int) -> Tensor:
    """Unpack codes and multiply them by the scales of their rows.

    w = bfloat16(q * s), the product in float32, rounded to nearest even.

    Args:
        packed: `(..., bytes of a row)` uint8.
        scales: `(...)` float16.
        n: codes in a row, >= 0.
        bits: 4 to 8.

    Returns:
        `(..., n)` bfloat16.

    Raises:
        ValueError: shapes, n or bits.
        TypeError: other dtypes.

    Source: csrc/kernels/int6.h.
    """
    refuse_transforms("unpack_dequantize", scales)
    weight: Tensor = torch.ops.pgolf.unpack_dequantize(packed, scales, n, bits)
    return weight


def _packed_bytes(n: int, bits: int) -> int:
    """Return the bytes of a row of n codes: whole groups of 2, 8, 4, 8, 1 codes for 4, 5, 6, 7, 8 bits."""
    group = GROUP[bits]
    return (n + group - 1) // group * group * bits // 8


def quantize_pack_ref(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Compute what `quantize_pack` computes, bit by bit."""
    q_max = 2 ** (bits - 1) - 1
    codes = (weight / scales.float().unsqueeze(-1)).round().clamp(-q_max, q_max).to(torch.int64)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % GROUP[bits]))
    stream = (padded.unsqueeze(-1) >> torch.arange(bits, device=codes.device) & 1).flatten(-2)
    powers = 1 << torch.arange(8, device=codes.device)
    return (stream.reshape(*weight.shape[:-1], -1, 8) * powers).sum(-1).to(torch.uint8)


def quantize_pack_sdclip_ref(weight: Tensor, clip: float, bits: int) -> tuple[Tensor, Tensor]:
    """Compute what `quantize_pack_sdclip` computes, with float64 sums of the rounded weights."""
    largest = weight.abs().amax(-1, keepdim=True).clamp(min=2.0**-113)
    shift = 14 - torch.frexp(largest).exponent.sub(1).double()
    x = (weight.double() * torch.exp2(shift)).round()
    n, total, squares = weight.shape[-1], x.sum(-1), x.square().sum(-1)
    deviation = ((squares - total * total / n) / (n - 1)).clamp(min=0).sqrt() * torch.exp2(-shift[..., 0])
    exact = float(torch.tensor(clip, dtype=torch.float32)) * deviation / (2 ** (bits - 1) - 1)
    scales = exact.clamp(2.0**-24, 65504.0).float().half()
    return quantize_pack_ref(weight, scales, bits), scales


def unpack_dequantize_ref(packed: Tensor, scales: Tensor, n: int, bits: int) -> Tensor:
    """Compute what `unpack_dequantize` computes, bit by bit."""
    stream = (packed.to(torch.int64).unsqueeze(-1) >> torch.arange(8, device=packed.device) & 1).flatten(-2)
    powers = 1 << torch.arange(bits, device=packed.device)
    fields = stream[..., : n * bits].reshape(*packed.shape[:-1], n, bits)
    u = (fields * powers).sum(-1)
    sign = 1 << (bits - 1)
    return (((u ^ sign) - sign).float() * scales.float().unsqueeze(-1)).bfloat16()


def _pack_fake(codes: Tensor) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], (codes.shape[-1] + 3) // 4 * 3), dtype=torch.uint8)


def _unpack_fake(packed: Tensor, n: int) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], n), dtype=torch.int8)


def _quantize_fake(weight: Tensor, _scales: Tensor, bits: int) -> Tensor:
    return weight.new_empty((*weight.shape[:-1], _packed_bytes(weight.shape[-1], bits)), dtype=torch.uint8)


def _sdclip_fake(weight: Tensor, _clip: float, bits: int) -> tuple[Tensor, Tensor]:
    scales = weight.new_empty(weight.shape[:-1], dtype=torch.float16)
    return _quantize_fake(weight, scales, bits), scales


def _dequantize_fake(packed: Tensor, _scales: Tensor, n: int, _bits: int) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], n), dtype=torch.bfloat16)


torch.library.register_fake("pgolf::pack_int6", _pack_fake)
torch.library.register_fake("pgolf::quantize_pack", _quantize_fake)
torch.library.register_fake("pgolf::quantize_pack_sdclip", _sdclip_fake)
torch.library.register_fake("pgolf::unpack_dequantize", _dequantize_fake)
torch.library.register_fake("pgolf::unpack_int6", _unpack_fake)
# Codes are integers, which autograd leaves alone; scales and weights are not.
refuse_derivatives("quantize_pack_sdclip", "quantize_pack_sdclip")
refuse_derivatives("unpack_dequantize", "unpack_dequantize")
