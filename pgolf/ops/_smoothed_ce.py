"""Cross-entropies with label smoothing or a scale of the logits, made of `softcap_ce` and PyTorch operators.

The kernels know neither. These operators take chunks of rows, so that a chunk of float32 logits exists at a
time. With class weights w_v (1 if there are none) and the mean over the vocabulary:

    z = cap * tanh(scale * x / cap)
    loss_i = sum_v q_v w_v (lse - z_v + z_loss lse^2),    q_v = (1 - s) [v = target_i] + s / vocab
           = a_i softcap_ce_i + s (mean(w) z_target - mean(w z)),    a_i = (1 - s) w_target + s mean(w)

Everything is float32 within a chunk; a gradient is rounded once to its dtype. The backward passes compute the
logits again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pgolf.ops._extension  # noqa: F401  (registers the operators)
from pgolf.ops._derivatives import second_order_error
from pgolf.ops._loss import class_weights

# Bytes of float32 logits at a time: the arithmetic of a chunk makes about five tensors of this size.
_CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
# Bytes of logits in hidden's dtype between two products, and least rows: see csrc/ops/linear_softcap_ce.cpp.
_PRODUCT_BYTES, _PRODUCT_ROWS = {"cpu": 8 << 20, "cuda": 256 << 20}, {"cpu": 64, "cuda": 2048}


@dataclass(frozen=True)
class _Rule:
    """What makes a loss of scaled logits."""

    class_weight: Tensor | None
    """`(vocab,)`, or None for ones."""
    cap: float | None
    """Soft limit of the logits."""
    ignore_index: int
    """Target value of rows whose loss and gradient are 0."""
    z_loss: float
    """Weight of lse^2."""
    smoothing: float
    """Share of the target's probability that all classes get."""

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each row of float32 logits."""
        options = (self.cap, self.ignore_index, self.z_loss)
        loss: Tensor = torch.ops.pgolf.softcap_ce(x, target, *options, False)[0]
        loss = loss * self._row_factor(target)
        if not self.smoothing:
            return loss
        z = x if self.cap is None else torch.tanh(x / self.cap).mul_(self.cap)
        at_target = z.gather(1, _index(target, x.shape[1])[:, None])[:, 0]
        weighted = z if self.class_weight is None else z * self.class_weight.float()
        extra = self._mean_weight() * at_target - weighted.mean(dim=1)
        return loss + torch.where(target == self.ignore_index, 0.0, self.smoothing * extra)

    def gradient(self, x: Tensor, target: Tensor, grad_loss: Tensor) -> Tensor:
        """Return the gradient of sum_i grad_loss_i loss_i by float32 logits."""
        ops, options = torch.ops.pgolf, (self.cap, self.ignore_index, self.z_loss)
        ignored = target == self.ignore_index
        upstream = grad_loss.masked_fill(ignored, 0.0)
        statistics = ops.softcap_ce(x, target, *options, False)
        factor = self._row_factor(target)
        grad: Tensor = ops.softcap_ce_backward(upstream * factor, x, target, *statistics, *options)
        if not self.smoothing:
            return grad
        rows, index = torch.arange(len(x), device=x.device), _index(target, x.shape[1])
        slope = cap_slope(x, self.cap)
        upstream = upstream * self.smoothing
        at_target = self._mean_weight() * upstream * slope[rows, index]
        grad[rows, index] += at_target.masked_fill_(ignored, 0.0)
        if self.class_weight is not None:
            slope.mul_(self.class_weight.float())
        extra = slope.mul_((upstream / x.shape[1])[:, None])
        return grad.sub_(extra.masked_fill_(ignored[:, None], 0.0))

    def _row_factor(self, target: Tensor) -> Tensor | float:
        """Return the sum of the weights of a row's loss: a_i."""
        if self.class_weight is None:
            return 1.0
        own = class_weights(self.class_weight.float(), target, self.ignore_index)
        return (1.0 - self.smoothing) * own + self.smoothing * self._mean_weight()

    def _mean_weight(self) -> Tensor | float:
        return 1.0 if self.class_weight is None else self.class_weight.float().mean()


