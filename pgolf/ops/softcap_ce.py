"""Cross-entropy of tanh-capped logits, fused so that the logits are read once.

This is the Python interface of `torch.ops.pgolf.softcap_ce*`: public function, reference, fake kernels and
autograd. Kernels: csrc/kernels/softcap_ce.h. Sources: Gemma 2, section 2 (soft cap on the logits), and PaLM,
section 5 (z-loss). The usual code computes `p - 1` and `1 - tanh^2` by subtraction, which loses digits where
a probability is close to 1 or the cap saturates; these kernels avoid both subtractions. The loss from hidden
states is in pgolf/ops/linear_softcap_ce.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pgolf.ops._smoothed_ce  # noqa: F401  (registers the operators, also those of the extension)
from pgolf.ops._derivatives import refuse_second_order, refuse_transforms, second_order_error
from pgolf.ops._loss import (
    CHECK_TARGETS,
    Reduction,
    check_reduction,
    check_weighting,
    class_weights,
    in_float64,
    integer_target,
    is_dtensor,
    is_traced,
    reduce_rows,
    rescale_once,
    row_weight,
)


def softcap_ce(
    logits: Tensor,
    target: Tensor,
    cap: float | None = 30.0,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    z_loss: float = 0.0,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    inplace: bool = False,
) -> Tensor:
    """Compute the cross-entropy of tanh-capped logits, in nats.

        z = cap * tanh(logit_scale * logits / cap)          lse = logsumexp(z)
        loss_i = sum_v q_iv class_weight_v (lse_i - z_iv + z_loss * lse_i^2)
        q_iv = (1 - label_smoothing) [v = target_i] + label_smoothing / vocab

    With the default arguments this is lse_i - z_i,target_i. It equals
    `F.cross_entropy(z, target, class_weight, label_smoothing=label_smoothing)` computed in float32.

    The loss can be differentiated once with respect to `logits`, by torch.autograd; a second derivative,
    forward mode and torch.func raise an error. The gradient has the dtype of `logits`. A NaN in a row of
    `logits` makes the loss and the gradient of that row NaN. The result is deterministic.

    With "mean" or "sum" in eager mode, the forward pass writes the gradient while it computes the loss: one
    read and one write of the logits. The backward pass multiplies that gradient by the upstream
    gradient, and skips the multiplication if the upstream gradient is exactly 1; a second backward pass
    through the same loss raises an error. With "none", with a class weight, label smoothing or a logit scale,
    in a traced or exported program, and under torch.compile, the backward pass reads the logits again. Label
    smoothing and the logit scale take chunks of rows with PyTorch operators, and are slower.

    If `logits` are a DTensor, the result is the one of the whole tensors on one rank, and the gradient is
    placed as the logits are. They may be Shard(-1) along one mesh dimension, which splits the vocabulary, and
    sharded along dimensions of rows; plain tensors must be the same on every rank. If the vocabulary is
    split, PyTorch operators compute, and the backward pass reads the logits again.

    Args:
        logits: `(rows, vocab)`, or any leading shape `(..., vocab)`; float32, bfloat16 or float16; copied if
            not contiguous. Sums are accumulated in float32. On the CPU also float64, for checks: computed by
            `softcap_ce_ref`, with its derivatives.
        target: `(rows,)`, or the leading shape of `logits`; int64 or int32 in [0, vocab), or `ignore_index`.
            A target out of range raises ValueError on the CPU. On CUDA, where finding it would stall the
            stream, the loss and the gradient of its row become NaN; with PGOLF_CHECK_TARGETS=1 in the
            environment CUDA raises too.
        cap: soft limit on |z|, > 0, or None for plain cross-entropy. PR #1855's run uses 30.
        reduction: "mean" over the rows that are not ignored, each counted with the class weight of its target
            (0 if all rows are ignored, where `F.cross_entropy` gives NaN), "sum", or "none".
        ignore_index: target value of rows whose loss and gradient are 0.
        z_loss: weight of lse^2, >= 0.
        class_weight: `(vocab,)` of a floating-point dtype, or None for ones; it gets no gradient.
        label_smoothing: share of each target's probability that is spread over all classes, from 0 to 1.
        logit_scale: factor of the logits before the cap, > 0.
        inplace: with "mean" and "sum", overwrite contiguous `logits` with their gradient, which halves the
            memory. The caller must not read `logits` afterwards; autograd raises if another operator saved
            them. Ignored where the backward pass reads the logits again, where no gradient is needed, and for
            a DTensor.

    Returns:
        float32 loss in nats (float64 for float64 logits): of the shape of `target` for "none", a scalar for
        "mean" and "sum". If `logits` are a DTensor, the loss is one: placed as the rows of `logits` are for
        "none", replicated for "mean" and "sum".

    Raises:
        ValueError: shapes or devices disagree, cap or logit_scale <= 0, z_loss < 0, label_smoothing is not
            from 0 to 1, the reduction is unknown, logits are not contiguous with inplace, a target is out of
            range, or ranks that share the vocabulary have different targets (on CUDA as for those out of
            range).
        TypeError: a dtype is not supported.
        RuntimeError: a second derivative, a derivative of forward mode or torch.func, or one with respect to
            `class_weight` was asked for, or the placements of DTensors are not supported.

    Source: Gemma 2, section 2. Kernel: csrc/kernels/softcap_ce.h.
    """
    check_reduction("softcap_ce", reduction)
    check_weighting("softcap_ce", logits, logits.shape[-1], class_weight, label_smoothing, logit_scale)
    target = integer_target("softcap_ce", target)
    given: dict[str, Any] = {
        "cap": cap,
        "reduction": reduction,
        "ignore_index": ignore_index,
        "z_loss": z_loss,
        "class_weight": class_weight,
        "label_smoothing": label_smoothing,
        "logit_scale": logit_scale,
    }
    if any(is_dtensor(t) for t in (logits, target, class_weight)):
        # Loaded here, because torch.distributed.tensor takes about as long to load as pgolf.
        from pgolf.ops._sharded_ce import sharded_ce

        _check_rows(logits, target)
        return sharded_ce(logits, target, **given)
    options = (cap, ignore_index, z_loss)
    if logits.dtype == torch.float64 and logits.is_cpu:
        return in_float64("softcap_ce", softcap_ce_ref, logits, target, **given)
    refuse_transforms("softcap_ce", logits)
    # A program that is recorded needs operators that know their own gradient.
    recorded = torch.compiler.is_compiling() or is_traced()
    gradient = torch.is_grad_enabled() and logits.requires_grad
    x, y = _as_rows(logits, target, inplace and gradient)
    weights = None if class_weight is None else class_weights(class_weight.float(), y, ignore_index)
    if label_smoothing or logit_scale != 1.0:
        rule = (class_weight, *options, label_smoothing, logit_scale)
        loss: Tensor = torch.ops.pgolf._smoothed_ce(x, y, *rule, CHECK_TARGETS)
    elif reduction != "none" and gradient and not recorded and weights is None and x.dim() == 2:
        weight = row_weight(y, ignore_index, reduction)
        return _OnePass.apply(x, y, weight, options, inplace)[0]  # type: ignore[no-any-return,no-untyped-call]
    else:
        loss = torch.ops.pgolf.softcap_ce(x, y, *options, CHECK_TARGETS)[0]
        loss = loss if weights is None else loss * weights
    loss = reduce_rows(loss, y, ignore_index, reduction, weights)
    return loss.reshape(target.shape) if reduction == "none" else loss


def softcap_ce_ref(
    logits: Tensor,
    target: Tensor,
    cap: float | None = 30.0,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    z_loss: float = 0.0,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
) -> Tensor:
    """Compute `softcap_ce` with PyTorch operators: float64 input in float64, other input in float32."""
    check_reduction("softcap_ce", reduction)
    x = (logits if logits.dtype == torch.float64 else logits.float()).flatten(0, -2)
    x = x if logit_scale == 1.0 else x * logit_scale
    z = x if cap is None else cap * torch.tanh(x / cap)
    y = target.flatten().long()
    w = None if class_weight is None else class_weight.to(z.dtype)
    loss = torch.nn.functional.cross_entropy(
        z, y, w, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    weights = None if w is None else class_weights(w, y, ignore_index)
    if z_loss:
        penalty = z_loss * torch.logsumexp(z, dim=1).square()
        if w is not None and weights is not None:
            penalty = penalty * ((1.0 - label_smoothing) * weights + label_smoothing * w.mean())
        loss = loss + torch.where(y == ignore_index, 0.0, penalty)
    loss = reduce_rows(loss, y, ignore_index, reduction, weights)
    return loss.reshape(target.shape) if reduction == "none" else loss


def _check_rows(logits: Tensor, target: Tensor) -> None:
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"softcap_ce: target must be {tuple(logits.shape[:-1])}, logits' shape without the last "
            f"dimension, which is the vocabulary, got {tuple(target.shape)}"
        )


def _as_rows(logits: Tensor, target: Tensor, overwrite: bool) -> tuple[Tensor, Tensor]:
    """Return logits as `(rows, vocab)` and targets as `(rows,)`."""
    if logits.dim() <= 2 and target.dim() == 1:
        return logits, target  # the operators check them
    _check_rows(logits, target)
    if overwrite and not logits.is_contiguous():
        raise ValueError(
            "softcap_ce: logits must be contiguous to be overwritten by their gradient; call .contiguous() "
            f"or leave inplace off; got strides {logits.stride()}"
        )
    return logits.flatten(0, -2), target.flatten()


class _OnePass(torch.autograd.Function):
    """Reduced loss whose forward pass also computes the gradient, for an upstream gradient of 1."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor,
        options: tuple[float | None, int, float],
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        if inplace:
            grad = logits.detach()
            loss = torch.ops.pgolf.softcap_ce_gradient_(grad, target, weight, *options, CHECK_TARGETS)
            # `grad` is the memory of `logits`: an operator that saved `logits` must raise in its backward.
            torch.autograd.graph.increment_version(logits)
        else:
            loss, grad = torch.ops.pgolf.softcap_ce_gradient(logits, target, weight, *options, CHECK_TARGETS)
        # `logits` are not saved. This empty output stands for them: autograd knows that it depends on
        # `logits`, and no caller can see or change it.
        anchor = weight.new_empty(0)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, anchor)
        total: Tensor = loss.sum() * weight
        return total, anchor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad_loss = grads[0]
        if grad_loss is None:
            return (None,) * 5
        grad, anchor = ctx.saved_tensors
        grad = rescale_once(grad, grad_loss)
        return refuse_second_order("softcap_ce", grad, grad_loss, anchor), None, None, None, None


