"""Norms, gates and mixes of the residual stream, as small pure functions.

Legend: `T` tokens, `D` width, `H` heads, `K` head dim, `G` kv heads, `W` gate window.
Sources, pull requests of parameter-golf: smear gate #1667 (BOS mask #1851), by channel #549, exclusive
self-attention #478, sparse head gate #1787, dense gate #1736, output gate #1667, gated U-Net skips #1394.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MixKernel = Callable[..., tuple[Tensor, ...]]
"""`stream_mix`."""
EPS = torch.finfo(torch.float32).eps
SMALLEST_SQUARE = 1e-24
"""Smallest |v|^2 by which `exclude_self` divides (as in F.normalize): a value of zeros removes nothing."""


def rms_norm(x: Tensor) -> Tensor:
    """Return `x` divided by its root mean square over the last dim; equals `F.rms_norm(x, x.shape[-1:])`.

    eps is that of float32 for every dtype, which is also torch's choice.
    """
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def smear(x: Tensor, first: Tensor | None, weight: Tensor, strength: Tensor) -> Tensor:
    """Add a gated copy of the previous token: x_t + strength * sigmoid(w . x_t[:W]) * x_(t-1).

    Args:
        x: `(T, D)` embeddings before smearing.
        first: `(T,)` bool, true at the first token of every segment (so at every BOS), where nothing is
            added; None adds everywhere but at position 0, so also across documents.
        weight: `(1, W)`.
        strength: `(1,)`.
    """
    gate = torch.sigmoid(F.linear(x[:, : weight.shape[1]], weight)) * strength  # (T, 1)
    previous = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
    if first is not None:
        gate = torch.where(first[:, None], torch.zeros_like(gate), gate)
    return x + gate * previous


def smear_channels(x: Tensor, first: Tensor | None, logit: Tensor) -> Tensor:
    """Mix each token with the previous one, channel by channel: (1 - g) * x_t + g * x_(t-1), g = sigmoid(l).

    Args:
        x: `(T, D)` normed embeddings before smearing.
        first: `(T,)` bool, true at the first token of every segment (so at every BOS), before which x is 0;
            None only knows position 0, so it mixes across documents.
        logit: `(D,)`, l.
    """
    previous = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
    if first is not None:
        previous = torch.where(first[:, None], torch.zeros_like(previous), previous)
    return x + torch.sigmoid(logit) * (previous - x)


def exclude_self(y: Tensor, v: Tensor, beyond: Tensor | None = None) -> Tensor:
    """Remove from each head's output its part along the token's own value (exclusive self-attention).

    Returns y_h - (1 + b_h) (y_h . u) u with u = v / |v| of the head's kv group.

    Args:
        y: `(T, H, K)` attention output.
        v: `(T, G, K)` values; group g has the query heads g * H/G to (g + 1) * H/G - 1.
        beyond: `(H,)`, b; None: 0.
    """
    tokens, groups = v.shape[:2]
    # No -1: with no tokens it could be anything.
    grouped = y.view(tokens, groups, y.shape[1] // groups, y.shape[2]).float()  # (T, G, H/G, K)
    # Expanded to the query heads before both products, so that the compiler makes one kernel of them and
    # does not store v in float32.
    values = v.unsqueeze(2).expand(grouped.shape).float()
    square = values.square().sum(-1, keepdim=True).clamp_min(SMALLEST_SQUARE)
    along = (grouped * values).sum(-1, keepdim=True) / square
    if beyond is not None:
        along = (1 + beyond.float()).view(grouped.shape[1:3])[..., None] * along
    return (grouped - along * values).view(y.shape).to(y.dtype)


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


class Skip(NamedTuple):
    """A skip of the U-Net into a layer of the decoder half."""

    saved: Tensor  # (T, D), output of the mirrored layer of the encoder half
    weight: Tensor  # (D,) float32
    gate: Tensor | None  # (D,) float32


def mix_streams(x: Tensor, skip: Skip | None, x0: Tensor, mix: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the stream with the skip joined, y = k x + a s, and the layer's input u = m_0 y + m_1 x0.

    A gated skip has k = sigmoid(gate) and a = (1 - k) * weight, a skip without a gate k = 1 and a = weight;
    without a skip y = x, without a mix u = y. Coefficients are multiplied channel by channel before they meet
    a stream, so u is one sum of three streams and each gradient of a coefficient is one sum over tokens.

    Args:
        x: `(T, D)` residual stream.
        skip: into this layer.
        x0: `(T, D)` input of the first layer.
        mix: `(2, D)`, m_0 and m_1.
    """
    if skip is None:
        return x, x if mix is None else mix[0].to(x.dtype) * x + mix[1].to(x.dtype) * x0
    keep, add = _skip_factors(skip)

    def joined(k: Tensor | None, a: Tensor) -> Tensor:
        return (x if k is None else k.to(x.dtype) * x) + a.to(x.dtype) * skip.saved

    y = joined(keep, add)
    return y, y if mix is None else joined(*_input_factors(mix, keep, add)) + mix[1].to(x.dtype) * x0


