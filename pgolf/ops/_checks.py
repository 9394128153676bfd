"""Checks of tensors that several operators share."""

from __future__ import annotations

import torch
from torch import Tensor


def check_like(
    op: str,
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    like: Tensor,
    *dtypes: torch.dtype,
    of: str = "",
) -> None:
    """Raise an error that names `op` and `name` if `tensor` is not what the operator takes.

    Args:
        shape: the shape it must have.
        like: the tensor on whose device it must be.
        dtypes: those that it may have.
        of: name of `like`, for the message.

    Raises:
        ValueError: another shape or device. TypeError: another dtype.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must be {shape}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        reason = f" as {of} is" if of else ""
        raise ValueError(f"{op}: {name} must be on {like.device}{reason}, got {tensor.device}")
    check_dtype(op, name, tensor, *dtypes)


def check_dtype(op: str, name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Raise TypeError if `tensor` has none of the dtypes; one that is given twice is named once."""
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(d) for d in dict.fromkeys(allowed))
        raise TypeError(f"{op}: {name} must be {wanted}, got {tensor.dtype}")
