"""Causal attention within documents that are packed one after another.

On a Hopper GPU one kernel computes the output and one all gradients; elsewhere, and for what the kernels do
not take, `doc_attention_ref` does. For one head, with i and j <= i tokens of one document,

    s_ij = scale q_i . k_j        lse_i = log sum_j exp(s_ij)        p_ij = exp(s_ij - lse_i)
    y_i = sum_j p_ij v_j          delta_i = dy_i . y_i - dlse_i      ds_ij = p_ij (dy_i . v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j  dk_j = scale sum_i ds_ij q_i       dv_j = sum_i p_ij dy_i

A head of q attends to the keys and values of its group, whose gradients are sums over the group's heads.

Legend: `T` tokens, `H` query heads, `G` kv heads, `K` head dim, `S` documents.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import torch
from torch import Tensor

import pgolf.ops._extension  # noqa: F401  (registers the operators)
from pgolf.ops._checks import check_like
from pgolf.ops._derivatives import refuse_derivatives, refuse_second_order, refuse_transforms
from pgolf.ops._hopper import has_kernels

HEAD_DIM, HEADS_PER_GROUP = 64, (1, 2, 4)
"""K and H / G that the kernels take."""
_COUNTS = f"{', '.join(map(str, HEADS_PER_GROUP[:-1]))} or {HEADS_PER_GROUP[-1]}"
HEADS_TAKEN = f"heads of {HEAD_DIM} columns, and {_COUNTS} of them per kv head"
"""The same in words."""


def doc_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attend causally within each document; no token attends to one of another document.

    Returns y_i = sum_j p_ij v_j with p_ij = exp(scale q_i . k_j - lse_i), over the tokens j <= i of the
    document of i, and lse.

    Equals `doc_attention_ref`. The kernels take bfloat16 with K = 64 and H / G = 1, 2 or 4, on Hopper GPUs.
    They multiply in bfloat16, to which they round p, and add in float32. Both results can be differentiated
    once, by torch.autograd, see `doc_attention_backward`. Everything else, and all of it under autocast, is
    computed by the reference, which is slow; on a GPU a warning says so. The kernels do not read `cu_seqlens`
    on the host, and work under torch.compile and in CUDA graphs.

    Args:
        q: `(T, H, K)` floating point.
        k, v: `(T, G, K)`, dtype of `q`; G divides H. A part of the columns of a wider matrix is read where it
            is.
        cu_seqlens: `(S + 1,)` int32 starts of the documents, then T; a repeated start is an empty document.
        scale: positive factor on the scores; None: 1 / sqrt(K).

    Returns:
        y `(T, H, K)` in the dtype of `q`, and lse `(H, T)` in float32 (float64 if `q` is), the natural
        logarithm of the sum of the exponentials of a token's scores; contiguous.

    Raises:
        ValueError: shapes or devices disagree, or `scale` is not positive; in the reference also if
            `cu_seqlens` does not go from 0 to T without decreasing. The kernels, which cannot see that, then
            read and write the wrong rows.
        TypeError: a dtype is none of those above.
        RuntimeError: the kernels were asked for a second derivative, or one of forward mode or torch.func.

    Source: FlashAttention-3, Shah et al. 2024 (arXiv 2407.08608). Kernels: csrc/kernels/doc_attention.h.
    """
    _check("doc_attention", q, k, v, cu_seqlens, scale)
    if not _takes(q, k):
        if q.is_cuda:
            _warn_of_reference("doc_attention", q, k)
        return doc_attention_ref(q, k, v, cu_seqlens, scale)
    refuse_transforms("doc_attention", q, k, v, reference="doc_attention_ref")
    y, lse = torch.ops.pgolf.doc_attention(q, k, v, cu_seqlens, _scale(scale, q))
    return y, lse


