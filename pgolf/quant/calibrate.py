"""The Hessians of a model's matrices, and how far quantization moves the inputs of the matrices.

The Hessian of a matrix is the mean outer product of its inputs on calibration text.

Legend: `C` columns of a matrix, which are its inputs, `T` tokens.
Source: parameter-golf PR #1855. Differs: the Hessians are summed over all ranks (PR #1855 keeps the share of
rank 0 only), queries, keys and values share one, and attention sees document boundaries as in training.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgolf.data.loader import Batch
from pgolf.dist import Dist
from pgolf.errors import UserError
from pgolf.model.gpt import Observe

InputKey = tuple[str, int]


@dataclass(frozen=True)
class Drift:
    """The inputs x' of a quantized model, and how they differ from the inputs x of the unquantized model."""

    hessians: dict[InputKey, Tensor]
    """(kind, layer) -> E[x' x'^T] `(C, C)` float32."""
    shifts: dict[InputKey, Tensor]
    """(kind, layer) -> E[(x - x') x'^T] `(C, C)` float32; exactly 0 where x' = x."""


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
        _add_product(sums, (kind, layer), *[x.detach().reshape(-1, x.shape[-1])] * 2)

    tokens = 0
    training = model.training
    model.eval()
    for batch in batches:
        tokens += _forward(model, batch, observe, dist)
    model.train(training)
    if not tokens or not sums:
        raise UserError(
            f"collect_hessians: expected batches and observed inputs, got {tokens} tokens and {len(sums)} "
            "inputs; raise quant.calibration_batches to at least the number of ranks"
        )
    _average(sums, tokens, dist)
    return sums


CORRECTED = ("attn_out", "mlp_out")
"""The kinds of inputs whose drift is corrected: those of the output matrices of attention and MLP. Most of
their drift comes from the other matrices of the same layer, which keep their codes. Where those are corrected
too, all codes change, and what was corrected is the drift of errors that are no longer there."""


def collect_drift(
    model: nn.Module, quantized: dict[str, Tensor], batches: Iterable[Batch], dist: Dist
) -> Drift:
    """Run the model with its own and with quantized weights on the same text, and compare inputs.

    Only the inputs of the kinds `CORRECTED` are compared.

    The inputs of one micro-batch are kept until the quantized model has run on it: about as much memory as
    the activations of a training step.

    Args:
        model: as in `collect_hessians`; it has its own weights again at the end.
        quantized: what each parameter becomes, by name.
        batches: this rank's calibration batches, at least one.
        dist: sums over the ranks and names the device.
    Returns:
        Means over all batches, passes and ranks as in `collect_hessians`, the same on every rank.
    Source: the two moments are those of Qronos (arXiv 2505.11695).
    """
    hessians: dict[InputKey, Tensor] = {}
    shifts: dict[InputKey, Tensor] = {}
    waiting: deque[tuple[InputKey, Tensor]] = deque()

    def keep(kind: str, layer: int, x: Tensor) -> None:
        if kind in CORRECTED:
            waiting.append(((kind, layer), x.detach().reshape(-1, x.shape[-1])))

    def compare(kind: str, layer: int, x: Tensor) -> None:
        if kind not in CORRECTED:
            return
        key, mine = waiting.popleft()
        assert key == (kind, layer)
        theirs = x.detach().reshape(-1, x.shape[-1])
        _add_product(hessians, key, theirs, theirs)
        _add_product(shifts, key, mine - theirs, theirs)

    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = {name: quantized[name].to(dist.device) for name in own}
    tokens = 0
    training = model.training
    model.eval()
    for batch in batches:
        _forward(model, batch, keep, dist)
        set_parameters(model, other)
        tokens += _forward(model, batch, compare, dist)
        set_parameters(model, own)
    model.train(training)
    for sums in (hessians, shifts):
        _average(sums, tokens, dist)
    return Drift(hessians, shifts)


def _forward(model: nn.Module, batch: Batch, observe: Observe, dist: Dist) -> int:
    """Run the model on a batch and return the number of its tokens."""
    arguments = (t.to(dist.device) for t in (batch.inputs, batch.targets, batch.cu_seqlens))
    with torch.no_grad():
        model(*arguments, max_seqlen=batch.max_seqlen, loop=True, observe=observe)
    return batch.inputs.numel()


def _average(sums: dict[InputKey, Tensor], tokens: int, dist: Dist) -> None:
    """Turn the sums of this rank into means over the tokens of all ranks, in place."""
    count = torch.tensor([tokens], dtype=torch.float64, device=dist.device)
    dist.all_reduce(count)
    for key in sorted(sums):
        dist.all_reduce(sums[key])
        sums[key] /= count.item()


@torch.no_grad()
def set_parameters(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Overwrite parameters in place, because compiled code holds on to these very tensors."""
    for name, p in model.named_parameters():
        p.copy_(tensors[name])


def _add_product(sums: dict[InputKey, Tensor], key: InputKey, x: Tensor, y: Tensor) -> None:
    """Add X^T Y, of two tensors `(T, C)`, to sums[key] in float32; bfloat16 products are exact there."""
    if key not in sums:
        sums[key] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    if x.is_cuda and x.dtype == torch.bfloat16:
        # bf16 tensor cores with float32 accumulation and output: the same sum as TF32, without x.float().
        sums[key] += torch.mm(x.t(), y, out_dtype=torch.float32)
    else:
        sums[key].addmm_(x.float().t(), y.float())
