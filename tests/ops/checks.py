"""What the tests of several operators check, and how they change the memory of a tensor."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def assert_no_worse_than_twice(
    got: Mapping[str, Tensor], base: Mapping[str, Tensor], want: Mapping[str, Tensor], **slack: float
) -> None:
    """Every result has at most twice the error of `base`, in the norm of the difference from `want`.

    1e-6 of the norm of `want` is allowed besides, or `slack` for the results that it names.
    """
    for name, truth in want.items():
        assert got[name].dtype == base[name].dtype and got[name].shape == truth.shape, name
        scale = truth.norm().item()
        error, bound = ((t[name].double() - truth).norm().item() for t in (got, base))
        limit = 2 * bound + slack.get(name, 1e-6) * scale
        assert error <= limit, f"{name}: error {error}, eager {bound}, norm {scale}"


def assert_the_same_on_every_call(call: Callable[[], Mapping[str, Tensor]]) -> None:
    """The results are finite and have the same bits in three calls, before the second of which torch begins
    to fill every new tensor with NaN: who reads what nobody has written, then has other results.
    """
    first = call()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.empty(1, device="cuda").isnan(), "torch does not fill new tensors with NaN"
            poisoned = call()
    finally:
        torch.use_deterministic_algorithms(False)
    again = call()
    for name, value in first.items():
        assert value.isfinite().all(), name
        assert torch.equal(value, poisoned[name]) and torch.equal(value, again[name]), name


def assert_replays_like_a_call(step: Callable[[], Sequence[Tensor]], *changes: Callable[[], object]) -> None:
    """A CUDA graph of `step` has, after each of `changes`, the results of a call bit for bit.

    `step` is called once on another stream, so that what a first call prepares is not captured, and then
    captured. It must not change what it reads, because it is called after each replay. A change must write
    into the tensors that `step` reads (gradients are off for it), because the graph reads those addresses.
    Neither a replay nor a call may make the host wait.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for i, change in enumerate(changes):
        with torch.no_grad():
            change()
        with no_waiting():
            graph.replay()
            wanted = step()
        for j, (got, want) in enumerate(zip(captured, wanted, strict=True)):
            assert torch.equal(got, want), f"result {j} after change {i}"


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise an error where torch would let the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def transposed(t: Tensor) -> Tensor:
    """The same values, of which those of a column lie next to each other."""
    return t.mT.contiguous().mT if t.dim() > 1 else t


def moved(t: Tensor) -> Tensor:
    """The same values one element after a multiple of 16 bytes."""
    storage = t.new_empty(t.numel() + 1)
    storage[1:] = t.flatten()
    return storage[1:].view(t.shape)


def part(t: Tensor) -> Tensor:
    """The same values as the first columns of a wider tensor."""
    return torch.cat((t, torch.full_like(t[..., :8], torch.nan)), dim=-1)[..., : t.shape[-1]]