def doc_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `doc_attention` with PyTorch operators, in float32, or in float64 for such input.

    `cu_seqlens` is read on the host.
    """
    _check("doc_attention_ref", q, k, v, cu_seqlens, scale)
    scale, bounds = _scale(scale, q), _bounds("doc_attention_ref", cu_seqlens, q)
    wide = torch.promote_types(q.dtype, torch.float32)
    y, lse = q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=wide)
    for document in bounds:
        scores = _scores(q[document], k[document], scale)
        sums = scores.logsumexp(-1)
        lse[:, document] = sums.flatten(0, 1)
        mixed = torch.einsum("grts,sgk->tgrk", (scores - sums[..., None]).exp(), v[document].to(wide))
        y[document] = mixed.flatten(1, 2).to(q.dtype)
    return y, lse


def doc_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float | None = None,
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `q`, `k` and `v` of causal attention within documents, given that of `y`.

    The formula is that of the module: p from q, k and lse, then ds, dq, dk and dv. Equals
    `doc_attention_backward_ref`, and is not differentiable. The kernels take bfloat16 with K = 64 and H / G =
    1, 2 or 4, on Hopper GPUs. They multiply in bfloat16, to which they round p and ds, and add in float32.
    They add the parts of dq of a document of more than 128 tokens in memory, in any order, so its last bits
    differ from run to run; dk, dv, and dq of shorter documents do not. For that they have dq in float32, and
    it is returned so, because what reads it next need not have it rounded. An infinity or NaN may spoil the
    documents that follow within 128 tokens. Everything else, and all of it under autocast, is computed by the
    reference. The kernels do not read `cu_seqlens` on the host, and work under torch.compile and in CUDA
    graphs.

    Args:
        grad: `(T, H, K)`, gradient of `y`, dtype of `q`.
        q, k, v, cu_seqlens, scale: as in `doc_attention_ref`, and as they were in the forward pass. A part of
            the columns of a wider matrix is read where it is.
        y: `(T, H, K)`, dtype of `q`, and
        lse: `(H, T)` float32 (or float64 if `q` is), what the forward pass returned.
        delta: `(H, T)`, dtype of `lse`: the sum over K of `grad` and `y`, less the gradient of lse; None: lse
            has none, and the sum is computed here.

    Returns:
        dq `(T, H, K)` in float32 (float64 if `q` is), dk and dv `(T, G, K)` in the dtype of `q`; contiguous.

    Raises:
        ValueError: shapes or devices disagree; in the reference also if `cu_seqlens` does not go from 0 to T
            without decreasing. The kernels, which cannot see that, then read and write the wrong rows.
        TypeError: a dtype is none of those above.
        RuntimeError: a derivative was asked for.

    Source: the backward pass of FlashAttention-2, Dao 2023 (arXiv 2307.08691). Kernels:
    csrc/kernels/doc_attention.h.
    """
    op = "doc_attention_backward"
    _check(op, q, k, v, cu_seqlens, scale)
    for name, tensor in (("grad", grad), ("y", y)):
        check_like(op, name, tensor, tuple(q.shape), q, q.dtype, of="q")
    wide = torch.promote_types(q.dtype, torch.float32)
    for name, tensor in (("lse", lse), *(() if delta is None else (("delta", delta),))):
        check_like(op, name, tensor, (q.shape[1], q.shape[0]), q, wide, of="q")
    arguments = grad, q, k, v, y, lse, cu_seqlens, _scale(scale, q), delta
    if not _takes(q, k):
        if q.is_cuda:
            _warn_of_reference(op, q, k)
        return doc_attention_backward_ref(*arguments)
    refuse_transforms(op, grad, q, k, v, y, lse)
    dq, dk, dv = torch.ops.pgolf.doc_attention_backward(*arguments)
    return dq, dk, dv