def _forward_fake(logits: Tensor, *_others: object) -> tuple[Tensor, Tensor]:
    rows = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return rows, torch.empty_like(rows)


def _backward_fake(_grad_loss: Tensor, logits: Tensor, *_others: object) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _gradient_fake(logits: Tensor, *_others: object) -> tuple[Tensor, Tensor]:
    rows = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return rows, torch.empty_like(logits, memory_format=torch.contiguous_format)


def _gradient_fake_(logits: Tensor, *_others: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, *options, _check = inputs
    ctx.options = options
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, target, *output)


def _backward(ctx: Any, grad_loss: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    logits, target, loss, lse = ctx.saved_tensors
    grad = torch.ops.pgolf.softcap_ce_backward(grad_loss, logits, target, loss, lse, *ctx.options)
    return grad, None, None, None, None, None


def _second_order(_ctx: Any, *_grads: Tensor) -> None:
    raise second_order_error("softcap_ce")


torch.library.register_fake("pgolf::softcap_ce", _forward_fake)
torch.library.register_fake("pgolf::softcap_ce_backward", _backward_fake)
torch.library.register_fake("pgolf::softcap_ce_gradient", _gradient_fake)
torch.library.register_fake("pgolf::softcap_ce_gradient_", _gradient_fake_)
torch.library.register_fake("pgolf::softcap_ce_rescale_", lambda _grad, _factor: None)
torch.library.register_autograd("pgolf::softcap_ce", _backward, setup_context=_setup_context)
torch.library.register_autograd("pgolf::softcap_ce_backward", _second_order)
torch.library.register_autograd("pgolf::softcap_ce_gradient", _second_order)
