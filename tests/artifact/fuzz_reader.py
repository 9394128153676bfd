"""Feeds damaged artifacts to the reader; `python tests/artifact/fuzz_reader.py --count N` prints JSON.

Each must give ArtifactError or, when the checksum was fixed and what was changed is allowed to be anything, a
state; within the memory that the file's size allows, and at once.
"""

import argparse
import io
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).parent))

from artifact_helpers import FACTS, TOY, make_state
from mutate import Mutator

from pgolf.artifact.format import Reader, raw_limit
from pgolf.artifact.header import ArtifactError
from pgolf.artifact.read import decode_artifact
from pgolf.artifact.write import write_artifact
from pgolf.config import Coder
from pgolf.quant.quantized import dequantize_state

SLOWEST = 5.0
"""Seconds of the processor in which a file that takes longer counts as a hang; a good one takes 0.001."""
OWN_MEMORY = 64 << 20
"""Bytes that decoders, their threads and the interpreter may take besides what the sections hold."""


def good_artifact(state=None, coder="range") -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        words = {**FACTS, "limit": 16_000_000, "quality": 1, "coder": coder}
        write_artifact(path, state or make_state(TOY), TOY, **words)
        return path.read_bytes()


def outcome(data: bytes) -> str:
    """Return "read" or "refused"; any other exception escapes."""
    try:
        dequantize_state(decode_artifact(Reader(io.BytesIO(data), len(data)))[1])
    except ArtifactError:
        return "refused"
    return "read"


def fuzz(good: bytes, *, count: int, seed: int) -> dict:
    """Return counts, the slowest file's seconds and the growth of the process.

    Raises:
        AssertionError: a damaged file with a wrong checksum was read, one took too long or too much memory.
    """
    assert outcome(good) == "read"
    mutator = Mutator(good, seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {"count": count, "read": 0, "refused": 0, "slowest": 0.0}
    began = time.perf_counter()
    for i in range(count):
        data, checksum = mutator.next()
        at = time.process_time()  # not of the clock on the wall, in which other programs have their share
        answer = outcome(data)
        result["slowest"] = max(result["slowest"], time.process_time() - at)
        result[answer] += 1
        assert checksum or answer == "refused" or data == good, (
            f"seed {seed}, file {i}: read with a wrong checksum"
        )
        assert result["slowest"] < SLOWEST, f"seed {seed}, file {i}: {result['slowest']:.1f} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    # Codes, their float32 copies, and brotli's and numpy's in between.
    bound = 16 * raw_limit(2 * len(good)) + OWN_MEMORY
    assert grown < bound, f"seed {seed}: {grown:,} bytes, at most {bound:,} are allowed"
    return {**result, "seconds": time.perf_counter() - began, "grown": grown, "bound": bound}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--coder", default="range", choices=get_args(Coder))
    args = parser.parse_args()
    sys.stdout.write(
        json.dumps(fuzz(good_artifact(coder=args.coder), count=args.count, seed=args.seed)) + "\n"
    )
