"""Cross-entropy of tanh-capped logits, fused with the projection that computes them from hidden states.

This is the Python interface of `torch.ops.pgolf.linear_softcap_ce*`: public function, reference, fake kernels
and autograd. The binding and its use of memory are in csrc/ops/linear_softcap_ce.cpp, the loss from logits is
in pgolf/ops/softcap_ce.py. Legend: `rows` tokens, `width` of the hidden states, `vocab` entries.
"""

from __future__ import annotations

from typing import Any, Literal

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
    fold_head,
    in_float64,
    integer_target,
    is_dtensor,
    is_exported,
    is_traced,
    reduce_rows,
    rescale_once,
    row_weight,
    to_autocast,
)
from pgolf.ops.softcap_ce import softcap_ce_ref


def linear_softcap_ce(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cap: float | None = 30.0,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    z_loss: float = 0.0,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    memory: Literal["fast", "low"] = "fast",
) -> Tensor:
    """Compute the cross-entropy of the tanh-capped logits `hidden @ weight.T`, in nats.

        z = cap * tanh(logit_scale * (hidden @ weight.T + bias) / cap)          lse = logsumexp(z)
        loss_i = sum_v q_iv class_weight_v (lse_i - z_iv + z_loss * lse_i^2)
        q_iv = (1 - label_smoothing) [v = target_i] + label_smoothing / vocab

    With the default arguments this is lse_i - z_i,target_i. It equals
    `F.cross_entropy(z, target, class_weight, label_smoothing=label_smoothing)` with z computed by `F.linear`.

    The loss can be differentiated once with respect to `hidden`, `weight` and `bias`, by torch.autograd; a
    second derivative, forward mode and torch.func raise an error. Each gradient has the dtype of its tensor;
    the weight's gradient is accumulated in float32. The result is deterministic, bitwise the same from run to
    run. Under autocast, `hidden` is cast to the autocast dtype first, as in `F.linear`.

    If `weight` is a DTensor, the result is the one of the whole tensors on one rank, and each gradient is
    placed as its tensor is. `weight` may be Shard(0) along one mesh dimension, which splits the vocabulary;
    `hidden` may be sharded along dimensions of rows; plain tensors must be the same on every rank. If the
    vocabulary is split, PyTorch operators compute, as for label smoothing, and no logits are kept whatever
    `memory` is.

    `bias` and `logit_scale` cost a copy of `hidden`, and `bias` one of `weight`, but no pass over logits;
    `class_weight` costs nothing. Label smoothing takes chunks of rows with PyTorch operators, computes the
    logits twice whatever `memory` is, keeps none, and is slower.

    Args:
        hidden: `(rows, width)`, or any leading shape `(..., width)`; float32, bfloat16 or float16. On the CPU
            also float64, for checks: computed by `linear_softcap_ce_ref`, with its derivatives.
        weight: `(vocab, width)` float32 or the dtype of `hidden`. A float32 weight is cast to `hidden`'s
            dtype once, but its gradient is not rounded to that dtype.
        target: `(rows,)`, or the leading shape of `hidden`; int64 or int32 in [0, vocab), or `ignore_index`.
            A target out of range raises on the CPU and gives NaN on CUDA (see `softcap_ce` and
            PGOLF_CHECK_TARGETS).
        cap: soft limit on |z|, > 0, or None for plain cross-entropy.
        reduction: "mean" over the rows that are not ignored, each counted with the class weight of its target
            (0 if all rows are ignored, where `F.cross_entropy` gives NaN), "sum", or "none".
        ignore_index: target value of rows whose loss and gradient are 0.
        z_loss: weight of lse^2, >= 0.
        bias: `(vocab,)` of a floating-point dtype, added to the logits, or None. It is cast as `weight` is.
        class_weight: `(vocab,)` of a floating-point dtype, or None for ones; it gets no gradient.
        label_smoothing: share of each target's probability that is spread over all classes, from 0 to 1.
        logit_scale: factor of the logits before the cap, > 0. It multiplies `hidden` in its dtype.
        memory: how much is kept for the backward pass. "fast" keeps one `(rows, vocab)` tensor in `hidden`'s
            dtype, which is at most half of what `F.linear` and `F.cross_entropy` keep. "low" keeps no logits
            and holds a chunk of them at a time (on CUDA 256 MiB or 2048 rows, whichever is more): "mean" and
            "sum" compute the gradients together with the loss, "none" (and float16) computes the logits a
            second time, and so do programs of torch.export and torch.jit.trace in both modes. If no gradient
            is needed, both are the same and keep nothing.

    Returns:
        float32 loss in nats (float64 for float64 hidden states): of the shape of `target` for "none", a
        scalar for "mean" and "sum". If `weight` is a DTensor, the loss is one: placed as the rows of `hidden`
        are for "none", replicated for "mean" and "sum".

    Raises:
        ValueError: shapes or devices disagree, cap or logit_scale <= 0, z_loss < 0, label_smoothing is not
            from 0 to 1, reduction or memory is unknown, a target is out of range, or ranks that share the
            vocabulary have different targets (on CUDA as for targets out of range).
        TypeError: a dtype is not supported.
        RuntimeError: a second derivative, a derivative of forward mode or torch.func, or one with respect to
            `class_weight` was asked for, or the placements of DTensors are not supported.

    Source: Gemma 2, section 2; PaLM, section 5 (z-loss). Kernel: csrc/ops/linear_softcap_ce.cpp.
    """
    check_reduction("linear_softcap_ce", reduction)
    target = integer_target("linear_softcap_ce", target)
    _check(hidden, weight, target, bias, memory)
    check_weighting("linear_softcap_ce", hidden, weight.shape[0], class_weight, label_smoothing, logit_scale)
    given: dict[str, Any] = {
        "cap": cap,
        "reduction": reduction,
        "ignore_index": ignore_index,
        "z_loss": z_loss,
        "bias": bias,
        "class_weight": class_weight,
        "label_smoothing": label_smoothing,
        "logit_scale": logit_scale,
    }
    if any(is_dtensor(t) for t in (hidden, weight, target, bias, class_weight)):
        # Loaded here, because torch.distributed.tensor takes about as long to load as pgolf.
        from pgolf.ops._sharded_ce import sharded_linear_ce

        return sharded_linear_ce(hidden, weight, target, memory=memory, **given)
    options = (cap, ignore_index, z_loss)
    if hidden.dtype == torch.float64 and hidden.is_cpu:
        return in_float64("linear_softcap_ce", linear_softcap_ce_ref, hidden, weight, target, **given)
    refuse_transforms("linear_softcap_ce", hidden, weight, *([] if bias is None else [bias]))
    x, y = to_autocast(hidden).flatten(0, -2), target.flatten()
    x, weight = fold_head(x, weight, bias, logit_scale)
    weights = None if class_weight is None else class_weights(class_weight.float(), y, ignore_index)
    if label_smoothing:
        loss: Tensor = torch.ops.pgolf._smoothed_linear_ce(
            x, weight, y, class_weight, *options, label_smoothing, CHECK_TARGETS
        )
    else:
        needs = [torch.is_grad_enabled() and t.requires_grad for t in (x, weight)]
        # A recorded program keeps nothing, because it may run with or without a backward pass.
        if is_traced() or is_exported():
            needs = [False, False]
        # A gradient scaler works only if the upstream gradient is applied before rounding to float16, so
        # float16 does not compute its gradients in the forward pass.
        if memory == "low" and any(needs) and reduction != "none" and x.dtype != torch.float16:
            return _one_pass(x, weight, y, row_weight(y, ignore_index, reduction, weights), options, needs)
        keep = memory == "fast" and any(needs)
        loss = torch.ops.pgolf.linear_softcap_ce(x, weight, y, *options, keep, CHECK_TARGETS)[0]
        loss = loss if weights is None else loss * weights
    loss = reduce_rows(loss, y, ignore_index, reduction, weights)
    return loss.reshape(target.shape if reduction == "none" else ())


