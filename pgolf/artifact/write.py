"""From a quantized state to a file: compress, count, refuse or write.

Owns the order of bytes inside the sections (with `read.py`, its inverse). The search for clips is `fit.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgolf.artifact.codec import compress, in_threads, split_bytes
from pgolf.artifact.format import frame, parse
from pgolf.artifact.header import (
    ArtifactError,
    Header,
    TensorEntry,
    TensorKind,
    place_sections,
    plan_sections,
)
from pgolf.artifact.size import Ledger, check, make_ledger
from pgolf.config import ModelConfig
from pgolf.data.shards import atomic_file
from pgolf.ops import encode_codes
from pgolf.quant.state import QuantizedState


def write_artifact(
    path: Path,
    state: QuantizedState,
    model: ModelConfig,
    *,
    tokenizer_sha256: str,
    config_hash: str,
    limit: int,
    quality: int = 11,
) -> Ledger:
    """Write the artifact atomically, or leave whatever was at `path` as it is.

    Args:
        path: file to write; a temporary file next to it is renamed over it at the end.
        state: from `quantize_model`.
        model: the configuration of the model that `state` belongs to.
        tokenizer_sha256: 64 hex digits. config_hash: 16 hex digits, from `pgolf.config.config_hash`.
        limit: counted bytes (file plus code) that are allowed.
        quality: brotli quality of all but the codes; 11 for anything that counts, lower in tests.
    Returns:
        The ledger of the written file.
    Raises:
        ArtifactError: above the limit (with the ledger), or a state that the format cannot hold.
        FileNotFoundError: the folder of `path` does not exist.
    """
    facts = Facts(tokenizer_sha256, config_hash, limit, 1.0)
    data, ledger = build_file(state, model, facts, quality=quality)
    check(ledger, limit)
    save_file(path, data)
    return ledger


def save_file(path: Path, data: bytes) -> None:
    """Put a finished artifact at `path`, atomically."""
    with atomic_file(path) as file:
        file.write(data)


@dataclass(frozen=True)
class Facts:
    """What the header and the ledger say besides the parameters."""

    tokenizer_sha256: str
    config_hash: str
    limit: int
    clip_scale: float


def build_file(
    state: QuantizedState, model: ModelConfig, facts: Facts, *, quality: int
) -> tuple[bytes, Ledger]:
    """Return the complete file and its ledger; the file has been parsed once to prove that it can be."""
    tensors = _entries(state)
    plans = plan_sections(tensors)
    streams = in_threads(partial(_encode, quality=quality), _payloads(state))
    sections = place_sections(plans, streams)
    header = Header(model, facts.tokenizer_sha256, facts.config_hash, facts.limit, tensors, sections)
    data = frame(header, streams)
    if parse(data)[0] != header:
        raise ArtifactError("artifact header changes when it is written and read back; nothing was written")
    return data, make_ledger(header, file_bytes=len(data), clip_scale=facts.clip_scale)


def _entries(state: QuantizedState) -> tuple[TensorEntry, ...]:
    """Return the directory of parameters, checked against what the format can hold."""
    entries = []
    for kind, group in (("matrix", state.quantized), ("gate", state.gates)):
        for name, t in group.items():
            if t.codes.dtype != torch.int8 or t.scales.dtype != torch.float16:
                raise TypeError(
                    f"artifact: {name} must have int8 codes and float16 scales, "
                    f"got {t.codes.dtype} and {t.scales.dtype}"
                )
            if t.scales.shape != t.codes.shape[:-1]:
                raise ArtifactError(
                    f"artifact: {name} needs one scale a row {tuple(t.codes.shape[:-1])}, "
                    f"got {tuple(t.scales.shape)}"
                )
            entries.append(TensorEntry(name, cast(TensorKind, kind), tuple(t.codes.shape), t.bits))
    for name, small in state.small.items():
        if small.dtype != torch.float16:
            raise TypeError(f"artifact: {name} must be float16, got {small.dtype}")
        entries.append(TensorEntry(name, "small", tuple(small.shape), 16))
    return tuple(entries)


def _encode(payload: NDArray[np.int8] | bytes, *, quality: int) -> bytes:
    return compress(payload, quality=quality) if isinstance(payload, bytes) else encode_codes(payload)


def _payloads(state: QuantizedState) -> list[NDArray[np.int8] | bytes]:
    """Return every section's codes or raw bytes, in the order of `plan_sections`."""
    payloads: list[NDArray[np.int8] | bytes] = []
    for t in state.quantized.values():
        stack = t.codes.reshape(-1, *t.codes.shape[-2:])
        payloads += list(stack.numpy())
    scales = [t.scales for t in (*state.quantized.values(), *state.gates.values())]
    payloads.append(split_bytes(_flat(scales)))
    payloads.append(b"".join(t.codes.contiguous().numpy().tobytes() for t in state.gates.values()))
    payloads.append(split_bytes(_flat(list(state.small.values()))))
    return payloads


def _flat(tensors: list[Tensor]) -> NDArray[np.float16]:
    empty = np.zeros(0, np.float16)
    return np.concatenate([empty, *(t.contiguous().numpy().reshape(-1) for t in tensors)])
