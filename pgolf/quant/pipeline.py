"""How weights become codes: a model is calibrated once and then quantized at any factor on the scales.

`Quantizer.calibrated` measures a model on training text, and `Quantizer.quantize` makes the codes. The
trainer, `pgolf quantize` and the bench of quantizers all use this class; `pgolf.artifact.fit.write_quantized`
makes a file of it. The class also decides which parameter gets which form: matrices get codes with calibrated
scales, gates, further tables and small networks get int8 rows, and all others become float16.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from pgolf.config import QuantConfig
from pgolf.data.loader import Batch
from pgolf.dist import Dist
from pgolf.errors import UserError
from pgolf.model.gpt import GPT
from pgolf.quant.bank import Bank, common_scale, prepare
from pgolf.quant.calibrate import Drift, InputKey, collect_drift, collect_hessians
from pgolf.quant.grid import quantize_gate_rows
from pgolf.quant.lqer import Correction, correct, largest_errors
from pgolf.quant.quantized import QuantizedState, dequantize_state
from pgolf.quant.sensitivity import Curvature, collect_curvature

GATE_NAME = "head_gate"
TABLES = ("bigram_table", "value_table")
"""Tables beside the token embedding: int8 rows, as in the pull requests that have them."""
TABLE_MATRICES = ("bigram_proj", "value_proj")
"""The matrices behind them: float16, or int8 rows where that would be too large."""
SMALL_NETWORKS = ("mudd_in",)
"""Larger matrices of small networks: int8 rows, half the bytes of float16."""
GATE_MIN, GATE_MAX = 32, 8192
"""A layer's gate matrix is stored in int8 rows if its number of elements is in this range, as in PR #1855."""
SMALL_MAX = 65_536
"""Most elements of a parameter that may stay float16, as in PR #1855."""
FLOAT16_MAX = 65504.0
OUTPUT_SCALES = {"attn_out": "attn_scale", "mlp_out": "mlp_scale"}
"""The kind of a matrix's inputs -> the parameter `(layers, R)` that multiplies its rows, and takes gains."""