def linear_softcap_ce_ref(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cap: float | None = 30.0,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    z_loss: float = 0.0,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
) -> Tensor:
    """Compute `linear_softcap_ce` with PyTorch operators; float64 input is computed in float64.

    Without gradients logits are not rounded to the dtype of `hidden`, as the kernels do not round them.
    """
    dtype = hidden.dtype if torch.is_grad_enabled() else torch.promote_types(hidden.dtype, torch.float32)
    offset = None if bias is None else bias.to(dtype)
    return softcap_ce_ref(
        torch.nn.functional.linear(hidden.to(dtype), weight.to(hidden.dtype).to(dtype), offset),
        target,
        cap,
        reduction=reduction,
        ignore_index=ignore_index,
        z_loss=z_loss,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        logit_scale=logit_scale,
    )


def _check(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, memory: str) -> None:
    """Check what the operators do not see: the leading dimensions, the bias and the mode."""
    if memory not in ("fast", "low"):
        raise ValueError(f'linear_softcap_ce: memory must be "fast" or "low", got {memory!r}')
    if hidden.dim() < 2:
        raise ValueError(
            f"linear_softcap_ce: hidden must be (rows, width) or (..., width), got {tuple(hidden.shape)}"
        )
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"linear_softcap_ce: target must be {tuple(hidden.shape[:-1])}, hidden's shape without the last "
            f"dimension, got {tuple(target.shape)}"
        )
    if bias is None:
        return
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_softcap_ce: bias must be (vocab,)={tuple(weight.shape[:1])}, got {tuple(bias.shape)}"
        )
    if not bias.is_floating_point():
        raise TypeError(f"linear_softcap_ce: bias must be of a floating-point dtype, got {bias.dtype}")


