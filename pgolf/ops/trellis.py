"""Rounding along a trellis: as many bits per code as plain rounding, with 1.27 dB less squared error.

This is the Python interface of `torch.ops.pgolf.trellis_round` and `trellis_values`. The state machine that
gives a code its value is specified in csrc/kernels/trellis.h; the `_ref` functions implement it a second
time, so that tests can compare.
Source: Marcellin and Fischer, Trellis coded quantization (1990); Ungerboeck's code of 256 states (1982).
"""

from __future__ import annotations

import torch
from torch import Tensor

import pgolf.ops._extension  # noqa: F401  (registers the operators)
from pgolf.ops._derivatives import refuse_derivatives, refuse_transforms
from pgolf.ops._trellis_machine import CHAIN, INPUT_TAPS, SIDE_TAPS, STATES, parity
from pgolf.ops._trellis_path import best_values


def trellis_round(x: Tensor) -> Tensor:
    """Round chains of numbers to values of codes, with the least squared error that the trellis allows.

    The value of a code k is v = k - 1/4 or k + 1/4; the codes before it in the chain decide which of the two.
    So k = round(v), and `trellis_values` computes v from the codes. |v - x| < 1. The Viterbi algorithm finds
    the best path through a chain exactly; a new chain begins every 256 numbers.

    Args:
        x: `(..., n)` float32, finite, with |x| < 2^20 (float32 has no quarters above); chains run along n.

    Returns:
        v, of the shape of x. CPU and CUDA may choose different paths if two are equally good. The operator is
        not differentiable: a derivative through it raises RuntimeError.

    Raises:
        ValueError: x has no dimension.
        TypeError: x is not float32.
    """
    refuse_transforms("trellis_round", x)
    values: Tensor = torch.ops.pgolf.trellis_round(x)
    return values


def trellis_values(codes: Tensor) -> Tensor:
    """Return the values of codes: k - 1/4 or k + 1/4, as `trellis_round` chose them.

    Args:
        codes: `(..., n, columns)` int8; the chains run along n in each column, a new one every 256 codes.

    Returns:
        float32 of the shape of codes, exact.

    Raises:
        ValueError: codes have fewer than two dimensions.
        TypeError: codes are not int8.
    """
    values: Tensor = torch.ops.pgolf.trellis_values(codes)
    return values


def trellis_round_ref(x: Tensor) -> Tensor:
    """Compute `trellis_round` with PyTorch operators, in float64."""
    return best_values(x.reshape(-1, x.shape[-1])).reshape(x.shape)


def trellis_values_ref(codes: Tensor) -> Tensor:
    """Compute `trellis_values` with PyTorch operators, one position of all chains after the other."""
    states = torch.arange(STATES, device=codes.device)
    shift, after = parity(states & SIDE_TAPS).float() / 2 - 0.25, parity(states & INPUT_TAPS)
    rows = codes.shape[-2]
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -rows % CHAIN))
    chains = padded.reshape(*codes.shape[:-2], -(-rows // CHAIN), CHAIN, codes.shape[-1])
    values, state = chains.float(), torch.zeros_like(chains[..., 0, :], dtype=torch.int64)
    for row in range(min(rows, CHAIN)):
        values[..., row, :] += shift[state]
        state = (2 * state + ((chains[..., row, :] & 1) ^ after[state])) % STATES
    return values.reshape(padded.shape)[..., :rows, :]


def _values_fake(codes: Tensor) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


torch.library.register_fake("pgolf::trellis_round", torch.empty_like)
torch.library.register_fake("pgolf::trellis_values", _values_fake)
refuse_derivatives("trellis_round", "trellis_round")
