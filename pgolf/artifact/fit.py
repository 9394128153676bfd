"""The search for the factor on the scales that fills the byte limit, and the writing of what it finds.

A scale that is wider by the factor f takes log2(f) bits less per code, so N weights take N log2(f) / 8 bytes
less: bytes over the logarithm of the factor are nearly a straight line, and a secant finds the place. Where
the line bends, a bracket keeps the search inside what is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from pgolf.artifact.size import Ledger, check
from pgolf.artifact.write import Facts, build_file, save_file, write_artifact
from pgolf.config import Coder, Config, Counted, ModelConfig, run_hash
from pgolf.quant.cap import Fit
from pgolf.quant.pipeline import Quantizer
from pgolf.quant.quantized import QuantizedState

T = TypeVar("T")

WINDOW = 1e-3
"""The search ends when the counted bytes are below the limit by at most this fraction of it."""
AIM = 0.4 * WINDOW
"""Where the search aims, as a fraction of the limit below it: inside the window, nearer to the limit."""
NARROWEST, WIDEST = 0.5, 64.0
"""Range of the factor on the configured scales. Scales finer than half of them would put codes beyond the
ends of the grid; with scales 64 times as wide a matrix is nothing but zeros."""
MOST_TRIES = 8


@dataclass(frozen=True)
class Try:
    """One quantization and what it weighs."""

    octaves: float
    """log2 of the factor on the scales."""
    total: int
    """Counted bytes: file and code."""


def fit_artifact(
    path: Path,
    quantize: Callable[[float], QuantizedState],
    model: ModelConfig,
    *,
    tokenizer_sha256: str,
    config_hash: str,
    limit: int,
    coder: Coder = "range",
    program: Counted = "evaluate",
) -> Ledger:
    """Write an artifact that fills at least 0.999 of the limit, code included, by scaling all scales.

    This usually takes two quantizations and at most 8. A model that is too small for the limit gets half the
    configured scales.

    Args:
        path: as for `write_artifact`, as are `model` and the last five.
        quantize: factor on the scales -> state; called with 1.0 first.
    Returns:
        The ledger of the written file; its `clip_scale` is the factor that was chosen.
    Raises:
        ArtifactError: no try is below the limit (with the ledger of the smallest); nothing is written.
        FileNotFoundError: the folder of `path` does not exist.
    """

    def make(scale: float) -> tuple[bytes, Ledger, int]:
        state = quantize(scale)
        facts = Facts(tokenizer_sha256, config_hash, limit, scale, coder, program)
        weights = sum(t.codes.numel() for t in state.quantized.values())
        return *build_file(state, model, facts, quality=11), weights

    data, ledger = search(make, limit=limit)
    check(ledger, limit, coder)
    save_file(path, data)
    return ledger


def search(make: Callable[[float], tuple[T, Ledger, int]], *, limit: int) -> tuple[T, Ledger]:
    """Return the largest thing found within `limit`, else the smallest, and its ledger.

    Args:
        make: factor on the scales -> the thing, its ledger, the number of its weights; called with 1.0 first.
        limit: counted bytes to stay within.
    """
    tries: list[Try] = []
    best: tuple[T, Ledger] | None = None
    octaves: float | None = 0.0
    while octaves is not None and len(tries) < MOST_TRIES:
        thing, ledger, weights = make(2.0**octaves)
        tries.append(Try(octaves, ledger.total))
        if best is None or _better(ledger, best[1], limit):
            best = thing, ledger
        if (1 - WINDOW) * limit <= ledger.total <= limit:
            break
        octaves = next_try(tries, limit=limit, weights=weights)
    assert best is not None
    return best


def fill_note(ledger: Ledger) -> str:
    """Return a sentence about an artifact that is too small to fill the limit; "" for any other."""
    if ledger.clip_scale > NARROWEST or ledger.total >= (1 - WINDOW) * ledger.limit:
        return ""
    share = 100 * ledger.total / ledger.limit
    return f"the model is too small to fill the limit: with the finest scales it takes {share:.1f} % of it"


def _better(new: Ledger, old: Ledger, limit: int) -> bool:
    """Return whether `new` is nearer to the goal: the largest that fits, else the smallest."""
    if (new.total <= limit) != (old.total <= limit):
        return new.total <= limit
    return (new.total > old.total) == (new.total <= limit)


def next_try(tries: list[Try], *, limit: int, weights: int) -> float | None:
    """Return the next log2 of the factor on the scales, None when nothing new is left to try.

    Newton's step from the last try with the slope -weights / 8 bytes per octave (one bit less per code where
    scales are twice as wide), then with the slope of the two last tries. Where that leaves the range between
    the nearest try above and the nearest below the limit, the middle of that range.
    """
    target = (1 - AIM) * limit
    last = tries[-1]
    slope = -max(weights, 1) / 8
    if len(tries) > 1 and tries[-2].octaves != last.octaves:
        measured = (last.total - tries[-2].total) / (last.octaves - tries[-2].octaves)
        slope = min(measured, slope / 8)  # never flat or rising: that is noise, or the floor of zeros
    step = min(max((target - last.total) / slope, -1.0), 4.0)
    place = last.octaves + step
    over = max((t.octaves for t in tries if t.total > limit), default=-math.inf)
    under = min((t.octaves for t in tries if t.total <= limit), default=math.inf)
    if over < under and not over < place < under:
        place = (over + under) / 2
    place = min(max(place, math.log2(NARROWEST)), math.log2(WIDEST))
    return None if any(abs(place - t.octaves) < 1e-9 for t in tries) else place


def write_quantized(
    path: Path,
    quantizer: Quantizer,
    config: Config,
    *,
    tokenizer_sha256: str,
    first: QuantizedState | None = None,
    fit: Fit | None = None,
) -> Ledger:
    """Quantize, compress and write the artifact; with artifact.fit, choose the factor that fills the limit.

    Args:
        path: the file to write. config: of the run, whose hash goes into the file.
        quantizer: the weights with their calibration.
        tokenizer_sha256: of the tokenizer that the weights were trained with, 64 hex digits.
        first: `quantizer.quantize()`, where the caller has it already.
        fit: the cap and scale for these weights, where they were fitted.
    Raises:
        ArtifactError: above the limit; nothing is written.
    """

    def quantize(factor: float) -> QuantizedState:
        return first if first is not None and factor == 1.0 else quantizer.quantize(factor)

    fill = config.artifact.fit
    write = partial(fit_artifact, path, quantize) if fill else partial(write_artifact, path, quantize(1.0))
    return write(
        config.model if fit is None else fit.applied(config.model),
        tokenizer_sha256=tokenizer_sha256,
        config_hash=run_hash(config),
        limit=config.artifact.limit,
        coder=config.artifact.coder,
        program=config.artifact.program,
    )
