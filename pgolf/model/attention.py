"""Causal attention over packed documents, and the attention branch of a block.

There are four implementations of the function `kernel(q, k, v, cu_seqlens, max_seqlen)`, of which
`select_attention` chooses one when a model is prepared. No token attends across a segment boundary.
Legend: `T` tokens, `R` of them whose output is wanted, `H` query heads, `G` kv heads, `K` head dim, `S`
segments, `D` width.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.config import ModelConfig
from pgolf.env import keep_kernels, launch
from pgolf.errors import RunError
from pgolf.model.gates import exclude_self, head_gate, rms_norm
from pgolf.model.own_attention import choose_own
from pgolf.model.rope import rotate
from pgolf.peers import Peer, describe, try_peer

AttentionKernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
AttentionName = Literal["auto", "doc", "fa4", "varlen", "sdpa"]


BLOCK = 512
"""Queries of one call of SDPA where attention is local: its mask has at most so many rows."""


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, reach: int = 0
) -> Tensor:
    """Attend with one call of `F.scaled_dot_product_attention` per segment; cu_seqlens is read on the host.

    Args:
        q: `(T, H, K)`.
        k, v: `(T, G, K)`; G divides H.
        cu_seqlens: `(S + 1,)` int32 starts of the segments, then T; a repeated start is an empty segment.
        max_seqlen: tokens of the longest segment; not used here.
        reach: tokens to which each token attends, itself and those just before it, >= 1; 0: all before it.

    Returns:
        `(T, H, K)`.
    """
    del max_seqlen
    bounds = cu_seqlens.tolist()
    qh, kh, vh = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    reach = reach or q.shape[0]
    parts = []
    for start, stop in itertools.pairwise(bounds):
        local = stop - start > reach
        step = BLOCK if local else max(stop - start, 1)
        for at in range(start, stop, step):
            first, end = max(start, at - reach + 1), min(at + step, stop)
            out = F.scaled_dot_product_attention(
                *(qh[:, :, at:end], kh[:, :, first:end], vh[:, :, first:end]),
                attn_mask=_band(at, end, first, reach).to(q.device) if local else None,
                is_causal=not local,
                enable_gqa=True,
            )
            parts.append(out)
    return torch.cat(parts, dim=2).squeeze(0).transpose(0, 1)


def _band(at: int, end: int, first: int, reach: int) -> Tensor:
    """Return which keys, from `first` on, the queries [at, end) see: `(end - at, end - first)` bool."""
    behind = torch.arange(at, end)[:, None] - torch.arange(first, end)
    return (behind >= 0) & (behind < reach)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, reach: int = 0
) -> Tensor:
    """Attend with torch's variable-length kernel on CUDA, in bf16 or fp16; arguments as `sdpa_attention`."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 accepts grouped queries without a flag, torch 2.13 requires the flag.
    gqa: dict[str, Any] = {"enable_gqa": True} if _VARLEN_HAS_GQA_FLAG else {}
    window = (reach - 1, 0)  # tokens before and after; -1 is all
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=window, **gqa)
    assert isinstance(out, Tensor)
    return out


def local_attention(name: AttentionName, reach: int) -> AttentionKernel:
    """Return a kernel in which each token attends to the last `reach` tokens, itself among them.

    It runs wherever the attention `name` does: SDPA stands in for SDPA, and torch's variable-length kernel
    for all others, which need a GPU that has it.
    """
    return functools.partial(sdpa_attention if name == "sdpa" else varlen_attention, reach=reach)


def _varlen_has_gqa_flag() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


# Asked when this module is loaded, because torch.compile does not follow `inspect`; and only where the kernel
# can run, because its module loads torch's compiler, which takes longer than all of pgolf.
_VARLEN_HAS_GQA_FLAG = torch.backends.cuda.is_built() and _varlen_has_gqa_flag()  # type: ignore[no-untyped-call]


def find_fa4() -> Peer:
    """Look for flash-attn-4 and check the arguments of its functions; `found` of the result is the kernel."""

    def load() -> AttentionKernel:
        keep_kernels()
        from pgolf.model.fa4 import fa4_attention

        return fa4_attention

    return try_peer("flash-attn-4", load)


