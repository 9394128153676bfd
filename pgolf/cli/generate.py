"""`pgolf generate MODEL --prompt TEXT`: let a model write, on standard output as it writes."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Generate:
    """Print a prompt and how the model continues it, until the document ends or `tokens` are drawn."""

    model: tyro.conf.Positional[Path]
    """An artifact, a checkpoint (raw.safetensors, ema.safetensors), or a run folder that holds them."""
    prompt: str = ""
    """Beginning of the document; when it is empty, the model begins the document."""
    tokens: int = 256
    """Most tokens to draw, at least 1."""
    temperature: float = 0.8
    """Divides the logits, >= 0. Below 1 the text is more predictable; 0 always takes the likeliest token."""
    top_p: float = 0.95
    """Draw only from the fewest tokens whose probabilities sum to this, in (0, 1]; 1 = from all tokens."""
    top_k: int = 0
    """Draw only from the k likeliest tokens; 0 = from all tokens."""
    seed: int = 0
    """Another seed gives another text; the same one gives the same text on the same machine."""
    tokenizer: Annotated[Path | None, tyro.conf.arg(aliases=["--data"])] = None
    """The tokenizer's .model file, or a folder that holds it, such as the folder of shards. Without it, the
    tokenizer next to the model is taken, else the one in the data folder that the run was trained on."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to run; auto is the GPU when there is one."""


def main(argv: list[str]) -> int:
    """Load, write, and say on standard error how fast it was."""
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
