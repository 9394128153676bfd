"""From a file to a model: verify, decompress, dequantize.

Reads with nothing of the trainer present. Every malformed file gives `ArtifactError`; see `format.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgolf.artifact.codec import decompress, in_threads, join_bytes
from pgolf.artifact.format import Reader
from pgolf.artifact.header import MAX_RAW_BYTES, ArtifactError, Header, Section, TensorEntry, matrix_shapes
from pgolf.config import ModelConfig
from pgolf.model.gpt import GPT
from pgolf.ops import decode_codes
from pgolf.quant.grid import QuantizedTensor, max_code
from pgolf.quant.state import QuantizedState, dequantize_state

MAX_LOOPS = 64
"""The layer order is built in memory from `loops`; the record uses 2."""


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
    """Return the header and the parameters as stored: codes, steps and float16; raises as `read_artifact`."""
    with open_artifact(path) as reader:
        raws = in_threads(_unpack, reader.sections())
    return reader.header, _assemble(reader.header.tensors, raws)


@contextmanager
def open_artifact(path: Path) -> Iterator[Reader]:
    """Yield a file's reader, whose header has been read and checked; raises as `read_artifact`."""
    size = _file_size(path)
    with path.open("rb") as file:
        yield Reader(file, size)


def _file_size(path: Path) -> int:
    if not path.exists():
        raise FileNotFoundError(f"no artifact at {path}; a run writes one: python -m pgolf train PRESET")
    if not path.is_file():
        raise ArtifactError(f"{path} is not a regular file, expected an artifact")
    size = path.stat().st_size
    if size > MAX_RAW_BYTES:
        raise ArtifactError(f"{path} has {size} bytes, an artifact has at most {MAX_RAW_BYTES}")
    return size


def _unpack(item: tuple[Section, bytes]) -> bytes:
    section, stream = item
    plan = section.plan
    try:
        if plan.kind == "codes":
            return decode_codes(stream, (plan.shape[0], plan.shape[1])).tobytes()
        return decompress(stream, raw_length=plan.raw)
    except ValueError as e:  # CodecError, or what decode_codes says
        raise ArtifactError(f"artifact section {plan.name!r}: {e}") from e


def _assemble(tensors: tuple[TensorEntry, ...], raws: list[bytes]) -> QuantizedState:
    """Return the parameters out of the sections' raw bytes, which come in the order of `plan_sections`."""
    matrices, gates, small = ([t for t in tensors if t.kind == kind] for kind in ("matrix", "gate", "small"))
    sections = iter(raws)
    codes = [_matrices(t, sections) for t in matrices]
    steps = _floats(next(sections), "scales")
    if not bool((steps > 0).all()):
        raise ArtifactError("artifact section 'scales' holds a step that is not positive")
    gate_codes = torch.from_numpy(np.frombuffer(next(sections), np.int8).copy())
    codes += _split(gate_codes, [t.shape for t in gates])
    scales = _split(steps, [t.shape[:-1] for t in (*matrices, *gates)])
    coded = [_coded(t, c, s) for t, c, s in zip((*matrices, *gates), codes, scales, strict=True)]
    values = _split(_floats(next(sections), "small"), [t.shape for t in small])
    return QuantizedState(
        quantized={t.name: q for t, q in zip(matrices, coded, strict=False)},
        gates={t.name: q for t, q in zip(gates, coded[len(matrices) :], strict=True)},
        small={t.name: v for t, v in zip(small, values, strict=True)},
    )


def _matrices(tensor: TensorEntry, sections: Iterator[bytes]) -> Tensor:
    """Return a matrix parameter's codes in its own shape; each section is one matrix, row-major."""
    raw = bytearray().join(next(sections) for _ in range(math.prod(tensor.shape[:-2])))
    return torch.from_numpy(np.frombuffer(raw, np.int8)).reshape(tensor.shape)


def _coded(tensor: TensorEntry, codes: Tensor, scales: Tensor) -> QuantizedTensor:
    largest = int(codes.abs().max()) if int(codes.min()) > -128 else 128
    if largest > max_code(tensor.bits):
        raise ArtifactError(
            f"artifact tensor {tensor.name!r}: code magnitude {largest} is not on a {tensor.bits}-bit grid"
        )
    return QuantizedTensor(codes, scales, tensor.bits)


def _floats(raw: bytes, name: str) -> Tensor:
    values = join_bytes(raw)
    if not bool(np.isfinite(values).all()):
        raise ArtifactError(f"artifact section {name!r} holds NaN or infinity")
    return torch.from_numpy(values)


def _split(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return consecutive parts of a flat tensor in these shapes."""
    parts = torch.split(flat, [math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _check_shapes(artifact: Artifact) -> None:
    """Refuse a configuration that would build another, perhaps enormous, network than the file holds."""
    config = artifact.model_config
    if config.loops > MAX_LOOPS:
        raise ArtifactError(f"artifact model: loops must be at most {MAX_LOOPS}, got {config.loops}")
    for name, shape in matrix_shapes(config).items():
        got = tuple(artifact.state[name].shape) if name in artifact.state else None
        if got != shape:
            raise ArtifactError(
                f"artifact parameter {name!r}: the model needs shape {shape}, the file has {got}"
            )
