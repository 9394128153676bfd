"""`pgolf demo`: the whole way on this machine, from text to a scored artifact and a loss plot."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Demo:
    """Train `tiny` on the bundled text (about 1 MB of Wikipedia, CC BY-SA 3.0) and score the artifact."""

    out: Path = Path("demo")
    """Folder for the tokenizer, the shards and the run."""
    smoke: bool = False
    """A few steps only: checks that everything works, not that the model is good."""


def main(argv: list[str]) -> int:
    """Run the demo."""
    args = tyro.cli(Demo, prog="pgolf demo", args=argv)
    from pgolf.cli import data
    from pgolf.data.text import sample_paths
    from pgolf.presets import tiny
    from pgolf.train.run import train_run

    began = time.perf_counter()
    train, val = (str(p) for p in sample_paths())
    shards, tokenizer = args.out / "shards", args.out / "tokenizer.model"
    args.out.mkdir(parents=True, exist_ok=True)
    config = tiny()
    vocab = str(config.model.vocab_size)
    data.main(["tokenizer", "--inputs", train, "--vocab-size", vocab, "--out", str(tokenizer)])
    paths = ["--train", train, "--val", val, "--tokenizer", str(tokenizer), "--out", str(shards)]
    data.main(["shards", *paths, "--overwrite"])
    clock = replace(config.train, out=args.out / "runs")
    if args.smoke:
        clock = replace(clock, seconds=0.0, steps=4)
    summary = train_run(replace(config, data=replace(config.data, dir=shards), train=clock))
    seconds = time.perf_counter() - began
    print(f"demo: {summary.scores['quantized'].bpb:.4f} bpb, {seconds:.0f} s from raw text")
    return 0
