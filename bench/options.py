"""The options of scoring on one artifact: bits per byte, seconds and memory of each, one row after another.

    python -m bench.options model.pgolf --data SHARDS --rows plain ttt ttt_tilt --out bench/results
    python -m bench.options model.pgolf --data SHARDS --rows ttt "mine=ttt context=3072 adapters.rank=48"

A row is a way to score with some settings of `pgolf.config.EvaluateConfig` changed: a name from `ROWS`, or
NAME=WAY KEY=VALUE ... The row `published` is the way to score of the run's pull request, with the settings in
the config.json next to the file. `difference` is its bits per byte minus those of `--base` (without it, of
the first row), with a 95 % interval over documents (`difference_low`, `difference_high`); less than 0 is
better. On a GPU test-time training is compiled; the first row that needs a graph has its compilation in its
seconds.

Choose options on text that no run has trained on and that is not the validation text: `pgolf data held-out`
makes such a folder before a run.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bench.common import Recorder, Sample
from bench.documents import Documents
from pgolf.artifact.read import build_model, read_artifact
from pgolf.config import Config, EvaluateConfig, Method, from_dict
from pgolf.config_evaluate import METHODS
from pgolf.config_io import read_json
from pgolf.dist import Dist
from pgolf.evaluate.validation import DataFolder

ROWS = {
    "plain": "plain",
    "plain_tilt": "plain tilt.on=true",
    "plain_tilt_seen2": "plain tilt.on=true tilt.seen=2",
    "plain_tilt_boost1": "plain tilt.on=true tilt.boost=1.0",
    "sliding": "sliding",
    "causal_slot": "causal_slot",
    "slot": "slot",
    "ttt": "ttt",
    "ttt_rate0": "ttt adapters.lr=0",
    "ttt_chunk_gradient": "ttt adapters.gradient=chunk",
    "ttt_tilt": "ttt tilt.on=true",
    "ttt_members2": "ttt adapters.members=2",
    "ttt_members3": "ttt adapters.members=3",
    "ttt_context2560": "ttt context=2560",
    "ttt_context3072": "ttt context=3072",
    "ttt_context4096": "ttt context=4096",
    "ttt_no_qv": "ttt adapters.on=k,o,mlp,head",
    "ttt_no_qkv": "ttt adapters.on=o,mlp,head",
    "ttt_rank48": "ttt adapters.rank=48",
    "ttt_lr0.7e-4": "ttt adapters.lr=0.7e-4",
    "ttt_lr1.5e-4": "ttt adapters.lr=1.5e-4",
    "ttt_decay2": "ttt adapters.weight_decay=2.0",
    "ttt_beta2_0.999": "ttt adapters.beta2=0.999",
    "ttt_first_chunks": "ttt adapters.first_chunks=8,16,24",
    "ttt_chunk32": "ttt adapters.chunk=32 adapters.chunk_growth=24",
    "phased": "phased",
    "phased_one": "phased phases.count=1",
    "phased_two_caps": "phased phases.two_caps=true",
    "phased_tilt": "phased tilt.on=true",
}
"""Name of a row -> way to score and what differs from its settings."""


PUBLISHED = "published"
"""The row whose settings are those of the run."""


@dataclass(frozen=True)
class Row:
    """One way to score."""

    name: str
    way: Method
    settings: EvaluateConfig

    @staticmethod
    def read(word: str, artifact: Path | None = None) -> Row:
        """Return the row that a name of `ROWS`, NAME=WAY KEY=VALUE ... or `published` describes.

        Args:
            artifact: next to which the config.json is that `published` needs.

        Raises:
            ValueError: another form, an unknown way or setting, or a bad value. OSError: no config.json.
        """
        if word == PUBLISHED and artifact is not None:
            saved = artifact.with_name("config.json")
            run = from_dict(Config, read_json(saved), where=str(saved)).evaluate
            return Row(word, run.method, run)
        name, equals, text = word.partition("=")
        if not equals:
            text = ROWS.get(name, "")
        way, *changes = text.split() or [""]
        if way not in METHODS:
            raise ValueError(
                f"expected one of {', '.join(ROWS)}, {PUBLISHED}, or NAME=WAY KEY=VALUE ... with a way of "
                f"{', '.join(METHODS)}, got {word!r}"
            )
        settings: dict[str, Any] = {}
        for change in changes:
            key, equals, value = change.partition("=")
            if not equals:
                raise ValueError(f"{word!r}: expected KEY=VALUE, got {change!r}")
            *sections, last = key.split(".")
            node = settings
            for section in sections:
                node = node.setdefault(section, {})
            try:
                node[last] = json.loads(value)
            except ValueError:
                node[last] = value
        return Row(name, way, from_dict(EvaluateConfig, settings, where=f"row {name}"))

    @property
    def case(self) -> str:
        """Its name in result lines, with what every score of its kind must say."""
        remark = self.settings.remark(self.way)
        return f"{self.name} ({remark})" if remark else self.name


def main(argv: list[str] | None = None) -> None:
    """Score, print and write; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path, help="the model file")
    parser.add_argument("--data", type=Path, required=True, help="folder of shards and tokenizer")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW", help="which, in this order")
    parser.add_argument("--base", help="the row with which it and later ones are compared")
    parser.add_argument("--documents", type=int, default=0, help="first documents of the text; 0: all")
    parser.add_argument("--tokens", type=int, default=98_304, help="tokens per forward pass")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--file", default="options", help="name of the result file")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    options = parser.parse_args(argv)
    try:
        rows = [Row.read(word, options.artifact) for word in options.rows]
    except (ValueError, TypeError, OSError) as e:
        parser.error(str(e))
    base = options.base or rows[0].name
    if base not in [row.name for row in rows]:
        parser.error(f"--base must be one of the rows, got {base!r}")
    dist = Dist.start(options.device)
    cuda = dist.device.type == "cuda"
    artifact = read_artifact(options.artifact)
    compile: Literal["off", "blocks"] = "blocks" if cuda else "off"
    model = build_model(artifact, dist.device).prepare(dist.device, compile=compile)
    folder = DataFolder.open(options.data, vocab_size=model.config.vocab_size)
    documents = Documents(folder, folder.validation(documents=options.documents), dist, options.tokens)
    # Rows with other adapters need graphs of their own.
    torch._dynamo.config.recompile_limit = 64
    recorder, first = Recorder("options", dist.device, options.out, file=options.file), None
    for row in rows:
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(dist.device)
        score, nats = documents.score(model, row.way, row.settings, compiled=cuda)
        values = [
            ("bpb", score.bpb, "bpb"),
            ("tokens", score.tokens, "tokens"),
            ("seconds", score.seconds, "s"),
            ("tokens_per_s", score.tokens / score.seconds, "1/s"),
        ]
        if row.name == base:
            first = nats
        if first is not None:
            found = documents.against(nats, first)
            values[1:1] = [
                ("difference", found.mean, "bpb"),
                ("difference_low", found.low, "bpb"),
                ("difference_high", found.high, "bpb"),
            ]
        if cuda:
            values.append(("peak_mib", torch.cuda.max_memory_allocated(dist.device) / 2**20, "MiB"))
        for metric, value, unit in values:
            recorder.add(row.case, "pgolf", metric, Sample(float(value), 0.0, 1), unit)
    recorder.write()
    dist.close()


if __name__ == "__main__":
    main()
