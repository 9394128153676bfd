"""From a trained model to its quantized state: input Hessians on calibration batches, then GPTQ per bank.

Owns which tensor gets which grid; grids are `grid.py`'s, rounding `gptq.py`'s, the result `quantized.py`'s.
Legend: `B` matrices of a bank, `R` rows, `C` columns, `T` tokens.
Source: SPEC 6.1-6.4 (parameter-golf PR #1855). Differs: the Hessians are summed over all ranks (the baseline
script kept rank 0's share only), q, k and v share one, and attention sees document boundaries as in
training.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from pgolf.config import QuantConfig
from pgolf.data.loader import Batch
from pgolf.dist import Dist
from pgolf.errors import UserError
from pgolf.model.gpt import GPT
from pgolf.quant.bank import Matrices, common_step, prepare
from pgolf.quant.grid import quantize_gate_rows
from pgolf.quant.lqer import Correction, correct, largest_errors
from pgolf.quant.quantized import QuantizedState, dequantize_state
from pgolf.quant.sensitivity import Curvature, collect_curvature

__all__ = ["Calibration", "calibrate", "collect_hessians", "dequantize_state", "quantize_model"]

GATE_NAME = "head_gate"
GATE_MIN, GATE_MAX = 32, 8192
"""A layer's gate matrix is stored in int8 rows if its element count is in this range (SPEC 6.4)."""
SMALL_MAX = 65_536
"""Largest parameter that may stay float16 (SPEC 6.4)."""
FLOAT16_MAX = 65504.0

InputKey = tuple[str, int]


@dataclass(frozen=True)
class Calibration:
    """What training text says about a model's matrices."""

    hessians: dict[InputKey, Tensor]
    """From `collect_hessians`."""
    curvature: dict[str, Curvature] | None = None
    """From `collect_curvature`, where quant.row_steps asks for it."""


def calibrate(model: GPT, batches: Iterator[Batch], config: QuantConfig, dist: Dist) -> Calibration:
    """Measure a model on this rank's share of quant.calibration_batches and quant.gradient_batches.

    Args:
        model: with the weights that will be quantized. batches: this rank's, endless.
    """

    def share(count: int) -> Iterator[Batch]:
        return islice(batches, max(1, count // dist.world_size))

    hessians = collect_hessians(model, share(config.calibration_batches), dist)
    if config.row_steps == "spread":
        return Calibration(hessians)
    names = model.quant_inputs()
    return Calibration(hessians, collect_curvature(model, share(config.gradient_batches), names, dist))


def collect_hessians(model: nn.Module, batches: Iterable[Batch], dist: Dist) -> dict[InputKey, Tensor]:
    """Return E[x x^T] of every matrix input over all batches, loop passes and ranks.

    H[kind, layer] = sum over ranks, batches and passes of X^T X / number of tokens, X `(T, C)`.
    A looped layer adds all its passes but is divided by the tokens once: GPTQ does not see the factor.

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


def quantize_model(
    model_state: dict[str, Tensor],
    inputs: dict[str, list[InputKey]],
    hessians: dict[InputKey, Tensor],
    config: QuantConfig,
    *,
    clip_scale: float = 1.0,
    curvature: dict[str, Curvature] | None = None,
) -> QuantizedState:
    """Quantize the matrices by GPTQ, the head gates to int8 rows and everything else to float16.

    Args:
        model_state: parameter name -> tensor; banks `(B, R, C)`, the embedding `(V, D)`.
        inputs: `GPT.quant_inputs()`: for each matrix parameter the (kind, layer) of each of its B matrices.
        hessians: from `collect_hessians`; the work runs on their device.
        config: bits and clips; `mlp_*` inputs take mlp_clip, `attn_*` attn_clip, the head embed_clip.
        clip_scale: multiplies every step; above 1 makes coarser grids and a smaller file.
        curvature: from `collect_curvature`, needed for config.row_steps = "loss".
    Returns:
        CPU tensors, and the seconds each matrix parameter took.
    Raises:
        ValueError: a missing parameter, Hessian or curvature, a large parameter without inputs, NaN.
    """
    missing = sorted(set(inputs) - set(model_state))
    if missing:
        raise UserError(f"quantize_model: parameters {missing} have inputs but are not in the model's state")
    result = QuantizedState({}, {}, {})
    matrices: dict[str, Matrices] = {}
    for name, weight in model_state.items():
        start = time.perf_counter()
        with _blame(name):
            if name in inputs:
                stacked = _stack_hessians(weight, inputs[name], hessians)
                matrices[name] = prepare(
                    weight, stacked, inputs[name][0][0], config, (curvature or {}).get(name)
                )
                result.seconds[name] = time.perf_counter() - start
            elif name == GATE_NAME and GATE_MIN <= weight[0].numel() <= GATE_MAX:
                result.gates[name] = quantize_gate_rows(weight.detach()).to("cpu")
            else:
                result.small[name] = _to_half(weight)
    step = common_step(list(matrices.values()), config) if config.row_steps == "loss" else 1.0
    for name, bank in matrices.items():
        start = time.perf_counter()
        with _blame(name):
            result.quantized[name] = bank.quantize(step * clip_scale, config).reshaped(
                model_state[name].shape
            )
            result.seconds[name] += time.perf_counter() - start
    if config.lqer != "off":
        result.corrections.update(_corrections(matrices, result, config))
    return result


def _corrections(
    matrices: dict[str, Matrices], state: QuantizedState, config: QuantConfig
) -> dict[str, Correction]:
    """Return low-rank corrections of the matrices that the quantization error hurts most."""
    assert config.lqer != "off"
    errors: dict[str, float] = {}
    for name, bank in matrices.items():
        for i, cost in enumerate(bank.errors(state.quantized[name]).tolist()):
            errors[f"{name}.{i}"] = cost
    found = {}
    for key in largest_errors(errors, config.lqer_top):
        name, _, index = key.rpartition(".")
        error, power = matrices[name].error(int(index), state.quantized[name])
        found[key] = correct(error, power, rank=config.lqer_rank, kind=config.lqer).to("cpu")
    return found


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


def _stack_hessians(weight: Tensor, keys: list[InputKey], hessians: dict[InputKey, Tensor]) -> Tensor:
    """Return `(B, C, C)`, the Hessian of each matrix of the bank."""
    if len(keys) != (weight.shape[0] if weight.dim() == 3 else 1) or weight.dim() not in (2, 3):
        raise UserError(
            f"expected a bank of {len(keys)} matrices, as its inputs say, got {tuple(weight.shape)}"
        )
    missing = [key for key in keys if key not in hessians]
    if missing:
        raise UserError(f"no Hessian for the inputs {missing}; calibration observed {sorted(hessians)}")
    return torch.stack([hessians[key] for key in keys])


def _to_half(weight: Tensor) -> Tensor:
    """Return a small parameter as float16 on the CPU."""
    if weight.numel() > SMALL_MAX:
        raise UserError(
            f"{weight.numel():,} elements are too many for float16 (limit {SMALL_MAX:,}); give the parameter "
            "an entry in the model's quant_inputs() so that GPTQ takes it"
        )
    largest = weight.detach().abs().max().item() if weight.numel() else 0.0
    if not largest <= FLOAT16_MAX:
        raise UserError(f"largest magnitude {largest:g} does not fit float16 ({FLOAT16_MAX:g})")
    return weight.detach().half().cpu()


@contextmanager
def _blame(name: str) -> Iterator[None]:
    """Put the parameter's name in front of an error."""
    try:
        yield
    except ValueError as e:
        raise UserError(f"quantize_model: {name}: {e}") from e
