"""Whether a device has an operator's kernels for Hopper GPUs."""

from __future__ import annotations

import torch

from pgolf.ops._compiler import constant_result


@constant_result
def has_kernels(operator: str, device: str, index: int | None) -> bool:
    """Return whether the device is a Hopper GPU and this build has the operator's CUDA kernels.

    Args:
        operator: a name of `torch.ops.pgolf`; one that is not registered has no kernels, as in a program
            that stands alone.
        device, index: as in `torch.device`.
    """
    if device != "cuda" or not hasattr(torch.ops.pgolf, operator):
        return False
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"pgolf::{operator}", "CUDA"):
        return False
    return torch.cuda.get_device_capability(index)[0] == 9


def has_kernels_ref(_operator: str, _device: str, _index: int | None) -> bool:
    """Return what `has_kernels` is in a program without the extension."""
    return False
