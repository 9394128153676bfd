"""The operators of `attend_heads` on the CPU, in plain PyTorch with gradients by hand, in any dtype.

Legend: `T` tokens, `H` query heads, `G` kv heads, `K` head dim, `R` rotated dims.
"""

import torch

from pgolf.model.gates import EPS, SMALLEST_SQUARE, rms_norm
from pgolf.model.rope import rotate

SCHEMAS = {
    "qk_norm_rope": "(Tensor qkv, Tensor gain, Tensor cos, Tensor sin, int head_dim) -> (Tensor, Tensor)",
    "qk_norm_rope_backward": "(Tensor dq, Tensor dk, Tensor[] dv, Tensor qkv, Tensor gain, Tensor cos, "
    "Tensor sin, int head_dim) -> (Tensor, Tensor)",
    "head_mix": "(Tensor y, Tensor v, Tensor? z, float scale, int kind) -> Tensor",
    "head_mix_backward": "(Tensor grad, Tensor y, Tensor v, Tensor? z, float scale, int kind) -> "
    "(Tensor, Tensor, Tensor)",
}


def split(qkv, heads, head_dim):
    """Return q `(T, H, K)`, k and v `(T, G, K)`."""
    wide = heads * head_dim
    narrow = (qkv.shape[1] - wide) // 2
    return [t.view(len(qkv), -1, head_dim) for t in qkv.split([wide, narrow, narrow], 1)]


def qk_norm_rope(qkv, gain, cos, sin, head_dim):
    q, k, _ = split(qkv, len(gain), head_dim)
    return rotate(rms_norm(q), cos, sin) * gain[:, None].to(q.dtype), rotate(rms_norm(k), cos, sin)


def norm_backward(grad, x):
    rho = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return rho * grad - rho**3 * (grad * x).mean(-1, keepdim=True) * x


def qk_norm_rope_backward(dq, dk, dv, qkv, gain, cos, sin, head_dim):
    q, k, _ = split(qkv, len(gain), head_dim)
    back = [rotate(t, cos, -sin) for t in (dq, dk)]
    dgain = (back[0] * rms_norm(q)).sum((0, 2)).to(torch.promote_types(gain.dtype, torch.float32))
    parts = [norm_backward(back[0] * gain[:, None].to(q.dtype), q), norm_backward(back[1], k), sum(dv)]
    return torch.cat([t.reshape(len(qkv), -1) for t in parts], 1), dgain


def gate(z, scale, kind):
    """Return the factor `(T, H, 1)`, and its derivative by z."""
    s = torch.sigmoid(scale * z if kind == 1 else z)[..., None]
    return (s, scale * s * (1 - s)) if kind == 1 else (2 * s, 2 * s * (1 - s))


def exclude_self(y, v, beyond=None):
    """Return what `pgolf.model.gates.exclude_self` does, which computes in float32, in the inputs' dtype."""
    wide = v.repeat_interleave(y.shape[1] // v.shape[1], 1)
    along = (y * wide).sum(-1, keepdim=True) / wide.square().sum(-1, keepdim=True).clamp_min(SMALLEST_SQUARE)
    return y - (along if beyond is None else (1 + beyond)[:, None] * along) * wide


def head_mix(y, v, z, scale, kind):
    assert (z is None) == (kind == 0)
    out = exclude_self(y, v)
    return out if z is None else out * gate(z, scale, kind)[0]


def head_mix_backward(grad, y, v, z, scale, kind):
    group = y.shape[1] // v.shape[1]
    wide = v.repeat_interleave(group, 1)
    square = wide.square().sum(-1, keepdim=True)
    clamped = square.clamp_min(SMALLEST_SQUARE)
    along = (y * wide).sum(-1, keepdim=True)
    mixed = y - along / clamped * wide
    dz = grad.new_empty(0)
    if z is not None:
        factor, slope = gate(z, scale, kind)
        dz, grad = (grad * mixed * slope).sum(-1), grad * factor
    seen = (grad * wide).sum(-1, keepdim=True)
    dv = -(seen * y + along * grad) / clamped
    dv = dv + 2 * along * seen / clamped.square() * wide * (square > SMALLEST_SQUARE)
    return grad - seen / clamped * wide, dv.unflatten(1, (-1, group)).sum(2), dz


def _fakes():
    def qk(qkv, gain, _cos, _sin, head_dim):
        heads = len(gain)
        groups = (qkv.shape[1] // head_dim - heads) // 2
        return tuple(qkv.new_empty(len(qkv), h, head_dim) for h in (heads, groups))

    def qk_back(_dq, _dk, _dv, qkv, gain, *_):
        return torch.empty_like(qkv), gain.new_empty(
            len(gain), dtype=torch.promote_types(gain.dtype, torch.float32)
        )

    def mix(y, *_):
        return torch.empty_like(y)

    def mix_back(_grad, y, v, z, *_):
        return torch.empty_like(y), v.new_empty(v.shape), y.new_empty(0) if z is None else torch.empty_like(z)

    return {
        "qk_norm_rope": qk,
        "qk_norm_rope_backward": qk_back,
        "head_mix": mix,
        "head_mix_backward": mix_back,
    }


LIBRARY = torch.library.Library("pgolf", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    if not hasattr(torch.ops.pgolf, _name):
        LIBRARY.define(_name + _schema)
        torch.library.register_fake(f"pgolf::{_name}", _fakes()[_name])
    LIBRARY.impl(_name, globals()[_name], "CPU")
