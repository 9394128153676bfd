"""Two ways to read an artifact's codes without a compiled pgolf: C++ that is compiled, and lanes in NumPy.

`c++` is pgolf/ops/range_decoder.cpp: its bytes in brotli 11, the seconds of compiling it (since 355f0ea with
the encoder, as range_coder.cpp), and those of decoding as many codes as the network of `pr1855` has, next to
the extension. The codes are made up: Gaussian, with rows that lean on earlier ones, so that the coder chooses
its slower modes, as for trained weights.

`numpy lanes` is a prototype of a stream that NumPy could read. Every column is a lane with an arithmetic
coder (rANS, 32 bits) of its own; the columns of all matrices of one shape are side by side, and their words
are in one stream. The prototype decodes random words, which gives codes that are distributed as its model
says, so it does the work of a real stream. A lane cannot use the codes to its left, so the model is the
coder's mode of columns, here even without the adaptive correction, which would make it slower. `bytes_more`
is what this mode costs on trained weights (`pgolf fast` in
bench/results/20261128_intel-r-xeon-r-processor-x1_range_coder.jsonl) and the last state of every lane.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import brotli
import numpy as np
import torch
from numpy.typing import NDArray

from bench.common import Recorder, Sample, parser
from pgolf import _C
from pgolf.artifact.header import matrix_shapes
from pgolf.ops import _coder, encode_codes
from pgolf.ops.range_coder import TAIL
from pgolf.presets import pr1855

TRAINED = {"pgolf": 15_883_976, "fast": 16_167_299}
"""Bytes of the codes of a trained model in the coder's two forms, from the file that the text above names."""
SIZES = 40
Codes = NDArray[np.int8]


def shapes() -> list[tuple[int, int, int]]:
    """Return (matrices, rows, cols) of the parameters of `pr1855`, as they are coded."""
    found = []
    for name, shape in matrix_shapes(pr1855().model).items():
        count, rows, cols = (1, *shape) if len(shape) == 2 else shape
        found.append((count, cols, rows) if name.startswith("mlp_down") else (count, rows, cols))
    return found


def made_up(rows: int, cols: int, seed: int) -> Codes:
    """Return codes of a deviation of 2.6, which is that of 3.4 bits; each row leans on an earlier one."""
    random = np.random.default_rng(seed)
    values = random.normal(size=(rows, cols))
    for row in range(1, rows):
        values[row] = 0.95 * values[row] + 0.3 * values[random.integers(row)]
    return np.clip(np.rint(2.6 * values), -15, 15).astype(np.int8)


