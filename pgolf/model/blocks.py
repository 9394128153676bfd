"""The blocks of the language model as pure functions, and the weights that they take.

Legend: `T` tokens, `R` of them whose output is wanted, `D` width, `L` layers, `H` heads, `G` kv heads, `K`
head dim, `M` hidden, `W` gate window, `S` segments.
Source: PR #1855 of the parameter-golf challenge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf.config import ModelConfig
from pgolf.model.attention import Asked, AttentionKernel, AttentionWeights, Term, asked_rows
from pgolf.model.gates import MixKernel, Skip, mix_and_norm, mix_lane, rms_norm, update_lanes
from pgolf.model.lora import LayerLora, Scales
from pgolf.model.mlp import mlp

MlpKernel = Callable[..., Tensor]
"""`norm_mlp` or its reference."""
Branch = Callable[..., Tensor]
"""`attention_branch`, or what computes the same."""
Tap = Callable[[str, Tensor], None] | None
"""Takes the name and the value of an input of a matrix; None: nobody looks."""


class LayerWeights(NamedTuple):
    """The weights of one layer, cut from what `fold` returns once per forward pass."""

    attn: AttentionWeights
    up: Tensor  # (M, D), times ln_scale
    down: Tensor  # (D, M), its rows times mlp_scale
    mix: Tensor | None  # (2, D) float32
    lane_post: Tensor | None  # (2, 2), [branch, destination lane]
    lane_resid: Tensor | None  # (2,)
    scales: Scales
    lora: LayerLora | None = None


class Folded(NamedTuple):
    """The matrices of all layers in the compute dtype, with the scales next to them multiplied in."""

    qkv: Tensor  # (L, D + 2 * G * K, D), times ln_scale
    out: Tensor  # (L, D, D), rows times attn_scale
    up: Tensor  # (L, M, D), times ln_scale
    down: Tensor  # (L, D, M), rows times mlp_scale
    gate: Tensor | None  # (L, H, W) or (L, H, D), times ln_scale
    ln: Tensor  # (L,)


def fold(
    qo: Tensor,
    kv: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    attn_scale: Tensor,
    mlp_scale: Tensor,
    ln_scale: bool,
    dtype: torch.dtype,
) -> Folded:
    """Multiply each scale that stands next to a matrix into that matrix, in float32; return them in `dtype`.

    A scale on activations `(T, D)` costs a pass over them, and its gradient, a sum over tokens, several. Here
    it costs a pass over the weights, and its gradient is that of the matrix, multiplied by the matrix and
    summed over columns. Source: modded-nanogpt, record 47.

    Args:
        qo, kv, up, down, gate, attn_scale, mlp_scale: parameters, see `parameter_shapes`.
        ln_scale: whether the norms of layer i are multiplied by 1 / sqrt(i + 1); otherwise by 1.
    """
    layers = up.shape[0]
    depth = torch.arange(1, layers + 1, device=up.device, dtype=torch.float32)
    ln = depth.rsqrt() if ln_scale else torch.ones_like(depth)
    column = ln[:, None, None]
    qkv = torch.cat((qo[:layers], kv[:layers], kv[layers:]), dim=1)
    return Folded(
        (column * qkv).to(dtype),
        (attn_scale[:, :, None] * qo[layers:]).to(dtype),
        (column * up).to(dtype),
        (mlp_scale[:, :, None] * down).to(dtype),
        None if gate is None else (column * gate).to(dtype),
        ln,
    )


class Context(NamedTuple):
    """The inputs that all layers share, in addition to their weights."""

    x0: Tensor  # (T, D)
    rope: tuple[Tensor, Tensor]  # (T, 1, dims / 2) each
    cu_seqlens: Tensor  # (S + 1,) int32
    values: Tensor | None = None  # (T, G * K), value embeddings
    asked: Asked | None = None  # for the layer that runs last: the tokens whose output is wanted, if not all


class Kernels(NamedTuple):
    """The functions that compute the branches of a block and what is between, chosen by `GPT.prepare`."""

    attention: AttentionKernel
    mlp: MlpKernel
    mix: MixKernel | None
    branch: Branch


def attend(
    config: ModelConfig,
    kernels: Kernels,
    n: Tensor,
    w: LayerWeights,
    ctx: Context,
    exclusive: bool,
    tap: Tap,
) -> Tensor:
    """Return the scaled attention `(T, D)` of a layer on its mixed and normed input `n` `(T, D)`."""
    lora: tuple[Term, ...] = (None,) * 4
    if w.lora is not None:
        lora = w.lora.attention(n, w.scales, ctx.asked)
    if tap is not None:
        tap("attn_in", n * w.scales.ln)
    return kernels.branch(
        config,
        kernels.attention,
        n,
        w.attn,
        exclusive=exclusive,
        rope=ctx.rope,
        cu_seqlens=ctx.cu_seqlens,
        lora=lora,
        values=ctx.values,
        asked=ctx.asked,
        observe=tap,
    )


def feed_forward(
    config: ModelConfig, kernel: MlpKernel, x: Tensor, residual: Tensor | None, w: LayerWeights, tap: Tap
) -> Tensor:
    """Return `residual` (None: 0) plus the scaled output `(T, D)` of a layer's MLP on the stream `x`."""
    if tap is None:
        y = kernel(x, w.up, w.down, residual, slope=config.slope)
    else:
        n = rms_norm(x)
        tap("mlp_in", n * w.scales.ln)
        y = mlp(n, w.up, w.down, slope=config.slope, observe=tap)
        y = y if residual is None else residual + y
    if w.lora is None or w.lora.mlp_a is None:
        return y
    # The norm again, because kernels do not give away theirs.
    return y + w.lora.mlp(rms_norm(x), w.scales)