def doc_attention_backward_ref(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float | None = None,
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `doc_attention_backward` with PyTorch operators, in float32, or in float64 for such input."""
    groups, wide = k.shape[1], torch.promote_types(q.dtype, torch.float32)
    scale, bounds = _scale(scale, q), _bounds("doc_attention_backward_ref", cu_seqlens, q)
    dq, dk, dv = q.new_empty(q.shape, dtype=wide), k.new_empty(k.shape), v.new_empty(v.shape)
    for document in bounds:
        keys, values = k[document].to(wide), v[document].to(wide)
        queries, upstream, out = (_grouped(t[document], groups) for t in (q, grad, y))
        sums = lse[:, document].view(*queries.shape[1:3], queries.shape[0])
        p = (_scores(q[document], keys, scale) - sums[..., None]).exp()
        along = (upstream * out).sum(-1).permute(1, 2, 0) if delta is None else delta[:, document]
        ds = (
            scale
            * p
            * (torch.einsum("tgrk,sgk->grts", upstream, values) - along.reshape(sums.shape)[..., None])
        )
        dq[document] = torch.einsum("grts,sgk->tgrk", ds, keys).flatten(1, 2)
        dk[document] = torch.einsum("grts,tgrk->sgk", ds, queries).to(q.dtype)
        dv[document] = torch.einsum("grts,tgrk->sgk", p, upstream).to(q.dtype)
    return dq, dk, dv


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Return `(T, H, K)` as `(T, G, H/G, K)`, in float32, or in float64 for such input."""
    tokens, heads, width = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.view(tokens, groups, heads // groups, width).to(wide)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return the scores `(G, H/G, L, L)` of one document of L tokens, -inf for keys after the query."""
    grouped = _grouped(q, k.shape[1])
    scores = scale * torch.einsum("tgrk,sgk->grts", grouped, k.to(grouped.dtype))
    later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -torch.inf)


def _scale(scale: float | None, q: Tensor) -> float:
    return float(q.shape[2] ** -0.5) if scale is None else scale


def _bounds(op: str, cu_seqlens: Tensor, q: Tensor) -> list[slice]:
    """Return the rows of each document that has some."""
    starts, tokens = cu_seqlens.tolist(), q.shape[0]
    if starts[0] != 0 or starts[-1] != tokens or any(a > b for a, b in itertools.pairwise(starts)):
        shown = f"{starts}" if len(starts) <= 8 else f"[{starts[0]}, ..., {starts[-1]}]"
        raise ValueError(
            f"{op}: cu_seqlens must begin with 0, never decrease and end with T = {tokens}, got {shown}"
        )
    return [slice(a, b) for a, b in itertools.pairwise(starts) if b > a]


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None) -> None:
    """Raise an error that names what does not fit to `q`, or a scale that is not positive."""
    if scale is not None and not scale > 0:
        raise ValueError(f"{op}: scale must be positive, got {scale}")
    if q.dim() != 3 or k.dim() != 3:
        raise ValueError(
            f"{op}: q must be (T, H, K) and k (T, G, K), got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    (tokens, heads, width), groups = q.shape, k.shape[1]
    if groups == 0 or heads == 0 or heads % groups != 0:
        raise ValueError(f"{op}: H must be a multiple of G, got {heads} and {groups}")
    if width == 0:
        raise ValueError(f"{op}: q must have at least one column per head, got {tuple(q.shape)}")
    if not q.is_floating_point():
        raise TypeError(f"{op}: q must have a floating-point dtype, got {q.dtype}")
    for name, tensor in (("k", k), ("v", v)):
        check_like(op, name, tensor, (tokens, groups, width), q, q.dtype, of="q")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{op}: cu_seqlens must be (S + 1,), got {tuple(cu_seqlens.shape)}")
    check_like(op, "cu_seqlens", cu_seqlens, tuple(cu_seqlens.shape), q, torch.int32, of="q")
    if cu_seqlens.shape[0] == 1 and tokens > 0:
        raise ValueError(f"{op}: cu_seqlens must begin with 0 and end with T = {tokens}, got one number")


def _takes(q: Tensor, k: Tensor) -> bool:
    """Return whether the kernels take this problem."""
    device = q.device
    return (
        q.dtype == torch.bfloat16
        and q.shape[2] == HEAD_DIM
        and q.shape[1] in [k.shape[1] * n for n in HEADS_PER_GROUP]
        and has_kernels("doc_attention", device.type, device.index)
        and not torch.is_autocast_enabled(device.type)
    )


def _warn_of_reference(op: str, q: Tensor, k: Tensor) -> None:
    """Say, once at each place, that the kernels do not take this problem on a GPU, where that is slow."""
    given = f"{q.dtype}, {q.shape[1]} heads of {q.shape[2]} columns, {k.shape[1]} kv heads"
    device = torch.cuda.get_device_name(q.device) if q.is_cuda else q.device.type
    autocast = ", under autocast" if torch.is_autocast_enabled(q.device.type) else ""
    warnings.warn(
        f"{op} is computed by its reference, one document after another, which is slow. The kernels take "
        f"bfloat16, {HEADS_TAKEN}, on Hopper GPUs and outside of autocast; got {given} on "
        f"{device}{autocast}. Use another attention",
        stacklevel=3,
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, cu_seqlens, y, lse = ctx.saved_tensors
    if grad is None and grad_lse is None:
        return (None,) * 5
    with torch.no_grad():
        upstream, delta = torch.zeros_like(y) if grad is None else grad, None
        if grad_lse is not None:
            delta = (upstream.to(lse.dtype) * y).sum(-1).t() - grad_lse
        found = torch.ops.pgolf.doc_attention_backward(
            upstream, q, k, v, y, lse, cu_seqlens, ctx.scale, delta
        )
    sources = [t for t in (grad, grad_lse, q, k, v) if t is not None]
    grads = (
        refuse_second_order("doc_attention", of.to(q.dtype), *sources) if need else None
        for of, need in zip(found, ctx.needs_input_grad[:3], strict=True)
    )
    return *grads, None, None


def _forward_fake(
    q: Tensor, _k: Tensor, _v: Tensor, _cu_seqlens: Tensor, _scale: float
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=wide)


def _backward_fake(
    _grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _y: Tensor,
    _lse: Tensor,
    _cu_seqlens: Tensor,
    _scale: float,
    _delta: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape, dtype=wide), k.new_empty(k.shape), v.new_empty(v.shape)


torch.library.register_fake("pgolf::doc_attention", _forward_fake)
torch.library.register_fake("pgolf::doc_attention_backward", _backward_fake)
torch.library.impl("pgolf::doc_attention", "CPU", doc_attention_ref)
torch.library.impl("pgolf::doc_attention_backward", "CPU", doc_attention_backward_ref)
torch.library.register_autograd("pgolf::doc_attention", _backward, setup_context=_setup)
refuse_derivatives("doc_attention_backward", "doc_attention_backward")