def seconds(work: Callable[[], object], repeats: int = 3) -> Sample:
    """Return the wall time of a call."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return Sample.of(times)


def compiled(recorder: Recorder) -> None:
    """Measure the C++ decoder, next to the extension."""
    source = Path(_coder.__file__).with_name("range_decoder.cpp").read_bytes()
    recorder.add("source", "c++", "bytes", Sample(len(brotli.compress(source, quality=11)), 0.0, 1), "bytes")
    recorder.add("source", "c++", "seconds_compile", seconds(_coder._compiled.__wrapped__), "s")
    matrices = [made_up(rows, cols, i) for n, rows, cols in shapes() for i in range(n)]
    streams = [encode_codes(m) for m in matrices]
    modes = np.bincount([stream[0] for stream in streams], minlength=4)
    print(f"{sum(m.size for m in matrices):,} codes; matrices in modes 1, 2, 3: {modes[1:]}")

    def read(decode: Callable[..., bytearray], threads: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            jobs = [(decode, s, *m.shape, b"") for s, m in zip(streams, matrices, strict=True)]
            found = list(pool.map(lambda job: job[0](*job[1:]), jobs))
        assert all(
            np.array_equal(np.frombuffer(f, np.int8), m.ravel()) for f, m in zip(found, matrices, strict=True)
        )

    for threads in (1, 2):
        for name, decode in (("c++", _coder.decode_codes), ("extension", _C.decode_codes)):
            taken = seconds(lambda d=decode, t=threads: read(d, t))
            recorder.add("36 M codes", name, f"seconds_{threads}_cores", taken, "s")


def table() -> NDArray[np.int64]:
    """Return p(bit) in 1/65536 for each of 800 variances: at the center, then of each size from it."""
    tails = np.array([*TAIL, TAIL[-1]], float)
    result = np.empty((800, SIZES))
    for i in range(800):
        deviation = np.sqrt((65 + 2 * (i & 31)) * 2.0 ** (i >> 5) / 64) / 16
        edges = (0.5 + np.arange(SIZES)) * 32 / deviation
        mass = np.interp(edges, np.arange(len(tails)), tails)
        result[i, 0] = 65536 * (1 - mass[0] / tails[0])
        result[i, 1:] = 65536 * (1 - mass[1:] / mass[:-1])
    return np.clip(result, 16, 65520).astype(np.int64).reshape(-1)


def lanes(rows: int, count: int, known: NDArray[np.int64], words: NDArray[np.int64]) -> Codes:
    """Decode `rows` codes of each of `count` lanes and return the last row."""
    state = words[:count] + 65536
    sums, at = np.full(count, 24 * 7 * 256, np.int64), 0
    code = np.zeros(count, np.int64)

    def bits(active: NDArray[np.int64], p: NDArray[np.int64]) -> NDArray[np.bool_]:
        nonlocal at
        x = state[active]
        low = x & 65535
        bit = low < p
        x = np.where(bit, p, 65536 - p) * (x >> 16) + low - np.where(bit, 0, p)
        short = np.flatnonzero(x < 65536)
        if at + len(short) > len(words):
            at = 0
        x[short] = x[short] << 16 | words[at : at + len(short)]
        at += len(short)
        state[active] = x
        return bit

    everyone = np.arange(count)
    for row in range(rows):
        # The decoder of a real stream would have the same steps: a bit for every lane that is not done.
        variance = np.clip(sums // (row + 24), 16, (1 << 25) - 1)
        octave = np.frexp(variance.astype(float))[1] - 1
        base = (octave * 32 + ((variance << 5 >> octave) & 31)) * SIZES
        code = np.zeros(count, np.int64)
        active = everyone[~bits(everyone, known[base])]
        sign = bits(active, np.full(len(active), 32768))
        for size in range(1, 15):
            code[active] = np.where(sign, size, -size)
            keep = ~bits(active, known[base[active] + size])
            active, sign = active[keep], sign[keep]
            if not len(active):
                break
        sums += code * code * 256
    return code.astype(np.int8)


def interleaved(recorder: Recorder) -> None:
    """Measure the prototype on the shapes of `pr1855`, and say what its stream costs."""
    known, words = table(), np.random.default_rng(0).integers(0, 65536, 1 << 22)
    whole, most, by_cols = 0.0, 0, {}
    for count, rows, cols in shapes():
        by_cols.setdefault((rows, cols), []).append(count)
    for (rows, cols), counts in by_cols.items():
        most = max(most, sum(counts) * cols)
        share = min(rows, 64)  # rows of one shape take the same time
        began = time.perf_counter()
        lanes(share, sum(counts) * cols, known, words)
        whole += (time.perf_counter() - began) * rows / share
    recorder.add("36 M codes", "numpy lanes", "seconds_1_core", Sample(whole, 0.0, 1), "s")
    more = TRAINED["fast"] - TRAINED["pgolf"] + 4 * most
    recorder.add("36 M codes", "numpy lanes", "bytes_more", Sample(more, 0.0, 1), "bytes")


def main() -> None:
    """Parse arguments, measure, write."""
    args = parser(__doc__ or "", ["36 M codes"]).parse_args()
    torch.set_num_threads(1)
    recorder = Recorder("decoders", torch.device("cpu"), None if args.quick else args.out)
    recorder.add("machine", "machine", "load_before", Sample(os.getloadavg()[0], 0.0, 1), "processes")
    compiled(recorder)
    interleaved(recorder)
    recorder.write()


if __name__ == "__main__":
    main()
