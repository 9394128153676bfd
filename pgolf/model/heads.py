"""The heads of a layer, from the product of q, k and v to the output product, as one node of autograd.

As separate operators, v has two gradients, of attention and of exclusive self-attention, each a tensor of its
own. A kernel adds them, and another one copies the gradients of q, k and v into that of the product. In one
node nothing but the operators' own kernels moves tensors: `qk_norm_rope`, attention and `head_mix`. On the
way back, the first of them writes the gradient of the product and adds both gradients of v while it does.
Attention is `doc_attention` or flash-attn-4. Where the kernel of `qkv_rope` takes it, the product of q, k and
v is part of the node, too, and computed together with q and k.

Passes over a `(T, D)` tensor in a block of `pr1855`, forward + backward, counted: what torch.compile 2.11
makes of composed operators 6.25 + 18.89, these operators 5.5 + 10 (`20261130_heads-passes.txt`).

Legend: `T` tokens, `H` query heads, `G` kv heads, `K` head dim, `R` rotated dims, `D` width.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.config import ModelConfig
from pgolf.env import launch
from pgolf.model.attention import (
    Asked,
    AttentionKernel,
    AttentionName,
    AttentionWeights,
    Term,
    attention_branch,
    first_difference,
    low_product,
)
from pgolf.model.blocks import Branch
from pgolf.model.gates import head_gate
from pgolf.model.rope import rope_tables
from pgolf.ops._hopper import has_kernels
from pgolf.ops.head_mix import Kind
from pgolf.ops.qk_norm_rope import HEAD_DIMS, HEADS_PER_GROUP
from pgolf.ops.qkv_rope import HEAD_DIM, LEAST_HEADS, MOST_WIDTH, ROTATED
from pgolf.peers import describe

HeadsName = Literal["auto", "plain", "composed"]
KINDS: dict[str, Kind] = {"none": 0, "sparse": 1, "dense": 1, "out": 2}
"""`ModelConfig.head_gate` -> `kind` of `head_mix`."""


class _Heads(torch.autograd.Function):
    """`attend_heads` and its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        z: Tensor | None,
        gain: Tensor,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        head_dim: int,
        mix: tuple[float, Kind] | None,
        doc: bool,
    ) -> Tensor:
        if weight is None:
            qkv = x
            q, k = torch.ops.pgolf.qk_norm_rope(qkv, gain, cos, sin, head_dim)
        else:
            qkv, q, k = torch.ops.pgolf.qkv_rope(x, weight, gain, cos, sin, head_dim)
        v = _values(qkv, k)
        if doc:
            y, lse = torch.ops.pgolf.doc_attention(q, k, v, cu_seqlens, head_dim**-0.5)
        else:
            y, lse = torch.ops.pgolf.fa4_forward(q, k, v, cu_seqlens, max_seqlen)
        n = None if weight is None else x
        ctx.save_for_backward(n, weight, qkv, z, gain, cos, sin, cu_seqlens, q, k, y, lse)
        ctx.max_seqlen, ctx.head_dim, ctx.mix, ctx.doc = max_seqlen, head_dim, mix, doc
        out: Tensor = y if mix is None else torch.ops.pgolf.head_mix(y, v, z, *mix)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        n, weight, qkv, z, gain, cos, sin, cu_seqlens, q, k, y, lse = ctx.saved_tensors
        v, dz, delta = _values(qkv, k), None, None
        mixed: list[Tensor] = []
        if ctx.mix is not None:
            grad, of_mix, dz, delta = torch.ops.pgolf.head_mix_backward(grad.contiguous(), y, v, z, *ctx.mix)
            mixed = [of_mix]
        known = grad, q, k, v, y, lse, cu_seqlens
        if ctx.doc:
            scale = ctx.head_dim**-0.5
            dq, dk, dv = torch.ops.pgolf.doc_attention_backward(*known, scale, delta)
        else:
            dq, dk, dv = torch.ops.pgolf.fa4_backward(*known, ctx.max_seqlen)
        dqkv, dgain = torch.ops.pgolf.qk_norm_rope_backward(
            dq, dk, [dv, *mixed], qkv, gain, cos, sin, ctx.head_dim
        )
        dx, dweight = dqkv, None
        if weight is not None:
            # As autograd does for F.linear.
            dx = dqkv @ weight if ctx.needs_input_grad[0] else None
            dweight = dqkv.t() @ n if ctx.needs_input_grad[1] else None
        return dx, dweight, dz if z is not None else None, dgain.to(gain.dtype), *(None,) * 7


