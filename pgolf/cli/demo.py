"""`pgolf demo`: all steps on this machine, from text to a scored artifact that generates a few lines."""

from __future__ import annotations

import itertools
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

LINES, LINE_CHARACTERS = 10, 100
"""Number of lines that the model generates at the end, and characters per line."""
MOST_DOCUMENTS = 100
"""Limit on the documents that are generated, because after a few training steps documents may be empty."""


@dataclass(frozen=True)
class Demo:
    """Train the preset `tiny` on the sample text of the package (about 1 MB of Wikipedia, CC BY-SA 3.0),
    score the artifact, and print text that it generates."""

    out: Path = Path("demo")
    """Folder for the tokenizer, the shards and the run."""
    smoke: bool = False
    """Train for 4 steps only, to check that everything works; the model is then useless."""


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
    runs = args.out / "runs"
    earlier = set(runs.glob("*"))
    clock = replace(config.train, out=runs)
    if args.smoke:
        clock = replace(clock, seconds=0.0, steps=4)
    summary = train_run(replace(config, data=replace(config.data, dir=shards), train=clock))
    seconds = time.perf_counter() - began
    (folder,) = set(runs.glob("*")) - earlier
    plot = folder / "loss.png"
    print(f"\nwhat the model writes (pgolf generate {folder}):")
    for line in itertools.islice(written_lines(folder), LINES):
        print(f"  {line}", flush=True)
    print(f"\ndemo: {summary.scores['quantized'].bpb:.4f} bpb, {seconds:.0f} s from raw text")
    if plot.is_file():
        print(f"demo: loss plot {plot}")
    return 0


def written_lines(folder: Path) -> Iterator[str]:
    """Yield lines of text that the model in a run folder generates, one document after another."""
    from pgolf.model.generate import generate
    from pgolf.train.load import load

    model, tokenizer = load(folder)
    for seed in range(MOST_DOCUMENTS):
        text = "".join(generate(model, tokenizer, tokens=model.config.max_context, seed=seed))
        yield from textwrap.wrap(text, LINE_CHARACTERS)
