"""Sums of residual streams, channel by channel, with the RMS norm of the last sum.

On a CUDA GPU one kernel computes the outputs and one all gradients, those of the coefficients too; elsewhere,
and for what the kernels do not take, `stream_mix_ref` does. With g_o the gradient of y_o, dn that of n, and
y the last sum:

    y_o = sum_i c_oi * s_i      n = rho y,  rho = (mean y^2 + eps)^(-1/2)
    g_last <- g_last + rho dn - rho^3 / D (dn . y) y
    ds_i = sum_o c_oi * g_o      dc_oi = sum_t g_o * s_i

Nothing is saved but the inputs: the backward kernel computes y and rho again from the streams, which it
reads anyway for dc. The norm is part of the operator because of the backward pass. With the mix alone,
another kernel would read y, dn and the gradient of the residual and write g_last, which the mix would read
again: five passes over a `(T, D)` tensor in place of two.

Such passes of a block of the model around its mix, forward + backward, counted from what the schedulers of
torch.compile 2.11 and 2.13 fuse (`bench/results/20261130_mix-passes.txt`) and from these kernels. A matrix
product is in neither. Two passes of each backward with kernels add the gradient of the head gate, which
reads a few columns of n, to dn; three of the last line add both gradients of the lane.

    what                                              torch.compile   kernels
    (x, x0) -> u, n(u)                                       4 + 13     4 + 8
    (x, skip, x0) -> u, n(u)                                 5 + 13    5 + 10
    (lane, skip, x0) -> lane, n(u); update of lanes          9 + 25   11 + 20
    (lane, x0) -> n(u); update of lanes                      8 + 22    9 + 20

The forward pass gains nothing. `pr1855` moves 41 passes less without and 65 less with depth recurrence: 1.1
and 1.8 ms for 98,304 x 512 at 3.6 TB/s; measured were 1.1 and 1.9 ms of the kernels of norms and mixes.
Adding the gradient that a stream already carries (x0 in each block, skips) in the same kernel would save 30
and 48 more, as threads do without this operator (`pgolf/model/threads.py`).

Legend: `T` tokens, `D` width, `n` streams, `o` sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import pgolf.ops._extension  # noqa: F401  (registers the operators)
from pgolf.ops._derivatives import refuse_derivatives, refuse_second_order, refuse_transforms
from pgolf.ops._hopper import has_kernels

EPS = torch.finfo(torch.float32).eps
"""Added to the mean square before the root, for every dtype, which is also torch's choice for float32."""
MOST_STREAMS, MOST_SUMS, MOST_WIDTH = 4, 2, 1024
"""Sizes that the kernels take."""
PARTIALS = 264
"""Blocks of the backward kernel, each of which sums the gradients of the coefficients over its tokens."""
Last = Literal["sum", "norm", "both"]


def stream_mix(streams: Sequence[Tensor], coefficients: Tensor, *, last: Last = "sum") -> tuple[Tensor, ...]:
    """Compute the sums y_o = sum_i c_oi * s_i of streams s_i, and the RMS norm of the last sum.

    Equals `stream_mix_ref`. The CUDA kernels take 2 to 4 streams in bfloat16, 1 or 2 sums, and D a multiple
    of 8 up to 1,024. They accumulate in float32 and round each output once, but neither the coefficients nor
    y before its norm. They are deterministic, bitwise the same from run to run, and can be differentiated
    once, by torch.autograd. Everything else, and all of it under autocast, is computed by the reference. Both
    work under torch.compile and in CUDA graphs.

    Args:
        streams: n of `(T, D)`, of one floating-point dtype.
        coefficients: `(o, n, D)`, float32 or the dtype of the streams.
        last: which outputs the last sum has: itself, its norm y / (mean y^2 + eps)^(1/2), or both.

    Returns:
        Each sum, without the last one if `last` is "norm"; then the norm, unless `last` is "sum". All are
        `(T, D)` in the dtype of the streams.

    Raises:
        ValueError: shapes or devices disagree, there is no stream or no sum, or `last` is none of the three.
        TypeError: dtypes disagree, or are no floating-point numbers.
        RuntimeError: the kernels were asked for a second derivative, or one of forward mode or torch.func.

    Source: residual mixes and lanes of parameter-golf #1855. Kernels: csrc/kernels/stream_mix.h.
    """
    streams = list(streams)
    _check(streams, coefficients, last)
    if not _takes(streams, coefficients):
        return stream_mix_ref(streams, coefficients, last=last)
    refuse_transforms("stream_mix", *streams, coefficients)
    coefficients = coefficients.to(torch.promote_types(coefficients.dtype, torch.float32))
    return tuple(torch.ops.pgolf.stream_mix(streams, coefficients, last != "norm", last != "sum"))