def _values(qkv: Tensor, k: Tensor) -> Tensor:
    """Return v `(T, G, K)`, the last columns of `qkv`, of the shape of `k`."""
    return qkv[:, qkv.shape[1] - k.shape[1] * k.shape[2] :].view(k.shape)


def attend_heads(
    x: Tensor,
    z: Tensor | None,
    gain: Tensor,
    rope: tuple[Tensor, Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    head_dim: int,
    mix: tuple[float, Kind] | None,
    doc: bool = False,
    weight: Tensor | None = None,
) -> Tensor:
    """Attend from the product of q, k and v; exclude each token's own value, and multiply by the head gate.

    q, k = qk_norm_rope(qkv)     y = attention(q, k, v)     result = head_mix(y, v, z), or y without `mix`

    The backward pass keeps qkv, q, k, y, z and the logsumexp of attention, and with `weight` also that and x.
    The result can be differentiated once, by torch.autograd; it works under torch.compile and in CUDA graphs.

    Args:
        x: qkv `(T, (H + 2 G) K)` bfloat16, contiguous; with `weight` the input of the product `(T, D)`.
        z: `(T, H)`, logits of the head gate; None: no gate.
        gain: `(H,)`.
        rope: cosines and sines, `(T, 1, R / 2)` float32 each.
        cu_seqlens, max_seqlen: as in `pgolf.model.attention.sdpa_attention`.
        head_dim: K.
        mix: `scale` and `kind` of `head_mix`; None: return y. Then z must be None.
        doc: whether to attend with `doc_attention`; otherwise with flash-attn-4.
        weight: `((H + 2 G) K, D)`, dtype of x: qkv = x weight^T, by `qkv_rope`.

    Returns:
        `(T, H, K)`.
    """
    out: Tensor = _Heads.apply(  # type: ignore[no-untyped-call]
        x, weight, z, gain, *rope, cu_seqlens, max_seqlen, head_dim, mix, doc
    )
    return out


def adapted_product(x: Tensor, weight: Tensor, terms: Sequence[Term], firsts: Sequence[int]) -> Tensor:
    """Return x weight^T, to whose columns from each of `firsts` on the term of an adapter is added in place.

    Put together from parts, the result would be read and written once more, and so would its gradient.

    Args:
        x: `(N * W, D)`.
        weight: `(E, D)`.
        terms: see `Term`; None: nothing is added.
        firsts: a column for each term.

    Returns:
        `(N * W, E)`; it can be differentiated.
    """
    found = [(*term, first) for term, first in zip(terms, firsts, strict=True) if term is not None]
    if not found:
        return F.linear(x, weight)
    lows, bs, places = map(list, zip(*found, strict=True))
    out: Tensor = torch.ops.pgolf._adapted_product(x, weight, lows, bs, places)
    return out


def _columns(of: Tensor, bs: list[Tensor], places: list[int]) -> list[Tensor]:
    """Return the columns `(N, W, E_i)` of `of` `(N * W, E)` that belong to each of `bs` `(N, E_i, r)`."""
    documents = of.view(bs[0].shape[0], -1, of.shape[1])
    return [documents[:, :, at : at + b.shape[1]] for b, at in zip(bs, places, strict=True)]


def _product_forward(
    x: Tensor, weight: Tensor, lows: list[Tensor], bs: list[Tensor], places: list[int]
) -> Tensor:
    out = F.linear(x, weight)
    for part, low, b in zip(_columns(out, bs, places), lows, bs, strict=True):
        part.baddbmm_(low, b.mT)
    return out


def _product_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, weight, lows, bs, ctx.places = inputs
    # Of frozen weights no gradient is computed, for which alone the input would be kept.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, *lows, *bs)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, *factors = ctx.saved_tensors
    count = len(ctx.places)
    lows, bs = factors[:count], factors[count:]
    of_x, of_weight, of_lows, of_bs = ctx.needs_input_grad[:4]
    grad = grad.contiguous()
    parts = _columns(grad, bs, ctx.places)
    to_lows, to_bs = zip(parts, bs, of_lows, strict=True), zip(parts, lows, of_bs, strict=True)
    return (
        grad @ weight if of_x else None,
        grad.t() @ x if of_weight else None,
        [torch.bmm(part, b) if need else None for part, b, need in to_lows],
        [torch.bmm(part.mT, low) if need else None for part, low, need in to_bs],
        None,
    )


# One operator, because the compiler would copy what is added to; in Python, because its steps are torch's.
torch.library.define(
    "pgolf::_adapted_product",
    "(Tensor x, Tensor weight, Tensor[] lows, Tensor[] bs, int[] places) -> Tensor",
)
torch.library.impl("pgolf::_adapted_product", "default", _product_forward)
torch.library.register_fake(
    "pgolf::_adapted_product", lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0])
)
torch.library.register_autograd("pgolf::_adapted_product", _product_backward, setup_context=_product_setup)


