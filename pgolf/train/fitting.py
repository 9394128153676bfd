"""The batch of a preset on the GPUs at hand: presets are written for eight, and most people have one."""

from __future__ import annotations

from dataclasses import replace

import torch

from pgolf.config import Config
from pgolf.ops._hopper import has_kernels
from pgolf.train.memory import MARGIN, estimate_memory, fitting_micro_tokens

LEAST_MICRO_BATCHES = 2
"""Micro-batches of a training step on one GPU. Of 98,304 tokens, two per step train `pr1855` better in 600 s
than the eight of the full batch, with which one GPU takes too few steps."""


def fit_batch(config: Config, world_size: int, per_gpu: int) -> Config:
    """Return the settings with a training step that suits `world_size` GPUs, at most the preset's own.

    `per_gpu` tokens for each GPU, and twice as many on a single one: for `pr1855` 196,608 tokens on one and
    two GPUs, 393,216 on four, 786,432 on eight.
    """
    tokens = min(config.data.batch_tokens, per_gpu * max(LEAST_MICRO_BATCHES, world_size))
    return replace(config, data=replace(config.data, batch_tokens=tokens))


def fit_micro_batch(config: Config, world_size: int, room: int, *, kernels: bool) -> Config:
    """Return the settings with the largest micro-batch that fits into a GPU's memory of `room` bytes.

    The step keeps its tokens, so the result changes by rounding only. Where not even the smallest fits, the
    settings are returned as they are, and the check before the run says what to do.

    Args:
        kernels: as in `estimate_memory`.
    """
    found = estimate_memory(
        config, device_type="cuda", world_size=world_size, attention="auto", kernels=kernels
    )
    if MARGIN * found.total <= room:
        return config
    micro = fitting_micro_tokens(
        config, room, device_type="cuda", world_size=world_size, attention="auto", kernels=kernels
    )
    if micro is None or micro > config.data.micro_tokens:
        return config
    return replace(config, data=replace(config.data, micro_tokens=micro))


def fit_to_gpus(config: Config, world_size: int, *, per_gpu: int | None, micro: bool) -> tuple[Config, str]:
    """Return settings that suit the GPUs of this host, and a sentence for the log; "" if nothing changes.

    Without a GPU nothing changes. All ranks of a host get the same result, because the smallest of its GPUs
    decides.

    Args:
        per_gpu: tokens of the preset's micro-batch; None: the user has set data.batch_tokens, which stays.
        micro: whether data.micro_tokens may change, because the user did not set it.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() and config.train.device != "cpu" else 0
    if not count:
        return config, ""
    fitted = config if per_gpu is None else fit_batch(config, world_size, per_gpu)
    if micro:
        room = min(torch.cuda.get_device_properties(i).total_memory for i in range(count))
        kernels = all(has_kernels("norm_mlp_up", "cuda", i) for i in range(count))
        fitted = fit_micro_batch(fitted, world_size, int(0.97 * room), kernels=kernels)
    changes = [
        f"data.{name} is {ours:,} (the preset has {theirs:,})"
        for name in ("batch_tokens", "micro_tokens")
        if (ours := getattr(fitted.data, name)) != (theirs := getattr(config.data, name))
    ]
    if not changes:
        return config, ""
    gpus = "1 GPU" if world_size == 1 else f"{world_size} GPUs"
    return fitted, f"on {gpus} {' and '.join(changes)}; set them to choose other values"
