"""encode_codes and decode_codes on the codes of a trained model, against general compressors.

Give `--artifact PATH`. Every contender gets the same matrices, one by one, in one thread; general compressors
get them column-major, which is best for them. `entropy` is the order-0 entropy of each parameter's histogram.
`Msym` are millions of codes.
"""

from __future__ import annotations

import argparse
import lzma
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import brotli
import numpy as np
import torch
from numpy.typing import NDArray

from bench.common import Recorder, Sample, parser
from pgolf.artifact.read import read_state
from pgolf.ops import decode_codes, encode_codes

CASES = ["record_checkpoint"]
Codes = NDArray[np.int8]
Coder = tuple[Callable[[Codes], bytes], Callable[[bytes, Codes], object]]


def load(path: Path, *, most: int | None) -> dict[str, list[Codes]]:
    """Return the matrices of each parameter, at most `most` of each."""
    banks = read_state(path)[1].quantized
    return {name: list(t.codes.reshape(-1, *t.codes.shape[-2:]).numpy())[:most] for name, t in banks.items()}


def entropy_bytes(matrices: list[Codes]) -> float:
    """Return what an ideal coder needs that knows the histogram of all matrices and nothing else."""
    counts = np.unique(np.concatenate([m.ravel() for m in matrices]), return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def column_major(codes: Codes) -> bytes:
    """Return the codes as general compressors like them."""
    return codes.T.tobytes()


def lrzip(arguments: list[str], data: bytes) -> bytes:
    """Return what lrzip writes for `data`."""
    return subprocess.run(["lrzip", "-q", *arguments], input=data, capture_output=True, check=True).stdout


def coders() -> dict[str, Coder]:
    """Return every coder that is installed: encode(codes), decode(stream, codes)."""
    result: dict[str, Coder] = {
        "pgolf": (encode_codes, lambda data, m: decode_codes(data, (m.shape[0], m.shape[1]))),
        f"brotli-11 {brotli.__version__}": (
            lambda m: brotli.compress(column_major(m), quality=11, lgwin=24),
            lambda data, _: brotli.decompress(data),
        ),
        "xz-9e": (
            lambda m: lzma.compress(column_major(m), preset=9 | lzma.PRESET_EXTREME),
            lambda data, _: lzma.decompress(data),
        ),
    }
    if find_spec("zstandard"):
        import zstandard

        result[f"zstd-22 {zstandard.__version__}"] = (
            lambda m: zstandard.ZstdCompressor(22).compress(column_major(m)),
            lambda data, _: zstandard.ZstdDecompressor().decompress(data),
        )
    if shutil.which("lrzip"):
        result["lrzip -z"] = (
            lambda m: lrzip(["-z", "-L9", "-p1"], column_major(m)),
            lambda data, _: lrzip(["-d", "-p1"], data),
        )
    return result


def measure(recorder: Recorder, args: argparse.Namespace) -> None:
    """Size and speed of every coder."""
    banks = load(args.artifact, most=1 if args.quick else None)
    matrices = [m for bank in banks.values() for m in bank]
    million = sum(m.size for m in matrices) * 1e-6
    entropy = sum(entropy_bytes(bank) for bank in banks.values())
    recorder.add(CASES[0], "entropy", "bytes", Sample(entropy, 0.0, 1), "bytes")
    for name, (encode, decode) in coders().items():
        encoding, decoding, streams = [], [], []
        for _ in range(args.repeats if name == "pgolf" else 1):
            begin = time.perf_counter()
            streams = [encode(m) for m in matrices]
            encoding.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            for stream, codes in zip(streams, matrices, strict=True):
                decode(stream, codes)
            decoding.append(time.perf_counter() - begin)
        recorder.add(CASES[0], name, "bytes", Sample(sum(map(len, streams)), 0.0, 1), "bytes")
        for metric, times in (("encode_msym_per_s", encoding), ("decode_msym_per_s", decoding)):
            recorder.add(CASES[0], name, metric, Sample.of([million / t for t in times]), "Msym/s")


def main() -> None:
    """Parse arguments, measure, write."""
    arguments = parser(__doc__ or "", CASES)
    arguments.add_argument("--artifact", type=Path, required=True, help="file whose codes are coded")
    arguments.set_defaults(repeats=3, device="cpu")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    recorder = Recorder("range_coder", torch.device("cpu"))
    measure(recorder, args)
    if not args.quick:
        recorder.write(args.out)


if __name__ == "__main__":
    main()
