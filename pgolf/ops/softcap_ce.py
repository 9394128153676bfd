"""Cross-entropy of tanh-capped logits, fused: the logits are read once.

Owns the Python face of `torch.ops.pgolf.softcap_ce*`: public function, reference, fake kernels, autograd.
Kernels: csrc/kernels/softcap_ce.h. Follows Gemma 2, section 2 (logit soft-capping), and PaLM, section 5
(z-loss); unlike the usual code it never forms `p - 1` or `1 - tanh^2` by subtraction, so the gradients stay
accurate where the model is sure or the cap saturates. From hidden states: pgolf/ops/linear_softcap_ce.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pgolf.ops._extension  # noqa: F401  (registers the operators)
from pgolf.ops._derivatives import refuse_second_order, refuse_transforms, second_order_error
from pgolf.ops._loss import (
    CHECK_TARGETS,
    Reduction,
    check_reduction,
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
    inplace: bool = False,
) -> Tensor:
    """Cross-entropy of tanh-capped logits, in nats.

        z = cap * tanh(logits / cap)
        loss_i = lse_i - z_i,target_i + z_loss * lse_i^2,   lse = logsumexp(z)

    Equals `F.cross_entropy(cap * torch.tanh(logits / cap), target)` computed in float32.

    Differentiable in `logits`, once, by torch.autograd; a second derivative, a tangent of forward mode and
    the derivatives of torch.func raise. The gradient has the dtype of `logits`. NaN in a row of `logits`
    makes the row's loss and gradient NaN. Deterministic. With "mean" or "sum" in eager mode, the gradient is
    written as the loss is computed: one read and one write of `(rows, vocab)`; backward then multiplies it
    by the upstream gradient, and touches nothing where that is exactly 1. A second backward through the same
    loss raises then. With "none" and under torch.compile, backward reads the logits again.

    Args:
        logits: `(rows, vocab)` float32, bfloat16 or float16; made contiguous if it is not. Accumulation is
            float32.
        target: `(rows,)` int64 in [0, vocab), or `ignore_index`. On CUDA a target out of range is not an
            error (finding it would stall the stream): its row's loss and gradient become NaN. With
            PGOLF_CHECK_TARGETS=1 in the environment it is an error there too.
        cap: soft limit on |z|, > 0, or None for plain cross-entropy. PR #1855's run uses 30.
        reduction: "mean" over the rows that are not ignored (0 if all are, where `F.cross_entropy` gives
            NaN), "sum", or "none".
        ignore_index: target value of rows with loss 0 and gradient 0.
        z_loss: weight of lse^2, >= 0.
        inplace: allow "mean" and "sum" to overwrite contiguous `logits` with their gradient, which halves the
            memory. The caller must not read `logits` afterwards; autograd raises if another operator saved
            them. Ignored under torch.compile, and where no gradient is needed.

    Returns:
        float32 loss, nats: `(rows,)` for "none", else a scalar.

    Raises:
        ValueError: shapes or devices disagree, cap <= 0, z_loss < 0, unknown reduction, strided logits
            with inplace, or a target out of range.
        TypeError: unsupported dtype.
        RuntimeError: another derivative than the first one, or by torch.func or forward mode.

    Source: Gemma 2, section 2. Kernel: csrc/kernels/softcap_ce.h.
    """
    check_reduction("softcap_ce", reduction)
    refuse_transforms("softcap_ce", logits)
    options = (cap, ignore_index, z_loss)
    compiling = torch.compiler.is_compiling()
    gradient = torch.is_grad_enabled() and logits.requires_grad
    if reduction != "none" and gradient and not compiling and logits.dim() == 2:
        weight = row_weight(target, ignore_index, reduction)
        return _OnePass.apply(logits, target, weight, options, inplace)[0]  # type: ignore[no-any-return,no-untyped-call]
    loss: Tensor = torch.ops.pgolf.softcap_ce(logits, target, *options, CHECK_TARGETS)[0]
    return reduce_rows(loss, target, ignore_index, reduction)


def softcap_ce_ref(
    logits: Tensor,
    target: Tensor,
    cap: float | None = 30.0,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Tensor:
    """Compute what `softcap_ce` computes with PyTorch operators; float64 input is computed in float64."""
    check_reduction("softcap_ce", reduction)
    x = logits if logits.dtype == torch.float64 else logits.float()
    z = x if cap is None else cap * torch.tanh(x / cap)
    loss = torch.nn.functional.cross_entropy(z, target, ignore_index=ignore_index, reduction="none")
    if z_loss:
        penalty = z_loss * torch.logsumexp(z, dim=1).square()
        loss = loss + torch.where(target == ignore_index, 0.0, penalty)
    return reduce_rows(loss, target, ignore_index, reduction)


class _OnePass(torch.autograd.Function):
    """Reduced loss whose gradient is computed in the forward pass, for an upstream gradient of 1."""

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
            # `grad` is `logits`: any operator that saved it must notice.
            torch.autograd.graph.increment_version(logits)
        else:
            loss, grad = torch.ops.pgolf.softcap_ce_gradient(logits, target, weight, *options, CHECK_TARGETS)
        # What nobody else sees or writes, and autograd knows to come from `logits`, which are not kept.
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
