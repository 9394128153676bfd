"""From a quantized state to a file: compress, count the bytes, refuse or write.

This module owns the order of bytes inside the sections; `read.py` is its inverse.
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
    CorrectionEntry,
    Header,
    ScaleForm,
    SectionPlan,
    TensorEntry,
    TensorKind,
    place_sections,
    plan_sections,
)
from pgolf.artifact.size import Ledger, check, make_ledger
from pgolf.config import Coder, Counted, ModelConfig
from pgolf.files import atomic_file
from pgolf.ops import encode_codes
from pgolf.quant.grid import QuantizedTensor, scale_exponents
from pgolf.quant.quantized import QuantizedState


def write_artifact(
    path: Path,
    state: QuantizedState,
    model: ModelConfig,
    *,
    tokenizer_sha256: str,
    config_hash: str,
    limit: int,
    quality: int = 11,
    coder: Coder = "range",
    program: Counted = "evaluate",
) -> Ledger:
    """Write the artifact atomically, or leave whatever was at `path` as it is.

    Args:
        path: file to write; a temporary file next to it is renamed over it at the end.
        state: from `Quantizer.quantize`.
        model: the configuration of the model that `state` belongs to.
        tokenizer_sha256: 64 hex digits. config_hash: 16 hex digits, from `pgolf.config.config_hash`.
        limit: counted bytes (file plus code) that are allowed.
        quality: of brotli; 11 for anything that counts, lower in tests.
        coder: what the codes of the matrices are written with. program: what is counted with the file.
    Returns:
        The ledger of the written file.
    Raises:
        ArtifactError: above the limit (with the ledger), or a state that the format cannot hold.
        FileNotFoundError: the folder of `path` does not exist.
    """
    facts = Facts(tokenizer_sha256, config_hash, limit, 1.0, coder, program)
    data, ledger = build_file(state, model, facts, quality=quality)
    check(ledger, limit, coder)
    save_file(path, data)
    return ledger


def save_file(path: Path, data: bytes) -> None:
    """Put a finished artifact at `path`, atomically."""
    with atomic_file(path) as file:
        file.write(data)


@dataclass(frozen=True)
class Facts:
    """What the header and the ledger say in addition to the parameters."""

    tokenizer_sha256: str
    config_hash: str
    limit: int
    clip_scale: float
    coder: Coder = "range"
    program: Counted = "evaluate"


def build_file(
    state: QuantizedState, model: ModelConfig, facts: Facts, *, quality: int
) -> tuple[bytes, Ledger]:
    """Return the complete file, which has been parsed once as a check, and its ledger."""
    tensors, corrections = _entries(state), _corrections(state)
    plans = plan_sections(tensors, corrections, facts.coder)
    encode = partial(_encode, quality=quality, coder=facts.coder)
    streams = in_threads(encode, _payloads(state, tensors, plans))
    sections = place_sections(plans, streams)
    header = Header(
        model,
        facts.tokenizer_sha256,
        facts.config_hash,
        facts.limit,
        tensors,
        corrections,
        sections,
        facts.coder,
    )
    data = frame(header, streams)
    if parse(data)[0] != header:
        raise ArtifactError("artifact header changes when it is written and read back; nothing was written")
    return data, make_ledger(header, file_bytes=len(data), clip_scale=facts.clip_scale, program=facts.program)


def _entries(state: QuantizedState) -> tuple[TensorEntry, ...]:
    """Return the entries of the parameters, checked against what the format can hold."""
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
                    f"artifact: {name} needs one scale per row {tuple(t.codes.shape[:-1])}, "
                    f"got {tuple(t.scales.shape)}"
                )
            form = _scale_form(name, t) if kind == "matrix" else "float16"
            shape = tuple(t.codes.shape)
            entries.append(
                TensorEntry(
                    name, cast(TensorKind, kind), shape, t.bits, form, t.columns is not None, t.trellis
                )
            )
    for name, small in state.small.items():
        if small.dtype != torch.float16:
            raise TypeError(f"artifact: {name} must be float16, got {small.dtype}")
        entries.append(TensorEntry(name, "small", tuple(small.shape), 16, "none", False))
    return tuple(entries)


def _scale_form(name: str, t: QuantizedTensor) -> ScaleForm:
    """Return how the scales of a matrix are stored: as exponents if all are on the logarithmic grid."""
    if t.columns is not None and t.columns.shape != (*t.codes.shape[:-2], t.codes.shape[-1]):
        raise ArtifactError(
            f"artifact: {name} needs one factor per column, got {tuple(t.columns.shape)} for "
            f"{tuple(t.codes.shape)}"
        )
    try:
        for group in _scale_groups(t):
            exponents = scale_exponents(group)
            if int(exponents.max()) - int(exponents.min()) > 255:
                raise ValueError("more than 256 eighths of an octave apart")
    except ValueError as e:
        if t.columns is not None:
            raise ArtifactError(f"artifact: {name} has factors of columns, but its scales: {e}") from e
        return "float16"
    return "log"


def _scale_groups(t: QuantizedTensor) -> list[Tensor]:
    """Return the scales of each matrix's rows and, if there are factors, of its columns, in file order."""
    groups = []
    stack = t.scales.reshape(-1, t.codes.shape[-2])
    factors = None if t.columns is None else t.columns.reshape(-1, t.codes.shape[-1])
    for i, rows in enumerate(stack):
        groups += [rows] if factors is None else [rows, factors[i]]
    return groups


