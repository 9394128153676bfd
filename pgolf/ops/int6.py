"""Packed codes of 4 to 8 bits: packing, unpacking, and both fused with quantizing and dequantizing.

This is the Python interface of `torch.ops.pgolf.pack_int6`, `unpack_int6`, `quantize_pack`,
`quantize_pack_sdclip` and `unpack_dequantize`. The bit layout (int6: four values in three bytes) is specified
in csrc/kernels/int6.h; the `_ref` functions implement it a second time, so that tests can compare.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pgolf.ops._extension  # noqa: F401  (registers the operators)
from pgolf.ops._derivatives import refuse_derivatives, refuse_transforms

GROUP = {4: 2, 5: 8, 6: 4, 7: 8, 8: 1}
"""Number of codes that share whole bytes, by bits per code."""


def pack_int6(codes: Tensor) -> Tensor:
    """Pack codes of six bits along the last dimension, four codes in three bytes.

    v = u0 | u1 << 6 | u2 << 12 | u3 << 18 with u = code & 63, stored as three little-endian bytes; the last
    group of a row is filled up with zeros.

    Args:
        codes: `(..., n)` int8, each in [-32, 31]. On CUDA a value outside that range is cut to its low six
            bits, because checking it would stall the stream.

    Returns:
        `(..., 3 * ceil(n / 4))` uint8.

    Raises:
        ValueError: codes have no dimension, or (on the CPU only) a code is outside [-32, 31].
        TypeError: codes are not int8.

    Source: csrc/kernels/int6.h.
    """
    packed: Tensor = torch.ops.pgolf.pack_int6(codes)
    return packed


def unpack_int6(packed: Tensor, n: int) -> Tensor:
    """Unpack the codes that `pack_int6` packed.

    Args:
        packed: `(..., 3 * ceil(n / 4))` uint8.
        n: codes per row, >= 0.

    Returns:
        `(..., n)` int8 in [-32, 31].

    Raises:
        ValueError: n < 0, or the last dimension is not 3 * ceil(n / 4).
        TypeError: packed is not uint8.

    Source: csrc/kernels/int6.h.
    """
    codes: Tensor = torch.ops.pgolf.unpack_int6(packed, n)
    return codes


def pack_int6_ref(codes: Tensor) -> Tensor:
    """Compute `pack_int6` with PyTorch operators, in integer arithmetic."""
    u = torch.nn.functional.pad(codes.to(torch.int32) & 63, (0, -codes.shape[-1] % 4))
    v = u[..., 0::4] | u[..., 1::4] << 6 | u[..., 2::4] << 12 | u[..., 3::4] << 18
    groups = torch.stack((v & 255, v >> 8 & 255, v >> 16 & 255), dim=-1)
    return groups.to(torch.uint8).flatten(-2)


def unpack_int6_ref(packed: Tensor, n: int) -> Tensor:
    """Compute `unpack_int6` with PyTorch operators, in integer arithmetic."""
    b = packed.to(torch.int32)
    v = b[..., 0::3] | b[..., 1::3] << 8 | b[..., 2::3] << 16
    u = torch.stack((v & 63, v >> 6 & 63, v >> 12 & 63, v >> 18 & 63), dim=-1).flatten(-2)
    return ((u ^ 32) - 32).to(torch.int8)[..., :n]


def quantize_pack(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Quantize rows with given scales and pack the codes, in one pass over the weights.

    q = clamp(round(w / s), -Q, Q), ties to even, with Q = 2^(bits-1) - 1; each code takes `bits` bits.
    For 6 bits equals `pack_int6(pgolf.quant.grid.quantize(weight, scales, bits=6))`.

    Args:
        weight: `(..., n)` float32, finite (NaN becomes Q).
        scales: `(...)` float16, > 0, one quantization scale per row.
        bits: bits per code, 4 to 8.

    Returns:
        `(..., bytes per row)` uint8, the same bytes on CPU and CUDA.

    Raises:
        ValueError: bits are out of range, or scales have another shape or device.
        TypeError: weight or scales have another dtype.

    Source: csrc/kernels/int6.h.
    """
    refuse_transforms("quantize_pack", weight, scales)
    packed: Tensor = torch.ops.pgolf.quantize_pack(weight, scales, bits)
    return packed


