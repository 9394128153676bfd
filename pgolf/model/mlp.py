"""The feed-forward branch of a block.

Legend: `T` tokens, `D` width, `M` hidden width. Source: squared leaky ReLU of parameter-golf #549.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def mlp(
    n: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: Literal["leaky_relu2", "relu2"],
    observe: Callable[[str, Tensor], None] | None = None,
) -> Tensor:
    """Return act(n up^T) down^T with act(p) = leaky_relu(p, 0.5)^2 or relu(p)^2.

    Args:
        n: `(T, D)` normed input.
        up: `(M, D)`.
        down: `(D, M)`.
        activation: "leaky_relu2" or "relu2", the two forms of act above.
        observe: called with ("mlp_out", act(n up^T)), for calibration.
    """
    slope = 0.5 if activation == "leaky_relu2" else 0.0
    hidden = F.leaky_relu(F.linear(n, up), slope).square()
    if observe is not None:
        observe("mlp_out", hidden)
    return F.linear(hidden, down)
