"""CaseOps: the rate of the transform, and the tokens and bytes that tokenizers with and without it give.

    python -m bench.caseops --set val.jsonl.xz plain.model caseops.model pairs.model

For each tokenizer of a set: the tokens of the text, the sum of their byte counts (which must be the bytes of
the text), how many of the tokens are operators, and how many documents decode exactly.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.common import Recorder, Sample
from pgolf.data import caseops
from pgolf.data.text import iterate_documents
from pgolf.data.tokenizer import Tokenizer

REPEATS = 5


def rate(function: Callable[[str], str], texts: list[str], size: int) -> Sample:
    """Return MB of original text per second of CPU time over all `texts`, which had `size` bytes."""
    seconds = []
    for _ in range(REPEATS):
        begin = time.process_time()
        for text in texts:
            function(text)
        seconds.append(time.process_time() - begin)
    return Sample.of([size / 1e6 / s for s in seconds])


def measure(recorder: Recorder, source: Path, models: list[Path]) -> None:
    """Measure the transform and the tokenizers on one text."""
    texts = [document.text for document in iterate_documents(source)]
    size = sum(len(text.encode()) for text in texts)
    case = f"{source.name} ({len(texts):,} documents, {size:,} bytes)"
    encoded = [caseops.encode(text) for text in texts]
    if [caseops.decode(text) for text in encoded] != texts:
        raise RuntimeError(f"{source}: a document does not come back")
    recorder.add(case, "pgolf", "encode", rate(caseops.encode, texts, size), "MB/CPU s")
    recorder.add(case, "pgolf", "decode", rate(caseops.decode, encoded, size), "MB/CPU s")
    for path in models:
        tokenizer = Tokenizer(path)
        begin = time.process_time()
        pairs = tokenizer.encode_batch(texts, threads=1)
        seconds = time.process_time() - begin
        ids = np.concatenate([i for i, _ in pairs])
        counted = sum(int(counts.sum()) for _, counts in pairs)
        if counted != size:
            raise RuntimeError(f"{path}: the counts sum to {counted} of {size} bytes")
        for metric, value, unit in (
            ("tokens", ids.size, "tokens"),
            ("sum of the byte counts", counted, "bytes"),
            ("operators", np.isin(ids, caseops.IDS).sum() if tokenizer.caseops else 0, "tokens"),
            (
                "exact",
                sum(tokenizer.decode(p[0]) == t for p, t in zip(pairs, texts, strict=True)),
                "documents",
            ),
            ("tokens and counts, one thread", size / 1e6 / seconds, "MB/CPU s"),
        ):
            recorder.add(case, path.name, metric, Sample(float(value), 0.0, 1), unit)


def main() -> None:
    """Measure and print; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--set", nargs="+", type=Path, action="append", required=True, help="a text and tokenizers"
    )
    parser.add_argument("--out", type=Path, help="folder of the result file")
    options = parser.parse_args()
    recorder = Recorder("caseops", torch.device("cpu"), options.out)
    for source, *models in options.set:
        measure(recorder, source, models)
    recorder.write()


if __name__ == "__main__":
    main()
