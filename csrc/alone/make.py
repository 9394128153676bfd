"""Write range_coder.cpp with all it includes, as small as a compiler takes it: pgolf/ops/range_coder.cpp.

The decoder alone is pgolf/ops/range_decoder.cpp. Run `python csrc/alone/make.py` after a change to the
sources of the range coder or of the trellis; tests/ops/test_coder.py fails while they differ. The results are
committed, because they are counted and the package ships no other C++ source. Comments and blanks are left
out, and our own names become short ones.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import product
from pathlib import Path
from string import ascii_letters

CSRC = Path(__file__).resolve().parents[1]
OUT = CSRC.parent / "pgolf" / "ops"
UNUSED = {"common.h"}
"""Included for the integer types alone, which range_model.h has too, and for a name that is declared."""
TOKEN = re.compile(r'"[^"]*"|[A-Za-z_]\w*|\d[\w.]*|\S')
STANDARD = set(
    re.findall(
        r"\w+",
        """
        GCC __attribute__ __builtin_cpu_supports __int128 __x86_64__ abs algorithm always_inline
        array auto begin bit bit_cast bit_width bool break case catch char clamp class cmath
        const constexpr continue copy cstdint cstdlib current_exception data decltype decode
        default define defined delete do else emplace_back empty encode end endif enum exception
        exception_ptr explicit extern false fill fill_n float for gnu if ifdef ifndef include
        inline int int16_t int32_t int64_t int8_t join long max min min_element move namespace
        new noexcept nullptr operator pragma private protected public push_back reserve resize
        rethrow_exception return short signed size size_t sizeof static static_assert
        static_cast std struct switch system_error target template this thread throw transform
        trellis true try typename uint16_t uint32_t uint64_t uint8_t unlikely unroll unsigned
        using utility vector vector_size virtual void while
        """,
    )
)
"""Names that are not ours to change: the language's, the library's, and the functions that are called."""


def joined(path: Path, seen: set[Path]) -> str:
    """Return a source without comments, with each of our headers in the place where it is first included."""
    if path in seen or path.name in UNUSED:
        return ""
    seen.add(path)
    lines = []
    for line in re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8")).splitlines():
        ours = re.match(r'#include "(.+)"', line)
        lines.append(joined(CSRC / ours[1], seen) if ours else line)
    return "\n".join(lines)


def chosen(text: str, *, encoder: bool) -> str:
    """Leave out what stands between `#ifndef PGOLF_DECODER_ONLY` and the next `#endif`, or these lines."""
    part = re.compile(r"^#ifndef PGOLF_DECODER_ONLY\n(.*?)^#endif[^\n]*\n", flags=re.M | re.S)
    return part.sub(r"\1" if encoder else "", text + "\n").replace("#pragma once\n", "")


def renamed(text: str) -> str:
    """Give every name of ours a short one, the most frequent names the shortest, of those the first first."""
    found = Counter(t for t in TOKEN.findall(text) if t[0] in f"{ascii_letters}_" and t not in STANDARD)
    pairs = ("".join(letters) for n in (1, 2) for letters in product(ascii_letters, repeat=n))
    short = (name for name in pairs if name not in STANDARD)
    names = {name: next(short) for name, _ in found.most_common()}
    return re.sub(r'"[^"]*"|\b[A-Za-z_]\w*', lambda m: names.get(m[0], m[0]), text)


def squeezed(text: str) -> str:
    """Leave out every blank that keeps nothing apart; preprocessor directives keep their lines."""
    out = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        if line[0] == "#":
            out = f"{out}\n{line}\n" if out and out[-1] != "\n" else f"{out}{line}\n"
            continue
        for blank, token in re.findall(r'(\s*)("[^"]*"|\w+|\S)', f" {line}"):
            # Words (a string takes a word as its suffix), and signs that would join ("a & &b").
            words = re.fullmatch(r'[\w"]\w', out[-1:] + token[0]) is not None
            out += " " * bool(blank and (words or (out[-1:] == token and token in "+-&|<>"))) + token
    return out.strip() + "\n"


def source(*, encoder: bool) -> str:
    """Return the whole coder, or its decoder, as one small file."""
    text = chosen(joined(CSRC / "alone" / "range_coder.cpp", set()), encoder=encoder)
    headers = sorted(set(re.findall(r"^#include <.+>", text, flags=re.M)))
    body = re.sub(r"^#include <.+>\n", "", text, flags=re.M)
    return "\n".join([*headers, squeezed(renamed(body))])


if __name__ == "__main__":
    (OUT / "range_coder.cpp").write_text(source(encoder=True), encoding="utf-8")
    (OUT / "range_decoder.cpp").write_text(source(encoder=False), encoding="utf-8")
