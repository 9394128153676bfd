"""The cross-entropies of DTensors: which part each rank computes, and what the ranks exchange.

A dimension of the device mesh either splits the vocabulary (the weight is Shard(0) along it, or the logits
Shard(-1)), or splits rows (hidden states or logits are sharded along it), or repeats the work. Hidden states
that are sharded along the vocabulary's dimension, as sequence parallelism leaves them, are gathered first.
Each rank then computes with plain tensors, by pgolf/ops/_vocab_ce.py if the vocabulary is split and by the
usual operators if it is not, and DTensor's own redistribution brings each gradient to the placements of its
tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

import pgolf.ops._vocab_ce  # noqa: F401  (registers the operators)
from pgolf.ops._derivatives import refuse_transforms
from pgolf.ops._loss import CHECK_TARGETS, Reduction, class_weights, fold_head, to_autocast
from pgolf.ops.linear_softcap_ce import linear_softcap_ce
from pgolf.ops.softcap_ce import softcap_ce

LINEAR, LOGITS = "linear_softcap_ce", "softcap_ce"
SUPPORTED = {
    LINEAR: "weight must be a DTensor with Replicate(), or Shard(0) along one mesh dimension, and hidden a "
    "DTensor on the same mesh with Replicate() or Shard(d), d a dimension of rows",
    LOGITS: "logits must be a DTensor with Replicate(), Shard(d), d a dimension of rows, or Shard(-1) along "
    "one mesh dimension",
}


@dataclass(frozen=True)
class _Layout:
    """How the work is split over the ranks of a mesh."""

    mesh: DeviceMesh
    """Device mesh of all tensors."""
    vocab: int | None
    """Mesh dimension along which the vocabulary is split, or None."""
    rows: tuple[Placement, ...]
    """Placements of targets and of losses of rows during the computation."""
    result: tuple[Placement, ...]
    """Placements of losses of rows that the caller gets, which are those of `hidden`."""

    def splits_rows(self) -> bool:
        """Return whether ranks have different rows."""
        return any(p.is_shard() for p in self.rows)

    def reduced(self, reduction: Reduction) -> Reduction:
        """Return how a rank reduces its own rows: a mean needs the number of all."""
        return "sum" if reduction == "mean" and self.splits_rows() else reduction

    def classes(self) -> list[Placement]:
        """Return the placements of what has an entry per class."""
        return [Shard(0) if i == self.vocab else Replicate() for i in range(self.mesh.ndim)]

    def summed(self, placements: list[Placement]) -> list[Placement]:
        """Return placements of a sum to which each of the ranks with different rows adds a part."""
        pairs = zip(placements, self.rows, strict=True)
        return [Partial() if row.is_shard() else p for p, row in pairs]

    def total(self, part: Tensor) -> DTensor:
        """Return the sum of a number over the ranks with different rows."""
        everywhere: list[Placement] = [Replicate()] * self.mesh.ndim
        found = DTensor.from_local(part, self.mesh, self.summed(everywhere), run_check=False)
        return found.redistribute(placements=everywhere)


def sharded_linear_ce(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    reduction: Reduction,
    bias: Tensor | None,
    class_weight: Tensor | None,
    **options: Any,
) -> Tensor:
    """Compute `linear_softcap_ce` if one of the tensors is a DTensor; the arguments are checked there.

    Returns:
        DTensor: replicated for "mean" and "sum", placed as the rows of `hidden` for "none".
    """
    layout = _linear_layout(hidden, weight, target=target, bias=bias, class_weight=class_weight)
    if isinstance(class_weight, DTensor):
        class_weight = class_weight.full_tensor()
    x, w, b, y = _parts(layout, hidden, weight, bias, target)
    options["class_weight"] = class_weight
    if layout.vocab is not None:
        loss = _rows_of_hidden(layout, x, w, b, y, vocab=weight.shape[0], **options)
        loss = loss.reshape(y.shape) if reduction == "none" else loss.sum()
    else:
        loss = linear_softcap_ce(x, w, y, bias=b, reduction=layout.reduced(reduction), **options)
    return _placed(layout, loss, y, target.shape, reduction, options["ignore_index"], class_weight)


def sharded_ce(
    logits: Tensor, target: Tensor, *, reduction: Reduction, class_weight: Tensor | None, **options: Any
) -> Tensor:
    """Compute `softcap_ce` if one of the tensors is a DTensor; as `sharded_linear_ce`."""
    layout = _logits_layout(logits, target=target, class_weight=class_weight)
    if isinstance(class_weight, DTensor):
        class_weight = class_weight.full_tensor()
    rows, last = list(layout.rows), logits.dim() - 1
    split = [Shard(last) if i == layout.vocab else p for i, p in enumerate(rows)]
    x, y = _local(layout, logits, split, split), _local(layout, target, rows, rows)
    options["class_weight"] = class_weight
    if layout.vocab is not None:
        loss = _rows_of_logits(layout, x, y, vocab=logits.shape[-1], **options)
        loss = loss.reshape(y.shape) if reduction == "none" else loss.sum()
    else:
        loss = softcap_ce(x, y, reduction=layout.reduced(reduction), **options)
    return _placed(layout, loss, y, target.shape, reduction, options["ignore_index"], class_weight)


def _placed(
    layout: _Layout,
    loss: Tensor,
    y: Tensor,
    shape: torch.Size,
    reduction: Reduction,
    ignore_index: int,
    class_weight: Tensor | None,
) -> Tensor:
    """Return the loss as a DTensor, from this rank's losses of rows or their sum."""
    if reduction == "none":
        stride = torch.empty(shape, device="meta").stride()
        rows = DTensor.from_local(loss, layout.mesh, layout.rows, run_check=False, shape=shape, stride=stride)
        return rows.redistribute(placements=layout.result)
    if reduction == "mean" and (layout.vocab is not None or layout.splits_rows()):
        loss = loss / _divisor(layout, y, ignore_index, class_weight, loss.dtype)
    return layout.total(loss)


