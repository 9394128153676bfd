"""Parts of Muon's update that torch computes, the same for the trainer's banks and for `pgolf.optim.Muon`.

The polar iteration between them is `pgolf.ops.newton_schulz`. None of them reads a value on the host, so they
can be captured in a CUDA graph.

Legend: `m` rows, `n` columns of a matrix; leading dimensions are any number of matrices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SQUARE_EPS = 1e-10
"""Smallest mean square by whose root an update is divided."""


def lr_scale(rows: int, cols: int) -> float:
    """Return Muon's factor on the learning rate of a matrix: sqrt(max(1, rows / cols))."""
    return math.sqrt(max(1.0, rows / cols))


def row_normalize_(x: Tensor) -> Tensor:
    """Divide every row of `x` `(..., m, n)` by its L2 norm (float32, at least 1e-7), in place; return `x`.

    A row holds the weights of one output feature. Source: MuonEq-R, arXiv 2603.28254.
    """
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).clamp_(min=1e-7)
    return x.div_(norms)


def square_size(rows: int, cols: int) -> int:
    """Return the number of mean squares that `normalize_update_` keeps of one matrix: the longer side."""
    return max(rows, cols)


def cautious_decay_(param: Tensor, update: Tensor, decay: float | Tensor) -> Tensor:
    """Decay the weights that the update moves towards 0 as well, in place; leave the others.

        w <- w - decay w 1[O w > 0]

    The update w <- w - lr O is made afterwards. Where it is zero, as in a step that is skipped, nothing
    decays. About half of the weights decay in a step, so twice the decay is the same amount of it. It costs
    several passes over weights and update, with three temporary tensors of the size of `param`.

    Args:
        param: w, any shape and floating-point dtype; changed.
        update: O, of the same number of elements per dimension, float32 or bfloat16.
        decay: learning rate times weight decay, a number or `()` on the device.

    Returns:
        `param`.

    Source: cautious weight decay, arXiv 2510.12402.
    """
    return param.sub_(decay * param * (param * update > 0))


def floor_update_(update: Tensor, param: Tensor, floor: float) -> Tensor:
    """Lengthen each row of an update that is short next to its row of weights, in place.

        O_r <- O_r max(1, floor |w_r| / |O_r|)

    So a row of weights moves by at least lr floor |w_r|, however long it has grown. A row of zeros stays
    zero: |O_r| is taken to be at least 1e-7. Norms and factors are computed in float32 or float64.

    Args:
        update: `(..., m, n)` any floating-point dtype, O; changed.
        param: `(..., m, n)`, w before the step.
        floor: smallest length of a row of the update over that of the weights, >= 0.

    Returns:
        `update`.

    Source: the update floor of modded-nanogpt's optimizer benchmark (track 3), per row; without its pin of
    the norm of the weights.
    """
    long, short = (
        torch.linalg.vector_norm(t, dim=-1, keepdim=True, dtype=torch.promote_types(t.dtype, torch.float32))
        for t in (param, update)
    )
    return update.mul_((floor * long / short.clamp_(min=1e-7)).clamp_(min=1))


def normalize_update_(update: Tensor, square: Tensor, decay: float, taken: Tensor | None = None) -> Tensor:
    """Divide an orthogonalized update by the root of its mean squares over time (NorMuon), in place.

        v <- b v + (1 - b) mean(O^2)      over each row if m >= n, otherwise over each column
        O' = O / sqrt(max(v, 1e-10));     O <- O' |O|_F / |O'|_F

    The rows of a tall orthogonal matrix (the columns of a wide one) have different norms, and the units that
    they belong to would be updated by different amounts. The Frobenius norm of each matrix stays, so v needs
    no correction for its start at 0. A zero matrix stays zero. Means and factors are computed in float32.

    Args:
        update: `(..., m, n)` float32 or bfloat16, O; changed.
        square: `(..., max(m, n))` float32, v; changed.
        decay: b, in [0, 1).
        taken: `()` float32 on the device: 1 for a step, 0 for one that is skipped, whose update is zero and
            which leaves v as it is; None = 1.

    Returns:
        `update`.

    Source: NorMuon, arXiv 2510.05491, as in modded-nanogpt.
    """
    along = -1 if update.shape[-2] >= update.shape[-1] else -2
    norms = torch.linalg.vector_norm(update, dim=along, dtype=torch.float32)
    means = norms.square_().div_(update.shape[along])
    square.lerp_(means, 1 - decay if taken is None else (1 - decay) * taken)
    scale = square.clamp(min=SQUARE_EPS).rsqrt_()
    # |O'|_F follows from the factors and the means, so that the update is read twice and written once.
    before, after = (t.sum(dim=-1, keepdim=True) for t in (means, means * scale.square()))
    scale.mul_((before / after.clamp_(min=torch.finfo(torch.float32).tiny)).sqrt_())
    return update.mul_(scale.unsqueeze(along))
