"""How much the training loss minds an error in each row of each matrix: the other half of the curvature.

The H of GPTQ says which inputs matter, and treats all outputs as equal. Near a minimum of the loss
    loss(W + E) - loss(W) = 1/2 sum_r g_r e_r H e_r^T (nearly),   g_r = E[(d loss / d y_r)^2],   y = W x,
if H and g are taken as independent (K-FAC). So the scale of a row should follow 1 / sqrt(g_r), and not the
spread of its weights.
Legend: `B` matrices of a bank, `R` rows, `C` columns, `T` tokens.
Source: Martens and Grosse, K-FAC (arXiv 1503.05671). Here g is measured through the gradients of the weights,
so that the model needs no second kind of hook.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf.data.loader import Batch
from pgolf.dist import Dist
from pgolf.model.gpt import GPT


@dataclass
class Curvature:
    """Second moments of the gradient of one parameter: means over tokens, without the mean gradient."""

    rows: Tensor
    """`(B, R)` float32: squares of the gradient, summed over the columns of each row."""
    gram: Tensor
    """`(B, C, C)` float32: the sum over rows of (gradient of w_r)^T (gradient of w_r)."""


def collect_curvature(
    model: GPT, batches: Iterable[Batch], names: Iterable[str], dist: Dist, *, seed: int = 0
) -> dict[str, Curvature]:
    """Return the second moments of the gradients of matrices, per token.

    With D = sum_t z_t d loss_t / d W over a batch, z_t = +-1 at random: rows are |D_r|^2 / tokens, gram is
    D^T D / tokens. On average the random signs leave the squares of single tokens, and no products of two.

    Args:
        model: called as `model(inputs, targets, cu_seqlens, max_seqlen=, loop=True)`, differentiable.
        batches: this rank's, at least one. names: parameters to measure, `(B, R, C)` or `(R, C)`.
        dist: sums over the ranks and names the device. seed: of the signs.
    Returns:
        name -> second moments, the same on every rank.
    Raises:
        ValueError: no batches.
    """
    wanted = set(names)
    parameters = {name: p for name, p in model.named_parameters() if name in wanted}
    sums = {name: _zeros(p, dist.device) for name, p in parameters.items()}
    signs = torch.Generator(device=dist.device).manual_seed(seed * dist.world_size + dist.rank)
    tokens = 0
    for batch in batches:
        inputs, targets, cu = (t.to(dist.device) for t in (batch.inputs, batch.targets, batch.cu_seqlens))
        loss = model(inputs, targets, cu, max_seqlen=batch.max_seqlen, loop=True)
        sign = torch.randint(0, 2, loss.shape, device=dist.device, generator=signs) * 2 - 1
        gradients = torch.autograd.grad(loss, list(parameters.values()), grad_outputs=sign.to(loss.dtype))
        for name, gradient in zip(parameters, gradients, strict=True):
            stack = gradient.float().reshape(-1, *gradient.shape[-2:])
            sums[name].rows += stack.square().sum(-1)
            sums[name].gram += stack.mT @ stack
        tokens += inputs.numel()
    if not tokens:
        raise ValueError("collect_curvature: expected at least one batch; raise quant.gradient_batches")
    count = torch.tensor([tokens], dtype=torch.float64, device=dist.device)
    dist.all_reduce(count)
    for name in sorted(sums):
        for total in (sums[name].rows, sums[name].gram):
            dist.all_reduce(total)
            total /= count.item()
    return sums


def _zeros(parameter: Tensor, device: torch.device) -> Curvature:
    *_, rows, columns = parameter.shape
    count = parameter.numel() // (rows * columns)
    return Curvature(
        torch.zeros(count, rows, device=device), torch.zeros(count, columns, columns, device=device)
    )


def unit_trace(matrices: Tensor) -> Tensor:
    """Return each matrix of a stack `(B, C, C)` over its trace; a matrix of trace 0 stays as it is."""
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    return matrices / torch.where(trace > 0, trace, torch.ones_like(trace))[:, None, None]
