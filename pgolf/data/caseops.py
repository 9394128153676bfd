"""CaseOps: upper case as operators, so that a word has the same tokens in every spelling.

`encode` writes ASCII letters in lower case and marks what was upper case with operators, which are four
private-use characters. `decode` reverses it exactly. Over each longest run of ASCII letters:

1. only lower case: unchanged ("the");
2. two or more letters, only upper case: ALLCAPS and the run in lower case ("NASA" -> ALLCAPS "nasa");
3. the first letter upper case and all others lower case, or one capital: TITLE and the run in lower case;
4. otherwise TITLE if the first letter is upper case, then CAPNEXT before every later upper-case letter
   ("iPhone" -> "i" CAPNEXT "phone").

An operator character that is in the text itself is written as ESC and that character. Everything else is
unchanged: a letter such as U+00C9 ends a run and keeps its case.

Source: PR #1729 of the parameter-golf challenge ("lossless_caps_caseops_v1").
"""

from __future__ import annotations

import re

from pgolf.errors import UserError

OPERATORS = TITLE, ALLCAPS, CAPNEXT, ESC = "\ue001", "\ue002", "\ue003", "\ue004"
"""The operators, in the order of their token ids."""
FIRST_ID = 4
"""Token id of TITLE in a CaseOps tokenizer; the other operators follow."""

_ANY = f"[{TITLE}-{ESC}]"
# Each pattern begins with one set of characters, because Python's matcher searches for that fastest.
_TO_ENCODE = re.compile(f"[A-Z{TITLE}-{ESC}](?:(?<=[A-Z])[A-Za-z]+)?")
_UPPER = re.compile("[A-Z]")
_TO_DECODE = re.compile(
    f"{_ANY}(?:(?<=[{TITLE}{CAPNEXT}])([A-Za-z])|(?<={ALLCAPS})((?:{CAPNEXT}?[A-Za-z])+)|(?<={ESC})({_ANY}))?"
)
LITERAL = re.compile(f"{ESC}{_ANY}")
"""An operator character of the text itself, in encoded text. Matches must be sought from the beginning."""


def encode(text: str) -> str:
    """Return `text` with the case of its ASCII letters written as operators.

    Raises:
        ValueError: the text holds a lone surrogate, so it is not Unicode text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"the text is not Unicode: a lone surrogate U+{ord(text[e.start]):04X} at character {e.start}; "
            "repair it where it was read"
        ) from e
    return _TO_ENCODE.sub(_mark, text)


def decode(text: str, *, strict: bool = True) -> str:
    """Reverse `encode`: `decode(encode(s)) == s` for every text `s`.

    Args:
        text: what `encode` returned, or text that a model wrote in its form.
        strict: refuse an operator that nothing follows to which it can apply, or that stands inside a word
            though it may only begin one. Otherwise it gives no text, and the decoded beginning of a text is
            the beginning of the decoded text.

    Raises:
        ValueError: `strict` and such an operator.
    """
    return _TO_DECODE.sub(_apply_strictly if strict else _apply, text)


def _mark(match: re.Match[str]) -> str:
    """Return the encoded form of a run, from its first upper-case letter on, or of an operator character."""
    run, start = match[0], match.start()
    low = run.lower()
    if low == run:
        return ESC + run
    if start and "a" <= match.string[start - 1] <= "z":
        return _UPPER.sub(_capnext, run)
    if low[1:] == run[1:]:
        return TITLE + low
    if run.isupper():
        return ALLCAPS + low
    return TITLE + low[0] + _UPPER.sub(_capnext, run[1:])


def _capnext(match: re.Match[str]) -> str:
    return CAPNEXT + match[0].lower()


def _apply(match: re.Match[str]) -> str:
    """Return the text of an operator and what it applies to; none if it applies to nothing."""
    letter, run, literal = match.groups(default="")
    if literal:
        return str(literal)
    letters = str(letter + run.replace(CAPNEXT, ""))
    return letters if match[0][0] in (TITLE, ALLCAPS) and _in_word(match) else letters.upper()


def _apply_strictly(match: re.Match[str]) -> str:
    operator = match[0][0]
    name = ("TITLE", "ALLCAPS", "CAPNEXT", "ESC")[OPERATORS.index(operator)]
    where = f"dangling operator {name} (U+{ord(operator):04X}) at character {match.start()}"
    how = "the text was cut or was not made by CaseOps"
    if len(match[0]) == 1:
        what = "one of the four operators" if operator == ESC else "an ASCII letter"
        raise UserError(f"{where}: expected {what} after it; {how}")
    if operator in (TITLE, ALLCAPS) and _in_word(match):
        raise UserError(f"{where}: it stands inside a word, expected before one; {how}")
    return _apply(match)


def _in_word(match: re.Match[str]) -> bool:
    before = match.string[max(0, match.start() - 1) : match.start()]
    return before.isascii() and before.isalpha()
