"""Parts that the two cross-entropies share: arguments, reductions, scaling of a saved gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from pgolf import env
from pgolf.ops._derivatives import is_batched, refuse_constant

Reduction = Literal["none", "mean", "sum"]

CHECK_TARGETS = env.check_targets()
"""Whether targets on CUDA are checked too, which costs one synchronization per call; read once, at import."""


def check_reduction(op: str, reduction: str) -> None:
    """Raise ValueError unless `reduction` is "none", "mean" or "sum"."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'{op}: reduction must be "none", "mean" or "sum", got {reduction!r}')


def check_weighting(
    op: str, like: Tensor, vocab: int, class_weight: Tensor | None, label_smoothing: float, logit_scale: float
) -> None:
    """Raise an error that names the first argument which cannot be used with `vocab` classes like `like`."""
    for name, value in (("label_smoothing", label_smoothing), ("logit_scale", logit_scale)):
        if isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a Python number; multiply the tensors by a learned one")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be from 0 to 1, got {label_smoothing}")
    if not (math.isfinite(logit_scale) and logit_scale > 0.0):
        raise ValueError(f"{op}: logit_scale must be finite and > 0, got {logit_scale}")
    if class_weight is None:
        return
    if class_weight.shape != (vocab,):
        raise ValueError(f"{op}: class_weight must be (vocab,)=({vocab},), got {tuple(class_weight.shape)}")
    if not class_weight.is_floating_point():
        raise TypeError(f"{op}: class_weight must be of a floating-point dtype, got {class_weight.dtype}")
    if class_weight.device != like.device:
        raise ValueError(f"{op}: class_weight must be on {like.device}, got {class_weight.device}")
    refuse_constant(op, "class_weight", class_weight)


def is_dtensor(tensor: Tensor | None) -> bool:
    """Return whether a tensor is split over ranks; torch's module of DTensors need not be loaded for it."""
    return hasattr(tensor, "placements")


def integer_target(op: str, target: Tensor) -> Tensor:
    """Return int64 targets; those of int32 are converted."""
    if target.dtype == torch.int64:
        return target
    if target.dtype == torch.int32:
        return target.long()
    raise TypeError(f"{op}: target must be int64 or int32, got {target.dtype}")


def to_autocast(hidden: Tensor) -> Tensor:
    """Return hidden states in the dtype of autocast, if it is on."""
    # Other devices ("meta", for example) have no autocast, and `is_autocast_enabled` raises for them.
    if hidden.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(hidden.device.type):
        return hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return hidden


def fold_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float
) -> tuple[Tensor, Tensor]:
    """Return hidden states and a weight whose product is logit_scale (hidden weight^T + bias).

    The bias becomes a column of the weight, which a column of ones in `hidden` multiplies; seven columns of
    zeros beside it keep a width that is a multiple of eight, as the Hopper kernels need it.
    """
    if logit_scale != 1.0:
        hidden = hidden * logit_scale
    if bias is None:
        return hidden, weight
    wide = bias.to(torch.promote_types(bias.dtype, torch.float32))
    column = (wide * logit_scale).to(weight.dtype)[:, None]
    ones = hidden.new_zeros(hidden.shape[0], 8)
    ones[:, 0] = 1.0
    pad = torch.nn.functional.pad
    return torch.cat([hidden, ones], dim=1), torch.cat([weight, pad(column, (0, 7))], dim=1)


def class_weights(class_weight: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Return the weight of each row's target, `(rows,)`, 0 for ignored rows.

    A target out of range gets some weight: its row's loss is NaN, or the operator raises.
    """
    found = class_weight[target.clamp(0, class_weight.shape[0] - 1)]
    return found.masked_fill(target == ignore_index, 0.0)


def row_weight(
    target: Tensor, ignore_index: int, reduction: Reduction, weights: Tensor | None = None
) -> Tensor:
    """Return the factor of each counted row's loss in the reduced loss, float32 on the target's device.

    1 for "sum"; 1 / (number of rows that are not ignored, at least 1) for "mean": one number, `()`. With
    class weights, `(rows,)`: the row's own weight, divided by their sum for "mean".
    """
    if weights is not None:
        return weights if reduction == "sum" else weights / _divisor(weights.sum())
    if reduction == "sum":
        return torch.ones((), dtype=torch.float32, device=target.device)
    return (target != ignore_index).sum().clamp_(min=1).float().reciprocal_()


def reduce_rows(
    loss: Tensor, target: Tensor, ignore_index: int, reduction: Reduction, weights: Tensor | None = None
) -> Tensor:
    """Reduce the losses of rows, `(rows,)`, in which ignored rows are 0.

    `weights`, those of the rows' targets, only change what "mean" divides by: the losses have them already.
    """
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    if weights is not None:
        return total / _divisor(weights.sum())
    return total / (target != ignore_index).sum().clamp(min=1)


def _divisor(total: Tensor) -> Tensor:
    """Return the sum of the rows' weights; 1 where it is 0, so that the mean of nothing is 0."""
    return torch.where(total == 0.0, 1.0, total)


def in_float64(op: str, reference: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    """Call the reference in place of an operator whose kernels have no float64."""
    try:
        return reference(*arguments, **options)
    except IndexError as error:  # what torch raises on the CPU for a target out of range
        raise ValueError(f"{op}: target must be in [0, vocab) or ignore_index: {error}") from error


def is_traced() -> bool:
    """Return whether torch.jit.trace records the call."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]


def is_exported() -> bool:
    """Return whether torch.export records the call.

    In PyTorch 2.11, torch.compile takes the public `torch.compiler.is_exporting()` for true, so this reads
    the flag that it returns elsewhere.
    """
    return bool(torch.compiler._is_exporting_flag)


def rescale_once(grad: Tensor, grad_loss: Tensor) -> Tensor:
    """Multiply a saved gradient by the upstream gradient, in place, and return it.

    If the upstream gradient is exactly 1, the saved gradient is neither read nor written. In a batched
    backward pass, which has several upstream gradients, the product is a new tensor.
    """
    with torch.no_grad():
        if is_batched(grad_loss):
            return (grad * grad_loss).to(grad.dtype)
        torch.ops.pgolf.softcap_ce_rescale_(grad, grad_loss)
        # A second backward pass would scale the same tensor again. A higher version makes autograd refuse it.
        torch.autograd.graph.increment_version(grad)
    return grad
