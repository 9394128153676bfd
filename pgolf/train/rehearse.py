"""How long calibration and quantization will take, found by doing a little of them before the clock starts.

That much of the budget is kept for them. One batch of each kind is timed, then one quantization of the
initial weights (the work does not depend on their values), then the writing of the weights, which comes
between training and calibration. Batches and quantization are done once before they are timed, so that
memory and libraries are warm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pgolf.config import QuantConfig
from pgolf.data.loader import Batch, TrainLoader
from pgolf.dist import Dist
from pgolf.model.gpt import GPT
from pgolf.quant.calibrate import collect_drift, collect_hessians
from pgolf.quant.pipeline import Quantizer
from pgolf.quant.quantized import QuantizedState, dequantize_state
from pgolf.quant.sensitivity import collect_curvature

SPARE = 1.15
"""The reserve over the measured time, so that the clock is kept on a machine that is 10 % slower by then."""


def rehearse(
    model: GPT,
    loader: TrainLoader,
    config: QuantConfig,
    dist: Dist,
    *,
    save: Callable[[], object],
    fit: Callable[[QuantizedState], object] | None = None,
) -> float:
    """Return the seconds to keep for saving, calibrating and quantizing; rank 0's number on every rank.

    reserve = 1.15 (seconds of saving + batches * seconds of a batch, for Hessians, gradients and drift,
    + seconds of quantizing, twice with drift, + seconds of fitting the cap).

    Args:
        model: prepared, compiled and warm; its weights and gradients stay as they are.
        loader: is put back to its first batch.
        save: writes what is saved after training, to a place that does not stay.
        fit: fits the cap of the quantized model; None: that is not asked for.
    """
    batches: Iterator[Batch] = iter(loader.next, None)
    names = model.quant_inputs()
    one = replace(config, calibration_batches=1, gradient_batches=1)

    def per_rank(count: int) -> int:
        return max(1, count // dist.world_size)

    # Not timed: it allocates and loads what the real one will find allocated and loaded.
    quantizer = replace(Quantizer.calibrated(model, batches, one, dist), config=config)
    seconds = per_rank(config.calibration_batches) * _seconds(
        lambda: collect_hessians(model, [next(batches)], dist), dist
    )
    if config.row_scales == "loss":
        seconds += per_rank(config.gradient_batches) * _seconds(
            lambda: collect_curvature(model, [next(batches)], names, dist), dist
        )
    state = quantizer.quantize()  # not timed either
    seconds += _seconds(quantizer.quantize, dist)
    if config.drift:
        first, plain = replace(quantizer, drift=None), dict[str, Tensor]()
        seconds += _seconds(lambda: plain.update(dequantize_state(first.quantize())), dist)
        seconds += per_rank(config.calibration_batches) * _seconds(
            lambda: collect_drift(model, plain, [next(batches)], dist), dist
        )
    if fit is not None:
        fit(state)  # not timed either
        seconds += _seconds(lambda: fit(state), dist)
    seconds += _seconds(save, dist)
    loader.restart()
    # One number on all ranks: with reserves of their own they would have clocks of different length.
    return dist.share([SPARE * seconds])[0]


def _seconds(work: Callable[[], object], dist: Dist) -> float:
    """Return the wall time of `work`, from an idle device until it is idle again."""
    if dist.device.type == "cuda":
        torch.cuda.synchronize(dist.device)
    began = time.perf_counter()
    work()
    if dist.device.type == "cuda":
        torch.cuda.synchronize(dist.device)
    return time.perf_counter() - began
