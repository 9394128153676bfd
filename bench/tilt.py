"""The hints of the n-gram tilt on real text: how many there are, how often they are right, what they take.

    python -m bench.tilt --set val.jsonl.xz sp8192.model --set fineweb.jsonl.xz fineweb.model --seen 1 2

No model is needed. Where a model gives the hint the probability q, the tilt costs log(1 + q (exp(boost) - 1))
nats and gains `boost` nats if the hint is right. So `break_even_q` is the probability above which the hints
of this text lose on the average, and `most_gain` is what they would bring at q = 0.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch

from bench.common import Recorder, Sample
from pgolf.config import TiltConfig
from pgolf.data.text import iterate_documents
from pgolf.data.tokenizer import Tokenizer
from pgolf.evaluate.tilt import find_hints

REPEATS = 3


def tokens_of(source: Path, tokenizer: Tokenizer) -> tuple[torch.Tensor, int]:
    """Return all tokens of a text with a BOS before each document and at the end, and its bytes."""
    texts = [document.text for document in iterate_documents(source)]
    bos = np.array([tokenizer.bos_id], dtype=np.int64)
    parts = [
        part for ids, _ in tokenizer.encode_batch(texts, threads=1) for part in (bos, ids.astype(np.int64))
    ]
    return torch.from_numpy(np.concatenate([*parts, bos])), sum(len(text.encode()) for text in texts)


def measure(recorder: Recorder, case: str, tokens: torch.Tensor, size: int, config: TiltConfig) -> None:
    """Measure the hints of one text with one setting."""
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        hints = find_hints(tokens, config)
        seconds.append(time.perf_counter() - begin)
    has = hints[:-1] >= 0
    fires, targets = int(has.sum()), tokens.numel() - 1
    right = int((hints[:-1] == tokens[1:])[has].sum())
    share = right / max(fires, 1)  # a short text has no hints
    even = math.expm1(share * config.boost) / math.expm1(config.boost)
    most = right * config.boost / math.log(2) / size
    name = f"{case}, order {config.order}, threshold {config.threshold}, seen {config.seen}"
    for metric, sample, unit in (
        ("seconds", Sample.of(seconds), "s"),
        ("tokens", Sample(float(targets), 0.0, 1), "tokens"),
        ("hints", Sample(float(fires), 0.0, 1), "tokens"),
        ("share_of_tokens", Sample(fires / targets, 0.0, 1), "1"),
        ("share_right", Sample(share, 0.0, 1), "1"),
        ("break_even_q", Sample(even, 0.0, 1), "1"),
        ("most_gain", Sample(most, 0.0, 1), "bpb"),
    ):
        recorder.add(name, "pgolf", metric, sample, unit)


def main() -> None:
    """Measure and print; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--set", nargs=2, type=Path, action="append", required=True, help="a text and its tokenizer"
    )
    parser.add_argument("--seen", type=int, nargs="+", default=[1, 2], help="settings of tilt.seen")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    options = parser.parse_args()
    recorder = Recorder("tilt", torch.device("cpu"), options.out)
    for text, model in options.set:
        tokens, size = tokens_of(text, Tokenizer(model))
        for seen in options.seen:
            measure(recorder, f"{text.name}, {model.name}", tokens, size, TiltConfig(seen=seen))
    recorder.write()


if __name__ == "__main__":
    main()