def _linear_layout(hidden: Tensor, weight: Tensor, **others: Tensor | None) -> _Layout:
    """Return how the work is split, or raise an error that names the placement that cannot be used."""
    if not isinstance(weight, DTensor):
        raise _unsupported(
            LINEAR,
            "weight is a plain tensor and another one a DTensor",
            "use distribute_tensor(weight, mesh, [Replicate()]), or pass .to_local() or .full_tensor() of "
            "the others",
        )
    mesh = weight.device_mesh
    _check_meshes(LINEAR, "weight", mesh, hidden=hidden, **others)
    vocab = _vocabulary_dim(weight)
    if isinstance(hidden, DTensor):
        placed = _row_placements(LINEAR, "hidden", hidden)
    else:
        placed = (Replicate(),) * mesh.ndim
        if any(mesh.size(i) > 1 for i in range(mesh.ndim) if i != vocab):
            raise _unsupported(
                LINEAR,
                f"hidden is a plain tensor and weight has {weight.placements} on {mesh}, so that it is "
                "unknown whether the ranks have the same rows",
                "use DTensor.from_local(hidden, mesh, placements) with Shard(0) where ranks have rows of "
                "their own",
            )
    rows = tuple(Replicate() if i == vocab or mesh.size(i) == 1 else p for i, p in enumerate(placed))
    return _Layout(mesh, vocab, rows, placed)


def _vocabulary_dim(weight: DTensor) -> int | None:
    """Return the mesh dimension of several ranks along which the rows of the weight are split."""
    mesh, found = weight.device_mesh, None
    for i, placement in enumerate(weight.placements):
        if mesh.size(i) == 1 or placement.is_replicate():
            continue
        if found is not None or not isinstance(placement, Shard) or placement.dim != 0:
            raise _unsupported(
                LINEAR,
                f"weight has {weight.placements} on {mesh}",
                "use weight.redistribute(placements=...), or FSDP2's unsharded weight",
            )
        found = i
    return found