def stream_mix_ref(
    streams: Sequence[Tensor], coefficients: Tensor, *, last: Last = "sum"
) -> tuple[Tensor, ...]:
    """Compute `stream_mix` with PyTorch operators; float64 input is computed in float64."""
    sums = []
    for row in coefficients.to(streams[0].dtype).unbind():
        y = row[0] * streams[0]
        for factor, stream in zip(row[1:], streams[1:], strict=True):
            y = y + factor * stream
        sums.append(y)
    kept = sums[:-1] if last == "norm" else sums
    return (*kept,) if last == "sum" else (*kept, F.rms_norm(sums[-1], sums[-1].shape[-1:], eps=EPS))


def _check(streams: Sequence[Tensor], coefficients: Tensor, last: str) -> None:
    """Raise an error that names what does not fit to the first stream."""
    if last not in ("sum", "norm", "both"):
        raise ValueError(f"stream_mix: last must be 'sum', 'norm' or 'both', got {last!r}")
    if not streams or streams[0].dim() != 2:
        shapes = [tuple(s.shape) for s in streams]
        raise ValueError(f"stream_mix: streams must be one or more (T, D), got {shapes}")
    first = streams[0]
    if not first.is_floating_point():
        raise TypeError(f"stream_mix: streams must have a floating-point dtype, got {first.dtype}")
    for i, stream in enumerate(streams):
        if stream.shape != first.shape:
            sizes = f"{tuple(first.shape)} as stream 0 is, got {tuple(stream.shape)}"
            raise ValueError(f"stream_mix: stream {i} must be {sizes}")
        if stream.dtype != first.dtype:
            raise TypeError(
                f"stream_mix: stream {i} must be {first.dtype} as stream 0 is, got {stream.dtype}"
            )
    shape = tuple(coefficients.shape)
    if len(shape) != 3 or shape[0] == 0 or shape[1:] != (len(streams), first.shape[1]):
        raise ValueError(
            f"stream_mix: coefficients must be (o, {len(streams)}, {first.shape[1]}) with o > 0, got {shape}"
        )
    if coefficients.dtype not in (torch.float32, first.dtype):
        raise TypeError(
            f"stream_mix: coefficients must be torch.float32, or {first.dtype} as the streams, got "
            f"{coefficients.dtype}"
        )
    for name, tensor in (
        ("coefficients", coefficients),
        *((f"stream {i}", s) for i, s in enumerate(streams)),
    ):
        if tensor.device != first.device:
            raise ValueError(
                f"stream_mix: {name} must be on {first.device} as stream 0 is, got {tensor.device}"
            )


def _takes(streams: list[Tensor], coefficients: Tensor) -> bool:
    """Return whether the kernels take this problem."""
    first = streams[0]
    width, device = first.shape[1], first.device
    return (
        first.dtype == torch.bfloat16
        and 2 <= len(streams) <= MOST_STREAMS
        and coefficients.shape[0] <= MOST_SUMS
        and (width % 8 == 0 and 0 < width <= MOST_WIDTH)
        and has_kernels("stream_mix", device.type, device.index, hopper=False)
        and not torch.is_autocast_enabled(device.type)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:  # noqa: ARG001
    streams, coefficients, ctx.keep, ctx.norm = inputs
    ctx.save_for_backward(*streams, coefficients)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    *streams, coefficients = ctx.saved_tensors
    need_streams, need_coefficients = ctx.needs_input_grad[:2]
    with torch.no_grad():
        *found, partials = torch.ops.pgolf.stream_mix_backward(
            grads, streams, coefficients, ctx.keep, ctx.norm
        )
        found.append(partials.sum(0))
    sources = (*grads, *streams, coefficients)
    *of_streams, of_coefficients = (
        refuse_second_order("stream_mix", grad, *sources) if need else None
        for grad, need in zip(found, (*need_streams, need_coefficients), strict=True)
    )
    return of_streams, of_coefficients, None, None


def _forward_fake(streams: list[Tensor], coefficients: Tensor, keep: bool, norm: bool) -> list[Tensor]:
    first = streams[0]
    # No arithmetic with bools: torch 2.11 refuses it where the number of sums is a symbol.
    outputs = coefficients.shape[0] - (0 if keep else 1) + (1 if norm else 0)
    return [first.new_empty(first.shape) for _ in range(outputs)]


def _backward_fake(
    _grads: list[Tensor], streams: list[Tensor], coefficients: Tensor, _keep: bool, _norm: bool
) -> list[Tensor]:
    partials = coefficients.new_empty(PARTIALS, *coefficients.shape)
    return [*(s.new_empty(s.shape) for s in streams), partials]


torch.library.register_fake("pgolf::stream_mix", _forward_fake)
torch.library.register_fake("pgolf::stream_mix_backward", _backward_fake)
torch.library.register_autograd("pgolf::stream_mix", _backward, setup_context=_setup)
refuse_derivatives("stream_mix", "stream_mix_backward")
