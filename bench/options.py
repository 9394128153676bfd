"""The options of scoring on one artifact: bits per byte, seconds and memory of each, one row after another.

    python -m bench.options model.pgolf --data SHARDS --rows plain ttt ttt_tilt --out bench/results

A row is a way to score with some settings changed (`ROWS`); `difference` is its bits per byte minus those of
the first row, so less than 0 is better. Choose options on text that no run has trained on and that is not the
validation text: make a data folder with the end of the training text as its `--val`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from bench.common import Recorder, Sample
from pgolf.artifact.read import build_model, read_artifact
from pgolf.config import EvaluateConfig, Method, TiltConfig, TttConfig
from pgolf.dist import Dist
from pgolf.evaluate.validation import DataFolder, score_as

TILT = TiltConfig(on=True)
TTT = TttConfig()
ROWS: dict[str, tuple[Method, EvaluateConfig]] = {
    "plain": ("plain", EvaluateConfig()),
    "plain_tilt": ("plain", EvaluateConfig(tilt=TILT)),
    "plain_tilt_seen2": ("plain", EvaluateConfig(tilt=replace(TILT, seen=2))),
    "plain_tilt_boost1": ("plain", EvaluateConfig(tilt=replace(TILT, boost=1.0))),
    "sliding": ("sliding", EvaluateConfig()),
    "causal_slot": ("causal_slot", EvaluateConfig()),
    "slot": ("slot", EvaluateConfig()),
    "ttt": ("ttt", EvaluateConfig()),
    "ttt_chunk_gradient": ("ttt", EvaluateConfig(adapters=replace(TTT, gradient="chunk"))),
    "ttt_tilt": ("ttt", EvaluateConfig(tilt=TILT)),
    "ttt_members2": ("ttt", EvaluateConfig(adapters=replace(TTT, members=2))),
    "ttt_members3": ("ttt", EvaluateConfig(adapters=replace(TTT, members=3))),
    "phased": ("phased", EvaluateConfig()),
    "phased_tilt": ("phased", EvaluateConfig(tilt=TILT)),
}
"""Name of a row -> way to score, settings."""


def main() -> None:
    """Score, print and write; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path, help="the model file")
    parser.add_argument("--data", type=Path, required=True, help="folder of shards and tokenizer")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which, in this order")
    parser.add_argument("--documents", type=int, default=0, help="first documents of the text; 0: all")
    parser.add_argument("--tokens", type=int, default=98_304, help="tokens per forward pass")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    options = parser.parse_args()
    dist = Dist.start(options.device)
    artifact = read_artifact(options.artifact)
    compile: Literal["off", "blocks"] = "blocks" if dist.device.type == "cuda" else "off"
    model = build_model(artifact, dist.device).prepare(dist.device, compile=compile)
    folder = DataFolder.open(options.data, vocab_size=model.config.vocab_size)
    text = folder.validation(documents=options.documents)
    recorder, first = Recorder("options", dist.device, options.out), None
    for name in options.rows:
        way, settings = ROWS[name]
        if dist.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(dist.device)
        score = score_as(way, model, folder, text, dist, batch_tokens=options.tokens, settings=settings)
        first = score.bpb if first is None else first
        case = f"{name}{f' ({settings.remark(way)})' if settings.remark(way) else ''}"
        values = [
            ("bpb", score.bpb, "bpb"),
            ("difference", score.bpb - first, "bpb"),
            ("tokens", score.tokens, "tokens"),
            ("seconds", score.seconds, "s"),
            ("tokens_per_s", score.tokens / score.seconds, "1/s"),
        ]
        if dist.device.type == "cuda":
            values.append(("peak_mib", torch.cuda.max_memory_allocated(dist.device) / 2**20, "MiB"))
        for metric, value, unit in values:
            recorder.add(case, "pgolf", metric, Sample(float(value), 0.0, 1), unit)
    recorder.write()
    dist.close()


if __name__ == "__main__":
    main()