def _corrections(state: QuantizedState) -> tuple[CorrectionEntry, ...]:
    """Return the entries of the low-rank corrections."""
    entries = []
    for key, c in state.corrections.items():
        name, _, index = key.rpartition(".")
        if c.left.dtype != torch.int8 or c.right.dtype != torch.int8:
            raise TypeError(f"artifact: the correction of {key} must have int8 codes, got {c.left.dtype}")
        rank = c.left.shape[-1]
        shape = state.quantized[name].codes.shape if name in state.quantized else ()
        if (c.left.shape[0], *c.right.shape) != (*shape[-2:-1], rank, *shape[-1:]):
            raise ArtifactError(
                f"artifact: the correction of {key} is {tuple(c.left.shape)} times {tuple(c.right.shape)}, "
                f"its matrices are {tuple(shape[-2:])}"
            )
        entries.append(CorrectionEntry(name, int(index), rank, c.left_scales.numel(), c.group))
    return tuple(entries)


@dataclass(frozen=True)
class _Matrix:
    """A matrix as it is coded, and the rows on which its rows may lean."""

    codes: NDArray[np.int8]
    pool: NDArray[np.int8] | None


def _encode(payload: _Matrix | bytes, *, quality: int, coder: Coder) -> bytes:
    if isinstance(payload, bytes):
        return compress(payload, quality=quality)
    return encode_matrix(payload.codes, payload.pool, quality=quality, coder=coder)


def encode_matrix(
    codes: NDArray[np.int8], pool: NDArray[np.int8] | None = None, *, coder: Coder, quality: int = 11
) -> bytes:
    """Return the stream of a matrix in the orientation in which it is coded; see `SectionPlan`.

    Args:
        codes: `(rows, cols)`. pool: rows that they may lean on, for the range coder.
        coder: what to write with. quality: of brotli.
    """
    if coder == "range":
        return encode_codes(codes, pool=pool)
    return compress(codes.tobytes(), quality=quality, coder=coder)


def _payloads(
    state: QuantizedState, tensors: tuple[TensorEntry, ...], plans: list[SectionPlan]
) -> list[_Matrix | bytes]:
    """Return every section's matrix or raw bytes, in the order of `plan_sections`."""
    matrices: dict[str, NDArray[np.int8]] = {}
    for name, t in state.quantized.items():
        stack = t.codes.reshape(-1, *t.codes.shape[-2:]).numpy()
        names = [name] if t.codes.dim() == 2 else [f"{name}.{i}" for i in range(len(stack))]
        matrices |= dict(zip(names, stack, strict=True))
    coded = [plan for plan in plans if plan.kind == "codes"]
    payloads: list[_Matrix | bytes] = [
        _Matrix(
            matrices[p.name].T if p.transposed else matrices[p.name], matrices[p.pool] if p.pool else None
        )
        for p in coded
    ]
    forms = {t.name: t.steps for t in tensors}
    everyone = (*state.quantized.items(), *state.gates.items())
    payloads.append(split_bytes(_flat([t.scales for name, t in everyone if forms[name] == "float16"])))
    payloads += _exponents([t for name, t in state.quantized.items() if forms[name] == "log"])
    payloads.append(b"".join(t.codes.contiguous().numpy().tobytes() for t in state.gates.values()))
    payloads.append(split_bytes(_flat(list(state.small.values()))))
    corrections = state.corrections.values()
    codes = [part.contiguous().numpy().tobytes() for c in corrections for part in (c.left, c.right)]
    scales = [part for c in corrections for part in (c.left_scales, c.right_scales)]
    return [*payloads, b"".join(codes), split_bytes(_flat(scales))]


def _exponents(tensors: list[QuantizedTensor]) -> list[bytes]:
    """Return the centers of the groups of logarithmic scales, and the exponents relative to them."""
    centers, exponents = [], [np.zeros(0, np.int8)]
    for group in (g for t in tensors for g in _scale_groups(t)):
        n = scale_exponents(group).numpy().astype(int)
        least, most = int(n.min()), int(n.max())
        # The median wastes least; the ends must be reachable with an int8.
        center = min(max(int(np.median(n)), most - 127), least + 128)
        centers.append(center)
        exponents.append((n - center).astype(np.int8))
    return [split_bytes(np.array(centers, np.int16)), np.concatenate(exponents).tobytes()]


def _flat(tensors: list[Tensor]) -> NDArray[np.float16]:
    empty = np.zeros(0, np.float16)
    return np.concatenate([empty, *(t.contiguous().numpy().reshape(-1) for t in tensors)])