@functools.lru_cache(maxsize=8)
def fa4_problem(device: torch.device, heads: int, kv_heads: int, head_dim: int) -> str:
    """Return why flash-attn-4 cannot be used on `device` with these heads; empty if it can be used.

    On Hopper GPUs a trial compares it with torch's variable-length attention, forward and backward, on 256
    tokens. The trial compiles the same kernels that the model will use.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "no Hopper GPU"
    peer = find_fa4()
    return peer.problem or _trial(peer.found, device, heads, kv_heads, head_dim)


def _trial(kernel: AttentionKernel, device: torch.device, heads: int, kv_heads: int, head_dim: int) -> str:
    """Return what is wrong with a kernel's output and gradients on four segments; empty if nothing."""
    if torch.is_inference_mode_enabled():  # tensors that are created in it cannot be differentiated
        with torch.inference_mode(False):
            return _trial(kernel, device, heads, kv_heads, head_dim)
    # So many tokens that a block of a kernel has more than one tile, also on the largest GPU.
    cu = torch.tensor([0, 100, 101, 2149, 2149, TRIAL_TOKENS], dtype=torch.int32, device=device)
    rng = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(TRIAL_TOKENS, h, head_dim, generator=rng).to(device, torch.bfloat16)
        for h in (heads, kv_heads, kv_heads, heads)
    ]

    def run(attend: AttentionKernel) -> list[Tensor]:
        q, k, v = (t.requires_grad_() for t in inputs[:3])
        with torch.enable_grad():
            out = attend(q, k, v, cu, TRIAL_TOKENS)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])]

    try:
        found, wanted = run(kernel), run(varlen_attention)
        if worse := first_difference(("output", "dq", "dk", "dv"), found, wanted):
            what, error = worse
            return f"not usable: its {what} differs from torch's by {error:.1e} of the norm, in a trial"
    except Exception as e:
        return f"not usable: a trial raised {describe(e)}"
    return ""


def first_difference(
    names: Sequence[str], found: Sequence[Tensor], wanted: Sequence[Tensor]
) -> tuple[str, float] | None:
    """Return name and relative error of the first tensor that is wrong in a trial; None: none is."""
    for what, got, want in zip(names, found, wanted, strict=True):
        error = float((got - want).float().norm() / want.float().norm())
        if not error < TRIAL_TOLERANCE:
            return what, error
    return None


TRIAL_TOKENS = 8192
TRIAL_TOLERANCE = 0.05
"""Relative error above which a kernel is wrong. Two correct bfloat16 kernels differ by 0.005."""


class Attention(NamedTuple):
    """The kernel that `select_attention` chose."""

    name: AttentionName
    kernel: AttentionKernel
    note: str
    """A sentence that says why kernels that come before it were not chosen, although this device and these
    heads are theirs; otherwise empty."""


def select_attention(
    name: AttentionName, device: torch.device, *, heads: int = 8, kv_heads: int = 4, head_dim: int = 64
) -> Attention:
    """Return the attention kernel to use on `device`.

    "auto" chooses the first that can run: on a Hopper GPU pgolf's own attention, "doc", where it takes these
    heads, and then flash-attn-4 where it is installed; torch's variable-length kernel on CUDA devices of
    sm_80 and newer; SDPA. A trial compares the first two with torch's kernel. If one fails, or flash-attn-4
    is installed and cannot be imported, rank 0 warns and says why.

    Args:
        heads, kv_heads, head_dim: sizes of the model, with which the kernels are tried.

    Raises:
        RuntimeError: the kernel that was asked for cannot run here.
    """
    own, reasons = choose_own(name, device, heads, kv_heads, head_dim, _trial)
    if own is not None:
        return Attention("doc", own, "")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if name == "doc":  # a program that stands alone scores a run that asked for it
        name = "auto"
    if name == "fa4" or (name == "auto" and capability[0] == 9):
        problem = fa4_problem(device, heads, kv_heads, head_dim)
        if problem and name == "fa4":
            raise RunError(
                "train.attention=fa4 needs a Hopper GPU and the flash-attn-4 package "
                f"(here: {problem}); pip install 'pgolf[fa4]', or use train.attention=auto"
            )
        if not problem:
            name = "fa4"
        elif problem != "not installed":
            reasons.append(f"flash-attn-4 is {problem}")
    if name == "auto":
        name = "varlen" if capability >= (8, 0) else "sdpa"
    if name == "varlen" and capability < (8, 0):
        raise RunError(
            "train.attention=varlen needs a CUDA device of sm_80 or newer; use train.attention=sdpa"
        )
    note = f"attention is {name}, because {' and '.join(reasons)}" if reasons else ""
    if note and launch().rank == 0:
        warnings.warn(note, stacklevel=2)
    if name == "fa4":
        return Attention(name, find_fa4().found, note)
    return Attention(name, varlen_attention if name == "varlen" else sdpa_attention, note)


class AttentionWeights(NamedTuple):
    """The attention weights of one layer in the compute dtype."""

    qkv: Tensor  # (D + 2 * G * K, D), times the scale of the norm before it
    out: Tensor  # (D, D), its rows times the scale of the attention
    q_gain: Tensor  # (H,)
    gate: Tensor | None  # (H, W) or (H, D), times the scale of the norm before it
    value_scale: Tensor | None  # (), factor on the value embeddings; None if the layer has none
    xsa_strength: Tensor | None  # (H,), what exclusive self-attention removes beyond 1; None: 0


