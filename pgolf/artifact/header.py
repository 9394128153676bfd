"""The header of an artifact: its parameters, its section table, and the JSON of both.

The layout of the file is in `format.py`, whose docstring specifies every key. Fields of the classes that go
into the JSON have the names of their keys.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from typing import Any, Literal, cast, get_args

from pgolf.config import Coder, ModelConfig, from_dict, to_dict
from pgolf.errors import UserError

MAX_RAW_BYTES = 1 << 30
MAX_SECTIONS = 4096

MODEL_KEYS = {
    "recurrence_start": "loop_start",
    "recurrence_end": "loop_end",
    "recurrence_repeats": "loops",
}
"""Settings of the model that have other names in format 4, which is older than the names."""
LATER: dict[str, Any] = {
    "leaky_slope": 0.5,
    "parallel": "lanes",
    "smear_over_bos": False,
    "smear_kind": "token",
    "smear_window": 0,
    "bigram_buckets": 0,
    "bigram_width": 128,
    "value_embed_layers": 0,
    "value_embed_width": 128,
    "mudd": 0,
    "xsa_strength": False,
    "logit_scale": 1.0,
}
"""Settings of the model that are newer than format 4, and what they are where a file does not name them: a
file names those that are something else, so that it does not change for models without the newer parts."""

GENERAL: tuple[Coder, ...] = get_args(Coder)[1:]
"""The general compressors. A file of the range coder names no coder, as before there were others."""

TensorKind = Literal["matrix", "gate", "small"]
ScaleForm = Literal["none", "float16", "log"]
_BITS = {"matrix": range(4, 9), "gate": range(8, 9), "small": range(16, 17)}


class ArtifactError(UserError):
    """A file that is not a readable artifact, or one that must not be written."""


@dataclass(frozen=True)
class TensorEntry:
    """One parameter: how it is stored, in the parameter's own shape."""

    name: str
    kind: TensorKind
    shape: tuple[int, ...]
    bits: int
    steps: ScaleForm
    """How the scales of its rows are stored; "none" for small ones. (Format 4 calls scales steps.)"""
    columns: bool
    """Whether its columns have factors on the scales, stored in the same form."""
    trellis: bool = False
    """Whether its codes mean values of `pgolf.ops.trellis_values`."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Number of rows, which is the number of scales of a matrix or gate."""
        return math.prod(self.shape[:-1])

    @property
    def groups(self) -> list[int]:
        """Sizes of the groups of its logarithmic scales: rows of each matrix and, if any, its columns."""
        if self.steps != "log":
            return []
        each = [self.shape[-2], self.shape[-1]] if self.columns else [self.shape[-2]]
        return each * math.prod(self.shape[:-2])


@dataclass(frozen=True)
class CorrectionEntry:
    """One low-rank correction A B of a matrix `(R, C)`: A is `(R, rank)`, B is `(rank, C)`."""

    name: str
    """Parameter."""
    index: int
    """Matrix in its bank, 0 for a plain matrix."""
    rank: int
    left_scales: int
    """Number of scales of A: 1, or R, one per row."""
    group: int
    """Elements of B that share a scale."""


@dataclass(frozen=True)
class SectionPlan:
    """What a section must be; it follows from the tensors."""

    name: str
    kind: Literal["codes", "steps", "gates", "small", "corrections"]
    dtype: Literal["int8", "int16", "float16"]
    shape: tuple[int, ...]
    transposed: bool = False
    """Whether the stream holds the transpose of the matrix."""
    pool: str | None = None
    """The section of codes on whose rows the rows of this one may lean."""

    @property
    def raw(self) -> int:
        """Bytes after decompression."""
        return math.prod(self.shape) * (1 if self.dtype == "int8" else 2)


@dataclass(frozen=True)
class Section:
    """One row of the section table."""

    plan: SectionPlan
    offset: int
    """From the end of the stored header, bytes."""
    length: int
    """Stored (compressed) bytes."""


@dataclass(frozen=True)
class Header:
    """Everything an artifact says about itself."""

    model: ModelConfig
    tokenizer_sha256: str
    config_hash: str
    limit: int
    tensors: tuple[TensorEntry, ...]
    corrections: tuple[CorrectionEntry, ...]
    sections: tuple[Section, ...]
    coder: Coder = "range"
    """What the sections of codes are written with."""


