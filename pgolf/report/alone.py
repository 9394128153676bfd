"""What the counted program does: read an artifact and print its score. `evaluate_gpt.py FILE --data SHARDS`.

`pgolf.artifact.code` puts this module, and all that it needs, into one file that needs no installed pgolf.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgolf.artifact.read import load_model
from pgolf.config import METHODS, EvaluateConfig, Method, from_dict
from pgolf.dist import Dist
from pgolf.errors import UserError, brief, is_checked
from pgolf.evaluate.bpb import Score
from pgolf.evaluate.validation import DataFolder, score_as, score_model

MICRO_TOKENS = 65_536


@dataclass(frozen=True)
class Settings:
    """How an artifact is scored; the defaults are for a file without its run's config.json."""

    tokens: int = MICRO_TOKENS
    """Tokens per forward pass, which change speed and memory, not the score without adaptation."""
    device: Any = "auto"
    attention: Any = "auto"
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Settings of the ways to score."""

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Return the settings in a run's config.json.

        Raises:
            UserError: it is not there or no such file.
        """
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            train, evaluate = config["train"], from_dict(EvaluateConfig, config["evaluate"])
            return cls(config["data"]["micro_tokens"], train["device"], train["attention"], evaluate)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{path} is not the config.json of a run ({type(e).__name__}: {e}); pass that of "
                "the model file's run, or leave --config out"
            ) from e


def main(argv: list[str], program: Path) -> int:
    """Score an artifact and print the result.

    Args:
        argv: the arguments. program: the file that is counted with the artifact.
    Returns:
        0, or 2 after an error, which is printed.
    """
    parser = argparse.ArgumentParser(
        program.name, description="Print the bits per byte of a model file on a folder's validation text."
    )
    parser.add_argument("artifact", type=Path, help="the model file, .pgolf")
    parser.add_argument("--data", type=Path, required=True, help="folder of validation shards and tokenizer")
    parser.add_argument(
        "--ttt", action="store_const", const="ttt", dest="mode", help="the same as --mode ttt"
    )
    parser.add_argument("--mode", choices=METHODS, help="how to score (default plain)")
    # Not a default of one of the two arguments: the first of them would give its own, which is None.
    parser.set_defaults(mode="plain")
    parser.add_argument("--config", type=Path, help="the run's config.json; else the one next to the program")
    args = parser.parse_args(argv)
    try:
        beside = program.with_name("config.json")
        path = args.config or (beside if beside.is_file() else None)
        settings = Settings() if path is None else Settings.read(path)
        _print_score(args.artifact, args.data, settings, program, args.mode)
    except Exception as e:
        if not is_checked(e):
            raise
        sys.stderr.write(f"{program.name}: {brief(e)}\n")
        return 2
    return 0


def _print_score(artifact: Path, data: Path, settings: Settings, program: Path, mode: Method) -> None:
    dist = Dist.start(settings.device, share_gpus=True)
    try:
        model = load_model(artifact, dist.device)
        blocks = dist.device.type == "cuda"
        model.prepare(dist.device, attention=settings.attention, compile="blocks" if blocks else "off")
        folder = DataFolder.open(data, vocab_size=model.config.vocab_size)
        found = _score(model, folder, settings, dist, mode)
    finally:
        dist.close()
    if dist.is_main:
        sizes = artifact.stat().st_size, program.stat().st_size
        sys.stdout.write(
            f"{found.bpb:.8f} bpb, {found.loss:.8f} nats per token, {found.tokens:,} tokens, {found.bytes:,} "
            f"bytes of text, {found.seconds:.1f} s\n"
            f"model {sizes[0]:,} + code {sizes[1]:,} = {sum(sizes):,} bytes\n{folder.checked}\n"
        )
        if remark := settings.evaluate.remark(mode):
            sys.stdout.write(f"{remark}\n")


def _score(model: Any, folder: DataFolder, settings: Settings, dist: Dist, mode: Method) -> Score:
    if mode == "plain":
        return score_model(model, folder, settings.tokens, dist)
    text, evaluate = folder.validation(), settings.evaluate
    return score_as(mode, model, folder, text, dist, batch_tokens=settings.tokens, settings=evaluate)
