"""What an artifact holds, as text or JSON, and its weights in a file that other tools read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from pgolf.artifact.format import MAGIC, VERSION
from pgolf.artifact.header import Header
from pgolf.artifact.read import open_artifact, read_artifact
from pgolf.artifact.size import make_ledger
from pgolf.config import to_dict
from pgolf.files import atomic_file


def describe(path: Path) -> dict[str, Any]:
    """Return what an artifact holds, as plain JSON data, without decoding its weights.

    Lengths and the checksum are checked; every section gets the SHA-256 of its stored bytes.

    Raises:
        FileNotFoundError: no such file. ArtifactError: not an artifact, truncated, corrupt or contradictory.
    """
    with open_artifact(path) as reader:
        header = reader.header
        rows = [
            {
                **asdict(section.plan),
                "offset": section.offset,
                "length": section.length,
                "raw": section.plan.raw,
                "sha256": hashlib.sha256(stream).hexdigest(),
            }
            for section, stream in reader.sections()
        ]
    size = path.stat().st_size
    return {
        "magic": MAGIC.decode(),
        "version": VERSION,
        "bytes": size,
        "sha256": reader.digest.hex(),
        "model": to_dict(header.model),
        "tokenizer_sha256": header.tokenizer_sha256,
        "config_hash": header.config_hash,
        "ledger": make_ledger(header, file_bytes=size).to_dict(),
        "tensors": _tensor_rows(header),
        "sections": rows,
    }


def _tensor_rows(header: Header) -> list[dict[str, Any]]:
    """Return the parameters; matrices with their stored bytes and bits per weight."""
    stored: dict[str, int] = {}
    for section in header.sections:
        if section.plan.kind == "codes":
            name = section.plan.name.split(".")[0]
            stored[name] = stored.get(name, 0) + section.length
    rows = []
    for t in header.tensors:
        row = {**asdict(t), "shape": list(t.shape), "numel": t.numel}
        if t.name in stored:
            row |= {"bytes": stored[t.name], "bits_per_weight": round(8 * stored[t.name] / t.numel, 4)}
        rows.append(row)
    return rows


def description_text(facts: dict[str, Any]) -> str:
    """Return `describe`'s facts as text: the file, its parameters, its sections."""
    model = facts["model"]
    lines = [
        f"pgolf artifact, version {facts['version']}, {facts['bytes']:,} bytes, SHA-256 {facts['sha256']}",
        f"model      {model['layers']} layers x {model['width']}, vocabulary {model['vocab_size']:,}",
        f"tokenizer  SHA-256 {facts['tokenizer_sha256']}",
        f"config     {facts['config_hash']}",
        "",
        f"{'parameter':<20}{'kind':<8}{'shape':<20}{'bits':>5}{'bytes':>12}{'bits/weight':>13}",
    ]
    for t in facts["tensors"]:
        shape = " x ".join(map(str, t["shape"]))
        size = f"{t['bytes']:>12,}{t['bits_per_weight']:>13.4f}" if "bytes" in t else ""
        lines.append(f"{t['name']:<20}{t['kind']:<8}{shape:<20}{t['bits']:>5}{size}")
    lines += [
        "",
        f"{'section':<20}{'kind':<8}{'offset':>12}{'stored':>12}{'decoded':>12}  SHA-256 of stored bytes",
    ]
    for s in facts["sections"]:
        sizes = f"{s['offset']:>12,}{s['length']:>12,}{s['raw']:>12,}"
        lines.append(f"{s['name']:<20}{s['kind']:<8}{sizes}  {s['sha256'][:16]}")
    return "\n".join(lines)


def export_artifact(path: Path, out: Path) -> int:
    """Write an artifact's parameters, dequantized to float32, as safetensors; return the bytes written.

    The metadata holds `model` (JSON), `tokenizer_sha256` and `config_hash`.

    Raises:
        FileNotFoundError: no such file. ArtifactError: as `read_artifact`. OSError: `out` cannot be written.
    """
    artifact = read_artifact(path)
    header = artifact.header
    metadata = {
        "model": json.dumps(to_dict(header.model)),
        "tokenizer_sha256": header.tokenizer_sha256,
        "config_hash": header.config_hash,
    }
    return write_tensors(out, artifact.state, metadata)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> int:
    """Write a safetensors file atomically and return its bytes.

    Raises:
        OSError: the file could not be written (disk full, no permission, no such folder); names the file.
    """
    data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata)
    with atomic_file(path) as file:
        file.write(data)
    return len(data)