def serial_block(
    config: ModelConfig,
    kernels: Kernels,
    x: Tensor,
    skip: Skip | None,
    w: LayerWeights,
    ctx: Context,
    exclusive: bool,
    joint: bool,
    tap: Tap,
) -> Tensor:
    """Join the skip, mix in x0, and run attention and the MLP on one residual stream `x` `(T, D)`.

    The MLP comes after the attention, or, if `joint`, both read the same mixed input. With `ctx.asked`, the
    result has the rows `(R, D)` of those tokens.
    """
    u, n = mix_and_norm(kernels.mix, x, skip, ctx.x0, w.mix)
    a = attend(config, kernels, n, w, ctx, exclusive, tap)
    u = asked_rows(u, ctx.asked)
    x = u + a
    return feed_forward(config, kernels.mlp, u if joint else x, x, w, tap)


def parallel_block(
    config: ModelConfig,
    kernels: Kernels,
    lanes: tuple[Tensor, Tensor],
    skip: Skip | None,
    w: LayerWeights,
    ctx: Context,
    exclusive: bool,
    tap: Tap,
) -> tuple[Tensor, Tensor]:
    """Run attention on lane 0 and the MLP on lane 1, and add both outputs to both lanes.

    lane_l <- r_l * lane_l + P[0, l] * attention + P[1, l] * mlp; the skip joins lane 0 before. With
    `ctx.asked`, the results have the rows `(R, D)` of those tokens.
    """
    lane0, lane1 = lanes
    lane0, n = mix_lane(kernels.mix, lane0, skip, ctx.x0, w.mix)
    a = attend(config, kernels, n, w, ctx, exclusive, tap)
    lane0, lane1 = asked_rows(lane0, ctx.asked), asked_rows(lane1, ctx.asked)
    m = feed_forward(config, kernels.mlp, lane1, None, w, tap)
    assert w.lane_post is not None and w.lane_resid is not None
    return update_lanes(kernels.mix, (lane0, lane1), a, m, w.lane_post, w.lane_resid)


def join_lanes(lane0: Tensor, lane1: Tensor) -> Tensor:
    """Return the normed mean of the two lanes, the input of the output projection."""
    return rms_norm(0.5 * (lane0 + lane1))