@dataclass(frozen=True)
class Quantizer:
    """Weights, and what training text says about them."""

    weights: dict[str, Tensor]
    """Parameter name -> tensor: banks `(B, R, C)`, the embedding `(V, D)`, small parameters."""
    inputs: dict[str, list[InputKey]]
    """`GPT.quant_inputs()`: matrix parameter -> the (kind, layer) of the input of each of its matrices."""
    hessians: dict[InputKey, Tensor]
    """From `collect_hessians`; the work runs on their device."""
    config: QuantConfig
    curvature: dict[str, Curvature] | None = None
    """From `collect_curvature`; needed where config.row_scales is "loss"."""
    drift: Drift | None = None
    """From `collect_drift`; used where config.drift is above 0."""

    @classmethod
    def calibrated(
        cls,
        model: GPT,
        batches: Iterator[Batch],
        config: QuantConfig,
        dist: Dist,
        *,
        weights: dict[str, Tensor] | None = None,
    ) -> Quantizer:
        """Measure a model on this rank's share of quant.calibration_batches and quant.gradient_batches.

        With quant.drift, the model is also quantized, and measured with the quantized weights.

        Args:
            model: with the weights that will be quantized.
            batches: this rank's, endless.
            dist: sums over the ranks.
            weights: the model's, where the caller has a copy already; by default they are copied.
        """

        def share(count: int) -> Iterator[Batch]:
            return islice(batches, max(1, count // dist.world_size))

        inputs = model.quant_inputs()
        text = list(share(config.calibration_batches))
        hessians = collect_hessians(model, text, dist)
        curvature = None
        if config.row_scales == "loss":
            curvature = collect_curvature(model, share(config.gradient_batches), inputs, dist)
        if weights is None:
            weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        quantizer = cls(weights, inputs, hessians, config, curvature)
        return quantizer.with_drift(model, text, dist) if config.drift else quantizer

    def with_drift(self, model: GPT, batches: Iterable[Batch], dist: Dist) -> Quantizer:
        """Return the quantizer with the drift that quantization by itself causes on `batches`.

        Every rank calls it, and gets the same codes from the same Hessians.

        Args:
            model: with the weights of the quantizer.
            batches: this rank's, those of the Hessians.
        """
        plain = replace(self, drift=None).quantize()
        return replace(self, drift=collect_drift(model, dequantize_state(plain), batches, dist))

    def quantize(self, factor: float = 1.0) -> QuantizedState:
        """Quantize matrices by GPTQ, what `is_gate` names to int8 rows, all else to float16.

        Args:
            factor: multiplies every scale of the matrices; above 1 makes coarser grids and a smaller file.
        Returns:
            CPU tensors.
        Raises:
            ValueError: a missing parameter, Hessian or curvature, a large parameter without inputs, NaN.
        """
        missing = sorted(set(self.inputs) - set(self.weights))
        if missing:
            raise UserError(f"quantize: parameters {missing} have inputs but are not among the weights")
        result = QuantizedState({}, {}, {})
        banks: dict[str, Bank] = {}
        for name, weight in self.weights.items():
            with _blame(name):
                if name in self.inputs:
                    banks[name] = self._prepare(name)
                elif is_gate(name, tuple(weight.shape)):
                    result.gates[name] = quantize_gate_rows(weight.detach()).to("cpu")
                else:
                    result.small[name] = _to_half(weight)
        common = common_scale(list(banks.values()), self.config) if self.config.row_scales == "loss" else 1.0
        for name, bank in banks.items():
            with _blame(name):
                codes = bank.quantize(common * factor, self.config)
                result.quantized[name] = codes.reshaped(self.weights[name].shape)
        if self.config.lqer != "off":
            result.corrections.update(_corrections(banks, result, self.config))
        if self.config.gains:
            self._multiply_gains(banks, result)
        return result

    def _prepare(self, name: str) -> Bank:
        """Return one bank with its Hessians `(B, C, C)`."""
        weight, keys = self.weights[name], self.inputs[name]
        if len(keys) != (weight.shape[0] if weight.dim() == 3 else 1) or weight.dim() not in (2, 3):
            raise UserError(
                f"expected a bank of {len(keys)} matrices, as its inputs say, got {tuple(weight.shape)}"
            )
        missing = [key for key in keys if key not in self.hessians]
        if missing:
            raise UserError(
                f"no Hessian for the inputs {missing}; calibration observed {sorted(self.hessians)}"
            )

        def stack(parts: dict[InputKey, Tensor]) -> Tensor:
            return torch.stack([parts[key] for key in keys])

        drift = None
        if self.drift is not None and self.config.drift and not self.drift.shifts.keys().isdisjoint(keys):
            # The other matrices of the bank have no drift, and so keep their codes.
            none = {key: torch.zeros_like(self.hessians[key]) for key in keys}
            drift = stack(self.hessians | self.drift.hessians), stack(none | self.drift.shifts)
        curvature = (self.curvature or {}).get(name)
        return prepare(weight, stack(self.hessians), keys[0][0], self.config, curvature, drift)

    def _multiply_gains(self, banks: dict[str, Bank], result: QuantizedState) -> None:
        """Multiply the scale of each output row that has one by the gain of the row."""
        for name, bank in banks.items():
            keys = self.inputs[name]
            if not any(kind in OUTPUT_SCALES for kind, _ in keys):
                continue
            matrices = ((i, result.corrections.get(f"{name}.{i}")) for i in range(len(keys)))
            gains = bank.gains(result.quantized[name], {i: c for i, c in matrices if c is not None})
            for gain, (kind, layer) in zip(gains.cpu(), keys, strict=True):
                if kind in OUTPUT_SCALES:
                    scales = OUTPUT_SCALES[kind]
                    exact = self.weights[scales][layer].float().cpu()
                    result.small[scales][layer] = (exact * gain).half()


def is_gate(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a parameter is stored as int8 rows with a scale each."""
    if name in TABLES or name in SMALL_NETWORKS:
        return True
    if name in TABLE_MATRICES:
        return math.prod(shape) > SMALL_MAX
    return name == GATE_NAME and GATE_MIN <= math.prod(shape[1:]) <= GATE_MAX


def _corrections(banks: dict[str, Bank], state: QuantizedState, config: QuantConfig) -> dict[str, Correction]:
    """Return low-rank corrections of the matrices that the quantization error hurts most."""
    assert config.lqer != "off"
    errors: dict[str, float] = {}
    for name, bank in banks.items():
        for i, cost in enumerate(bank.errors(state.quantized[name]).tolist()):
            errors[f"{name}.{i}"] = cost
    found = {}
    for key in largest_errors(errors, config.lqer_top):
        name, _, index = key.rpartition(".")
        error, power = banks[name].error(int(index), state.quantized[name])
        found[key] = correct(error, power, rank=config.lqer_rank, kind=config.lqer).to("cpu")
    return found


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
        raise UserError(f"quantize: {name}: {e}") from e
