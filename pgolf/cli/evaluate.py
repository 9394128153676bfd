"""`pgolf evaluate ARTIFACT --data DIR`: bits per byte of an artifact on a validation set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Evaluate:
    """Score an artifact over the whole validation set of a data folder."""

    artifact: tyro.conf.Positional[Path]
    """A file written by `pgolf train` or `pgolf quantize`."""
    data: Path
    """Folder of shards with its tokenizer."""
    tokens: int = 98_304
    """Tokens per forward pass; changes speed and memory, not the score."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to run."""


def main(argv: list[str]) -> int:
    """Read, score and print."""
    args = tyro.cli(Evaluate, prog="pgolf evaluate", args=argv)
    from pgolf.artifact.read import build_model, read_artifact
    from pgolf.dist import Dist
    from pgolf.evaluate.corpus import Corpus, score_model

    artifact = read_artifact(args.artifact)
    header = artifact.header
    corpus = Corpus.open(args.data, vocab_size=header.model.vocab_size)
    if header.tokenizer_sha256 != corpus.sha256:
        theirs, ours = header.tokenizer_sha256[:16], corpus.sha256[:16]
        raise ValueError(
            f"{args.artifact} was trained with another tokenizer (sha256 {theirs}...) than {args.data} holds "
            f"({ours}...); use the run's tokenizer.model"
        )
    dist = Dist.start(args.device)
    try:
        model = build_model(artifact, dist.device)
        model.prepare(dist.device, compile="blocks" if dist.device.type == "cuda" else "off")
        score = score_model(model, corpus, args.tokens, dist)
    finally:
        dist.close()
    if dist.is_main:
        print(f"{score.bpb:.4f} bpb  {score.loss:.4f} nats/token  {score.tokens:,} tokens  {score.bytes:,} B")
    return 0
