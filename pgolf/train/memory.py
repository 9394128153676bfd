"""What a run will need of memory, from its configuration alone, and whether this machine has it.

Nearly all of it is what the backward pass needs of the forward pass. Counted with saved-tensor hooks, one
execution of a block (the loop's repeats count) keeps of each token, with `D` width, `G` width of the keys and
`M` hidden width:
    eagerly    11 D + 3 G + 3 M, and D for the mix, D for a head gate, D + G for exclusive self-attention;
    compiled    8 D + 3 G + 2 M, and D each for mix, rotation, gate or exclusion; 2 G for the exclusion;
besides the stem, the skips and, for the loss, one row of the vocabulary. glibc keeps tensors under 32 MiB in
its heap, most of whose holes stay empty: on a CPU they count `HEAP` times.

Measured and estimated MiB. CPU (x86, torch 2.13, one thread), resident, steps with the loop on:
    tiny    2,048 tokens 577 566    8,192 1,304 1,273    16,384 2,278 2,215    32,768 4,185 3,842
    naive   1,024 1,203 1,235       4,096 2,756 2,785
    pr1855  1,024 2,578 2,710       2,048 3,770 4,129     4,096 6,344 6,967
with calibration and quantization after them:
    tiny    2,048 593 575    8,192 1,328 1,282    naive 1,024 1,347 1,348    4,096 2,666 2,785
    pr1855  1,024 4,646 4,471
CUDA (H200 and H100, allocated), pr1855 with 98,304 tokens: one GPU 39,676 39,644, two 39,715 39,685; no other
shape was measured. tests/train/test_memory.py holds the estimate to 10 % of the first, to 5 % of the second.
Not counted: the text and its shards, and test-time training, which does not depend on the micro-batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import isqrt, prod
from pathlib import Path
from typing import Protocol

import torch

from pgolf.config import Config, ModelConfig
from pgolf.env import ranks_on_this_host
from pgolf.model.gpt import layer_order, parameter_shapes
from pgolf.errors import UserError

MARGIN = 1.1
"""The estimate, times this, must be there: it is right to about 10 %."""
PROCESS = 310 << 20
"""Python, torch and libraries in a CPU process. What a GPU holds besides tensors is not free anyway."""
HEAP, HEAP_WIDE, HEAP_LARGEST = 1.42, 1.3, 32 << 20
"""Heap over live bytes while a step runs, of tensors as wide as the model and as its MLP (whose holes take
what is narrower); and the bytes from which on a tensor is mapped by itself."""
EAGER_BF16 = 1.25
"""Eager bfloat16 over float32 in elements: parts of rotation and exclusion are float32 there."""
HEAP_LEFT = 0.85
"""What is left of that after the steps, when rounding begins."""
FACTOR_COPIES = 9
"""Stacks of Hessians alive at once while the largest is blended and factored (6 without blending)."""
SMALLEST = 16
"""Least data.micro_tokens."""

BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")


class Place(Protocol):
    """What of `pgolf.dist.Dist` is needed."""

    device: torch.device
    world_size: int

    def share(self, values: list[float]) -> list[float]:
        """Return rank 0's values on every rank."""

    def check(self, error: str | None) -> None:
        """Raise on every rank if one passes a message."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank; the parts are what `total`, the peak over all phases, is made of."""

    process: int
    """Python and its libraries, on a CPU."""
    weights: int
    gradients: int
    averages: int
    optimizer: int
    """Momentum, moments, updates and what travels between ranks."""
    copies: int
    """Of weights: kept through the warm-up or quantization, cast for the blocks, and gradients of banks."""
    activations: int
    """Kept for the backward pass, with the loop on; on a CPU with the heap's holes."""
    loss: int
    """The loss's factor and the gradients it begins with."""
    quantization: int
    """Hessians, gram matrices and their factors, as far as they come on top of the rest."""

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(getattr(self, f.name) for f in fields(self))

    def parts(self) -> str:
        """Return the parts that matter, largest first, in words."""
        sizes = sorted(((getattr(self, f.name), f.name) for f in fields(self)), reverse=True)
        return ", ".join(f"{name} {gib(size)}" for size, name in sizes if size >= self.total / 1000)


