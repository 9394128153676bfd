"""How long calibration and quantization will take, found by doing a little of them before the clock starts.

The clock keeps that much of its budget. One batch of each kind is timed, then one quantization of the initial
weights (the work does not depend on their values), each the second time, when memory and libraries are warm,
and the writing of the checkpoints, which comes between training and calibration.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from pgolf.config import QuantConfig
from pgolf.data.loader import Batch, TrainLoader
from pgolf.dist import Dist
from pgolf.model.gpt import GPT
from pgolf.quant.calibrate import collect_hessians
from pgolf.quant.pipeline import Quantizer
from pgolf.quant.sensitivity import collect_curvature

SPARE = 1.15
"""The reserve over the measured time; the clock must not be overrun because a machine was 10 % slower."""


def rehearse(
    model: GPT, loader: TrainLoader, config: QuantConfig, dist: Dist, *, save: Callable[[], object]
) -> float:
    """Return the seconds to keep for saving, calibrating and quantizing; rank 0's number on every rank.

    reserve = 1.15 (seconds of saving + batches * seconds of a batch, for Hessians and for gradients,
    + seconds of quantizing).

    Args:
        model: prepared, compiled and warm; its weights and gradients stay as they are.
        loader: is put back to its first batch.
        save: writes what is saved after training, somewhere else.
    """
    batches: Iterator[Batch] = iter(loader.next, None)
    names = model.quant_inputs()
    one = replace(config, calibration_batches=1, gradient_batches=1)

    def per_rank(count: int) -> int:
        return max(1, count // dist.world_size)

    quantizer = replace(Quantizer.calibrated(model, batches, one, dist), config=config)
    seconds = per_rank(config.calibration_batches) * _seconds(
        lambda: collect_hessians(model, [next(batches)], dist), dist
    )
    if config.row_scales == "loss":
        seconds += per_rank(config.gradient_batches) * _seconds(
            lambda: collect_curvature(model, [next(batches)], names, dist), dist
        )
    for last in (False, True):
        took = _seconds(quantizer.quantize, dist)
        seconds += took if last else 0.0
    seconds += _seconds(save, dist)
    loader.restart()
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
