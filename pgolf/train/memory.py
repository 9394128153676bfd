"""How much memory a run will need, from its configuration alone, and whether this machine has it.

Nearly all of it is what the backward pass needs of the forward pass. Counted with saved-tensor hooks, one
execution of a block (each repeat of the loop is one) keeps for each token, with `D` width, `G` width of the
keys and `M` hidden width:
    eagerly     9 D + 3 G + 3 M, and D each for the mix, a head gate and exclusive self-attention;
    compiled    5 D + 3 G + 2 M, and D each for mix, rotation, gate or exclusion;
    of it the kernels of norm_mlp keep, in place of D + 2 M, one M and a bit for each of its elements.
The stem, the skips and, for the loss, one row of the vocabulary come on top. glibc keeps tensors under 32 MiB
in its heap, most of whose holes stay empty, so on a CPU those tensors count `HEAP` times.

Measured and estimated MiB. CPU (x86, torch 2.13, one thread), resident, steps with the loop on:
    tiny    2,048 tokens 547 553    8,192 1,235 1,221    16,384 2,213 2,113    32,768 3,749 3,637
    naive   1,024 1,166 1,201       4,096 2,470 2,648
    pr1855  1,024 2,626 2,587       2,048 3,641 3,882     4,096 6,195 6,473
with calibration and quantization after them:
    tiny    2,048 664 641    8,192 1,560 1,547    naive 1,024 1,398 1,295    4,096 2,635 2,648
    pr1855  1,024 4,725 4,337
CUDA (H200, allocated), 98,304 tokens, compiled:
    composed operators       pr1855 32,294 31,884 (without quantization)
    kernels of norm_mlp      pr1855 25,240 24,711    pr1787 24,458 24,036
                             pr1394 21,471 21,550    pr1493 23,951 24,036
    one step of the bench    pr1855 24,124 24,132, with the loop off 16,672 16,676
      composed                      31,866 31,884                    21,688 21,692
tests/train/test_memory.py holds the estimate to 10 % of the first, to 5 % of the second, and for the step of
the bench to 10 % and never less.
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

from pgolf.config import Config, ModelConfig, OptimConfig
from pgolf.env import ranks_on_this_host
from pgolf.errors import UserError
from pgolf.model.gpt import layer_order, parameter_shapes
from pgolf.ops._hopper import has_kernels
from pgolf.optim.update_rules import square_size

MARGIN = 1.1
"""This many times the estimate must be there: the estimate is right to about 10 %."""
SLACK = 0.9
"""Fraction of the memory that is free now for which a smaller micro-batch is proposed."""
NO_GPU = (
    ". This run is on the CPU, which is hundreds of times slower than a GPU; to try pgolf here, take the "
    "preset tiny with a tokenizer of 1,024 tokens"
)
PROCESS = 310 << 20
"""Bytes of Python, torch and libraries in a CPU process. On a GPU they are not in the memory that is free."""
HEAP, HEAP_WIDE, HEAP_LARGEST = 1.42, 1.3, 32 << 20
"""Bytes of the heap over live bytes while a step runs, for tensors as wide as the model and for tensors as
wide as its MLP (narrower ones fit into the holes of those); and the bytes from which on a tensor has pages of
its own."""
EAGER_BF16 = 1.25
"""Elements of eager bfloat16 over those of float32: parts of rotation and exclusion are float32 there."""
HEAP_LEFT = 0.85
"""Fraction of that heap that is still held after the steps, when rounding begins."""
HEAP_AGAIN = 0.4
"""Fraction of that heap that the passes of the calibration take in addition, as its holes do not fit them."""
FACTOR_COPIES = 9
"""Stacks of Hessians alive at once while the largest is blended and factored (6 without blending)."""
SMALLEST = 16
"""Smallest data.micro_tokens that is proposed."""

BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")


class Place(Protocol):
    """The part of `pgolf.dist.Dist` that is needed."""

    device: torch.device
    world_size: int

    def share(self, values: list[float]) -> list[float]:
        """Return rank 0's values on every rank."""

    def check(self, error: str | None) -> None:
        """Raise on every rank if one passes a message."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank. The parts are those at the peak over all phases, and add up to `total`."""

    process: int
    """Python and its libraries, on a CPU."""
    weights: int
    gradients: int
    averages: int
    optimizer: int
    """Momentum, moments, updates, the buffers of the collectives and the pool of a captured step."""
    copies: int
    """Copies of weights: those kept through the warm-up or quantization, those cast for the blocks, and the
    gradients of banks."""
    activations: int
    """Kept for the backward pass, with the loop on; on a CPU with the heap's holes."""
    loss: int
    """The loss's factor, the gradients it begins with, and on a CPU those of one block."""
    graphs: int
    """The pass that train.capture keeps as CUDA graphs, in memory that nothing else can use."""
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


