"""The challenge's published data: where the files are, and the known answers of its validation text.

The tokenizers' SHA-256 are those of the models in the challenge's repository and its pull requests. The
numbers of validation tokens are what the logs of its merged records print, which is the number of targets
rounded down to whole sequences of 2,048. A folder that has fewer is a part of the text (files that were cut
off have cost people their records), and a score on it is not one on the challenge's validation text.
"""

from __future__ import annotations

from dataclasses import dataclass

SEQUENCE = 2048
"""Tokens of a sequence of the published scripts, to which they round the number of validation tokens down."""


PART = "NOT the challenge's validation text"
"""The beginning of what is said of another text."""


@dataclass(frozen=True)
class Variant:
    """One tokenization of the challenge's text."""

    repository: str
    """Dataset repository of the Hugging Face Hub that publishes it."""
    tokenizer_sha256: str
    validation_tokens: int | None
    """As the logs print it; None where two published exports differ."""


VARIANTS = {
    "sp1024": Variant(
        "willdepueoai/parameter-golf",
        "4f5e8adb109c66b4886963bc75a7befd73bda36d27fd7102df8e9e66503b0e2a",
        62_021_632,
    ),
    "sp4096": Variant(
        "kevclark/parameter-golf", "d76de35070ed9feb76afe3a7efc3a1a0e91e9aa4978360ecdc7fbc22a9725512", None
    ),
    "sp8192": Variant(
        "kevclark/parameter-golf",
        "4e979c92754cc9d7bdebd9dfe5edf3fc0b41b38714b394e4297fa851e3afd516",
        40_540_160,
    ),
    "sp8192_caseops": Variant(
        "romeerp/parameter-golf-caseops-v1",
        "97754754561f20def5edd99765ca0668f880bd94e67316d54aa10ab25f45cc4d",
        47_851_520,
    ),
}


def known_text(tokenizer_sha256: str, targets: int) -> str:
    """Return what is known of a validation text of `targets` tokens that was made with a known tokenizer.

    A sentence for results that rest on it; empty if the tokenizer is not one of the challenge's, or its text
    is not known.
    """
    for name, variant in VARIANTS.items():
        whole = variant.validation_tokens
        if tokenizer_sha256 != variant.tokenizer_sha256 or whole is None:
            continue
        if targets // SEQUENCE * SEQUENCE == whole:
            return f"as many validation tokens as the challenge's text has with {name}: {targets:,}"
        return (
            f"{PART}: {targets:,} tokens, where that of {name} has "
            f"{whole:,} to {whole + SEQUENCE - 1:,}; a score on this text is no score of the challenge"
        )
    return ""
