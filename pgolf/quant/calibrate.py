"""The Hessians of a model's matrices: the mean outer products of their inputs on calibration text.

Legend: `C` columns of a matrix, which are its inputs, `T` tokens.
Source: parameter-golf PR #1855. Differs: the Hessians are summed over all ranks (PR #1855 keeps the share of
rank 0 only), queries, keys and values share one, and attention sees document boundaries as in training.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pgolf.data.loader import Batch
from pgolf.dist import Dist
from pgolf.errors import UserError

InputKey = tuple[str, int]


def collect_hessians(model: nn.Module, batches: Iterable[Batch], dist: Dist) -> dict[InputKey, Tensor]:
    """Return E[x x^T] of every matrix input over all batches, loop passes and ranks.

    H[kind, layer] = sum over ranks, batches and passes of X^T X / number of tokens, X `(T, C)`. A layer that
    runs several times adds all its passes and is divided by the tokens once; GPTQ does not see the factor.

    Args:
        model: called as `model(inputs, targets, cu_seqlens, max_seqlen=, loop=True, observe=)`.
        batches: this rank's calibration batches, at least one.
        dist: sums over the ranks and names the device.
    Returns:
        (kind, layer) -> `(C, C)` float32 on dist.device, the same on every rank.
    Raises:
        ValueError: no batches, or a model that never called `observe`.
    """
    sums: dict[InputKey, Tensor] = {}

    def observe(kind: str, layer: int, x: Tensor) -> None:
        _add_gram(sums, (kind, layer), x.detach().reshape(-1, x.shape[-1]))

    tokens = 0
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            arguments = (t.to(dist.device) for t in (batch.inputs, batch.targets, batch.cu_seqlens))
            model(*arguments, max_seqlen=batch.max_seqlen, loop=True, observe=observe)
            tokens += batch.inputs.numel()
    model.train(training)
    if not tokens or not sums:
        raise UserError(
            f"collect_hessians: expected batches and observed inputs, got {tokens} tokens and {len(sums)} "
            "inputs; raise quant.calibration_batches to at least the number of ranks"
        )
    count = torch.tensor([tokens], dtype=torch.float64, device=dist.device)
    dist.all_reduce(count)
    for key in sorted(sums):
        dist.all_reduce(sums[key])
        sums[key] /= count.item()
    return sums


def _add_gram(sums: dict[InputKey, Tensor], key: InputKey, x: Tensor) -> None:
    """Add X^T X to sums[key] in float32; bfloat16 products are exact there."""
    if key not in sums:
        sums[key] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    if x.is_cuda and x.dtype == torch.bfloat16:
        # bf16 tensor cores with float32 accumulation and output: the same sum as TF32, without x.float().
        sums[key] += torch.mm(x.t(), x, out_dtype=torch.float32)
    else:
        x = x.float()
        sums[key].addmm_(x.t(), x)
