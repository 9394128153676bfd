"""Rounding along a trellis: codes as cheap as those of plain rounding, with 1.27 dB less squared error.

Owns the Python face of `torch.ops.pgolf.trellis_round` and `trellis_values`. The machine that says what a
code means is described in csrc/kernels/trellis.h and lives nowhere else but in the `_ref` functions, which
state it a second time as the check.
Source: Marcellin and Fischer, Trellis coded quantization (1990); Ungerboeck's code of 256 states (1982).
"""

from __future__ import annotations

import torch
from torch import Tensor

import pgolf.ops._extension  # noqa: F401  (registers the operators)
from pgolf.ops._derivatives import refuse_derivatives, refuse_transforms

STATES, CHAIN = 256, 256
"""States of the machine; numbers after which a chain starts anew."""
SIDE_TAPS, INPUT_TAPS = 0o362 >> 1, 0o515 >> 1


def trellis_round(x: Tensor) -> Tensor:
    """Round chains of numbers to the values of codes, with the least squared error that the trellis allows.

    A value is v = k - 1/4 or k + 1/4, which of the two being decided by the codes before it, so that the code
    is k = round(v) and `trellis_values` gives v back. |v - x| < 1. A chain is found whole (Viterbi), every
    256 numbers a new one begins.

    Args:
        x: `(..., n)` float32, finite and |x| < 2^20 (quarters get lost in larger ones), chains along n.

    Returns:
        v, of the same shape. CPU and CUDA may choose different paths where two are equally good. Not
        differentiable: a derivative through it raises RuntimeError.

    Raises:
        ValueError: no dimension.
        TypeError: not float32.
    """
    refuse_transforms("trellis_round", x)
    values: Tensor = torch.ops.pgolf.trellis_round(x)
    return values


def trellis_values(codes: Tensor) -> Tensor:
    """Return what codes mean: k - 1/4 or k + 1/4, as `trellis_round` chose them.

    Args:
        codes: `(..., n, columns)` int8; each column is a chain along n, new every 256 codes.

    Returns:
        float32 of the same shape, exact.

    Raises:
        ValueError: fewer than two dimensions.
        TypeError: not int8.
    """
    values: Tensor = torch.ops.pgolf.trellis_values(codes)
    return values


def trellis_round_ref(x: Tensor) -> Tensor:
    """Compute what `trellis_round` computes, in float64."""
    flat = x.double().reshape(-1, x.shape[-1])
    starts = range(0, flat.shape[1], CHAIN)
    pieces = [flat[:, :0], *(_best_path(flat[:, start : start + CHAIN]) for start in starts)]
    return torch.cat(pieces, dim=1).reshape(x.shape).float()


def trellis_values_ref(codes: Tensor) -> Tensor:
    """Compute what `trellis_values` computes, one row of all chains after the other."""
    states = torch.arange(STATES, device=codes.device)
    shift, after = _parity(states & SIDE_TAPS).float() / 2 - 0.25, _parity(states & INPUT_TAPS)
    rows = codes.shape[-2]
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -rows % CHAIN))
    chains = padded.reshape(*codes.shape[:-2], -(-rows // CHAIN), CHAIN, codes.shape[-1])
    values, state = chains.float(), torch.zeros_like(chains[..., 0, :], dtype=torch.int64)
    for row in range(min(rows, CHAIN)):
        values[..., row, :] += shift[state]
        state = (2 * state + ((chains[..., row, :] & 1) ^ after[state])) % STATES
    return values.reshape(padded.shape)[..., :rows, :]


def _best_path(x: Tensor) -> Tensor:
    """Return the values float64 of chains `(N, n)` that begin together."""
    state = torch.arange(STATES, device=x.device)
    source = torch.stack((state >> 1, (state >> 1) + STATES // 2))  # (2, S), both lead to `state`
    back = _parity(source & INPUT_TAPS)
    residue = 2 * (state & 1 ^ back) + _parity(source & SIDE_TAPS)
    cost = x.new_full((len(x), STATES), torch.inf)
    cost[:, 0] = 0
    decisions = []
    for target in (2 * x + 0.5).unbind(1):
        near = residue + 4 * ((target[:, None, None] - residue) / 4).round()
        cost, decision = (cost[:, source] + (target[:, None, None] - near).square()).min(1)
        decisions.append(decision)
    values, at, rows = torch.empty_like(x), cost.argmin(1), torch.arange(len(x), device=x.device)
    for t in reversed(range(x.shape[1])):
        decision = decisions[t][rows, at]
        r = residue[decision, at]
        values[:, t] = (r + 4 * ((2 * x[:, t] + 0.5 - r) / 4).round()) / 2 - 0.25
        at = source[decision, at]
    return values


def _parity(x: Tensor) -> Tensor:
    """Return whether the number of ones in the low eight bits is odd."""
    for shift in (4, 2, 1):
        x = x ^ x >> shift
    return x & 1


def _values_fake(codes: Tensor) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


torch.library.register_fake("pgolf::trellis_round", torch.empty_like)
torch.library.register_fake("pgolf::trellis_values", _values_fake)
refuse_derivatives("trellis_round", "trellis_round")
