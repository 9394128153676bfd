"""Cross-entropy of tanh-capped logits, fused: logits are read once forward and once backward.

Owns the Python face of `torch.ops.pgolf.softcap_ce`: public function, reference, fake kernels, autograd.
Kernels: csrc/kernels/softcap_ce.h. Follows Gemma 2, section 2 (logit soft-capping); unlike the usual code it
never forms `p - 1` or `1 - tanh^2` by subtraction, so the gradients stay accurate where the model is sure or
the cap saturates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pgolf.ops._extension  # noqa: F401  (registers the operators)

_SECOND_ORDER = (
    "softcap_ce: second derivatives are not implemented; "
    "use softcap_ce_ref where a gradient of a gradient is needed"
)


def softcap_ce(logits: Tensor, target: Tensor, cap: float, *, ignore_index: int = -100) -> Tensor:
    """Cross-entropy of tanh-capped logits, per row, in nats.

    loss_i = logsumexp_j(z_ij) - z_i,target_i   with   z = cap * tanh(logits / cap)
    Equals `F.cross_entropy(cap * torch.tanh(logits / cap), target, reduction="none")` computed in float32.

    Differentiable in `logits`, once; the gradient has the dtype of `logits`:
    (softmax(z) - onehot(target)) * (1 - tanh(logits / cap)^2) * grad_loss. NaN in a row of `logits` makes the
    row's loss and gradient NaN. Deterministic.

    Args:
        logits: `(rows, vocab)` float32, bfloat16 or float16; made contiguous if it is not. Accumulation is
            float32.
        target: `(rows,)` int64 in [0, vocab), or `ignore_index`. On CUDA a target out of range is not an
            error (finding it would stall the stream): its row's loss and gradient become NaN.
        cap: soft limit on |z|, > 0. The record run uses 30.
        ignore_index: target value of rows with loss 0 and gradient 0.

    Returns:
        `(rows,)` float32 loss, nats.

    Raises:
        ValueError: shapes or devices disagree, cap <= 0, or (CPU only) a target out of range.
        TypeError: unsupported dtype.

    Source: Gemma 2, section 2. Kernel: csrc/kernels/softcap_ce.h.
    """
    loss: Tensor = torch.ops.pgolf.softcap_ce(logits, target, cap, ignore_index)[0]
    return loss


def softcap_ce_ref(logits: Tensor, target: Tensor, cap: float, *, ignore_index: int = -100) -> Tensor:
    """Compute what `softcap_ce` computes with PyTorch operators; float64 input is computed in float64."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    z = cap * torch.tanh(x / cap)
    return torch.nn.functional.cross_entropy(z, target, ignore_index=ignore_index, reduction="none")


def _forward_fake(logits: Tensor, _target: Tensor, _cap: float, _ignore: int) -> tuple[Tensor, Tensor]:
    rows = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return rows, torch.empty_like(rows)


def _backward_fake(_grad_loss: Tensor, logits: Tensor, *_others: object) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, ctx.cap, ctx.ignore_index = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, target, *output)


def _backward(ctx: Any, grad_loss: Tensor, _grad_lse: Tensor) -> tuple[Tensor, None, None, None]:
    logits, target, loss, lse = ctx.saved_tensors
    grad = torch.ops.pgolf.softcap_ce_backward(
        grad_loss, logits, target, loss, lse, ctx.cap, ctx.ignore_index
    )
    return grad, None, None, None


def _second_order(_ctx: Any, _grad: Tensor) -> None:
    raise RuntimeError(_SECOND_ORDER)


torch.library.register_fake("pgolf::softcap_ce", _forward_fake)
torch.library.register_fake("pgolf::softcap_ce_backward", _backward_fake)
torch.library.register_autograd("pgolf::softcap_ce", _backward, setup_context=_setup_context)
torch.library.register_autograd("pgolf::softcap_ce_backward", _second_order)
