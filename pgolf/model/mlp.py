"""The feed-forward branch of a block.

Legend: `T` tokens, `D` width, `M` hidden width. Source: squared leaky ReLU of parameter-golf #549.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def mlp(
    n: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    slope: float,
    observe: Callable[[str, Tensor], None] | None = None,
) -> Tensor:
    """Return act(n up^T) down^T with act(p) = leaky_relu(p, slope)^2.

    Args:
        n: `(T, D)` normed input.
        up: `(M, D)`.
        down: `(D, M)`.
        slope: of act below 0, before it is squared; 0 is relu(p)^2.
        observe: called with ("mlp_out", act(n up^T)), for calibration.
    """
    hidden = F.leaky_relu(F.linear(n, up), slope).square()
    if observe is not None:
        observe("mlp_out", hidden)
    return F.linear(hidden, down)
