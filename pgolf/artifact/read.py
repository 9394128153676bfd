"""From a file to a model: verify, decompress, dequantize.

Nothing of the trainer is needed. Every malformed file gives `ArtifactError`; see `format.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgolf.artifact.codec import decompress, in_threads, join_bytes
from pgolf.artifact.format import Reader
from pgolf.artifact.header import (
    MAX_RAW_BYTES,
    ArtifactError,
    Header,
    Section,
    SectionPlan,
    TensorEntry,
    correction_sizes,
    matrix_shapes,
)
from pgolf.config import Coder, ModelConfig
from pgolf.model.gpt import GPT
from pgolf.ops import decode_codes
from pgolf.quant.grid import LEAST_EXPONENT, MOST_EXPONENT, QuantizedTensor, from_exponents, max_code
from pgolf.quant.lqer import Correction
from pgolf.quant.quantized import QuantizedState, dequantize_state

MAX_REPEATS = 64
"""Most repeats of the recurrent layers: the order of the layers is built in memory. PR #1855 has 2."""


THREADS_PAY = 1 << 20
"""Decoded bytes below which starting threads takes longer than decoding."""


@dataclass(frozen=True)
class Artifact:
    """What a file holds."""

    header: Header
    """Model configuration, tokenizer and configuration hashes, directory and section table."""
    state: dict[str, Tensor]
    """Parameter name -> float32 CPU tensor."""

    @property
    def model_config(self) -> ModelConfig:
        """The network that the parameters belong to."""
        return self.header.model


def load_model(path: Path, device: torch.device | str) -> GPT:
    """Return the model of an artifact, on `device`, in evaluation mode, not compiled.

    Raises:
        FileNotFoundError: no such file. ArtifactError: a malformed file, or parameters that do not fit the
            file's own model configuration.
    """
    return build_model(read_artifact(path), device)


def build_model(artifact: Artifact, device: torch.device | str) -> GPT:
    """Return the model of an artifact that has been read; otherwise as `load_model`."""
    _check_shapes(artifact)
    with torch.device("meta"):  # initialization would cost seconds and be overwritten
        model = GPT(artifact.model_config)
    try:
        model.load_state_dict(artifact.state, assign=True)
    except RuntimeError as e:
        detail = " ".join(str(e).split())
        raise ArtifactError(f"artifact: parameters do not fit the model configuration: {detail}") from e
    return model.prepare(torch.device(device)).eval()


def read_artifact(path: Path) -> Artifact:
    """Return the header and the dequantized parameters of an artifact.

    Raises:
        FileNotFoundError: no such file.
        ArtifactError: not an artifact, truncated, corrupt, or contradictory; the message says where.
        RuntimeError: brotli is missing.
    """
    header, state = read_state(path)
    return Artifact(header, dequantize_state(state))


def read_state(path: Path) -> tuple[Header, QuantizedState]:
    """Return the header and the parameters as stored (codes, scales, float16); raises as `read_artifact`."""
    with open_artifact(path) as reader:
        return decode_artifact(reader)


def decode_artifact(reader: Reader) -> tuple[Header, QuantizedState]:
    """Read all sections and decode them; raises `ArtifactError` as `read_artifact`."""
    stored = list(reader.sections())
    return reader.header, _assemble(reader.header, _decode(stored, reader.header.coder))


@contextmanager
def open_artifact(path: Path) -> Iterator[Reader]:
    """Yield the reader of a file, which has checked the header; raises as `read_artifact`."""
    if not path.exists():
        raise FileNotFoundError(f"no artifact at {path}; a run writes one: pgolf train PRESET")
    if not path.is_file():
        raise ArtifactError(f"{path} is not a regular file, expected an artifact")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size  # of this file, not of one that replaces it meanwhile
        if size > MAX_RAW_BYTES:
            raise ArtifactError(f"{path} has {size} bytes, an artifact has at most {MAX_RAW_BYTES}")
        try:
            yield Reader(file, size)
        except ArtifactError as e:
            raise ArtifactError(f"{path}: {e}") from e


