"""flash-attn-4 (CuTe DSL, Hopper) as a custom operator of torch, which torch.compile treats as one node.

The package is optional: `pip install 'pgolf[fa4]'`. It compiles its kernels at the first call. Its public
functions are autograd functions, at which a compiled block would have to break its graph. This module calls
the private functions below them. Those have had the arguments used here from 4.0.0b18 to 4.0.0b36, but not
the same number of results, so the results are written into tensors that are passed by name. Importing this
module raises ImportError if an argument is missing; `pgolf.model.attention` does that before it says that
flash-attn-4 can be used.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
from torch import Tensor

from pgolf.ops._derivatives import refuse_transforms

_VARLEN = ("causal", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_NEEDED = {
    _flash_attn_fwd: ("q", "k", "v", *_VARLEN, "return_lse", "out", "lse"),
    _flash_attn_bwd: ("q", "k", "v", "out", "dout", "lse", *_VARLEN, "dq", "dk", "dv"),
}
for _function, _names in _NEEDED.items():
    _missing = sorted(set(_names) - set(inspect.signature(_function).parameters))
    if _missing:
        raise ImportError(
            f"{_function.__name__} of this flash-attn-4 has no argument {', '.join(_missing)}; "
            "install a version that has it: pip install 'pgolf[fa4]'"
        )


# 4.0.0b36 warns at each compilation about an argument of its own that is not used here.
warnings.filterwarnings("ignore", message=r"Argument aux_data \(position", category=UserWarning)


@torch.library.custom_op("pgolf::fa4_forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    out, lse = _results(q)
    _flash_attn_fwd(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        causal=True,
        return_lse=True,
        out=out,
        lse=lse,
    )
    return out, lse


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return uninitialized tensors for the output `(T, H, K)` and the logsumexp `(H, T)` float32."""
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    del k, v, cu_seqlens, max_seqlen
    return _results(q)


@torch.library.custom_op("pgolf::fa4_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    _flash_attn_bwd(
        q=q,
        k=k,
        v=v,
        out=out,
        dout=grad.contiguous(),
        lse=lse,
        causal=True,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        dq=dq,
        dk=dk,
        dv=dv,
    )
    return dq, dk, dv


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    del grad, out, lse, cu_seqlens, max_seqlen
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.max_seqlen = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    del grad_lse
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    return *torch.ops.pgolf.fa4_backward(grad, q, k, v, out, lse, cu_seqlens, ctx.max_seqlen), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def fa4_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Attend causally within each segment; arguments as in `pgolf.model.attention.sdpa_attention`.

    The result can be differentiated once, by torch.autograd.
    """
    refuse_transforms("fa4_attention", q, k, v, reference="sdpa_attention")
    out: Tensor = torch.ops.pgolf.fa4_forward(q, k, v, cu_seqlens, max_seqlen)[0]
    return out
