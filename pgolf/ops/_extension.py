"""Load the compiled extension `pgolf._C`, which registers `torch.ops.pgolf`, and list its kernels.

This module raises the error for an extension that is missing or does not load. torch is imported first,
because that import loads the shared libraries that the extension is linked to.
"""

from __future__ import annotations

from typing import TypedDict

import torch

BUILD_COMMAND = "pip install --no-build-isolation -e ."

try:
    from pgolf import _C
except ImportError as e:
    raise ImportError(
        f"pgolf's compiled extension pgolf._C could not be loaded ({e}); it is missing, or this torch "
        f"({torch.__version__}) is older than 2.11; in the repository's root run: {BUILD_COMMAND}"
    ) from e

OPERATORS = (
    "newton_schulz",
    "newton_schulz_banks",
    "muon_step",
    "muon_apply",
    "square_sums",
    "clip_scale",
    "adam_step",
    "softcap_ce",
    "softcap_ce_backward",
    "softcap_ce_gradient",
    "softcap_ce_gradient_",
    "softcap_ce_rescale_",
    "linear_softcap_ce",
    "linear_softcap_ce_backward",
    "linear_softcap_ce_gradients",
    "norm_mlp_up",
    "norm_mlp_dact",
    "norm_mlp_sum",
    "stream_mix",
    "stream_mix_backward",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "qkv_rope",
    "head_mix",
    "head_mix_backward",
    "doc_attention",
    "doc_attention_backward",
    "pack_int6",
    "unpack_int6",
    "quantize_pack",
    "quantize_pack_sdclip",
    "unpack_dequantize",
    "trellis_round",
    "trellis_values",
)
"""Every operator of `torch.ops.pgolf`, in the order in which `kernel_table` lists them."""


class KernelRow(TypedDict):
    """One operator, and which of its kernels exist."""

    op: str
    """Name in `torch.ops.pgolf`."""
    cpu: bool
    """Whether a CPU kernel is registered."""
    cuda: bool
    """Whether a CUDA kernel is registered."""
    reason: str
    """Why the CUDA kernel is missing; empty if it is there."""


def kernel_table() -> list[KernelRow]:
    """Return, for each operator, which kernels this build has and why one is missing.

    The answer comes from torch's dispatcher, so it describes the kernels that a call would run. The facts of
    the build itself (GPU architectures, compilers) are in `pgolf._C.build_info()`.
    """
    no_cuda = f"torch {torch.__version__} is a CPU build" if torch.version.cuda is None else ""
    reason = _C.build_info()["cuda_reason"] or no_cuda
    rows: list[KernelRow] = []
    for op in OPERATORS:
        cpu, cuda = (
            torch._C._dispatch_has_kernel_for_dispatch_key(f"pgolf::{op}", key) for key in ("CPU", "CUDA")
        )
        cuda = cuda and not no_cuda
        rows.append({"op": op, "cpu": cpu, "cuda": cuda, "reason": "" if cuda else reason})
    return rows
