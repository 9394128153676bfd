"""What rounding costs a score: one artifact scored with the number formats and kernels that a pass could use.

    python -m bench.precision model.pgolf --data SHARDS --documents 1000 --out bench/results

`difference` is the bits per byte of a row minus those of the first one, with a 95 % interval over documents
(`difference_low`, `difference_high`); less than 0 is better. The rows: bfloat16 with the kernels, as
`pgolf evaluate` computes on a GPU; with torch's operators in place of `norm_mlp`, which round more often;
float16, which has eight times the precision of bfloat16 and torch's operators only; float32.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.common import Recorder, Sample
from bench.documents import Documents
from pgolf.artifact.read import build_model, read_artifact
from pgolf.dist import Dist
from pgolf.evaluate.validation import DataFolder
from pgolf.model.attention import AttentionName
from pgolf.model.gpt import MlpName


@dataclass(frozen=True)
class Form:
    """How a pass computes."""

    name: str
    dtype: torch.dtype
    attention: AttentionName
    mlp: MlpName


FORMS = (
    Form("bfloat16", torch.bfloat16, "auto", "auto"),
    Form("bfloat16, composed", torch.bfloat16, "varlen", "composed"),
    Form("float16, composed", torch.float16, "varlen", "composed"),
    Form("float32, composed", torch.float32, "sdpa", "composed"),
)


def main(argv: list[str] | None = None) -> None:
    """Score, print and write; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path, help="the model file")
    parser.add_argument("--data", type=Path, required=True, help="folder of shards and tokenizer")
    parser.add_argument("--way", choices=("plain", "ttt"), default="plain", help="way to score")
    parser.add_argument("--documents", type=int, default=0, help="first documents of the text; 0: all")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    options = parser.parse_args(argv)
    dist = Dist.start(options.device)
    cuda = dist.device.type == "cuda"
    recorder, first = Recorder("precision", dist.device, options.out, file=f"precision-{options.way}"), None
    artifact = read_artifact(options.artifact)
    for form in FORMS:
        attention = form.attention if cuda else "sdpa"
        model = build_model(artifact, dist.device).prepare(dist.device, attention=attention, mlp=form.mlp)
        model.compute_dtype = form.dtype
        folder = DataFolder.open(options.data, vocab_size=model.config.vocab_size)
        documents = Documents(folder, folder.validation(documents=options.documents), dist, 98_304)
        score, nats = documents.score(model, options.way, compiled=False)
        first = nats if first is None else first
        found = documents.against(nats, first)
        for metric, value, unit in (
            ("bpb", score.bpb, "bpb"),
            ("difference", found.mean, "bpb"),
            ("difference_low", found.low, "bpb"),
            ("difference_high", found.high, "bpb"),
            ("seconds", score.seconds, "s"),
        ):
            recorder.add(f"{options.way}, {form.name}", "pgolf", metric, Sample(float(value), 0.0, 1), unit)
    recorder.write()
    dist.close()


if __name__ == "__main__":
    main()
