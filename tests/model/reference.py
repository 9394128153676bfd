"""The model of PR #1855 written down step by step, every scale where the script has it; slow and plain."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.model.gpt import GPT, layer_order


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def attention(
    model: GPT, i: int, n: Tensor, ids: Tensor, rope: tuple[Tensor, Tensor], cu: list[int]
) -> Tensor:
    c, layers = model.config, model.config.layers
    heads, groups, size = c.heads, c.kv_heads, c.head_dim
    q = (n @ model.qo_bank[i].T).view(-1, heads, size)
    k = (n @ model.kv_bank[i].T).view(-1, groups, size)
    v = n @ model.kv_bank[layers + i].T
    if i >= layers - c.value_embed_layers:
        own_scale = model.value_layer_scale[i - (layers - c.value_embed_layers)]
        v = v + own_scale * model.value_scale * (model.value_table[ids] @ model.value_proj[0].T)
    v = v.view(-1, groups, size)

    def turned(x: Tensor) -> Tensor:
        half = c.rope_dims // 2
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cos, sin = (t.double() for t in rope)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)

    q, k = turned(norm(q)) * model.q_gain[i][:, None], turned(norm(k))
    k, own = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
    y = torch.zeros_like(q)
    for start, stop in itertools.pairwise(cu):
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) / size**0.5
        future = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
        weight = scores.masked_fill(future, -torch.inf).softmax(-1)
        y[start:stop] = torch.einsum("hqk,khd->qhd", weight, own[start:stop])
    if i >= layers - c.xsa_layers:
        unit = own / own.norm(dim=-1, keepdim=True)
        strength = 1 + model.xsa_strength[i - layers] if c.xsa_strength else torch.ones(heads)
        y = y - strength[:, None] * (y * unit).sum(-1, keepdim=True) * unit
    if c.head_gate != "none":
        gate = model.head_gate[i]
        logit = (n[:, : gate.shape[1]] @ gate.T)[..., None]
        factor = {"sparse": c.sparse_gate_scale, "dense": 1.0, "out": 1.0}[c.head_gate]
        y = y * torch.sigmoid(factor * logit) * (2.0 if c.head_gate == "out" else 1.0)
    return model.attn_scale[i] * (y.flatten(1) @ model.qo_bank[layers + i].T)


def feed_forward(model: GPT, i: int, n: Tensor) -> Tensor:
    c = model.config
    slope = c.leaky_slope if c.activation == "leaky_relu2" else 0.0
    hidden = F.leaky_relu(n @ model.mlp_up_bank[i].T, slope) ** 2
    return model.mlp_scale[i] * (hidden @ model.mlp_down_bank[i].T)


def mudd(model: GPT, place: int, x: Tensor, sources: list[Tensor]) -> Tensor:
    """The state `x` with `sources` and itself added; rows of the second place follow those of the first."""
    count = len(sources) + 1
    rows = range(count) if place == 0 else range(len(model.mudd_bias) - count, len(model.mudd_bias))
    u = norm(x) @ model.mudd_in[place].T
    u = 0.5 * u * (1 + torch.erf(u / 2**0.5))
    a = [0.1 * (u @ model.mudd_out[r] + model.mudd_bias[r]) for r in rows]
    return x + sum(a[j][:, None] * h for j, h in enumerate([*sources, x]))


def hidden(model: GPT, ids: Tensor, cu: list[int], *, loop: bool) -> Tensor:
    """Return the normed states `(T, D)` before the output projection, in the dtype of the parameters."""
    c = model.config
    x = model.tok_emb[ids]
    if c.bigram_buckets:
        buckets = []
        for t, cur in enumerate(ids.tolist()):
            if t in cu[:-1]:
                buckets.append(c.bigram_buckets - 1)
            else:
                buckets.append((36313 * cur ^ 27191 * int(ids[t - 1])) % (c.bigram_buckets - 1))
        x = x + model.bigram_scale * (model.bigram_table[buckets] @ model.bigram_proj[0].T)
    inside = torch.ones(len(ids), 1, dtype=x.dtype)
    inside[0 if c.smear_over_bos else cu[:-1]] = 0
    if c.smear_gate and c.smear_kind == "token":
        gate = torch.sigmoid(x[:, : model.smear_weight.shape[1]] @ model.smear_weight.T) * model.smear_lambda
        x = x + inside * gate * x.roll(1, 0)
    x = norm(x)
    if c.smear_gate and c.smear_kind == "channel":
        gate = torch.sigmoid(model.smear_logit)
        x = (1 - gate) * x + gate * inside * x.roll(1, 0)
    x0 = x
    rope = model.rope(len(ids))

    def joined(x: Tensor, j: int) -> Tensor:
        if not saved or c.skip == "none":
            return x
        s = model.skip_weights[j] * saved.pop()
        return x + s if c.skip == "weighted" else torch.lerp(s, x, torch.sigmoid(model.skip_gates[j]))

    def mixed(x: Tensor, i: int) -> Tensor:
        return model.resid_mix[i][0] * x + model.resid_mix[i][1] * x0 if c.resid_mix else x

    def scaled(x: Tensor, i: int) -> Tensor:
        return norm(x) * ((i + 1) ** -0.5 if c.ln_scale else 1.0)

    def serial(x: Tensor, i: int) -> Tensor:
        u = mixed(x, i)
        x = u + attention(model, i, scaled(u, i), ids, rope, cu)
        if c.parallel == "gptj" and i >= c.parallel_from:
            return x + feed_forward(model, i, scaled(u, i))
        return x + feed_forward(model, i, scaled(x, i))

    encoder, decoder = layer_order(c, loop=loop)
    saved: list[Tensor] = []
    after = {}  # state by physical layer, of its last execution
    for i in encoder:
        x = after[i] = serial(x, i)
        saved.append(x)
    lanes = (x, x)
    last = c.layers - 1
    early, late = c.layers // 3, c.parallel_from - 1 if c.lanes else 2 * c.layers // 3
    sources = sorted({early, late} - {last - 1, last})
    for j, i in enumerate(decoder):
        first, second = lanes
        if c.mudd and j == len(decoder) - 1:
            first = mudd(model, 0, first, [x0, *(after[k] for k in sources)])
        first = joined(first, j)
        if i < c.parallel_from or c.parallel == "gptj":
            x = after[i] = serial(first, i)
            lanes = (x, x)
            continue
        a = attention(model, i, scaled(mixed(first, i), i), ids, rope, cu)
        m = feed_forward(model, i, scaled(second, i))
        post, keep = model.lane_post[i], model.lane_resid[i]
        lanes = (
            keep[0] * first + post[0, 0] * a + post[1, 0] * m,
            keep[1] * second + post[0, 1] * a + post[1, 1] * m,
        )
        after[i] = 0.5 * (lanes[0] + lanes[1])
    x = 0.5 * (lanes[0] + lanes[1])
    if c.mudd:
        x = mudd(model, 1, x, [x0, *(after[k] for k in (*sources, last - 1))])
    return norm(x)
