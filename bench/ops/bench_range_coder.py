"""encode_codes and decode_codes on the codes of a trained model, compared with general compressors.

Give `--artifact PATH`. pgolf's coder gets the matrices one by one, as an artifact stores them: transposed and
with a pool where the format says so; `pgolf fast` gets no pool. General compressors get each parameter in one
piece, with the columns of a matrix one after the other, which is best for them. `entropy` is the order-0
entropy of each parameter's histogram. Everything runs in one thread, and the seconds are CPU time (including
that of lrzip and zstd, which are separate programs). `seconds_*_2_cores` are the wall time of pgolf's coder
in two threads, `seconds_read_file` that of reading the whole file in one thread per core. `machine` has the
number of cores and the load average before and after. If other programs ran too (a load above 1 before), the
wall time means little, and the CPU time is too long by a few tens of percent.
"""

from __future__ import annotations

import argparse
import lzma
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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
Coder = tuple[Callable[[bytes], bytes], Callable[[bytes], object]]


@dataclass(frozen=True)
class Matrix:
    """A matrix in the form in which an artifact codes it."""

    codes: Codes
    pool: Codes | None


def load(path: Path, *, most: int | None) -> tuple[dict[str, list[Codes]], list[Matrix]]:
    """Return the matrices of each parameter (at most `most` of each), and all of them in their coded form."""
    header, state = read_state(path)
    banks = {n: list(t.codes.reshape(-1, *t.codes.shape[-2:]).numpy()) for n, t in state.quantized.items()}
    names = {n if len(b) == 1 else f"{n}.{i}": m for n, b in banks.items() for i, m in enumerate(b)}
    coded = [
        Matrix(names[p.name].T if p.transposed else names[p.name], names[p.pool] if p.pool else None)
        for p in (section.plan for section in header.sections)
        if p.kind == "codes" and (most is None or p.name.endswith(("emb", ".0")))
    ]
    return {name: bank[:most] for name, bank in banks.items()}, coded


