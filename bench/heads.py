"""What the benches of the operators on heads share: sizes, and how a pass is timed and counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.ce_peers import working
from bench.common import Recorder, Sample, only, time_graph, time_launched, torch_name
from bench.step import MEMORY_RATE

HEADS, GROUPS, WIDTH, DIMS = 8, 4, 64, 16
CASES = {"small": 1024, "model": 98_304}
"""Tokens."""
QUICK = 1
"""Number of cases, from the first, that only --quick runs."""


class Pass(NamedTuple):
    """One pass that is measured, of pgolf and of its reference."""

    metric: str
    pgolf: Callable[[], object]
    composed: Callable[[], object]
    columns: int
    """What is read and written, each once, in columns of a token."""


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """Return torch.compile of `function`, for one shape."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def record_passes(
    recorder: Recorder, case: str, found: list[Pass], *, repeats: int, parts: list[str]
) -> None:
    """Time each pass as a CUDA graph, as launched on the CPU, and record it with its counted bytes."""
    device, tokens = recorder.device, CASES[case]
    size = 2 if device.type == "cuda" else 4
    for one in found:
        counted = tokens * one.columns * size
        recorder.add(case, "counted", one.metric.replace("ms", "gbytes"), Sample(counted / 1e9, 0.0, 1), "GB")
        recorder.add(case, "floor", one.metric, Sample(1e3 * counted / MEMORY_RATE, 0.0, 1), "ms")
        calls = working(only({"pgolf": one.pgolf, torch_name("compile"): one.composed}, parts))
        samples = time_graph(calls, device, repeats=repeats) or time_launched(calls, device, repeats=repeats)
        for label, sample in samples.items():
            recorder.add(case, label, one.metric, sample, "ms")


def random(recorder: Recorder, *shape: int, seed: int = 0) -> Tensor:
    """Return random numbers in the dtype that is measured: bfloat16, on the CPU float32."""
    rng = torch.Generator(recorder.device).manual_seed(seed)
    dtype = torch.bfloat16 if recorder.device.type == "cuda" else torch.float32
    return torch.randn(shape, generator=rng, device=recorder.device).to(dtype)
