"""The best path through the trellis, with PyTorch operators.

`train_gpt.py` has `_trellis_compiled.py` in its place: on a GPU this takes minutes for a model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf.ops._trellis_machine import CHAIN, INPUT_TAPS, SIDE_TAPS, STATES, parity


def best_values(x: Tensor) -> Tensor:
    """Return the values, float32, of chains along the rows of x `(N, n)`, computed in float64."""
    starts = range(0, x.shape[1], CHAIN)
    pieces = [x[:, :0].double(), *(_best_path(x[:, start : start + CHAIN].double()) for start in starts)]
    return torch.cat(pieces, dim=1).float()


def _best_path(x: Tensor) -> Tensor:
    """Return the values of N chains `(N, n)`, float64, by the Viterbi algorithm."""
    state = torch.arange(STATES, device=x.device)
    source = torch.stack((state >> 1, (state >> 1) + STATES // 2))  # (2, S), both lead to `state`
    back = parity(source & INPUT_TAPS)
    residue = 2 * (state & 1 ^ back) + parity(source & SIDE_TAPS)
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