class Asked(NamedTuple):
    """The last tokens of each of N segments of one length, `(R,)` in all: only their outputs are wanted."""

    cu_seqlens: Tensor  # (N + 1,) int32 starts of the segments, then T
    rope: tuple[Tensor, Tensor]  # (R, 1, dims / 2) each: the rows of these tokens

    @classmethod
    def last(cls, count: int, width: int, cu_seqlens: Tensor, rope: tuple[Tensor, Tensor]) -> Asked:
        """Return the last `count` tokens of segments that have `width` tokens each."""
        cos, sin = (t.view(-1, width, *t.shape[1:])[:, width - count :].flatten(0, 1) for t in rope)
        return cls(cu_seqlens, (cos, sin))

    @property
    def each(self) -> int:
        """Tokens of each segment that are asked for."""
        return self.rope[0].shape[0] // (self.cu_seqlens.shape[0] - 1)

    def rows(self, x: Tensor) -> Tensor:
        """Return their rows `(R, ...)` of `x` `(T, ...)`."""
        segments = self._segments(x)
        return segments[:, segments.shape[1] - self.each :].flatten(0, 1)

    def padded(self, x: Tensor, tokens: int) -> Tensor:
        """Return `(T, H, K)`, the rows `x` `(R, H, K)` at their places and zeros at the others."""
        segments = self._segments(x)
        before = tokens // segments.shape[0] - self.each
        return F.pad(segments, (0, 0, 0, 0, before, 0)).flatten(0, 1)

    def _segments(self, x: Tensor) -> Tensor:
        return x.view(self.cu_seqlens.shape[0] - 1, -1, *x.shape[1:])


def asked_rows(x: Tensor, asked: Asked | None) -> Tensor:
    """Return the rows of `x` whose outputs are wanted; None: all."""
    return x if asked is None else asked.rows(x)


Term = tuple[Tensor, Tensor] | None
"""What an adapter adds to a product, as the factors of `low_product`."""


def low_product(low: Tensor, b: Tensor) -> Tensor:
    """Return low B^T of each document, `(N * W, E)`, of `(N, W, r)` and `(N, E, r)`."""
    return torch.bmm(low, b.mT).flatten(0, 1)


def attention_branch(
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
) -> Tensor:
    """Return the attention output `(T, D)` for the normed input `n` `(T, D)`; with `asked`, `(R, D)` of it.

    The steps are those of PR #1855: QK-norm, learned gain on q and partial RoPE (in either order, the result
    is the same), causal attention within each segment, exclusive self-attention, head gate, output
    projection. Adapters add to q, k and v before the norm, and to the output.

    Args:
        kernel: attention kernel.
        exclusive: whether this layer uses exclusive self-attention.
        rope: cosines and sines, `(T, 1, dims / 2)` each.
        cu_seqlens: as in `sdpa_attention`.
        lora: what adapters add to q, k, v and the output, see `LayerLora.attention`; None where there are
            none.
        values: value embeddings `(T, G * K)`; layers with a `value_scale` add them to v.
        asked: the tokens whose output is wanted; the others only need keys and values.
        observe: called with ("attn_out", input of the output projection).
    """
    widths = [config.width, config.kv_width, config.kv_width]
    if asked is None:
        q, k, v = torch.split(F.linear(n, weights.qkv), widths, dim=-1)
    else:
        q = F.linear(asked.rows(n), weights.qkv[: widths[0]])
        k, v = torch.split(F.linear(n, weights.qkv[widths[0] :]), widths[1:], dim=-1)
    q, k, v = (
        (part if extra is None else part + low_product(*extra)).view(part.shape[0], -1, config.head_dim)
        for part, extra in zip((q, k, v), lora[:3], strict=True)
    )
    if weights.value_scale is not None:
        assert values is not None
        v = v + weights.value_scale * values.view(v.shape)
    q = rotate(rms_norm(q) * weights.q_gain[:, None], *(rope if asked is None else asked.rope))
    k = rotate(rms_norm(k), *rope)
    if asked is not None:
        q = asked.padded(q, n.shape[0])  # the kernels take as many queries as keys
    y = asked_rows(kernel(q, k, v, cu_seqlens, config.max_context), asked)
    if exclusive:
        y = exclude_self(y, asked_rows(v, asked), weights.xsa_strength)
    if config.head_gate != "none":
        assert weights.gate is not None
        gate_input = asked_rows(n, asked)
        y = y * head_gate(config.head_gate, gate_input, weights.gate, scale=config.sparse_gate_scale)
    y = y.flatten(1)
    if observe is not None:
        observe("attn_out", y)
    out = F.linear(y, weights.out)
    return out if lora[3] is None else out + low_product(*lora[3])