def _one_pass(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    share: Tensor,
    options: tuple[float | None, int, float],
    needs: list[bool],
) -> Tensor:
    """Return the sum of the losses, each multiplied by its row's share; the gradients come with it."""
    if not torch.compiler.is_compiling():
        return _OnePass.apply(hidden, weight, target, share, options, needs)[0]  # type: ignore[no-any-return,no-untyped-call]
    gradients = torch.ops.pgolf.linear_softcap_ce_gradients
    total: Tensor = gradients(share, hidden, weight, target, *options, *needs, CHECK_TARGETS)[0]
    return total


class _OnePass(torch.autograd.Function):
    """Reduced loss whose forward pass also computes the gradients, for an upstream gradient of 1."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        share: Tensor,
        options: tuple[float | None, int, float],
        needs: list[bool],
    ) -> tuple[Tensor, Tensor]:
        loss, *grads = torch.ops.pgolf.linear_softcap_ce_gradients(
            share, hidden, weight, target, *options, *needs, CHECK_TARGETS
        )
        ctx.weight_dtype = weight.dtype
        # The inputs are not saved. This empty output stands for them, as in `softcap_ce`.
        anchor = share.new_empty(0)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*grads, anchor)
        total: Tensor = loss
        return total, anchor

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        grad_loss = upstream[0]
        if grad_loss is None:
            return (None,) * 6
        needed = ctx.needs_input_grad
        *saved, anchor = ctx.saved_tensors
        # With retain_graph the saved gradients are needed again, so they must not be scaled in place.
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        with torch.no_grad():
            scale = torch.mul if kept else rescale_once
            grads = [scale(g, grad_loss) if n else g for g, n in zip(saved, needed, strict=False)]
            both = grads[0], grads[1].to(ctx.weight_dtype)
        return *_needed(both, needed, grad_loss, anchor), None, None, None, None


def _forward_fake(
    hidden: Tensor, weight: Tensor, _target: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keep, rows = others[-2], hidden.shape[0]
    kept_rows = rows if keep else 0
    factor = hidden.new_empty((rows, weight.shape[0]) if keep else (0,))
    scale = hidden.new_empty(kept_rows, dtype=torch.float32)
    cast = keep and weight.dtype != hidden.dtype
    return (
        hidden.new_empty(rows, dtype=torch.float32),
        factor,
        scale,
        hidden.new_empty(weight.shape if cast else (0,)),
    )


def _backward_fake(
    _grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    _factor: Tensor,
    _scale: Tensor,
    weight_dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        hidden.new_empty(weight.shape if need_weight else (0,), dtype=weight_dtype),
    )


def _gradients_fake(
    _grad_loss: Tensor, hidden: Tensor, weight: Tensor, _target: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight = others[-3:-1]
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        hidden.new_empty(weight.shape if need_weight else (0,), dtype=torch.float32),
    )


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, *options, keep, _check = inputs
    _loss, factor, scale, weight_cast = output
    ctx.mark_non_differentiable(factor, scale, weight_cast)
    # Otherwise backward begins by filling a gradient of the factor, (rows, vocab), with zeros.
    ctx.set_materialize_grads(False)
    ctx.keep, ctx.options, ctx.weight_dtype = keep, options, weight.dtype
    if keep:
        cast = weight.dtype != hidden.dtype
        ctx.save_for_backward(hidden, weight_cast if cast else weight, factor, scale)
    else:
        ctx.save_for_backward(hidden, weight, target)


def _backward(ctx: Any, grad_loss: Tensor | None, *_others: object) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 8
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    ops = torch.ops.pgolf
    if ctx.keep:
        hidden, weight, factor, scale = ctx.saved_tensors
        arguments = (ctx.weight_dtype, need_hidden, need_weight)
        grads = ops.linear_softcap_ce_backward(grad_loss, hidden, weight, factor, scale, *arguments)
    else:
        hidden, weight, target = ctx.saved_tensors
        arguments = (*ctx.options, need_hidden, need_weight, False)
        with torch.no_grad():
            grads = ops.linear_softcap_ce_gradients(grad_loss, hidden, weight, target, *arguments)[1:]
            grads = grads[0], grads[1].to(ctx.weight_dtype)
    return _needed(grads, ctx.needs_input_grad, grad_loss, hidden, weight) + (None,) * 6


def _setup_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.weight_dtype = inputs[2].dtype
    # The inputs are saved only to tell autograd what the gradients depend on; the compiler removes them.
    ctx.save_for_backward(*output[1:], inputs[1], inputs[2])


def _scale_gradients(ctx: Any, grad_loss: Tensor | None, *_others: object) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 10
    *saved, hidden, weight = ctx.saved_tensors
    with torch.no_grad():
        grads = tuple(g * grad_loss for g in saved)
        grads = grads[0], grads[1].to(ctx.weight_dtype)
    return (None, *_needed(grads, ctx.needs_input_grad[1:], grad_loss, hidden, weight), *(None,) * 7)


def _needed(
    grads: tuple[Tensor, Tensor], needed: tuple[bool, ...], *sources: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients so that differentiating them raises, and None for those that are not needed."""
    return tuple(
        refuse_second_order("linear_softcap_ce", g, *sources) if n else None
        for g, n in zip(grads, needed[:2], strict=True)
    )


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total` in float32, for the C++ operators (see `float_product` there)."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)
    else:
        torch.addmm(total, left.float(), right.float(), out=total)


def _second_order(_ctx: Any, *_grads: Tensor) -> None:
    raise second_order_error("linear_softcap_ce")


torch.library.define("pgolf::_add_product_", "(Tensor(a!) total, Tensor left, Tensor right) -> ()")
torch.library.impl("pgolf::_add_product_", "default", _add_product_)
torch.library.register_fake("pgolf::linear_softcap_ce", _forward_fake)
torch.library.register_fake("pgolf::linear_softcap_ce_backward", _backward_fake)
torch.library.register_fake("pgolf::linear_softcap_ce_gradients", _gradients_fake)
torch.library.register_autograd("pgolf::linear_softcap_ce", _backward, setup_context=_setup_forward)
torch.library.register_autograd("pgolf::linear_softcap_ce_backward", _second_order)
torch.library.register_autograd(
    "pgolf::linear_softcap_ce_gradients", _scale_gradients, setup_context=_setup_gradients
)
