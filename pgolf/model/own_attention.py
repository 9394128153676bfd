"""pgolf's own attention as an attention kernel of the model: where it runs, and a trial of it there.

The programs that stand alone have `_no_own_attention.py` in place of this module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pgolf.errors import RunError
from pgolf.ops._hopper import has_kernels
from pgolf.ops.doc_attention import HEAD_DIM, HEADS_PER_GROUP, HEADS_TAKEN, doc_attention

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
Trial = Callable[[Kernel, torch.device, int, int, int], str]


def doc_kernel(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Attend with `pgolf.ops.doc_attention`; arguments as in `pgolf.model.attention.sdpa_attention`.

    The result can be differentiated once, by torch.autograd.
    """
    del max_seqlen
    return doc_attention(q, k, v, cu_seqlens)[0]


def choose_own(
    name: str, device: torch.device, heads: int, kv_heads: int, head_dim: int, trial: Trial
) -> tuple[Kernel | None, list[str]]:
    """Return pgolf's own attention, if `name` allows it and it runs on `device` with these heads.

    Args:
        name: the attention kernel that was asked for.
        heads, kv_heads, head_dim: sizes of the model.
        trial: returns what is wrong with a kernel on a device with these sizes; empty if nothing is.

    Returns:
        The kernel, or None; and what a trial found wrong with it, in words. The list is empty if the kernel
        is returned, was not asked for, or does not take these heads on this device.

    Raises:
        RunError: `name` is "doc", and it cannot run here.
    """
    if name not in ("auto", "doc"):
        return None, []
    lacking = _lacking(device, heads, kv_heads, head_dim)
    problem = lacking or _wrong(trial, device, heads, kv_heads, head_dim)
    if not problem:
        return doc_kernel, []
    if name == "doc":
        raise RunError(
            f"train.attention=doc needs a Hopper GPU, a pgolf built with nvcc, {HEADS_TAKEN} (here: "
            f"{problem}); use train.attention=auto, which takes another kernel where this one cannot run"
        )
    return None, [] if lacking else [f"pgolf's own is {problem}"]


def _lacking(device: torch.device, heads: int, kv_heads: int, head_dim: int) -> str:
    """Return what the kernels need and do not find; empty if nothing."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "no Hopper GPU"
    if not has_kernels("doc_attention", device.type, device.index):
        return "pgolf has no CUDA kernels; build it with nvcc: pip install --no-build-isolation -e ."
    if head_dim != HEAD_DIM or heads not in [kv_heads * n for n in HEADS_PER_GROUP]:
        return f"{heads} heads of {head_dim} columns and {kv_heads} kv heads"
    return ""


@functools.lru_cache(maxsize=8)
def _wrong(trial: Trial, device: torch.device, heads: int, kv_heads: int, head_dim: int) -> str:
    """Return what a trial says, which each device and size has once."""
    return trial(doc_kernel, device, heads, kv_heads, head_dim)