Raw = bytes | NDArray[np.int8]


def _decode(stored: list[tuple[Section, bytes]], coder: Coder) -> dict[str, Raw]:
    """Return every section decoded, by name; threads decode each matrix after its pool."""
    chains: dict[str, list[tuple[Section, bytes]]] = {}
    for item in stored:
        plan = item[0].plan
        chains.setdefault(plan.pool or plan.name, []).append(item)
    # A pool goes first in its chain; the longest chain starts first.
    ordered = [sorted(chain, key=lambda item: item[0].plan.pool is not None) for chain in chains.values()]
    ordered.sort(key=lambda chain: -sum(section.plan.raw for section, _ in chain))
    small = sum(section.plan.raw for section, _ in stored) < THREADS_PAY
    work = partial(_decode_chain, coder=coder)
    parts = map(work, ordered) if small else in_threads(work, ordered)
    return {name: raw for part in parts for name, raw in part.items()}


def _decode_chain(chain: list[tuple[Section, bytes]], coder: Coder) -> dict[str, Raw]:
    done: dict[str, Raw] = {}
    for section, stream in chain:
        plan = section.plan
        pool = done[plan.pool] if plan.pool is not None else None
        assert not isinstance(pool, bytes)
        try:
            done[plan.name] = _unpack(plan, stream, pool, coder)
        except ValueError as e:  # CodecError, or what decode_codes says
            raise ArtifactError(f"artifact section {plan.name!r}: {e}") from e
    return done


def _unpack(plan: SectionPlan, stream: bytes, pool: NDArray[np.int8] | None, coder: Coder) -> Raw:
    if plan.kind != "codes":
        return decompress(stream, raw_length=plan.raw)
    rows, cols = plan.shape
    if plan.transposed:
        rows, cols = cols, rows
    if coder == "range":
        codes = decode_codes(stream, (rows, cols), pool=pool)
    else:
        raw = decompress(stream, raw_length=plan.raw, coder=coder)
        codes = np.frombuffer(raw, np.int8).reshape(rows, cols)
    return codes.T if plan.transposed else codes


def _assemble(header: Header, raws: dict[str, Raw]) -> QuantizedState:
    """Return the parameters out of the decoded sections."""
    matrices, gates, small = (
        [t for t in header.tensors if t.kind == kind] for kind in ("matrix", "gate", "small")
    )
    codes = [_matrices(t, raws) for t in matrices]
    stored = _positive(raws["scales"], "scales")
    plain = [t for t in (*matrices, *gates) if t.steps == "float16"]
    scales = dict(zip((t.name for t in plain), _split(stored, [t.shape[:-1] for t in plain]), strict=True))
    rows, columns = _log_scales([t for t in matrices if t.steps == "log"], raws)
    gate_codes = torch.from_numpy(np.frombuffer(_bytes(raws["gates"]), np.int8).copy())
    codes += _split(gate_codes, [t.shape for t in gates])
    coded = {
        t.name: _coded(t, c, (scales | rows)[t.name], columns.get(t.name))
        for t, c in zip((*matrices, *gates), codes, strict=True)
    }
    values = _split(_floats(raws["small"], "small"), [t.shape for t in small])
    return QuantizedState(
        quantized={t.name: coded[t.name] for t in matrices},
        gates={t.name: coded[t.name] for t in gates},
        small={t.name: v for t, v in zip(small, values, strict=True)},
        corrections=_corrections(header, raws),
    )