def cap_slope(x: Tensor, cap: float | None) -> Tensor:
    """Return the derivative of the capped logits, 1 - tanh^2, without a subtraction that loses its digits."""
    if cap is None:
        return torch.ones_like(x)
    u = x * (2.0 / cap)
    return torch.sigmoid(u).mul_(torch.sigmoid(-u)).mul_(4.0)


def _index(target: Tensor, vocab: int) -> Tensor:
    return target.clamp(0, vocab - 1)


def _chunks(rows: int, row_bytes: int, most: int, least_rows: int = 1) -> Iterator[slice]:
    """Yield slices of about the same number of rows, with at most `most` bytes or `least_rows`."""
    limit = max(most // max(row_bytes, 1), least_rows)
    count = max(-(-rows // limit), 1)
    each = max(-(-rows // count), 1)
    for begin in range(0, rows, each):
        yield slice(begin, min(begin + each, rows))


def _kind(tensor: Tensor) -> str:
    return "cpu" if tensor.device.type == "cpu" else "cuda"


def check_targets(op: str, target: Tensor, vocab: int, ignore_index: int, always: bool) -> None:
    """Raise ValueError for a target out of range: on the CPU, elsewhere only if asked, as the kernels do."""
    if not (always or target.is_cpu):
        return
    bad = ((target < 0) | (target >= vocab)) & (target != ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{op}: target must be in [0, vocab={vocab}) or ignore_index={ignore_index}, "
            f"got {int(target[row])} at row {row}"
        )


def row_chunks(logits: Tensor) -> Iterator[slice]:
    """Yield slices of rows of which float32 copies are small."""
    return _chunks(len(logits), 4 * logits.shape[1], _CHUNK_BYTES[_kind(logits)])


def product_chunks(hidden: Tensor, vocab: int) -> Iterator[slice]:
    """Yield slices of rows of which `vocab` logits are computed at a time."""
    kind = _kind(hidden)
    row_bytes = vocab * hidden.element_size()
    return _chunks(len(hidden), row_bytes, _PRODUCT_BYTES[kind], _PRODUCT_ROWS[kind])


def _scaled(logits: Tensor, scale: float) -> Tensor:
    return logits.float() if scale == 1.0 else logits.float() * scale


# The kernels of the four operators. Arguments after the tensors: those of `_Rule`, and the scale of logits.
# The fused operators, called with no rows, check tensors and options. Products write into a tensor that is
# given: autocast has no rule for them, so that of the caller cannot change their dtypes.


def _from_logits(logits: Tensor, target: Tensor, *options: Any) -> Tensor:
    *rule, scale, check = options
    check_targets("softcap_ce", target, logits.shape[1], rule[2], check)
    torch.ops.pgolf.softcap_ce(logits[:0], target[:0], *rule[1:4], False)
    loss = logits.new_empty(len(logits), dtype=torch.float32)
    for part in row_chunks(logits):
        loss[part] = _Rule(*rule).loss(_scaled(logits[part], scale), target[part])
    return loss


def _from_logits_backward(grad_loss: Tensor, logits: Tensor, target: Tensor, *options: Any) -> Tensor:
    *rule, scale = options
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for part in row_chunks(logits):
        x = _scaled(logits[part], scale)
        grad[part] = _Rule(*rule).gradient(x, target[part], grad_loss[part]).mul_(scale)
    return grad


def _from_hidden(hidden: Tensor, weight: Tensor, target: Tensor, *options: Any) -> Tensor:
    *rule, check = options
    check_targets("linear_softcap_ce", target, weight.shape[0], rule[2], check)
    torch.ops.pgolf.linear_softcap_ce(hidden[:0], weight[:1], target[:0], *rule[1:4], False, False)
    w = weight.to(hidden.dtype)
    loss = hidden.new_empty(len(hidden), dtype=torch.float32)
    for part in product_chunks(hidden, len(w)):
        logits = torch.mm(hidden[part], w.t(), out=hidden.new_empty(0))
        loss[part] = _from_logits(logits, target[part], *rule, 1.0, False)
    return loss


def _from_hidden_backward(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    *rule, need_hidden, need_weight = options
    w = weight.to(hidden.dtype)
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    grad_weight = torch.zeros(w.shape if need_weight else 0, dtype=torch.float32, device=hidden.device)
    for part in product_chunks(hidden, len(w)):
        x = hidden[part]
        logits = torch.mm(x, w.t(), out=hidden.new_empty(0))
        for sub in row_chunks(logits):
            y, g = target[part][sub], grad_loss[part][sub]
            logits[sub] = _Rule(*rule).gradient(logits[sub].float(), y, g)
        if need_hidden:
            torch.mm(logits, w, out=grad_hidden[part])
        if need_weight:
            torch.ops.pgolf._add_product_(grad_weight, logits.t(), x)
    return grad_hidden, grad_weight.to(weight.dtype)


def _loss_fake(logits: Tensor, *_others: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def from_logits_backward_fake(_grad_loss: Tensor, logits: Tensor, *_others: object) -> Tensor:
    """Return an empty gradient of the logits."""
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def from_hidden_backward_fake(
    _grad_loss: Tensor, hidden: Tensor, weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    """Return empty gradients of hidden states and weight, as far as the last two arguments ask for them."""
    need_hidden, need_weight = others[-2:]
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.cap, ctx.ignore_index, ctx.z_loss, ctx.smoothing, ctx.scale, _check = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_logits(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    options = (ctx.cap, ctx.ignore_index, ctx.z_loss, ctx.smoothing, ctx.scale)
    grad = torch.ops.pgolf._smoothed_ce_backward(grad_loss, *ctx.saved_tensors, *options)
    return grad, *(None,) * 8


def _save_hidden(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.cap, ctx.ignore_index, ctx.z_loss, ctx.smoothing, _check = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_hidden(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:2]
    options = (ctx.cap, ctx.ignore_index, ctx.z_loss, ctx.smoothing)
    grads = torch.ops.pgolf._smoothed_linear_ce_backward(grad_loss, *ctx.saved_tensors, *options, *needed)
    return *(g if n else None for g, n in zip(grads, needed, strict=True)), *(None,) * 7


def register(name: str, schema: str, kernel: Any, fake: Any) -> None:
    """Register an operator of `torch.ops.pgolf` that is made of PyTorch operators."""
    torch.library.define(f"pgolf::{name}", schema)
    torch.library.impl(f"pgolf::{name}", "default", kernel)
    torch.library.register_fake(f"pgolf::{name}", fake)


def register_second_order(name: str, op: str) -> None:
    """Make the derivative of a backward operator an error that names `op`."""

    def refuse(_ctx: Any, *_grads: Tensor) -> None:
        raise second_order_error(op)

    torch.library.register_autograd(f"pgolf::{name}", refuse)


RULE = "Tensor? class_weight, float? cap, int ignore_index, float z_loss, float smoothing"
_LOGITS = f"Tensor logits, Tensor target, {RULE}, float scale"
_HIDDEN = f"Tensor hidden, Tensor weight, Tensor target, {RULE}"
_NEEDS = "bool need_hidden, bool need_weight"
register("_smoothed_ce", f"({_LOGITS}, bool check_targets) -> Tensor", _from_logits, _loss_fake)
register(
    "_smoothed_ce_backward",
    f"(Tensor grad_loss, {_LOGITS}) -> Tensor",
    _from_logits_backward,
    from_logits_backward_fake,
)
register("_smoothed_linear_ce", f"({_HIDDEN}, bool check_targets) -> Tensor", _from_hidden, _loss_fake)
register(
    "_smoothed_linear_ce_backward",
    f"(Tensor grad_loss, {_HIDDEN}, {_NEEDS}) -> (Tensor, Tensor)",
    _from_hidden_backward,
    from_hidden_backward_fake,
)
torch.library.register_autograd("pgolf::_smoothed_ce", _differentiate_logits, setup_context=_save_logits)
torch.library.register_autograd(
    "pgolf::_smoothed_linear_ce", _differentiate_hidden, setup_context=_save_hidden
)
register_second_order("_smoothed_ce_backward", "softcap_ce")
register_second_order("_smoothed_linear_ce_backward", "linear_softcap_ce")