def gib(size: float) -> str:
    """Return a size in words."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def estimate_memory(config: Config, *, device_type: str, world_size: int, attention: str) -> MemoryEstimate:
    """Return what one rank needs at the peak of its phases: steps with the loop on, calibration, rounding.

    Args:
        device_type: "cuda" (bfloat16) or another (float32, eager). attention: kernel, for what sdpa copies.
    """
    cuda, model = device_type == "cuda", config.model
    size = 2 if cuda else 4
    shapes = parameter_shapes(model)
    weights = 4 * sum(map(prod, shapes.values()))
    banks = 4 * sum(prod(shapes[name]) for name in BANKS)
    averages = weights if config.optim.ema_horizon else 0
    activations, in_heap = _activations(config, cuda=cuda, attention=attention)
    tokens, row = config.data.micro_tokens, model.vocab_size * size
    loss = tokens * (row + 2 * model.width * size) + shapes["tok_emb"][0] * model.width * 4
    qkv = model.layers * (model.width + 2 * model.kv_width) * model.width
    transient = weights // 2 + qkv * size if cuda else banks + qkv * size
    kept = weights * (2 if averages else 1)  # raw and averaged weights, from the end of training on
    steps = weights + transient + activations + loss
    left = int(HEAP_LEFT * in_heap)
    calibrating = rounding = 0
    if config.train.quantize:
        hessians, grams, largest = _hessians(model)
        blending = config.quant.row_scales == "loss"
        known = hessians + (grams if blending else 0)
        # With the curvature the backward pass runs beside all that; the Hessians need a forward pass only.
        calibrating = kept + known + transient + activations + loss if blending else 0
        copies = FACTOR_COPIES if blending else FACTOR_COPIES - 3
        rounding = kept + known + max(left, 2 * (grams - largest)) + copies * largest
    peak = max(steps, calibrating, rounding)
    if peak == rounding > max(steps, calibrating):
        # The heap still holds the activations; what else is there is quantization.
        parts = {"copies": kept, "activations": left, "loss": 0}
    else:
        parts = {"copies": weights + transient, "activations": activations, "loss": loss}
    return MemoryEstimate(
        process=0 if cuda else PROCESS,
        weights=weights,
        gradients=weights,
        averages=averages,
        optimizer=_optimizer(shapes, world_size, size),
        quantization=peak - sum(parts.values()),
        **parts,
    )


def _activations(config: Config, *, cuda: bool, attention: str) -> tuple[int, int]:
    """Return the bytes of one micro-batch's activations, and how many of them a CPU's heap holds."""
    c, tokens = config.model, config.data.micro_tokens
    compiled = cuda and config.train.compile != "off"
    encoder, decoder = layer_order(c, loop=True)
    exclusive, gated = c.xsa_layers / c.layers, c.head_gate != "none"
    skips = {"none": 0, "weighted": 1, "gated": 2}[c.skip] * min(len(encoder), len(decoder))
    lanes = c.layers - c.parallel_from
    if compiled:
        wide = 8.0 + c.resid_mix + (gated or exclusive > 0) + (c.rope_dims > 0)
        narrow, hidden, ends = 3 + 2 * exclusive, 2, 4 + c.smear_gate + skips / 2
    else:
        wide = 11 + c.resid_mix + gated + exclusive + (cuda and attention == "sdpa")
        narrow, hidden = 3 + exclusive, 3
        ends = 3 + 2 * c.smear_gate + skips + max(2 * lanes - 1, 0)
    runs = len(encoder) + len(decoder)
    streams = c.width * (runs * wide + ends) + runs * (c.kv_width * narrow + 8 * c.heads)
    wanted = ((streams, c.width, HEAP), (runs * hidden * c.hidden, c.hidden, HEAP_WIDE))
    if cuda:
        elements = sum(count for count, _, _ in wanted) * (1 if compiled else EAGER_BF16)
        return int(2 * tokens * elements), 0
    total = heap = 0.0
    for count, each, factor in wanted:
        small = factor * 4 * count * min(tokens, HEAP_LARGEST / (4 * each))
        total += max(small, 4 * count * tokens)  # never less for more tokens
        heap += small
    return int(total), int(heap)


def _hessians(c: ModelConfig) -> tuple[int, int, int]:
    """Return the bytes of all inputs' Hessians, of one for every matrix, and of the largest bank's."""
    square, wide = 4 * c.width**2, 4 * c.hidden**2
    stacks = [4 * c.layers * square + c.layers * square + square, c.layers * wide]
    return c.layers * (3 * square + wide) + square, sum(stacks), max(c.layers * wide, 2 * c.layers * square)


def _optimizer(shapes: dict[str, tuple[int, ...]], world_size: int, size: int) -> int:
    """Return the bytes of Muon's and AdamW's state on one rank."""
    share = size * sum(-(-shapes[n][0] // world_size) * prod(shapes[n][1:]) for n in BANKS)
    rest = sum(prod(shape) for name, shape in shapes.items() if name not in BANKS)
    # Momentum and update; several ranks have their averaged gradients and the wire of all of them besides.
    return share * (2 if world_size == 1 else 3 + world_size) + 2 * 4 * rest


def available_memory(device: torch.device, *, root: Path = Path("/")) -> int:
    """Return the bytes that this process may have in all: what it holds already and its share of the rest.

    CUDA: what is free on the device. Otherwise MemAvailable, or what the cgroup leaves, whichever is less,
    divided by the ranks on this host (without /proc: the machine's memory, divided).

    Args:
        root: where proc and sys are.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    ranks = ranks_on_this_host()
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
        held = int((root / "proc/self/statm").read_text().split()[1]) * _page()
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * _page() // ranks
    return held + max(0, min([free, *_cgroup_room(root)])) // ranks


def _page() -> int:
    return os.sysconf("SC_PAGE_SIZE")


def _cgroup_room(root: Path) -> Iterator[int]:
    """Yield what each cgroup of this process leaves of its limit, v1 and v2; file caches do not count."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names, cache = root / "sys/fs/cgroup", ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            cache = "total_inactive_file"
        else:
            continue
        # In a container the path may be the host's: then only the top is there.
        inner = Path(path.lstrip("/"))
        for folder in (inner, *inner.parents):
            try:
                limit, usage = ((top / folder / name).read_text().strip() for name in names)
                stat = dict(x.split() for x in (top / folder / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if limit != "max":
                yield int(limit) - int(usage) + int(stat.get(cache, 0))


def fitting_micro_tokens(
    config: Config, room: int, *, device_type: str, world_size: int, attention: str
) -> int | None:
    """Return the largest data.micro_tokens that fits into `room` bytes and divides the batch; None: none."""
    share = config.data.batch_tokens // world_size
    low = [d for d in range(1, isqrt(share) + 1) if share % d == 0]
    for micro in sorted({*low, *(share // d for d in low)} - set(range(SMALLEST)), reverse=True):
        smaller = replace(config, data=replace(config.data, micro_tokens=micro))
        found = estimate_memory(smaller, device_type=device_type, world_size=world_size, attention=attention)
        if MARGIN * found.total <= room:
            return micro
    return None


def check_memory(config: Config, dist: Place, *, attention: str) -> str:
    """Compare the estimate with what there is; return the sentence for the log. Every rank calls it.

    Raises:
        ValueError: it does not fit (by rank 0's figures, so on every rank); names the parts, what there is,
            and the flag with the largest micro-batch that would fit.
        RuntimeError: it fits on rank 0 and not on another rank.
    """
    kind, world = dist.device.type, dist.world_size
    found = estimate_memory(config, device_type=kind, world_size=world, attention=attention)
    own = available_memory(dist.device)
    whole = int(dist.share([float(own)])[0])
    error = _refusal(config, found, whole, kind, world, attention)
    if error is not None:
        raise UserError(error)
    dist.check(_refusal(config, found, own, kind, world, attention))
    return (
        f"memory: about {gib(found.total)} at the peak of {gib(whole)} {_for_whom(world)} ({found.parts()})"
    )


def _for_whom(world_size: int) -> str:
    return "available" if world_size == 1 else "available to each rank"


def _refusal(
    config: Config, found: MemoryEstimate, room: int, kind: str, world_size: int, attention: str
) -> str | None:
    """Return why `found` does not fit into `room` bytes, and what would; None where it fits."""
    if MARGIN * found.total <= room:
        return None
    micro = fitting_micro_tokens(config, room, device_type=kind, world_size=world_size, attention=attention)
    where = "GPU" if kind == "cuda" else "machine"
    advice = (
        f"pass --data.micro-tokens {micro}, the largest micro-batch that fits"
        if micro is not None
        else f"not even the smallest micro-batch would fit; use a {where} with more memory or a smaller model"
    )
    return (
        f"this run needs about {gib(found.total)} of memory with data.micro_tokens="
        f"{config.data.micro_tokens} ({found.parts()}), and {gib(MARGIN * found.total)} with a margin; "
        f"{gib(room)} are {_for_whom(world_size)} on this {where}: {advice}"
    )