def quantize_pack_sdclip(weight: Tensor, clip: float, bits: int) -> tuple[Tensor, Tensor]:
    """Quantize and pack rows with a scale whose largest code stands for `clip` standard deviations (SDClip).

    s = float16(clamp(clip * std(w) / Q, 2^-24, 65504)) with the unbiased std of the row, then as
    `quantize_pack`. The scales equal `pgolf.quant.grid.sdclip_scales` except for the last bit: here the
    weights are first rounded to 14 bits of the row's largest one, so that sums are sums of integers and do
    not depend on their order.

    Args:
        weight: `(..., n)` float32, 2 <= n <= 2^20; a row that is not finite gets the scale NaN.
        clip: standard deviations of the row, > 0.
        bits: bits per code, 4 to 8.

    Returns:
        packed `(..., bytes per row)` uint8 and scales `(...)` float16, the same on CPU and CUDA.

    Raises:
        ValueError: bits, clip or n are out of range.
        TypeError: weight is not float32.

    Source: csrc/kernels/int6.h; SDClip of parameter-golf PR #1394.
    """
    refuse_transforms("quantize_pack_sdclip", weight)
    packed, scales = torch.ops.pgolf.quantize_pack_sdclip(weight, clip, bits)
    return packed, scales


def unpack_dequantize(packed: Tensor, scales: Tensor, n: int, bits: int) -> Tensor:
    """Unpack codes and multiply them by the scale of their row.

    w = bfloat16(q * s); the product is computed in float32 and rounded to nearest even.

    Args:
        packed: `(..., bytes per row)` uint8.
        scales: `(...)` float16, one per row.
        n: codes per row, >= 0.
        bits: bits per code, 4 to 8.

    Returns:
        `(..., n)` bfloat16.

    Raises:
        ValueError: the shapes do not fit, or n or bits are out of range.
        TypeError: packed or scales have another dtype.

    Source: csrc/kernels/int6.h.
    """
    refuse_transforms("unpack_dequantize", scales)
    weight: Tensor = torch.ops.pgolf.unpack_dequantize(packed, scales, n, bits)
    return weight


def _packed_bytes(n: int, bits: int) -> int:
    """Return the bytes of a row of n codes, which is filled up to a whole number of groups (`GROUP`)."""
    group = GROUP[bits]
    return (n + group - 1) // group * group * bits // 8


def quantize_pack_ref(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Compute `quantize_pack` with PyTorch operators, bit by bit."""
    q_max = 2 ** (bits - 1) - 1
    codes = (weight / scales.float().unsqueeze(-1)).round().clamp(-q_max, q_max).to(torch.int64)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % GROUP[bits]))
    stream = (padded.unsqueeze(-1) >> torch.arange(bits, device=codes.device) & 1).flatten(-2)
    powers = 1 << torch.arange(8, device=codes.device)
    return (stream.reshape(*weight.shape[:-1], -1, 8) * powers).sum(-1).to(torch.uint8)


def quantize_pack_sdclip_ref(weight: Tensor, clip: float, bits: int) -> tuple[Tensor, Tensor]:
    """Compute `quantize_pack_sdclip` with PyTorch operators, with float64 sums of the rounded weights."""
    largest = weight.abs().amax(-1, keepdim=True).clamp(min=2.0**-113)
    shift = 14 - torch.frexp(largest).exponent.sub(1).double()
    x = (weight.double() * torch.exp2(shift)).round()
    n, total, squares = weight.shape[-1], x.sum(-1), x.square().sum(-1)
    deviation = ((squares - total * total / n) / (n - 1)).clamp(min=0).sqrt() * torch.exp2(-shift[..., 0])
    exact = float(torch.tensor(clip, dtype=torch.float32)) * deviation / (2 ** (bits - 1) - 1)
    scales = exact.clamp(2.0**-24, 65504.0).float().half()
    return quantize_pack_ref(weight, scales, bits), scales


def unpack_dequantize_ref(packed: Tensor, scales: Tensor, n: int, bits: int) -> Tensor:
    """Compute `unpack_dequantize` with PyTorch operators, bit by bit."""
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
# The operators on codes need no such rule, because autograd ignores integers.
refuse_derivatives("quantize_pack_sdclip", "quantize_pack_sdclip")
refuse_derivatives("unpack_dequantize", "unpack_dequantize")
