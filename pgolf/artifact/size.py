"""The 16,000,000-byte ledger: what the artifact weighs, against which limit, and what it will weigh.

The counted size is the artifact file plus the code that turns it into a score. The rule for the code: start
at `pgolf.artifact.read` and `pgolf.evaluate.bpb`, follow every `import` of a pgolf module (with the packages
on its path, and imports inside functions, but not those under `if TYPE_CHECKING`), join these sources as they
stand, in order of their paths, and compress the text with brotli 11. Not counted, as in the challenge:
installed libraries, the tokenizer file, and the compiled extension `pgolf._C` (an installed library too; the
Python source of every operator carries its reference).
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pgolf
from pgolf.artifact.codec import compress
from pgolf.artifact.header import ArtifactError, Header

READER_MODULES = ("pgolf.artifact.read", "pgolf.evaluate.bpb")
CODE_RULE = (
    "code: every pgolf source that reading and scoring import, as it stands, in one text compressed with "
    "brotli 11;\ninstalled libraries (pgolf's compiled extension with them) and the tokenizer do not count"
)
"""The rule above, for people who see only the ledger."""


@dataclass(frozen=True)
class Ledger:
    """Where the bytes of an artifact are."""

    parts: tuple[tuple[str, int], ...]
    """(parameter or section group, stored bytes), largest first; the header's row includes the checksum."""
    code: int
    """Compressed sources of the reader and the evaluation."""
    limit: int
    """Bytes that the artifact may have."""
    clip_scale: float = 1.0
    """Factor on the configured clips that the file was quantized with."""

    @classmethod
    def empty(cls) -> Ledger:
        """Return a ledger without bytes, for ranks that write no file."""
        return cls((), 0, 0)

    @property
    def model_bytes(self) -> int:
        """Bytes of the artifact file."""
        return sum(size for _, size in self.parts)

    @property
    def total(self) -> int:
        """Counted bytes: file plus code."""
        return self.model_bytes + self.code

    def text(self) -> str:
        """Return the ledger as a table, one line a part."""
        rows = [*self.parts, ("code", self.code), ("total", self.total), ("limit", self.limit)]
        lines = [f"{name:<16} {size:>12,} bytes" for name, size in rows]
        lines.append(f"{'left':<16} {self.limit - self.total:>12,} bytes")
        return "\n".join([*lines, CODE_RULE])

    def to_dict(self) -> dict[str, Any]:
        """Return the ledger as plain JSON data."""
        return {
            "parts": dict(self.parts),
            "model": self.model_bytes,
            "code": self.code,
            "total": self.total,
            "limit": self.limit,
            "clip_scale": self.clip_scale,
        }


def make_ledger(header: Header, *, file_bytes: int, clip_scale: float = 1.0) -> Ledger:
    """Return the ledger of an artifact file of `file_bytes` bytes with this header."""
    sizes: dict[str, int] = {}
    for section in header.sections:
        name = section.plan.name.split(".")[0] if section.plan.kind == "codes" else section.plan.name
        sizes[name] = sizes.get(name, 0) + section.length
    sizes["header"] = file_bytes - sum(sizes.values())
    parts = sorted(sizes.items(), key=lambda item: -item[1])
    return Ledger(tuple(parts), code_bytes(), header.limit, clip_scale)


def check(ledger: Ledger, limit: int) -> None:
    """Raise unless the counted bytes are within `limit`.

    Raises:
        ArtifactError: with the total, the limit, the largest sections, what to do, and the whole ledger.
    """
    if ledger.total <= limit:
        return
    largest = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in ledger.parts[:3])
    raise ArtifactError(
        f"artifact is {ledger.total:_} bytes, limit {limit:_}, {ledger.total - limit:_} too many; largest "
        f"sections: {largest}; raise quant.mlp_clip (coarser steps), lower quant.embed_bits, or set "
        f"artifact.fit\n{ledger.text()}"
    )


def code_bytes() -> int:
    """Return the compressed size of the sources that reading and scoring need (module docstring)."""
    return len(compress(b"\n".join(path.read_bytes() for path in reader_sources()), quality=11))


def reader_sources() -> list[Path]:
    """Return the pgolf source files that the modules of `READER_MODULES` import, directly or not, sorted."""
    root = Path(pgolf.__file__).parent.parent
    found: set[Path] = set()
    waiting = list(READER_MODULES)
    while waiting:
        name = waiting.pop()
        path = _source(root, name)
        if path is None or path in found:
            continue
        found.add(path)
        waiting += [name.rpartition(".")[0], *_imports(path, name)]
    return sorted(found)


def _source(root: Path, name: str) -> Path | None:
    """Return the file of a pgolf module or package, None for anything else (a class, an extension)."""
    if name.split(".")[0] != "pgolf":
        return None
    base = root.joinpath(*name.split("."))
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def _imports(path: Path, name: str) -> list[str]:
    """Return every dotted name that the file imports; `from a import b` gives a and a.b."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    names: list[str] = []
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            levels = package.split(".")
            prefix = ".".join(levels[: len(levels) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (prefix, node.module) if part)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)
    return names
