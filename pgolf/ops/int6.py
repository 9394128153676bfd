"""Packing of int6 codes: four values in three bytes.

Owns the Python face of `torch.ops.pgolf.pack_int6` and `unpack_int6`. The bit layout is drawn in
csrc/kernels/int6.h and lives nowhere else but in `pack_int6_ref`, which states it a second time as the check.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pgolf.ops._extension  # noqa: F401  (registers the operators)


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


def _pack_fake(codes: Tensor) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], (codes.shape[-1] + 3) // 4 * 3), dtype=torch.uint8)


def _unpack_fake(packed: Tensor, n: int) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], n), dtype=torch.int8)


torch.library.register_fake("pgolf::pack_int6", _pack_fake)
torch.library.register_fake("pgolf::unpack_int6", _unpack_fake)