_HEADER_KEYS, _TENSOR_KEYS, _CORRECTION_KEYS, _PLAN_KEYS = (
    {f.name for f in dataclass_fields(kind)} for kind in (Header, TensorEntry, CorrectionEntry, SectionPlan)
)
_SECTION_KEYS = _PLAN_KEYS | {"offset", "length", "raw"}


def plan_sections(
    tensors: tuple[TensorEntry, ...], corrections: tuple[CorrectionEntry, ...] = (), coder: Coder = "range"
) -> list[SectionPlan]:
    """Return the sections that hold `tensors`, in file order (list of sections in `format.py`)."""
    banks = {t.name: t.shape for t in tensors if t.kind == "matrix"}
    plans = []
    for t in tensors:
        if t.kind == "matrix" and len(t.shape) == 2:
            plans.append(SectionPlan(t.name, "codes", "int8", t.shape))
        elif t.kind == "matrix":
            plans += [_bank_section(t, i, banks) for i in range(t.shape[0])]
    if coder != "range":
        plans = [replace(plan, transposed=True, pool=None) for plan in plans]
    scales = sum(t.rows for t in tensors if t.steps == "float16")
    groups = [size for t in tensors for size in t.groups]
    gates = sum(t.numel for t in tensors if t.kind == "gate")
    small = sum(t.numel for t in tensors if t.kind == "small")
    sizes = [correction_sizes(c, banks[c.name]) for c in corrections]
    plans.append(SectionPlan("scales", "steps", "float16", (scales,)))
    plans.append(SectionPlan("centers", "steps", "int16", (len(groups),)))
    plans.append(SectionPlan("exponents", "steps", "int8", (sum(groups),)))
    plans.append(SectionPlan("gates", "gates", "int8", (gates,)))
    plans.append(SectionPlan("small", "small", "float16", (small,)))
    plans.append(SectionPlan("corrections", "corrections", "int8", (sum(a + b for a, b, _, _ in sizes),)))
    plans.append(
        SectionPlan("correction_scales", "corrections", "float16", (sum(c + d for _, _, c, d in sizes),))
    )
    return plans