def _logits_layout(logits: Tensor, **others: Tensor | None) -> _Layout:
    """Return how the work is split, or raise an error that names the placement that cannot be used."""
    if not isinstance(logits, DTensor):
        raise _unsupported(
            LOGITS,
            "logits is a plain tensor and another one a DTensor",
            "use distribute_tensor(logits, mesh, [Replicate()]), or pass .to_local() or .full_tensor() of "
            "the others",
        )
    mesh, last = logits.device_mesh, logits.dim() - 1
    _check_meshes(LOGITS, "logits", mesh, **others)
    split = [i for i, p in enumerate(logits.placements) if isinstance(p, Shard) and p.dim == last]
    vocab = next((i for i in split if mesh.size(i) > 1), None)
    placed = _row_placements(LOGITS, "logits", logits, vocab)
    rows = tuple(Replicate() if mesh.size(i) == 1 else p for i, p in enumerate(placed))
    return _Layout(mesh, vocab, rows, placed)


def _check_meshes(op: str, owner: str, mesh: DeviceMesh, **others: Tensor | None) -> None:
    """Raise RuntimeError if a DTensor is on another mesh."""
    for name, tensor in others.items():
        if isinstance(tensor, DTensor) and tensor.device_mesh != mesh:
            raise _unsupported(
                op,
                f"{name} is on {tensor.device_mesh} and {owner} on {mesh}",
                "make both on one mesh, with Replicate() along the dimensions that do not split them",
            )


def _row_placements(op: str, name: str, tensor: DTensor, vocab: int | None = None) -> tuple[Placement, ...]:
    """Return the placements of rows, in which those along the vocabulary's dimension do not count."""
    mesh, last = tensor.device_mesh, tensor.dim() - 1
    placed: list[Placement] = []
    for i, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard) and placement.dim < last:
            placed.append(placement)
        elif placement.is_replicate() or mesh.size(i) == 1 or i == vocab:
            placed.append(Replicate())
        else:
            raise _unsupported(
                op,
                f"{name} has {tensor.placements} on {mesh}",
                f"use {name}.redistribute(placements=...), for example with Replicate()",
            )
    return tuple(placed)


def _unsupported(op: str, given: str, advice: str) -> RuntimeError:
    return RuntimeError(f"{op}: {given}, which is not supported: {SUPPORTED[op]}; {advice}")


