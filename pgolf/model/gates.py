"""Norms, gates and mixes of the residual stream, as small pure functions.

Legend: `T` tokens, `D` width, `H` heads, `K` head dim, `G` kv heads, `W` gate window.
Sources, pull requests of parameter-golf: smear gate #1667 (BOS mask #1851), exclusive self-attention #478,
sparse head gate #1787, dense gate #1736, output gate #1667, gated U-Net skips #1394.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


def rms_norm(x: Tensor) -> Tensor:
    """Return `x` divided by its root mean square over the last dim; equals `F.rms_norm(x, x.shape[-1:])`.

    eps is that of float32 for every dtype, which is also torch's choice.
    """
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def smear(x: Tensor, first: Tensor, weight: Tensor, strength: Tensor) -> Tensor:
    """Add a gated copy of the previous token: x_t + strength * sigmoid(w . x_t[:W]) * x_(t-1).

    Args:
        x: `(T, D)` embeddings before smearing.
        first: `(T,)` bool, true at the first token of every segment (so at every BOS), where nothing is
            added.
        weight: `(1, W)`.
        strength: `(1,)`.
    """
    gate = torch.sigmoid(F.linear(x[:, : weight.shape[1]], weight)) * strength  # (T, 1)
    previous = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
    return x + torch.where(first[:, None], torch.zeros_like(gate), gate) * previous


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """Remove from each head's output its part along the token's own value (exclusive self-attention).

    Returns y_h - (y_h . u) u with u = v / |v| of the head's kv group.

    Args:
        y: `(T, H, K)` attention output.
        v: `(T, G, K)` values; group g has the query heads g * H/G to (g + 1) * H/G - 1.
    """
    unit = F.normalize(v.float(), dim=-1).unsqueeze(2)  # (T, G, 1, K)
    grouped = y.view(y.shape[0], v.shape[1], -1, y.shape[2]).float()  # (T, G, H/G, K)
    along = (grouped * unit).sum(-1, keepdim=True)
    return (grouped - along * unit).view(y.shape).to(y.dtype)


def head_gate(kind: Literal["sparse", "dense", "out"], n: Tensor, weight: Tensor, *, scale: float) -> Tensor:
    """Return the factor on each head's output, `(T, H, 1)`.

    sparse: sigmoid(scale * w_h . n[:W]); dense: sigmoid(w_h . n); out: 2 * sigmoid(w_h . n[:W]).

    Args:
        kind: one of the three gates above.
        n: `(T, D)` normed input of the attention.
        weight: `(H, W)`, or `(H, D)` for dense.
        scale: multiplier inside the sparse gate's sigmoid.
    """
    logit = F.linear(n[:, : weight.shape[1]], weight).unsqueeze(-1)
    if kind == "sparse":
        return torch.sigmoid(scale * logit)
    return torch.sigmoid(logit) if kind == "dense" else 2 * torch.sigmoid(logit)


def skip_mix(x: Tensor, saved: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
    """Add a U-Net skip: return s + sigmoid(gate) * (x - s), s = weight * saved, or x + s without a gate.

    Args:
        x: `(T, D)` decoder stream.
        saved: `(T, D)` output of the mirrored encoder layer.
        weight: `(D,)`.
        gate: `(D,)` or None.
    """
    s = weight * saved
    return x + s if gate is None else torch.lerp(s, x, torch.sigmoid(gate))
