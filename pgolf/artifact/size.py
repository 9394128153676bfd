"""The ledger of an artifact: what each part weighs, and the limit.

What counts is the file plus the code that turns it into a score, which `code.py` defines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pgolf.artifact.code import CODE_RULE, code_bytes
from pgolf.artifact.header import ArtifactError, Header
from pgolf.config import ArtifactConfig, Coder, Counted
from pgolf.errors import UserError


@dataclass(frozen=True)
class Ledger:
    """Where the bytes of an artifact are."""

    parts: tuple[tuple[str, int], ...]
    """(parameter or kind of section, stored bytes), largest first; the header includes the checksum."""
    code: int
    """Bytes of the counted code."""
    limit: int
    """Bytes that file and code may have together."""
    clip_scale: float = 1.0
    """Factor on the configured scales that the file was quantized with."""

    @property
    def model_bytes(self) -> int:
        """Bytes of the artifact file."""
        return sum(size for _, size in self.parts)

    @property
    def total(self) -> int:
        """Counted bytes: file plus code."""
        return self.model_bytes + self.code

    def text(self, rule: str = CODE_RULE) -> str:
        """Return the ledger as a table, one line per part, with the rule by which the code was counted."""
        rows = [*self.parts, ("code", self.code), ("total", self.total), ("limit", self.limit)]
        lines = [f"{name:<16} {size:>12,} bytes" for name, size in rows]
        lines.append(f"{'left':<16} {self.limit - self.total:>12,} bytes")
        return "\n".join([*lines, rule])

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

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Ledger:
        """Return the ledger that `to_dict` gave."""
        return cls(tuple(data["parts"].items()), data["code"], data["limit"], data["clip_scale"])


def make_ledger(
    header: Header, *, file_bytes: int, clip_scale: float = 1.0, program: Counted = "evaluate"
) -> Ledger:
    """Return the ledger of an artifact file of `file_bytes` bytes with this header and `program` as code."""
    sizes: dict[str, int] = {}
    for section in header.sections:
        name = section.plan.name.split(".")[0] if section.plan.kind == "codes" else section.plan.name
        sizes[name] = sizes.get(name, 0) + section.length
    sizes["header"] = file_bytes - sum(sizes.values())
    parts = sorted(sizes.items(), key=lambda item: -item[1])
    return Ledger(tuple(parts), code_bytes(header.coder, program), header.limit, clip_scale)


def check_limit(artifact: ArtifactConfig) -> None:
    """Refuse a limit that leaves nothing for a model, before anything is trained.

    Raises:
        ValueError: the counted code alone takes it.
    """
    code = code_bytes(artifact.coder, artifact.program)
    if artifact.limit <= code:
        raise UserError(
            f"artifact.limit must be above {code:,} bytes, which the counted code alone takes, "
            f"got {artifact.limit:,}"
        )


def check(ledger: Ledger, limit: int, coder: Coder = "range") -> None:
    """Raise unless the counted bytes are within `limit`.

    Raises:
        ArtifactError: with the total, the limit, the largest sections, what to do, and the whole ledger.
    """
    if ledger.total <= limit:
        return
    largest = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in ledger.parts[:3])
    smaller = "" if coder == "range" else f"set artifact.coder=range, which takes less than {coder}, or "
    raise ArtifactError(
        f"artifact is {ledger.total:_} bytes, limit {limit:_}, {ledger.total - limit:_} too many; largest "
        f"sections: {largest}; {smaller}set artifact.fit, or make the scales coarser (lower quant.mean_bits; "
        f"with quant.row_scales=spread raise quant.mlp_clip), or the model smaller\n{ledger.text()}"
    )