def _skip_factors(skip: Skip) -> tuple[Tensor | None, Tensor]:
    """Return k and a of `mix_streams`, and None for a k of 1.

    Not a tensor of ones: torch.compile (torch 2.11 and 2.13, Inductor) replaces a row of the mix times ones
    by the row, and forgets that the row is a part of the parameter. The backward pass then writes a gradient
    into it, so the weights change (`docs/findings.md`).
    """
    if skip.gate is None:
        return None, skip.weight
    keep = torch.sigmoid(skip.gate)
    return keep, (1 - keep) * skip.weight


def _input_factors(mix: Tensor, keep: Tensor | None, add: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors m_0 k and m_0 a of the stream and of the skip in u of `mix_streams`."""
    return mix[0] if keep is None else mix[0] * keep, mix[0] * add


def mix_and_norm(
    kernel: MixKernel | None, x: Tensor, skip: Skip | None, x0: Tensor, mix: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return u of `mix_streams` and its RMS norm.

    Args:
        kernel: `stream_mix`; None: torch's operators, which the compiler fuses.
        x, skip, x0, mix: as in `mix_streams`.
    """
    if kernel is None or mix is None:
        _, u = mix_streams(x, skip, x0, mix)
        return u, rms_norm(u)
    if skip is None:
        u, n = kernel((x, x0), mix[None], last="both")
        return u, n
    keep, add = _skip_factors(skip)
    factors = torch.stack((*_input_factors(mix, keep, add), mix[1]))
    u, n = kernel((x, skip.saved, x0), factors[None], last="both")
    return u, n


def mix_lane(
    kernel: MixKernel | None, lane: Tensor, skip: Skip | None, x0: Tensor, mix: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y of `mix_streams` and the RMS norm of its u; arguments as in `mix_and_norm`."""
    if kernel is None or mix is None:
        y, u = mix_streams(lane, skip, x0, mix)
        return y, rms_norm(u)
    if skip is None:
        (n,) = kernel((lane, x0), mix[None], last="norm")
        return lane, n
    keep, add = _skip_factors(skip)
    ones = torch.ones_like(add) if keep is None else keep
    rows = (ones, add, torch.zeros_like(add)), (*_input_factors(mix, keep, add), mix[1])
    y, n = kernel((lane, skip.saved, x0), torch.stack([torch.stack(row) for row in rows]), last="norm")
    return y, n


def update_lanes(
    kernel: MixKernel | None, lanes: tuple[Tensor, Tensor], a: Tensor, m: Tensor, post: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor]:
    """Return both lanes, lane_l <- r_l * lane_l + P[0, l] * a + P[1, l] * m.

    Args:
        kernel: as in `mix_and_norm`.
        lanes, a, m: `(T, D)` each; output of the attention and of the MLP.
        post: `(2, 2)`, P.
        keep: `(2,)`, r.
    """
    lane0, lane1 = lanes
    if kernel is None:
        return (
            keep[0] * lane0 + post[0, 0] * a + post[1, 0] * m,
            keep[1] * lane1 + post[0, 1] * a + post[1, 1] * m,
        )
    factors = torch.cat((torch.diag(keep), post.T), dim=1)  # (2, 4)
    lane0, lane1 = kernel((lane0, lane1, a, m), factors[:, :, None].expand(-1, -1, a.shape[1]))
    return lane0, lane1