def entropy_bytes(matrices: list[Codes]) -> float:
    """Return the bytes that an ideal coder needs if it knows only the histogram of all matrices."""
    counts = np.unique(np.concatenate([m.ravel() for m in matrices]), return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def column_major(matrices: list[Codes]) -> bytes:
    """Return a parameter's codes in the order that is best for general compressors."""
    return b"".join(m.T.tobytes() for m in matrices)


def coders() -> dict[str, Coder]:
    """Return every general compressor that is installed: compress(data), decompress(stream)."""
    result: dict[str, Coder] = {
        f"brotli-11 {brotli.__version__}": (
            lambda data: brotli.compress(data, quality=11, lgwin=24),
            brotli.decompress,
        ),
        "xz-9": (lambda data: lzma.compress(data, preset=9), lzma.decompress),
    }
    if shutil.which("zstd"):
        result["zstd-19"] = (
            lambda data: pipe(["zstd", "-q", "-19", "--single-thread"], data),
            lambda data: pipe(["zstd", "-q", "-d"], data),
        )
    if shutil.which("lrzip"):
        result["lrzip -z -L 9"] = (
            lambda data: pipe(["lrzip", "-q", "-z", "-L9", "-p1"], data),
            lambda data: pipe(["lrzip", "-q", "-d", "-p1"], data),
        )
    return result


def pipe(command: list[str], data: bytes) -> bytes:
    """Return the output of a program for the input `data`."""
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its finished children, seconds."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def ours(recorder: Recorder, matrices: list[Matrix], repeats: int) -> None:
    """Measure the size and the speed of pgolf's two modes, in one thread and in two."""
    million = sum(m.codes.size for m in matrices) * 1e-6

    def decode(item: tuple[bytes, Matrix], *, fast: bool) -> None:
        pool = None if fast else item[1].pool
        back = decode_codes(item[0], item[1].codes.shape, pool=pool)
        assert np.array_equal(back, item[1].codes)

    for name, fast in (("pgolf", False), ("pgolf fast", True)):
        encode = partial(encode_matrix, fast=fast)
        encoding, decoding, streams = [], [], []
        for _ in range(repeats):
            began = cpu_seconds()
            streams = [encode(m) for m in matrices]
            encoding.append(cpu_seconds() - began)
            began = cpu_seconds()
            for item in zip(streams, matrices, strict=True):
                decode(item, fast=fast)
            decoding.append(cpu_seconds() - began)
        recorder.add(CASES[0], name, "bytes", Sample(sum(map(len, streams)), 0.0, 1), "bytes")
        for metric, times in (("encode", encoding), ("decode", decoding)):
            recorder.add(CASES[0], name, f"seconds_{metric}", Sample.of(times), "s")
            recorder.add(
                CASES[0], name, f"{metric}_msym_per_s", Sample.of([million / t for t in times]), "Msym/s"
            )
        with ThreadPoolExecutor(2) as pool:
            began = time.perf_counter()
            list(pool.map(encode, matrices))
            encoded = time.perf_counter()
            list(pool.map(partial(decode, fast=fast), zip(streams, matrices, strict=True)))
            both = {"encode": encoded - began, "decode": time.perf_counter() - encoded}
        for metric, seconds in both.items():
            recorder.add(CASES[0], name, f"seconds_{metric}_2_cores", Sample(seconds, 0.0, 1), "s")


def encode_matrix(matrix: Matrix, *, fast: bool) -> bytes:
    """Return the stream of one matrix; the fast mode uses neither pool nor orientation."""
    return encode_codes(matrix.codes, pool=None if fast else matrix.pool, fast=fast)


def measure(recorder: Recorder, args: argparse.Namespace) -> None:
    """Measure the size and the speed of every coder."""
    banks, matrices = load(args.artifact, most=1 if args.quick else None)
    million = sum(m.size for bank in banks.values() for m in bank) * 1e-6
    entropy = sum(entropy_bytes(bank) for bank in banks.values())
    recorder.add(CASES[0], "entropy", "bytes", Sample(entropy, 0.0, 1), "bytes")
    recorder.add(CASES[0], "machine", "cores", Sample(os.cpu_count() or 0, 0.0, 1), "cores")
    recorder.add(CASES[0], "machine", "load_before", Sample(os.getloadavg()[0], 0.0, 1), "processes")
    ours(recorder, matrices, args.repeats)
    began, before = time.perf_counter(), cpu_seconds()
    read_state(args.artifact)
    wall, spent = time.perf_counter() - began, cpu_seconds() - before
    recorder.add(CASES[0], "pgolf", "seconds_read_file", Sample(wall, 0.0, 1), "s")
    recorder.add(CASES[0], "pgolf", "cpu_seconds_read_file", Sample(spent, 0.0, 1), "s")
    data = [column_major(bank) for bank in banks.values()]
    for name, (compress, decompress) in coders().items():
        began = cpu_seconds()
        streams = [compress(piece) for piece in data]
        encoding = cpu_seconds() - began
        began = cpu_seconds()
        assert [decompress(stream) for stream in streams] == data
        decoding = cpu_seconds() - began
        recorder.add(CASES[0], name, "bytes", Sample(sum(map(len, streams)), 0.0, 1), "bytes")
        for metric, seconds in (("encode", encoding), ("decode", decoding)):
            recorder.add(CASES[0], name, f"seconds_{metric}", Sample(seconds, 0.0, 1), "s")
            recorder.add(CASES[0], name, f"{metric}_msym_per_s", Sample(million / seconds, 0.0, 1), "Msym/s")
    recorder.add(CASES[0], "machine", "load_after", Sample(os.getloadavg()[0], 0.0, 1), "processes")


def main() -> None:
    """Parse arguments, measure, write."""
    arguments = parser(__doc__ or "", CASES)
    arguments.add_argument("--artifact", type=Path, required=True, help="file whose codes are coded")
    arguments.set_defaults(repeats=1, device="cpu")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    recorder = Recorder("range_coder", torch.device("cpu"), None if args.quick else args.out)
    measure(recorder, args)
    recorder.write()


if __name__ == "__main__":
    main()
