"""Whether a device has an operator's kernels."""

from __future__ import annotations

import torch

from pgolf.ops._compiler import constant_result


@constant_result
def has_kernels(operator: str, device: str, index: int | None, hopper: bool = True) -> bool:
    """Return whether this build has the operator's CUDA kernels and the device runs them.

    Args:
        operator: a name of `torch.ops.pgolf`; one that is not registered has no kernels, as in a program
            that stands alone.
        device, index: as in `torch.device`.
        hopper: whether the kernels are for Hopper GPUs alone; otherwise for sm_80 and newer.
    """
    if device != "cuda" or not hasattr(torch.ops.pgolf, operator):
        return False
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"pgolf::{operator}", "CUDA"):
        return False
    major = torch.cuda.get_device_capability(index)[0]
    return major == 9 if hopper else major >= 8


def has_kernels_ref(_operator: str, _device: str, _index: int | None, _hopper: bool = True) -> bool:
    """Return what `has_kernels` is in a program without the extension."""
    return False