def correction_sizes(c: CorrectionEntry, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return the elements of A, of B, and their scales, for a correction of a parameter of this shape."""
    rows, cols = shape[-2:]
    return rows * c.rank, c.rank * cols, c.left_scales, -(-c.rank * cols // c.group)


def _bank_section(t: TensorEntry, index: int, banks: dict[str, tuple[int, ...]]) -> SectionPlan:
    """Return the section of one matrix of a bank; queries, outputs and MLP-down have a pool."""
    pool, transposed, shape = None, False, t.shape[1:]
    keys, up = banks.get("kv_bank", ()), banks.get("mlp_up_bank", ())
    if t.name == "qo_bank" and len(keys) == 3 and keys[0] == t.shape[0] and keys[2] == shape[0] == shape[1]:
        pool, transposed = f"kv_bank.{index}", index >= t.shape[0] // 2
    elif t.name == "mlp_down_bank" and up == (t.shape[0], shape[1], shape[0]):
        pool, transposed = f"mlp_up_bank.{index}", True
    return SectionPlan(f"{t.name}.{index}", "codes", "int8", shape, transposed, pool)


def matrix_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters that are stored as matrices."""
    layers, width = model.layers, model.width
    return {
        "tok_emb": (model.vocab_size, width),
        "qo_bank": (2 * layers, width, width),
        "kv_bank": (2 * layers, model.kv_width, width),
        "mlp_up_bank": (layers, model.hidden, width),
        "mlp_down_bank": (layers, width, model.hidden),
    }


def place_sections(plans: list[SectionPlan], streams: list[bytes]) -> tuple[Section, ...]:
    """Return the section table for streams that lie back to back."""
    sections, offset = [], 0
    for plan, stream in zip(plans, streams, strict=True):
        sections.append(Section(plan, offset, len(stream)))
        offset += len(stream)
    return tuple(sections)


def encode_header(header: Header) -> bytes:
    """Return the header's JSON, UTF-8, keys as in the docstring of `format.py`."""
    fields = {
        "model": _model_dict(header.model),
        "tokenizer_sha256": header.tokenizer_sha256,
        "config_hash": header.config_hash,
        "limit": header.limit,
        **({} if header.coder == "range" else {"coder": header.coder}),
        "tensors": [asdict(t) for t in header.tensors],
        "corrections": [asdict(c) for c in header.corrections],
        "sections": [_section_dict(s) for s in header.sections],
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def _model_dict(model: ModelConfig) -> dict[str, Any]:
    named = {key: value for key, value in to_dict(model).items() if key not in LATER or value != LATER[key]}
    return {MODEL_KEYS.get(key, key): value for key, value in named.items()}


def _section_dict(section: Section) -> dict[str, Any]:
    plan = section.plan
    place = {"offset": section.offset, "length": section.length, "raw": plan.raw}
    return vars(plan) | {"shape": list(plan.shape)} | place


def parse_header(text: bytes, *, raw_limit: int = MAX_RAW_BYTES) -> Header:
    """Return the header that `text` spells.

    Args:
        text: UTF-8 JSON.
        raw_limit: bytes that the sections may have after decoding.
    Raises:
        ArtifactError: not JSON, keys missing or unknown, values out of bounds, sections that do not fit the
            tensors, more raw bytes than are allowed.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ArtifactError(f"artifact header is not JSON: {e}") from e
    _keys({"coder": "range", **fields} if isinstance(fields, dict) else fields, _HEADER_KEYS, "header")
    coder = _parse_coder(fields)
    tensors = tuple(_parse_tensor(t) for t in _list(fields["tensors"], "tensors"))
    if len({t.name for t in tensors}) != len(tensors):
        raise ArtifactError("artifact header names a tensor twice")
    shapes = {t.name: t.shape for t in tensors if t.kind == "matrix"}
    corrections = tuple(_parse_correction(c, shapes) for c in _list(fields["corrections"], "corrections"))
    return Header(
        model=_parse_model(fields["model"]),
        tokenizer_sha256=_text(fields["tokenizer_sha256"], "[0-9a-f]{64}", "tokenizer_sha256"),
        config_hash=_text(fields["config_hash"], "[0-9a-f]{16}", "config_hash"),
        limit=_count(fields["limit"], "limit"),
        tensors=tensors,
        corrections=corrections,
        sections=_parse_sections(
            _list(fields["sections"], "sections"), tensors, corrections, coder, raw_limit
        ),
        coder=coder,
    )


def _parse_coder(fields: dict[str, Any]) -> Coder:
    coder = fields.get("coder", "range")
    if "coder" in fields and coder not in GENERAL:
        raise ArtifactError(
            f"artifact header: coder must be one of {GENERAL}, or absent for the range coder, got {coder!r}"
        )
    return cast(Coder, coder)


def _parse_model(value: object) -> ModelConfig:
    if not isinstance(value, dict):
        raise ArtifactError(f"artifact header: model must be an object, got {type(value).__name__}")
    names = {MODEL_KEYS.get(f.name, f.name): f.name for f in dataclass_fields(ModelConfig)}
    missing = sorted(names.keys() - value.keys() - LATER.keys())
    if missing:
        raise ArtifactError(
            f"artifact header: the model lacks {', '.join(missing)}; its writer left none out"
        )
    newer = sorted(MODEL_KEYS.keys() & value.keys())
    if newer:
        raise ArtifactError(f"artifact header: the model has the key {newer[0]}, which format 4 has not")
    idle = [key for key in LATER if key in value and value[key] == LATER[key]]
    if idle:
        raise ArtifactError(f"artifact header: the model names {idle[0]}, which is {LATER[idle[0]]} anyway")
    try:
        given = LATER | {names.get(str(k), str(k)): v for k, v in value.items()}
        return from_dict(ModelConfig, given, where="artifact model")
    except (ValueError, TypeError, ArithmeticError) as e:
        raise ArtifactError(f"artifact header: bad model configuration: {e}") from e


def _parse_tensor(row: object) -> TensorEntry:
    _keys(row, _TENSOR_KEYS, "tensor")
    assert isinstance(row, dict)
    name = _text(row["name"], r"[A-Za-z0-9_.]{1,64}", "tensor name")
    kind, bits = row["kind"], _count(row["bits"], f"bits of {name}")
    shape = tuple(_count(size, f"shape of {name}") for size in _list(row["shape"], f"shape of {name}"))
    if not isinstance(kind, str) or bits not in _BITS.get(kind, ()):
        raise ArtifactError(f"artifact tensor {name!r}: kind {kind!r} with {bits} bits is not known")
    wanted = {"matrix": (2, 3), "gate": (2, 3), "small": (0, 1, 2, 3)}[kind]
    if len(shape) not in wanted or math.prod(shape) > MAX_RAW_BYTES or 0 in shape:
        raise ArtifactError(f"artifact tensor {name!r}: shape {shape} is not possible for kind {kind!r}")
    steps, columns = row["steps"], row["columns"]
    forms = {"matrix": ("float16", "log"), "gate": ("float16",), "small": ("none",)}[kind]
    if steps not in forms or not isinstance(columns, bool) or (columns and steps != "log"):
        raise ArtifactError(
            f"artifact tensor {name!r}: steps {steps!r} with columns {columns!r} do not go with {kind!r}"
        )
    trellis = row["trellis"]
    if not isinstance(trellis, bool) or (trellis and kind != "matrix"):
        raise ArtifactError(f"artifact tensor {name!r}: trellis {trellis!r} does not go with {kind!r}")
    return TensorEntry(name, cast(TensorKind, kind), shape, bits, cast(ScaleForm, steps), columns, trellis)


def _parse_correction(row: object, shapes: dict[str, tuple[int, ...]]) -> CorrectionEntry:
    _keys(row, _CORRECTION_KEYS, "correction")
    assert isinstance(row, dict)
    name = _text(row["name"], r"[A-Za-z0-9_.]{1,64}", "correction name")
    numbers = {key: _count(row[key], f"{key} of a correction") for key in row if key != "name"}
    c = CorrectionEntry(name, **numbers)
    shape = shapes.get(name, ())
    count = shape[0] if len(shape) == 3 else 1
    if not shape or c.index >= count or not 1 <= c.rank <= min(shape[-2:]):
        raise ArtifactError(
            f"artifact correction of {name!r}: index {c.index} and rank {c.rank} fit no matrix"
        )
    if c.left_scales not in (1, shape[-2]) or not 1 <= c.group <= MAX_RAW_BYTES:
        raise ArtifactError(f"artifact correction of {name!r}: {c.left_scales} scales, groups of {c.group}")
    return c


def _parse_sections(
    rows: list[object],
    tensors: tuple[TensorEntry, ...],
    corrections: tuple[CorrectionEntry, ...],
    coder: Coder,
    raw_limit: int,
) -> tuple[Section, ...]:
    """Return the table; every row must be what the tensors call for."""
    count = sum(t.shape[0] if t.kind == "matrix" and len(t.shape) == 3 else 1 for t in tensors)
    if count > MAX_SECTIONS:
        raise ArtifactError(f"artifact has {count} matrices, at most {MAX_SECTIONS} are allowed")
    plans = plan_sections(tensors, corrections, coder)
    total = sum(plan.raw for plan in plans)
    if total > raw_limit:
        raise ArtifactError(
            f"artifact would unpack to {total} bytes, at most {raw_limit} are allowed for a file of its size"
        )
    if len(rows) != len(plans):
        raise ArtifactError(f"artifact has {len(rows)} sections, its tensors need {len(plans)}")
    sections = []
    for row, plan in zip(rows, plans, strict=True):
        _keys(row, _SECTION_KEYS, "section")
        assert isinstance(row, dict)
        offset = _count(row["offset"], f"offset of section {plan.name}")
        section = Section(plan, offset, _count(row["length"], f"length of section {plan.name}"))
        expected = _section_dict(section)
        if row != expected:
            raise ArtifactError(f"artifact section {plan.name!r}: expected {expected}, got {row}")
        sections.append(section)
    return tuple(sections)


def _keys(value: object, expected: set[str], what: str) -> None:
    if not isinstance(value, dict) or set(value) != expected:
        got = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise ArtifactError(f"artifact {what}: expected the keys {sorted(expected)}, got {got}")


def _list(value: object, what: str) -> list[object]:
    if not isinstance(value, list) or len(value) > MAX_SECTIONS:
        raise ArtifactError(f"artifact header: {what} must be a list of at most {MAX_SECTIONS} items")
    return value


def _count(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_RAW_BYTES:
        raise ArtifactError(f"artifact header: {what} must be an integer in [0, 2^30], got {value!r}")
    return value


def _text(value: object, pattern: str, what: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise ArtifactError(f"artifact header: {what} must match {pattern}, got {value!r}")
    return value