def estimate_memory(
    config: Config, *, device_type: str, world_size: int, attention: str, kernels: bool = False
) -> MemoryEstimate:
    """Return what one rank needs at the peak of its phases: steps with the loop on, calibration, rounding.

    Args:
        device_type: "cuda" (bfloat16) or another (float32, eager). attention: kernel, for what sdpa copies.
        kernels: the GPU has the kernels of `norm_mlp`, see `ops._hopper`.
    """
    cuda, model = device_type == "cuda", config.model
    size = 2 if cuda else 4
    shapes = parameter_shapes(model)
    weights = 4 * sum(map(prod, shapes.values()))
    banks = 4 * sum(prod(shapes[name]) for name in BANKS)
    averages = weights if config.optim.averages else 0
    activations, in_heap = _activations(config, cuda=cuda, attention=attention, kernels=kernels)
    tokens, row = config.data.micro_tokens, model.vocab_size * size
    loss = tokens * (row + 2 * model.width * size) + shapes["tok_emb"][0] * model.width * 4
    # Eagerly, each step of a block's backward pass is a tensor of its own.
    loss += 0 if cuda else int(HEAP * tokens * size * (8 * model.width + model.hidden))
    qkv = model.layers * (model.width + 2 * model.kv_width) * model.width
    transient = weights // 2 + qkv * size if cuda else banks + qkv * size
    # Rounded copies of the banks, which the gradients of the scales need; one of them packed for a moment.
    rounded = (banks + banks // 4) * (config.train.fake_quant_from > 0)
    # The peak is that of the phase that needs most; weights, gradients, averages and optimizer are there in
    # all of them and are added below.
    kept = weights * (2 if averages else 1)  # raw and averaged weights, from the end of training on
    steps = weights + transient + rounded + activations + loss
    left = int(HEAP_LEFT * in_heap)
    calibrating = rounding = 0
    if config.train.quantize:
        hessians, grams, largest = _hessians(model)
        blending, drift = config.quant.row_scales == "loss", config.quant.drift > 0
        known = hessians + (grams if blending else 0)
        # The two moments of the inputs' drift, and the weights of both models.
        known += (2 * hessians + 2 * weights) * drift
        # With the curvature the backward pass runs while all that is held; Hessians need a forward pass only.
        # The drift needs the inputs of all matrices, which are fewer than the activations of a step.
        calibrating = kept + known + transient + activations + loss if blending or drift else 0
        calibrating += int(HEAP_AGAIN * in_heap) if blending else 0
        copies = FACTOR_COPIES if blending else FACTOR_COPIES - 3
        rounding = kept + known + max(left, 2 * (grams - largest)) + copies * largest
        rounding += (2 * grams + banks) * drift  # Hessians, factors and corrected weights of all banks
    peak = max(steps, calibrating, rounding)
    if peak == rounding > max(steps, calibrating):
        # The heap still holds the activations; what else is there is quantization.
        parts = {"copies": kept, "activations": left, "loss": 0}
    else:
        copies = weights + transient + (rounded if peak == steps else 0)
        parts = {"copies": copies, "activations": activations, "loss": loss}
    # The graphs share the memory of the largest pass; batches that are launched, and calibration, need more.
    captured = (transient + rounded + activations + loss) * (cuda and config.train.capture)
    return MemoryEstimate(
        process=0 if cuda else PROCESS,
        weights=weights,
        gradients=weights,
        averages=averages,
        optimizer=_optimizer(shapes, world_size, size, config.optim),
        graphs=captured,
        quantization=peak - sum(parts.values()),
        **parts,
    )


def _activations(config: Config, *, cuda: bool, attention: str, kernels: bool) -> tuple[int, int]:
    """Return the bytes of one micro-batch's activations, and how many of them a CPU's heap holds."""
    c, tokens = config.model, config.data.micro_tokens
    compiled = cuda and config.train.compile != "off"
    encoder, decoder = layer_order(c, loop=True)
    exclusive, gated = c.xsa_layers / c.layers, c.head_gate != "none"
    skips = (c.skip != "none" and not c.resid_mix) * min(len(encoder), len(decoder))
    lanes = (c.layers - c.parallel_from) * c.lanes
    if compiled:
        wide = 5.0 + c.resid_mix + (gated or exclusive > 0) + (c.rope_dims > 0)
        narrow, hidden, ends = 3.0, 2.0, 4 + c.smear_gate + skips / 2
    else:
        wide = 9 + c.resid_mix + gated + exclusive + (cuda and attention == "sdpa")
        narrow, hidden = 3.0, 3.0
        smears = c.smear_gate * (2 if c.smear_kind == "token" else 1)
        ends = 3 + smears + skips + max(2 * lanes - 1, 0) + lanes * (c.skip != "none" and c.resid_mix)
        # Joint layers have no stream between attention and MLP.
        ends -= sum(i >= c.parallel_from for i in encoder + decoder) * (c.parallel == "gptj")
    if cuda and kernels:
        wide, hidden = wide - 1, 1 + 1 / 16
    runs = len(encoder) + len(decoder)
    # What MUDD connections keep was counted eagerly: two norms and two sums, a mean of lanes, their networks.
    ends += (c.mudd > 0) * (4 + (lanes > 1))
    # Numbers per token: sums of the softmax; compiled also the roots of all norms, in float32.
    numbers = 8 * c.heads + compiled * (2 * (c.heads + c.kv_heads) + 12)
    streams = c.width * (runs * wide + ends) + runs * (c.kv_width * narrow + numbers) + 4 * c.mudd
    wanted = ((streams, c.width, HEAP), (runs * hidden * c.hidden, c.hidden, HEAP_WIDE))
    if cuda:
        elements = sum(count for count, _, _ in wanted) * (1 if compiled else EAGER_BF16)
        return int(2 * tokens * elements), 0
    # On a CPU a tensor under HEAP_LARGEST bytes is in the heap and counts with its holes.
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


def _optimizer(shapes: dict[str, tuple[int, ...]], world_size: int, size: int, config: OptimConfig) -> int:
    """Return the bytes of Muon's, AdamW's and EMA-Nesterov's state on one rank."""
    counts = {name: -(-shapes[name][0] // world_size) for name in BANKS}
    share = size * sum(count * prod(shapes[name][1:]) for name, count in counts.items())
    squares = 4 * sum(count * square_size(*shapes[name][1:]) for name, count in counts.items())
    rest = sum(prod(shape) for name, shape in shapes.items() if name not in BANKS)
    # Momentum and update; with several ranks also the averaged gradients of this rank's matrices, and the
    # buffer through which the updates of all ranks are gathered.
    muon = share * (2 if world_size == 1 else 3 + world_size) + squares * (config.muon.normalize > 0)
    muon += share // size * 4 * (config.muon.slow_age > 0)
    if size == 2 and world_size == 1:
        # The step is a CUDA graph, whose temporary tensors have a pool of their own: a float32 gradient of
        # all banks.
        muon += share // size * 4 * (config.muon.slow_age > 0)
    ahead = 2 * 4 * sum(map(prod, shapes.values())) * (config.ema_nesterov > 0)
    return muon + 2 * 4 * rest + ahead


def available_memory(device: torch.device, *, root: Path = Path("/")) -> int:
    """Return the bytes that this process may use in all: what it holds already and its share of the rest.

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
    config: Config, room: int, *, device_type: str, world_size: int, attention: str, kernels: bool = False
) -> int | None:
    """Return the largest data.micro_tokens that fits into `room` bytes and divides the batch; None: none."""
    # The divisors of a rank's tokens, in pairs about the square root; the largest that fits is the fastest.
    share = config.data.batch_tokens // world_size
    low = [d for d in range(1, isqrt(share) + 1) if share % d == 0]
    for micro in sorted({*low, *(share // d for d in low)} - set(range(SMALLEST)), reverse=True):
        smaller = replace(config, data=replace(config.data, micro_tokens=micro))
        found = estimate_memory(
            smaller, device_type=device_type, world_size=world_size, attention=attention, kernels=kernels
        )
        if MARGIN * found.total <= room:
            return micro
    return None


def check_memory(config: Config, dist: Place, *, attention: str) -> str:
    """Compare the estimate with the memory that there is; return the sentence for the log.

    Every rank calls it.

    Raises:
        UserError: it does not fit (by rank 0's figures, so on every rank); names the parts, what there is,
            and the flag with the largest micro-batch that would fit.
        RanksFailed: it fits on rank 0 and not on another rank.
    """
    kind, world = dist.device.type, dist.world_size
    kernels = has_kernels("norm_mlp_up", kind, dist.device.index)
    found = estimate_memory(config, device_type=kind, world_size=world, attention=attention, kernels=kernels)
    own = available_memory(dist.device)
    # By rank 0's memory first, so that the usual refusal, on equal machines, is one sentence and not one per
    # rank; then each rank by its own.
    whole = int(dist.share([float(own)])[0])
    error = _refusal(config, found, whole, kind, world, attention, kernels)
    if error is not None:
        raise UserError(error)
    dist.check(_refusal(config, found, own, kind, world, attention, kernels))
    return (
        f"memory: about {gib(found.total)} at the peak of {gib(whole)} {_for_whom(world)} ({found.parts()})"
    )


def _for_whom(world_size: int) -> str:
    return "available" if world_size == 1 else "available to each rank"


def _refusal(
    config: Config,
    found: MemoryEstimate,
    room: int,
    kind: str,
    world_size: int,
    attention: str,
    kernels: bool,
) -> str | None:
    """Return why `found` does not fit into `room` bytes, and what would; None where it fits."""
    if MARGIN * found.total <= room:
        return None
    # With slack, because the memory that is free changes from one command to the next.
    micro = fitting_micro_tokens(
        config,
        int(SLACK * room),
        device_type=kind,
        world_size=world_size,
        attention=attention,
        kernels=kernels,
    )
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
        f"{'' if kind == 'cuda' else NO_GPU}"
    )
