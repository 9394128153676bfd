"""Tables of text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return one line per row: each column as wide as its longest cell, two spaces between columns.

    The last column is not padded, so long sentences in it do not lengthen the other lines.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, [*widths[:-1], 0])).rstrip() for row in rows]
