"""The heads between the product that makes q, k and v and the output product, as one step of autograd.

As separate operators, each gradient of v (of attention, and of exclusive self-attention) is a tensor of its
own, which autograd adds; the sum is then copied, with the gradients of q and k, into that of the product. In
one step nothing but the operators' own kernels moves tensors: `qk_norm_rope`, flash-attn-4 and `head_mix`, of
which the first, going back, adds both gradients of v while it writes the gradient of the product.

Legend: `T` tokens, `H` query heads, `G` kv heads, `K` head dim, `R` rotated dims, `S` segments, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.config import ModelConfig
from pgolf.model.attention import AttentionKernel, AttentionName, AttentionWeights, attention_branch
from pgolf.model.gates import head_gate

HeadsName = Literal["auto", "composed"]
Branch = Callable[..., Tensor]
"""`attention_branch`, or what computes the same."""
KINDS = {"none": 0, "sparse": 1, "dense": 1, "out": 2}
"""`ModelConfig.head_gate` -> `kind` of `head_mix`."""


class _Heads(torch.autograd.Function):
    """`attend_heads` and its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        z: Tensor | None,
        gain: Tensor,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        head_dim: int,
        mix: tuple[float, int] | None,
    ) -> Tensor:
        q, k = torch.ops.pgolf.qk_norm_rope(qkv, gain, cos, sin, head_dim)
        v = _values(qkv, k)
        y, lse = torch.ops.pgolf.fa4_forward(q, k, v, cu_seqlens, max_seqlen)
        ctx.save_for_backward(qkv, z, gain, cos, sin, cu_seqlens, q, k, y, lse)
        ctx.max_seqlen, ctx.head_dim, ctx.mix = max_seqlen, head_dim, mix
        out: Tensor = y if mix is None else torch.ops.pgolf.head_mix(y, v, z, *mix)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, z, gain, cos, sin, cu_seqlens, q, k, y, lse = ctx.saved_tensors
        v, mixed, dz = _values(qkv, k), [], None
        if ctx.mix is not None:
            grad, dv, dz = torch.ops.pgolf.head_mix_backward(grad.contiguous(), y, v, z, *ctx.mix)
            mixed = [dv]
        dq, dk, dv = torch.ops.pgolf.fa4_backward(grad, q, k, v, y, lse, cu_seqlens, ctx.max_seqlen)
        dqkv, dgain = torch.ops.pgolf.qk_norm_rope_backward(
            dq, dk, [dv, *mixed], qkv, gain, cos, sin, ctx.head_dim
        )
        return dqkv, dz if z is not None else None, dgain.to(gain.dtype), *(None,) * 6


def _values(qkv: Tensor, k: Tensor) -> Tensor:
    """Return v `(T, G, K)`, the last columns of `qkv`, of the shape of `k`."""
    return qkv[:, qkv.shape[1] - k.shape[1] * k.shape[2] :].view(k.shape)


def attend_heads(
    qkv: Tensor,
    z: Tensor | None,
    gain: Tensor,
    rope: tuple[Tensor, Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    head_dim: int,
    mix: tuple[float, int] | None,
) -> Tensor:
    """Attend with normed and rotated q and k; exclude each token's own value and gate the result, if asked.

    q_h = rotate(rms_norm(q_h)) gain_h     k_g = rotate(rms_norm(k_g))     y = attention(q, k, v)
    y' = gate(z) (y - (y . u) u)  with  u = v / |v|

    It saves qkv, q, k, y, z and the logsumexp of attention. The result can be differentiated once, by
    torch.autograd; it works under torch.compile and in CUDA graphs.

    Args:
        qkv: `(T, (H + 2 G) K)`, contiguous.
        z: `(T, H)`, logits of the head gate; None: no gate.
        gain: `(H,)`.
        rope: cosines and sines, `(T, 1, R / 2)` float32 each.
        cu_seqlens, max_seqlen: as in `pgolf.model.attention.sdpa_attention`.
        head_dim: K.
        mix: `scale` and `kind` of `head_mix`; None: return y, and z is not used.

    Returns:
        `(T, H, K)`.
    """
    out: Tensor = _Heads.apply(  # type: ignore[no-untyped-call]
        qkv, z, gain, *rope, cu_seqlens, max_seqlen, head_dim, mix
    )
    return out


def heads_branch(
    config: ModelConfig,
    kernel: AttentionKernel,
    n: Tensor,
    weights: AttentionWeights,
    *,
    exclusive: bool,
    rope: tuple[Tensor, Tensor],
    cu_seqlens: Tensor,
    lora: tuple[Tensor | None, ...],
    values: Tensor | None,
    asked: Any,
    observe: Callable[[str, Tensor], None] | None,
) -> Tensor:
    """Compute `attention_branch` with `attend_heads`; arguments as there.

    What changes q, k or v before the norm, or the mix after attention, is left to `attention_branch`:
    adapters, value embeddings, learned strengths of the exclusion, and tokens that are not asked for.
    """
    changed = (*lora, weights.value_scale, weights.xsa_strength, asked)
    if any(part is not None for part in changed):
        return attention_branch(
            config,
            kernel,
            n,
            weights,
            exclusive=exclusive,
            rope=rope,
            cu_seqlens=cu_seqlens,
            lora=lora,
            values=values,
            asked=asked,
            observe=observe,
        )
    gate, scale = config.head_gate, config.sparse_gate_scale
    z = mix = None
    if exclusive:
        mix = (scale if gate == "sparse" else 1.0, KINDS[gate])
        if weights.gate is not None:
            z = F.linear(n[:, : weights.gate.shape[1]], weights.gate)
    qkv = F.linear(n, weights.qkv)
    y = attend_heads(
        qkv,
        z,
        weights.q_gain,
        rope,
        cu_seqlens,
        config.max_context,
        head_dim=config.head_dim,
        mix=mix,
    )
    if not exclusive and gate != "none":
        assert weights.gate is not None
        y = y * head_gate(gate, n, weights.gate, scale=scale)
    y = y.flatten(1)
    if observe is not None:
        observe("attn_out", y)
    return F.linear(y, weights.out)


def select_branch(name: HeadsName, attention: AttentionName, config: ModelConfig) -> Branch:
    """Return `heads_branch` if `name` is "auto" and its operators take the model, else `attention_branch`.

    Only flash-attn-4 is part of the step: the forward and backward operators of torch's variable-length
    attention are private.

    The programs that stand alone have `_no_heads.py` in place of this module.
    """
    return heads_branch if name == "auto" and attention == "fa4" and takes(config) else attention_branch


def takes(config: ModelConfig) -> bool:
    """Return whether the kernels take heads of this size."""
    return config.head_dim in (64, 128) and config.heads // config.kv_heads in (1, 2, 4)
