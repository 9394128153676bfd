"""Cross-entropy of capped logits when each rank of a group has a part of the vocabulary: the operators.

Every rank has all targets of the group, and all hidden states or the logits of its part, which capped are z.
Per call there are two all-reduces of a few numbers per row: the maximum, then sums relative to it. With m the
maximum over the vocabulary, t the target, and a_i, s and w_v as in pgolf/ops/_smoothed_ce.py:

    rest_i = sum_{v != t} exp(z_v - m)     ce_i = m - z_t + log(exp(z_t - m) + rest_i)     lse_i = z_t + ce_i
    loss_i = a_i (ce_i + z_loss lse_i^2) + s (mean(w) z_t - mean(w z))
    dloss_i / dz_v = a_i exp(z_v - lse_i) (1 + 2 z_loss lse_i) - s w_v / vocab              for v != t
    dloss_i / dz_t = a_i (expm1(-ce_i) + 2 z_loss lse_i exp(z_t - lse_i)) + s mean(w) - s w_t / vocab

The target's own term is not part of `rest`, so that nothing is lost by subtraction where a probability is
close to 1. Chunks of rows are taken as there, no logits are kept, and the backward operator, which has no
collective, computes them again: the gradient of `hidden` is that of the rank's part, and the caller adds up
the parts. float64 is computed in float64. Only PyTorch operators are used, so that no device and no backend
of torch.distributed is special.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgolf.ops._loss import class_weights
from pgolf.ops._smoothed_ce import (
    RULE,
    cap_slope,
    check_targets,
    from_hidden_backward_fake,
    from_logits_backward_fake,
    product_chunks,
    register,
    register_second_order,
    row_chunks,
)


@dataclass(frozen=True)
class _Part:
    """What makes a loss, and which part of the vocabulary this rank has."""

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
    begin: int
    """Class of the first row of this rank's weight."""
    vocab: int
    """Number of classes on all ranks."""

    def statistics(self, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """Return what a chunk of logits adds, `(rows,)` each.

        That is the maximum, the sum of the other classes' exponentials relative to it, the target's logit and
        whether it is here (0 if it is not), and the sum of the weighted logits.
        """
        z = self._capped(x)
        own, index = self._own(target, x.shape[1])
        at_target = torch.where(own, z.gather(1, index)[:, 0], 0.0)
        weighted = z.new_zeros(len(z))
        if self.smoothing:
            weighted = (z if self.class_weight is None else z * self._weights(z)).sum(dim=1)
        top = z.amax(dim=1)
        terms = z.sub_(top[:, None]).exp_()
        terms.scatter_(1, index, torch.where(own[:, None], 0.0, terms.gather(1, index)))
        return top, terms.sum(dim=1), at_target, own.to(x.dtype), weighted

    def loss(self, ce: Tensor, lse: Tensor, at_target: Tensor, weighted: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each row from the sums over all classes."""
        loss = (ce + self.z_loss * lse.square()) * self._row_factor(target, ce.dtype)
        if self.smoothing:
            mean = self._mean_weight(ce.dtype)
            loss = loss + self.smoothing * (mean * at_target - weighted / self.vocab)
        return loss.masked_fill(target == self.ignore_index, 0.0)

    def gradient(self, x: Tensor, target: Tensor, grad_loss: Tensor, ce: Tensor, lse: Tensor) -> Tensor:
        """Return the gradient of sum_i grad_loss_i loss_i by a chunk of logits."""
        ignored = target == self.ignore_index
        upstream = grad_loss.to(x.dtype).masked_fill(ignored, 0.0)
        own, index = self._own(target, x.shape[1])
        factor = upstream * self._row_factor(target, x.dtype)
        tilt = 2.0 * self.z_loss * lse
        grad = self._capped(x).sub_(lse[:, None]).exp_()
        at_target = factor * (torch.expm1(-ce) + tilt * grad.gather(1, index)[:, 0])
        grad.mul_((factor * (1.0 + tilt))[:, None])
        if self.smoothing:
            spread = upstream * (self.smoothing / self.vocab)
            weights = self._weights(x)
            grad.sub_(spread[:, None] * weights)
            at_target += (
                upstream * self.smoothing * self._mean_weight(x.dtype) - spread * weights[index[:, 0]]
            )
        grad.scatter_(1, index, torch.where(own[:, None], at_target[:, None], grad.gather(1, index)))
        return grad.mul_(cap_slope(x, self.cap)).masked_fill_(ignored[:, None], 0.0)

    def _capped(self, x: Tensor) -> Tensor:
        return x.clone() if self.cap is None else torch.tanh(x / self.cap).mul_(self.cap)

    def _own(self, target: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Return whether each row's target is a class of this rank, and a valid index for it, `(rows, 1)`."""
        index = target - self.begin
        return (index >= 0) & (index < classes), index.clamp(0, classes - 1)[:, None]

    def _weights(self, x: Tensor) -> Tensor:
        """Return the weights of this rank's classes."""
        if self.class_weight is None:
            return x.new_ones(x.shape[1])
        return self.class_weight[self.begin : self.begin + x.shape[1]].to(x.dtype)

    def _row_factor(self, target: Tensor, dtype: torch.dtype) -> Tensor | float:
        """Return the sum of the weights of a row's loss: a_i."""
        if self.class_weight is None:
            return 1.0
        own = class_weights(self.class_weight.to(dtype), target, self.ignore_index)
        return (1.0 - self.smoothing) * own + self.smoothing * self._mean_weight(dtype)

    def _mean_weight(self, dtype: torch.dtype) -> Tensor | float:
        return 1.0 if self.class_weight is None else self.class_weight.to(dtype).mean()


def _accumulator(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _reduced(values: list[Tensor], how: str, group: str) -> tuple[Tensor, ...]:
    """Return tensors of one shape, reduced over the group in one collective."""
    stacked = torch.stack(values)
    if stacked.numel():
        ops = torch.ops._c10d_functional
        stacked = ops.wait_tensor(ops.all_reduce(stacked, how, group))
    return stacked.unbind()


def _statistics(logits: Tensor, target: Tensor, part: _Part, scale: float = 1.0) -> Tensor:
    """Return `_Part.statistics` of all rows, `(5, rows)`; those of a rank without classes are neutral."""
    found = logits.new_zeros(5, len(logits), dtype=_accumulator(logits))
    found[0] = float("-inf")
    for rows in row_chunks(logits) if logits.shape[1] else ():
        x = logits[rows].to(found.dtype) * scale
        found[:, rows] = torch.stack(part.statistics(x, target[rows]))
    return found


def _combine(
    op: str, part: _Part, statistics: Tensor, target: Tensor, group: str, check: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the cross-entropy without weights, and the lse of each row, of the whole group."""
    top, rest, at_target, own, weighted = statistics.unbind()
    labels = target.to(top.dtype)
    highest, largest, smallest = _reduced([top, labels, -labels], "max", group)
    differ = largest != -smallest
    if (check or target.is_cpu) and differ.any():
        row = int(differ.nonzero()[0])
        raise ValueError(
            f"{op}: the ranks that share the vocabulary have different targets at row {row} "
            f"({-int(smallest[row])} to {int(largest[row])}), but each needs the same rows; if each rank has "
            "rows of its own, say so with DTensor.from_local(..., mesh, [Shard(0)]), for the target too"
        )
    sums = [rest * torch.exp(top - highest), at_target, own, weighted]
    rest, at_target, own, weighted = _reduced(sums, "sum", group)
    missing = own != 1.0
    at_target = torch.where(missing, highest, at_target)
    gap = highest - at_target
    # The maximum is the target or one of the rest, so the argument of log1p loses no digits.
    tail = torch.log1p(torch.where(gap == 0.0, rest, rest + torch.exp(-gap) - 1.0))
    ce, lse = gap + tail, highest + tail
    loss = part.loss(ce, lse, at_target, weighted, target)
    wrong = differ | (missing & (target != part.ignore_index))
    return tuple(t.masked_fill(wrong, float("nan")) for t in (loss, ce, lse))  # type: ignore[return-value]


def _from_hidden(
    hidden: Tensor, weight: Tensor, target: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *rule, group, check = options
    part, w = _Part(*rule), weight.to(hidden.dtype)
    check_targets("linear_softcap_ce", target, part.vocab, part.ignore_index, check)
    found = [hidden.new_empty(5, 0, dtype=_accumulator(hidden))]
    for rows in product_chunks(hidden, len(w)):
        logits = torch.mm(hidden[rows], w.t(), out=hidden.new_empty(0))
        found.append(_statistics(logits, target[rows], part))
    return _combine("linear_softcap_ce", part, torch.cat(found, dim=1), target, group, check)


def _from_logits(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    *rule, scale, group, check = options
    part = _Part(*rule)
    check_targets("softcap_ce", target, part.vocab, part.ignore_index, check)
    return _combine("softcap_ce", part, _statistics(logits, target, part, scale), target, group, check)


def _from_logits_backward(
    grad_loss: Tensor, logits: Tensor, target: Tensor, ce: Tensor, lse: Tensor, *options: Any
) -> Tensor:
    *rule, scale = options
    part, grad = _Part(*rule), torch.empty_like(logits, memory_format=torch.contiguous_format)
    for rows in row_chunks(logits) if logits.shape[1] else ():
        x = logits[rows].to(ce.dtype) * scale
        there = (t[rows] for t in (target, grad_loss, ce, lse))
        grad[rows] = part.gradient(x, *there).mul_(scale)
    return grad


def _from_hidden_backward(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, ce: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    *rule, need_hidden, need_weight = options
    part, w, dtype = _Part(*rule), weight.to(hidden.dtype), ce.dtype
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else 0)
    grad_weight = torch.zeros(w.shape if need_weight else 0, dtype=dtype, device=hidden.device)
    if len(w) == 0:
        return grad_hidden, grad_weight.to(weight.dtype)
    for rows in product_chunks(hidden, len(w)):
        x = hidden[rows]
        logits = torch.mm(x, w.t(), out=hidden.new_empty(0))
        there = [t[rows] for t in (target, grad_loss, ce, lse)]
        for sub in row_chunks(logits):
            logits[sub] = part.gradient(logits[sub].to(dtype), *(t[sub] for t in there))
        if need_hidden:
            torch.mm(logits, w, out=grad_hidden[rows])
        if need_weight and dtype == torch.float64:
            torch.addmm(grad_weight, logits.t(), x, out=grad_weight)
        elif need_weight:
            torch.ops.pgolf._add_product_(grad_weight, logits.t(), x)
    return grad_hidden, grad_weight.to(weight.dtype)


def _forward_fake(states: Tensor, *_others: object) -> tuple[Tensor, Tensor, Tensor]:
    rows = states.new_empty(states.shape[0], dtype=_accumulator(states))
    return rows, torch.empty_like(rows), torch.empty_like(rows)


def _save_hidden(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, target, class_weight, *ctx.numbers, _group, _check = inputs
    _save(ctx, hidden, weight, target, *output[1:], class_weight)
    ctx.mark_non_differentiable(*output[1:])


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target, class_weight, *ctx.numbers, _group, _check = inputs
    _save(ctx, logits, target, *output[1:], class_weight)
    ctx.mark_non_differentiable(*output[1:])


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _differentiate_hidden(ctx: Any, grad_loss: Tensor | None, *_others: object) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 12
    needed = ctx.needs_input_grad[:2]
    grads = torch.ops.pgolf._vocab_linear_ce_backward(grad_loss, *ctx.saved_tensors, *ctx.numbers, *needed)
    return *(g if n else None for g, n in zip(grads, needed, strict=True)), *(None,) * 10


def _differentiate_logits(ctx: Any, grad_loss: Tensor | None, *_others: object) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 12
    grad = torch.ops.pgolf._vocab_ce_backward(grad_loss, *ctx.saved_tensors, *ctx.numbers)
    return grad, *(None,) * 11


_TENSORS = "Tensor hidden, Tensor weight, Tensor target"
_PART = f"{RULE}, int begin, int vocab"
_RESULT = "(Tensor loss, Tensor ce, Tensor lse)"
register(
    "_vocab_linear_ce",
    f"({_TENSORS}, {_PART}, str group, bool check_targets) -> {_RESULT}",
    _from_hidden,
    _forward_fake,
)
register(
    "_vocab_linear_ce_backward",
    f"(Tensor grad_loss, {_TENSORS}, Tensor ce, Tensor lse, {_PART}, bool need_hidden, bool need_weight)"
    " -> (Tensor, Tensor)",
    _from_hidden_backward,
    from_hidden_backward_fake,
)
register(
    "_vocab_ce",
    f"(Tensor logits, Tensor target, {_PART}, float scale, str group, bool check_targets) -> {_RESULT}",
    _from_logits,
    _forward_fake,
)
register(
    "_vocab_ce_backward",
    f"(Tensor grad_loss, Tensor logits, Tensor target, Tensor ce, Tensor lse, {_PART}, float scale)"
    " -> Tensor",
    _from_logits_backward,
    from_logits_backward_fake,
)
torch.library.register_autograd("pgolf::_vocab_linear_ce", _differentiate_hidden, setup_context=_save_hidden)
torch.library.register_autograd("pgolf::_vocab_ce", _differentiate_logits, setup_context=_save_logits)
register_second_order("_vocab_linear_ce_backward", "linear_softcap_ce")
register_second_order("_vocab_ce_backward", "softcap_ce")