def unrounded_logits(hidden: Tensor, table: Tensor, extra: Tensor | None = None) -> Tensor:
    """Return hidden table^T and, if there is one, `extra` added, in float32, or in float64 for such input.

    Logits rounded to bfloat16 have errors of up to 0.03 at 10; about half the variance of the errors adds to
    the mean loss: 1e-4 nats. On a GPU factors in bfloat16 are multiplied as such, and only their product is
    not rounded. The gradient of the logits is rounded to the dtype of `hidden` before its products, unless
    the table is trained, too.

    Args:
        hidden: `(R, D)`.
        table: `(V, D)`, dtype of `hidden`.
        extra: `(R, V)`, what adapters add.

    Returns:
        `(R, V)`; it can be differentiated.
    """
    if not table.requires_grad:
        found: Tensor = _Logits.apply(hidden, table, extra)  # type: ignore[no-untyped-call]
        return found
    logits = _wide_product(hidden, table)
    return logits if extra is None else logits + extra


class _Logits(torch.autograd.Function):
    """`unrounded_logits` of a table without gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, extra: Tensor | None) -> Tensor:
        ctx.save_for_backward(table)
        if hidden.is_cuda and hidden.dtype == torch.bfloat16:
            logits = torch.mm(hidden, table.t(), out_dtype=torch.float32)
        else:
            logits = _wide_product(hidden, table)
        return logits if extra is None else logits.add_(extra)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (table,) = ctx.saved_tensors
        grad = grad.to(table.dtype)
        return grad @ table, None, grad if ctx.needs_input_grad[2] else None


def _wide_product(hidden: Tensor, table: Tensor) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return F.linear(hidden.to(dtype), table.to(dtype))


def asked_attention(
    asked: Asked, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """Attend from the tokens that are asked for alone; arguments as in `sdpa_attention`, and `asked`.

    Other kernels take as many queries as keys: zeros for the tokens before a chunk, which cost as much.

    Returns:
        `(T, H, K)`, zero for the other tokens.
    """
    del max_seqlen
    count = cu_seqlens.shape[0] - 1

    def heads(x: Tensor) -> Tensor:
        """Return `(N, H, W, K)` of `(N * W, H, K)` or of `(N * W, G, K)`."""
        x = x.view(count, -1, *x.shape[1:]).transpose(1, 2)
        return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)

    rows, keys, values = heads(asked.rows(q)), heads(k), heads(v)
    # The last query sees all keys. That is what this operator means by causal, as `torch.nn.attention.bias`
    # has it, which loads torch's compiler and does not work in a TorchDispatchMode.
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        y = torch.ops.aten._scaled_dot_product_flash_attention(rows, keys, values, is_causal=True)[0]
    else:
        shape = rows.shape[2], keys.shape[2]
        mask = torch.ones(shape, dtype=torch.bool, device=q.device).tril(shape[1] - shape[0])
        y = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
    return asked.padded(y.transpose(1, 2).flatten(0, 1), q.shape[0])


def heads_branch(
    config: ModelConfig,
    kernel: AttentionKernel,
    n: Tensor,
    weights: AttentionWeights,
    *,
    exclusive: bool,
    rope: tuple[Tensor, Tensor],
    cu_seqlens: Tensor,
    lora: tuple[Term, ...] = (None,) * 4,
    values: Tensor | None = None,
    asked: Asked | None = None,
    observe: Callable[[str, Tensor], None] | None = None,
    doc: bool = False,
    product: bool = False,
) -> Tensor:
    """Compute `attention_branch` with `attend_heads`; arguments as in both.

    `kernel` is `doc_kernel` with `doc`, and flash-attn-4 without. With `product`, `qkv_rope` computes the
    product of q, k and v, except where adapters add to it. What the operators do not compute is left
    to `attention_branch` and `kernel`: value embeddings, learned strengths of the exclusion, and outputs of
    some tokens only, for which `asked_attention` is the kernel.
    """
    others = (weights.value_scale, weights.xsa_strength, asked)
    if any(part is not None for part in others):
        if asked is not None:
            kernel = functools.partial(asked_attention, asked)
        return attention_branch(
            *(config, kernel, n, weights),
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
        mix = scale if gate == "sparse" else 1.0, KINDS[gate]
        if weights.gate is not None:
            z = F.linear(n[:, : weights.gate.shape[1]], weights.gate)
    inside = product and not any(term is not None for term in lora[:3])
    firsts = 0, config.width, config.width + config.kv_width
    x = n if inside else adapted_product(n, weights.qkv, lora[:3], firsts)
    y = attend_heads(
        *(x, z, weights.q_gain, rope, cu_seqlens, config.max_context),
        head_dim=config.head_dim,
        mix=mix,
        doc=doc,
        weight=weights.qkv if inside else None,
    )
    if not exclusive and gate != "none":
        assert weights.gate is not None
        y = y * head_gate(gate, n, weights.gate, scale=scale)
    y = y.flatten(1)
    if observe is not None:
        observe("attn_out", y)
    out = F.linear(y, weights.out)
    return out if lora[3] is None else out + low_product(*lora[3])


doc_branch = functools.partial(heads_branch, doc=True)
PLAIN: dict[str, Branch] = {"doc": doc_branch, "fa4": heads_branch}
WITH_PRODUCT: dict[str, Branch] = {n: functools.partial(b, product=True) for n, b in PLAIN.items()}
"""Attention -> branch; in the second, `qkv_rope` computes the product."""


class Heads(NamedTuple):
    """What `select_branch` chose."""

    name: HeadsName
    """"auto": with `attend_heads`; "plain": also, but the product of q, k and v is torch's; "composed": with
    torch's operators."""
    branch: Branch
    note: str
    """A sentence that says why a trial refused `attend_heads`, or `qkv_rope` in it; otherwise empty."""


