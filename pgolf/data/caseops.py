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

CASE_OPERATORS = TITLE, ALLCAPS, CAPNEXT, ESC = "\ue001", "\ue002", "\ue003", "\ue004"
"""The operators."""
IDS = [4, 5, 6, 7]
"""Their token ids in a CaseOps tokenizer."""

_ANY = f"[{TITLE}-{ESC}]"
# Each pattern begins with one set of characters, because Python's matcher searches for that fastest.
_TO_ENCODE = re.compile(f"[A-Z{TITLE}-{ESC}](?:(?<=[A-Z])[A-Za-z]+)?")
_UPPER = re.compile("[A-Z]")
_TO_DECODE = re.compile(
    f"{_ANY}(?:(?<=[{TITLE}{CAPNEXT}])[A-Za-z]|(?<={ALLCAPS})(?:{CAPNEXT}?[A-Za-z])+|(?<={ESC}){_ANY})?"
)


def encode(text: str) -> str:
    """Return `text` with the case of its ASCII letters written as operators.

    Raises:
        ValueError: the text holds a lone surrogate, so it is not Unicode text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"the text is not Unicode (a lone surrogate at character {e.start}); repair it"
        ) from e
    return _TO_ENCODE.sub(_mark, text)


def decode(text: str) -> str:
    """Reverse `encode`: `decode(encode(s)) == s` for every text `s`.

    Raises:
        ValueError: an operator dangles: nothing follows to which it can apply, or it stands inside a word
            though it may only begin one.
    """
    for match in _TO_DECODE.finditer(text):
        if _dangles(match):
            raise UserError(
                f"dangling operator U+{ord(match[0][0]):04X} at character {match.start()}: expected the "
                "first letter of a word after U+E001 and U+E002, a letter after U+E003, an operator after "
                "U+E004; the text was cut, or CaseOps did not make it"
            )
    return decode_written(text)


def decode_written(text: str) -> str:
    """Decode text that a model wrote, or that was cut, as `decode` does; a dangling operator gives no text.

    The decoded beginning of a text is the beginning of the decoded text.
    """
    return _TO_DECODE.sub(_apply, text)


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
    """Return the text of an operator and what it applies to."""
    text = match[0][1:].replace(CAPNEXT, "") if match[0][0] == ALLCAPS else match[0][1:]
    return text if match[0][0] == ESC or _dangles(match) else text.upper()


def _dangles(match: re.Match[str]) -> bool:
    before = match.string[max(0, match.start() - 1) : match.start()]
    in_word = before.isascii() and before.isalpha()
    return len(match[0]) == 1 or (in_word and match[0][0] in (TITLE, ALLCAPS))