def _parts(
    layout: _Layout, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return this rank's part of hidden, weight, bias and target as plain tensors."""
    rows, classes = list(layout.rows), layout.classes()
    along_vocab = [Partial() if i == layout.vocab else p for i, p in enumerate(rows)]
    x = _local(layout, hidden, rows, along_vocab)
    w = _local(layout, weight, classes, layout.summed(classes))
    b = None if bias is None else _local(layout, bias, classes, layout.summed(classes))
    return x, w, b, _local(layout, target, rows, rows)


def _local(layout: _Layout, tensor: Tensor, wanted: list[Placement], gradient: list[Placement]) -> Tensor:
    """Return this rank's part with the placements `wanted`; its gradient is placed as `gradient`."""
    if not isinstance(tensor, DTensor):
        everywhere = [Replicate()] * layout.mesh.ndim
        tensor = DTensor.from_local(tensor, layout.mesh, everywhere, run_check=False)
    # Also where nothing moves, because the backward pass of redistribute() adds up the parts of the gradient.
    local = tensor.redistribute(placements=wanted).to_local(grad_placements=gradient)
    found: Tensor = _GradientInItsStrides.apply(local)  # type: ignore[no-untyped-call]
    return found


class _GradientInItsStrides(torch.autograd.Function):
    """Returns its input; the gradient gets the input's strides.

    torch 2.11 copies a gradient with other strides than its DTensor's into a new one, which is replicated.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size, ctx.stride = x.size(), x.stride()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if grad.stride() == ctx.stride:
            return grad
        return grad.new_empty_strided(ctx.size, ctx.stride).copy_(grad)


def _rows_of_hidden(
    layout: _Layout,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    y: Tensor,
    *,
    vocab: int,
    cap: float | None,
    ignore_index: int,
    z_loss: float,
    class_weight: Tensor | None,
    label_smoothing: float,
    logit_scale: float,
    memory: str,  # noqa: ARG001  (no logits are kept in either mode)
) -> Tensor:
    """Return the loss of each row, `(rows,)`, the same on all ranks that share the vocabulary."""
    refuse_transforms(LINEAR, x, w, *([] if b is None else [b]))
    x, w = fold_head(to_autocast(x).flatten(0, -2), w, b, logit_scale)
    y = y.flatten()
    if not (x.dtype == torch.float64 and x.is_cpu):
        # The fused operator, called with no rows, checks dtypes, sizes and options; it wants a class.
        one = w.new_empty(1, w.shape[1])
        torch.ops.pgolf.linear_softcap_ce(x[:0], one, y[:0], cap, ignore_index, z_loss, False, False)
    begin = _begin(layout, LINEAR, len(w), vocab)
    rule = (class_weight, cap, ignore_index, z_loss, label_smoothing, begin, vocab)
    loss: Tensor = torch.ops.pgolf._vocab_linear_ce(x, w, y, *rule, _group(layout), CHECK_TARGETS)[0]
    return loss


def _rows_of_logits(
    layout: _Layout,
    x: Tensor,
    y: Tensor,
    *,
    vocab: int,
    cap: float | None,
    ignore_index: int,
    z_loss: float,
    class_weight: Tensor | None,
    label_smoothing: float,
    logit_scale: float,
) -> Tensor:
    """Return the loss of each row, `(rows,)`, the same on all ranks that share the vocabulary."""
    refuse_transforms(LOGITS, x)
    x, y = x.flatten(0, -2), y.flatten()
    if not (x.dtype == torch.float64 and x.is_cpu):
        torch.ops.pgolf.softcap_ce(x.new_empty(0, 1), y[:0], cap, ignore_index, z_loss, False)
    begin = _begin(layout, LOGITS, x.shape[1], vocab)
    rule = (class_weight, cap, ignore_index, z_loss, label_smoothing, begin, vocab, logit_scale)
    loss: Tensor = torch.ops.pgolf._vocab_ce(x, y, *rule, _group(layout), CHECK_TARGETS)[0]
    return loss


def _begin(layout: _Layout, op: str, classes: int, vocab: int) -> int:
    """Return this rank's first class, after a check that it has as many as Shard() gives it."""
    assert layout.vocab is not None
    each = -(-vocab // layout.mesh.size(layout.vocab))
    begin = min(each * layout.mesh.get_local_rank(layout.vocab), vocab)
    if classes != min(each, vocab - begin):
        raise ValueError(
            f"{op}: this rank must have the {min(each, vocab - begin)} classes from {begin} on, as Shard() "
            f"splits {vocab}, but has {classes}; make the DTensor with distribute_tensor"
        )
    return begin


def _group(layout: _Layout) -> str:
    """Return the name of the group of ranks that share the vocabulary."""
    assert layout.vocab is not None
    name: str = layout.mesh.get_group(layout.vocab).group_name
    return name


def _divisor(
    layout: _Layout, y: Tensor, ignore_index: int, class_weight: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return how many rows of all ranks are not ignored, or the sum of their weights; 1 if it is 0."""
    if class_weight is None:
        part = (y != ignore_index).sum()
    else:
        part = class_weights(class_weight.to(dtype), y, ignore_index).sum()
    total = layout.total(part).to_local()
    return torch.where(total == 0, 1, total)
