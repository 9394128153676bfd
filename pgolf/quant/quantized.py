"""The stored form of a whole model (codes, gates and float16 tensors), and the way back to float32 weights.

Reading an artifact needs this module and none of the quantizers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from pgolf.quant.grid import QuantizedTensor
from pgolf.quant.lqer import Correction


@dataclass(frozen=True)
class QuantizedState:
    """Every parameter of a model in its stored form; a name is in one of the first three groups only."""

    quantized: dict[str, QuantizedTensor]
    """Matrix banks and the embedding: the bulk of the bytes."""
    gates: dict[str, QuantizedTensor]
    """Gate matrices, int8 rows."""
    small: dict[str, Tensor]
    """Everything else, float16."""
    corrections: dict[str, Correction] = field(default_factory=dict)
    """Low-rank corrections by "parameter.index", where a parameter of one matrix has the index 0."""


def dequantize_state(state: QuantizedState) -> dict[str, Tensor]:
    """Return every parameter as float32 under its own name.

    Raises:
        ValueError: a name is in two groups.
    """
    result: dict[str, Tensor] = {}
    for group in (state.quantized, state.gates, state.small):
        for name, value in group.items():
            if name in result:
                raise ValueError(f"dequantize_state: {name!r} is stored twice; each parameter has one form")
            result[name] = value.dequantize() if isinstance(value, QuantizedTensor) else value.float()
    for key, correction in state.corrections.items():
        name, _, index = key.rpartition(".")
        stack = result[name].view(-1, *result[name].shape[-2:])
        stack[int(index)] += correction.dequantize()
    return result