def _log_scales(
    tensors: list[TensorEntry], raws: dict[str, Raw]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the scales of rows and the factors of columns that are stored as exponents, by parameter."""
    groups = [size for t in tensors for size in t.groups]
    centers = join_bytes(_bytes(raws["centers"]), np.int16).astype(int)
    exponents = np.frombuffer(_bytes(raws["exponents"]), np.int8).astype(int) + np.repeat(centers, groups)
    if exponents.size and not LEAST_EXPONENT <= exponents.min() <= exponents.max() <= MOST_EXPONENT:
        raise ArtifactError(
            f"artifact section 'exponents': must lie in [{LEAST_EXPONENT}, {MOST_EXPONENT}] eighths of an "
            f"octave, got {exponents.min()} to {exponents.max()}"
        )
    parts = iter(torch.split(from_exponents(torch.from_numpy(exponents)), groups))
    rows, columns = {}, {}
    for t in tensors:
        pairs = [(next(parts), next(parts) if t.columns else None) for _ in range(math.prod(t.shape[:-2]))]
        rows[t.name] = torch.cat([row for row, _ in pairs]).reshape(t.shape[:-1])
        factors = [column for _, column in pairs if column is not None]
        if factors:
            columns[t.name] = torch.cat(factors).reshape(*t.shape[:-2], t.shape[-1])
    return rows, columns


def _corrections(header: Header, raws: dict[str, Raw]) -> dict[str, Correction]:
    shapes = {t.name: t.shape for t in header.tensors}
    codes = torch.from_numpy(np.frombuffer(_bytes(raws["corrections"]), np.int8).copy())
    scales = _floats(raws["correction_scales"], "correction_scales")
    sizes = [correction_sizes(c, shapes[c.name]) for c in header.corrections]
    factors = iter(torch.split(codes, [size for a, b, _, _ in sizes for size in (a, b)]))
    grids = iter(torch.split(scales, [size for _, _, a, b in sizes for size in (a, b)]))
    return {
        f"{c.name}.{c.index}": Correction(
            left=next(factors).reshape(-1, c.rank),
            left_scales=next(grids),
            right=next(factors).reshape(c.rank, -1),
            right_scales=next(grids),
            group=c.group,
        )
        for c in header.corrections
    }


def _matrices(tensor: TensorEntry, raws: dict[str, Raw]) -> Tensor:
    """Return a matrix parameter's codes in its own shape; each section is one matrix."""
    names = [tensor.name]
    if len(tensor.shape) == 3:
        names = [f"{tensor.name}.{i}" for i in range(tensor.shape[0])]
    codes = np.empty((len(names), *tensor.shape[-2:]), np.int8)
    for matrix, name in zip(codes, names, strict=True):
        matrix[:] = raws.pop(name)
    return torch.from_numpy(codes).reshape(tensor.shape)


def _coded(tensor: TensorEntry, codes: Tensor, scales: Tensor, columns: Tensor | None) -> QuantizedTensor:
    largest = max(int(codes.max()), -int(codes.min()))
    if largest > max_code(tensor.bits):
        raise ArtifactError(
            f"artifact tensor {tensor.name!r}: code magnitude {largest} is not on a {tensor.bits}-bit grid"
        )
    return QuantizedTensor(codes, scales, tensor.bits, columns, tensor.trellis)


def _bytes(raw: Raw) -> bytes:
    assert isinstance(raw, bytes)
    return raw


def _floats(raw: Raw, name: str) -> Tensor:
    values = join_bytes(_bytes(raw))
    if not bool(np.isfinite(values).all()):
        raise ArtifactError(f"artifact section {name!r} holds NaN or infinity")
    return torch.from_numpy(values)


def _positive(raw: Raw, name: str) -> Tensor:
    scales = _floats(raw, name)
    if not bool((scales > 0).all()):
        raise ArtifactError(f"artifact section {name!r} holds a scale that is not positive")
    return scales


def _split(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return consecutive parts of a flat tensor in these shapes."""
    parts = torch.split(flat, [math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _check_shapes(artifact: Artifact) -> None:
    """Refuse a configuration that would build another, perhaps enormous, network than the file holds."""
    config = artifact.model_config
    repeats = config.recurrence_repeats
    if repeats > MAX_REPEATS:
        raise ArtifactError(
            f"artifact model: recurrence_repeats must be at most {MAX_REPEATS}, got {repeats}"
        )
    for name, shape in matrix_shapes(config).items():
        got = tuple(artifact.state[name].shape) if name in artifact.state else None
        if got != shape:
            raise ArtifactError(
                f"artifact parameter {name!r}: the model needs shape {shape}, the file has {got}"
            )
