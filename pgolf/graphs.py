"""CUDA graphs: work that was captured once is replayed with one launch instead of one per kernel.

The optimizer captures its step (`pgolf/optim/step.py`), training its micro-steps (`pgolf/train/captured.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Work = Callable[[], None]
NOISE = 0.1
"""Relative difference of two gradients from which on they are not the same: the order of additions makes less
than a hundredth, stale or missing data about 1."""


class Recorder:
    """Captures work on a CUDA device as graphs that share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def launch(self, work: Work) -> None:
        """Run the work on the stream of the captures, so that nothing is done there for the first time."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        """Capture the work, without running it; return what replays it on the current stream."""
        graph = torch.cuda.CUDAGraph()
        # After an error torch leaves the stream of the capture as the current one; the first context puts the
        # former back. Other threads, such as the loader's, may use CUDA during the capture.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            work()
        return graph.replay

    def held(self) -> int:
        """Return the bytes that torch holds on the device, without what it keeps for later use."""
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()


def first_error(error: BaseException) -> BaseException:
    """Return the error that came first: torch answers one in a capture with another one at its end."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def unlike(wanted: dict[str, Tensor], got: dict[str, Tensor]) -> str:
    """Return the name of a gradient of a replayed pass that is not that of a launched one; "" if all are.

    They may differ by `NOISE` of their norm and of a hundredth of the norm of them all, because parts of them
    are added in no fixed order.
    """
    norms = torch.stack([wanted[name].norm() for name in wanted])
    errors = torch.stack([(got[name] - wanted[name]).norm() for name in wanted])
    good = errors <= NOISE * (norms + norms.norm() / 100)
    return next((name for name, same in zip(wanted, good.tolist(), strict=True) if not same), "")