def select_branch(
    name: HeadsName,
    attention: AttentionName,
    kernel: AttentionKernel,
    config: ModelConfig,
    device: torch.device,
) -> Heads:
    """Return the function that computes attention and what is next to it.

    If `name` is "plain", it is `doc_branch` for pgolf's own attention and `heads_branch` for flash-attn-4;
    with torch's variable-length attention it is neither, because its forward and backward operators are
    private. If it is "auto", `qkv_rope` computes their product where its kernel takes it. Where the other
    kernels do not take these heads or this device, it is `attention_branch`. The programs that stand alone
    have `_no_heads.py` in place of this module.

    A trial compares with `attention_branch` first, as one does for attention. If the results differ, the next
    in this order computes: with `qkv_rope`, without, `attention_branch`; and the note says how they differ,
    with which rank 0 warns.
    """
    if name == "composed" or attention not in PLAIN or not _takes(config):
        return Heads("composed", attention_branch, "")
    note = ""
    if name == "auto" and _takes_product(config):
        branch = WITH_PRODUCT[attention]
        problem = _problem(branch, kernel, config, device)
        if not problem:
            return Heads("auto", branch, "")
        name, note = "plain", f"torch computes the product of q, k and v, because {problem}"
    chosen = Heads(name, PLAIN[attention], note)
    if problem := _problem(chosen.branch, kernel, config, device):
        note = f"torch computes what is next to attention, because {problem}"
        chosen = Heads("composed", attention_branch, note)
    if note and launch().rank == 0:
        warnings.warn(note, stacklevel=3)
    return chosen


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # tensors that are created in it cannot be differentiated
@torch.enable_grad()
def _problem(branch: Branch, kernel: AttentionKernel, config: ModelConfig, device: torch.device) -> str:
    """Return what is wrong with `branch` in a trial on three small segments; empty if nothing is."""
    tokens, width = 256, config.width
    cu_seqlens = torch.tensor([0, 100, 101, tokens], dtype=torch.int32, device=device)
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(device, torch.bfloat16)

    window = width if config.head_gate == "dense" else config.gate_window
    gate = None if config.head_gate == "none" else draw(config.heads, window)
    leaves = [
        draw(tokens, width),
        draw(width + 2 * config.kv_width, width) / width**0.5,
        draw(width, width) / width**0.5,
        1 + draw(config.heads),
        *([] if gate is None else [gate / window**0.5]),
    ]
    upstream = draw(tokens, width)
    rope = rope_tables(tokens, config.rope_dims, base=config.rope_base, device=device)
    names = ("output", "dn", "dqkv", "dout", "dgain", "dgate")[: 1 + len(leaves)]

    def run(branch: Branch, exclusive: bool) -> list[Tensor]:
        n, qkv, out, gain, *gates = (t.requires_grad_() for t in leaves)
        weights = AttentionWeights(qkv, out, gain, gates[0] if gates else None, None, None)
        y = branch(config, kernel, n, weights, exclusive=exclusive, rope=rope, cu_seqlens=cu_seqlens)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]

    try:
        for exclusive in (True, False):
            found, wanted = run(branch, exclusive), run(attention_branch, exclusive)
            if worse := first_difference(names, found, wanted):
                what, error = worse
                return f"the {what} of pgolf's operators differs by {error:.1e} of the norm, in a trial"
    except Exception as e:
        return f"a trial of pgolf's operators raised {describe(e)}"
    return ""


def _takes(config: ModelConfig) -> bool:
    """Return whether this build has the kernels next to attention, and they take heads of this size."""
    known = config.head_dim in HEAD_DIMS and config.heads // config.kv_heads in HEADS_PER_GROUP
    return known and all(has_kernels(op, "cuda", None, hopper=False) for op in ("qk_norm_rope", "head_mix"))


def _takes_product(config: ModelConfig) -> bool:
    """Return whether this build has the kernel of `qkv_rope`, and it takes heads of this size."""
    heads, groups = config.heads, config.kv_heads
    known = config.head_dim == HEAD_DIM and config.rope_dims in ROTATED and heads % 2 == groups % 2 == 0
    fits = config.width <= MOST_WIDTH and heads + 2 * groups >= LEAST_HEADS
    return known and fits and has_kernels("qkv_rope", "cuda", None)
