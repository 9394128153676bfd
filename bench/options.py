"""The options of scoring on one artifact: bits per byte, seconds and memory of each, one row after another.

    python -m bench.options model.pgolf --data SHARDS --rows plain ttt ttt_tilt --out bench/results
    python -m bench.options model.pgolf --data SHARDS --rows ttt "mine=ttt context=3072 adapters.rank=48"

A row is a way to score with some settings of `pgolf.config.EvaluateConfig` changed: a name from `ROWS`, or
NAME=WAY KEY=VALUE ... The row `published` is the way to score of the run's pull request, with the settings in
the config.json next to the file. `difference` is its bits per byte minus those of `--base` (without it, of
the first row), with a 95 % interval over documents (`difference_low`, `difference_high`); less than 0 is
better. On a GPU test-time training is compiled; the first row that needs a graph has its compilation in its
seconds.

`--keep FOLDER` keeps what was measured of each row and the losses of all documents, and a row that is there
already is read instead of scored. So rows can be scored by several processes, or after an interruption, and
one more call with all of them compares each with the same base.

Choose options on text that no run has trained on and that is not the validation text: `pgolf data held-out`
makes such a folder before a run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bench.common import Recorder, Sample, device_name, versions
from bench.documents import Documents
from pgolf.artifact.read import build_model, read_artifact
from pgolf.config import Config, EvaluateConfig, Method, from_dict
from pgolf.config_evaluate import METHODS
from pgolf.config_io import read_json
from pgolf.dist import Dist
from pgolf.env import source_commit
from pgolf.evaluate.validation import DataFolder
from pgolf.files import atomic_file, file_sha256
from pgolf.model.gpt import GPT

ROWS = {
    "plain": "plain",
    "plain_context3072": "plain context=3072",
    "plain_tilt": "plain tilt.on=true",
    "plain_tilt_seen2": "plain tilt.on=true tilt.seen=2",
    "plain_tilt_boost1": "plain tilt.on=true tilt.boost=1.0",
    "sliding": "sliding",
    "local": "local",
    "local_context3072": "local context=3072",
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
    "ttt_chunk48": "ttt adapters.chunk=48 adapters.chunk_growth=16",
    "ttt_chunk_max512": "ttt adapters.chunk_max=512",
    "ttt_chunk_growth4": "ttt adapters.chunk_growth=4 adapters.chunk_max=512",
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


class Scored(NamedTuple):
    """What was measured of a row."""

    impl: str
    values: list[tuple[str, float, str]]
    """Metric, value and unit of each."""
    nats: NDArray[np.float64]
    """`(n,)` sum of the losses of each document."""
    origin: dict[str, Any]
    """Device, commit and versions, as result lines have them."""


class Kept:
    """A folder with what was measured of rows.

    Args:
        folder: where; made when the first row is kept.
        facts: what all rows have in common, such as the hash of the file that is scored.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self._folder, self._facts = folder, facts

    def _facts_of(self, row: Row) -> dict[str, Any]:
        return {**self._facts, "way": row.way, "settings": row.settings.settings_of(row.way)}

    def read(self, row: Row) -> Scored | None:
        """Return what was measured of a row, None if it is not there.

        Raises:
            ValueError: a row of this name was measured with something else.
        """
        path = self._folder / f"{row.name}.npz"
        if not path.is_file():
            return None
        with np.load(path) as file:
            found, nats = json.loads(str(file["measured"])), file["nats"]
        if found["facts"] != json.loads(json.dumps(self._facts_of(row))):
            raise ValueError(
                f"{path} has a row of this name with other settings, of another file or of another text; use "
                "another name or another folder"
            )
        values = [(metric, value, unit) for metric, value, unit in found["values"]]
        return Scored(found["impl"], values, nats, found["origin"])

    def write(self, row: Row, scored: Scored) -> None:
        """Keep what was measured of a row."""
        self._folder.mkdir(parents=True, exist_ok=True)
        measured = {"facts": self._facts_of(row), **scored._asdict()}
        del measured["nats"]
        with atomic_file(self._folder / f"{row.name}.npz") as file:
            np.savez(file, measured=np.array(json.dumps(measured)), nats=scored.nats)


def measure(row: Row, model: GPT, documents: Documents, impl: str) -> Scored:
    """Score a row; `impl` is what result lines say of who did it."""
    device = documents.dist.device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    score, nats = documents.score(model, row.way, row.settings, compiled=cuda)
    values = [
        ("bpb", score.bpb, "bpb"),
        ("tokens", float(score.tokens), "tokens"),
        ("seconds", score.seconds, "s"),
        ("tokens_per_s", score.tokens / score.seconds, "1/s"),
    ]
    if cuda:
        values.append(("peak_mib", torch.cuda.max_memory_allocated(device) / 2**20, "MiB"))
    commit, dirty = source_commit()
    origin = {"device": device_name(device), "commit": commit, "dirty": dirty, "versions": versions()}
    return Scored(impl, values, nats, origin)


def mixed(origins: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a line that says so if rows, by name, were measured on several devices or commits; else nothing.

    Their differences are then also those of other kernels and other rounding.
    """
    found: dict[str, list[str]] = {}
    for name, origin in origins.items():
        found.setdefault(f"{origin['device']} at {origin['commit']}", []).append(name)
    if len(found) < 2:
        return ""
    parts = "; ".join(f"{', '.join(names)} on {where}" for where, names in found.items())
    return f"note: these rows were not measured with the same kernels: {parts}\n"


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
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep rows there, and read those it has")
    parser.add_argument(
        "--shared", action="store_true", help="say in each line that other programs ran on the same GPU"
    )
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
    text = folder.validation(documents=options.documents)
    documents = Documents(folder, text, dist, options.tokens)
    # Rows with other adapters need graphs of their own.
    torch._dynamo.config.recompile_limit = 64
    kept = None
    if options.keep:
        facts = {"artifact": file_sha256(options.artifact), "tokens": text.tokens.size, **folder.facts()}
        kept = Kept(options.keep, facts)
    impl = "pgolf, shared GPU" if options.shared else "pgolf"
    recorder, first = Recorder("options", dist.device, options.out, file=options.file), None
    origins: dict[str, dict[str, Any]] = {}
    for row in rows:
        try:
            scored = kept and kept.read(row)
        except ValueError as e:
            parser.error(str(e))
        if scored is None:
            scored = measure(row, model, documents, impl)
            if kept:
                kept.write(row, scored)
        values = list(scored.values)
        recorder.measured = scored.origin
        origins[row.name] = scored.origin
        if row.name == base:
            first = scored.nats
        if first is not None:
            found = documents.against(scored.nats, first)
            values[1:1] = [
                ("difference", found.mean, "bpb"),
                ("difference_low", found.low, "bpb"),
                ("difference_high", found.high, "bpb"),
            ]
        for metric, value, unit in values:
            recorder.add(row.case, scored.impl, metric, Sample(float(value), 0.0, 1), unit)
    recorder.write()
    print(mixed(origins), end="")
    dist.close()


if __name__ == "__main__":
    main()
