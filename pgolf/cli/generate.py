"""`pgolf generate MODEL --prompt TEXT`: generate text with a model and print it as it is generated."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Generate:
    """Print a prompt and the model's continuation, until the document ends or `tokens` tokens are drawn."""

    model: tyro.conf.Positional[Path]
    """An artifact, a checkpoint (raw.safetensors, ema.safetensors), or a run folder that contains them."""
    prompt: str = ""
    """Beginning of the document; if it is empty, the model writes the document from its beginning."""
    tokens: int = 256
    """Largest number of tokens to draw, >= 1."""
    temperature: float = 0.8
    """The logits are divided by it, >= 0. Below 1 the text is more predictable; 0 always takes the likeliest
    token."""
    top_p: float = 0.95
    """Draw only from the smallest set of tokens whose probabilities sum to at least this, in (0, 1]; 1 = all
    tokens."""
    top_k: int = 0
    """Draw only from the k likeliest tokens, >= 0; 0 = all tokens."""
    seed: int = 0
    """Seed of the random numbers, >= 0; the same seed gives the same text on the same machine."""
    tokenizer: Annotated[Path | None, tyro.conf.arg(aliases=["--data"])] = None
    """The tokenizer's .model file, or a folder that contains it, such as the folder of shards. Default: the
    tokenizer next to the model, otherwise the one in the data folder on which the run was trained."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device to run on; auto uses the GPU if there is one."""


def main(argv: list[str]) -> int:
    """Load the model, print the text, and print the speed on standard error."""
    args = tyro.cli(Generate, prog="pgolf generate", args=argv)
    from pgolf.model.generate import generate
    from pgolf.train.load import load

    model, tokenizer = load(args.model, tokenizer=args.tokenizer, device=args.device)
    pieces = generate(
        model,
        tokenizer,
        args.prompt,
        tokens=args.tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
    )
    began = time.perf_counter()
    print(args.prompt, end="", flush=True)
    characters = 0
    for piece in pieces:
        print(piece, end="", flush=True)
        characters += len(piece)
    print(flush=True)
    seconds = time.perf_counter() - began
    print(f"{characters:,} characters in {seconds:.1f} s on {model.tok_emb.device}", file=sys.stderr)
    return 0
