"""Bytes of the codes of matrices in the coders and layouts that published stacks wrote them in.

`gaussian` is made up: a matrix of 512 x 2048 Gaussian weights whose rows differ in scale, as 6-bit codes with
a clip of 12.85 standard deviations, and as 8-bit codes with one of 20 (PR #1394's matrices and embedding).
`entropy` is that of the codes' distribution as a formula, N / 8 (2.047 - log2(clip / largest code)) bytes.
`--artifact FILE ...` takes the codes of model files instead, each a case of the name of its file; `entropy`
is then that of the histogram of each parameter.

An impl is a coder and a layout: one int8 per code, row after row or column after column, each matrix a stream
(`matrix`, as an artifact has it), each parameter one (`bank`), or all codes one (`all`); `packed` is four
6-bit codes in three bytes, row after row; `groups` has a stream per kind of matrix, with the rows of the
embedding, the queries and the first MLP matrix in the order of a greedy walk to the nearest row, and the
permutations in brotli (PR #1855, which compressed its groups with lrzip). `zstd-22` is the program `zstd`, if
it is installed. `program` is the counted program, for a file of the range coder and for one of the others.
"""

from __future__ import annotations

import argparse
import lzma
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import brotli
import numpy as np
import torch
from numpy.typing import NDArray

from bench.common import Recorder, Sample, parser
from pgolf.artifact.code import code_bytes
from pgolf.artifact.read import read_state
from pgolf.artifact.write import encode_matrix
from pgolf.ops import pack_int6

CASES = ["gaussian", "program"]
GRIDS = {"gaussian 6 bits": (12.85, 31), "gaussian 8 bits": (20.0, 127)}
"""Case -> the clip in standard deviations and the largest code."""
Codes = NDArray[np.int8]


def compressors() -> dict[str, Callable[[bytes], bytes]]:
    """Return the general compressors as published stacks called them, by name."""
    found: dict[str, Callable[[bytes], bytes]] = {
        "brotli-11": lambda data: brotli.compress(data, quality=11, lgwin=24),
        "lzma-6": lambda data: lzma.compress(data, preset=6),
        "lzma-9": lambda data: lzma.compress(data, preset=9),
        "zlib-9": lambda data: zlib.compress(data, 9),
    }
    if shutil.which("zstd"):
        command = ["zstd", "-q", "--ultra", "-22", "--single-thread"]
        found["zstd-22"] = lambda data: (
            subprocess.run(command, input=data, capture_output=True, check=True).stdout
        )
    return found


def made_up(clip: float, largest: int) -> Codes:
    """Return the codes of 512 x 2048 Gaussian weights with scales from the spread of each row (SDClip)."""
    random = np.random.default_rng(0)
    weights = random.normal(size=(512, 2048)) * np.exp(0.3 * random.normal(size=(512, 1)))
    scales = (clip * weights.std(1, ddof=1, keepdims=True) / largest).astype(np.float16).astype(float)
    return np.clip(np.rint(weights / scales), -largest, largest).astype(np.int8)


def packed(codes: Codes) -> bytes:
    """Return the codes of a matrix in 6 bits each."""
    return pack_int6(torch.from_numpy(np.ascontiguousarray(codes).ravel())).numpy().tobytes()


def histogram_bytes(codes: Codes) -> float:
    """Return the bytes that an ideal coder needs if it knows only the histogram."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def walk(matrix: Codes) -> NDArray[np.uint16]:
    """Return an order of the rows: from the first always to the nearest that is left, by absolute errors."""
    rows, left, order = matrix.astype(np.int16), list(range(1, len(matrix))), [0]
    while left:
        order.append(left.pop(int(np.abs(rows[left] - rows[order[-1]]).sum(1).argmin())))
    return np.array(order, np.uint16)


def groups(banks: dict[str, Codes], compress: Callable[[bytes], bytes]) -> int:
    """Return the bytes of the groups, each one stream of columns of ordered rows, and of the orders."""
    kinds = {name: bank for name, bank in banks.items() if not name.startswith(("qo", "kv"))}
    for name in ("qo_bank", "kv_bank"):
        half = len(banks[name]) // 2
        kinds |= {f"{name[0]}": banks[name][:half], f"{name[1]}": banks[name][half:]}
    total, orders = 0, b""
    for name, bank in kinds.items():
        if name in ("tok_emb", "q", "mlp_up_bank"):
            found = [walk(matrix) for matrix in bank]
            orders += b"".join(order.tobytes() for order in found)
            bank = np.stack([matrix[order] for matrix, order in zip(bank, found, strict=True)])
        total += len(compress(columns(bank)))
    return total + len(brotli.compress(orders, quality=11))


def columns(bank: Codes) -> bytes:
    """Return the codes of matrices, column after column."""
    return b"".join(matrix.T.tobytes() for matrix in bank)


def measure(add: Callable[[str, float], None], banks: dict[str, Codes], *, six: bool) -> None:
    """Measure every layout in every compressor, and the range coder without pools."""
    matrices = [matrix for bank in banks.values() for matrix in bank]
    add("pgolf range, matrix", sum(len(encode_matrix(m, coder="range")) for m in matrices))
    for name, compress in compressors().items():
        orders: dict[str, Callable[[Codes], bytes]] = {"rows": Codes.tobytes, "columns": columns}
        for order, join in orders.items():
            per = {
                "matrix": [join(m[None]) for m in matrices],
                "bank": [join(bank) for bank in banks.values()],
                "all": [b"".join(join(bank) for bank in banks.values())],
            }
            for streams, pieces in list(per.items())[: 3 if len(matrices) > 1 else 1]:
                add(f"{name}, {order}, {streams}", sum(len(compress(piece)) for piece in pieces))
        if six:
            add(f"{name}, packed", sum(len(compress(packed(m))) for m in matrices))
        if "qo_bank" in banks:
            add(f"{name}, groups", groups(banks, compress))


def of_artifact(recorder: Recorder, path: Path) -> None:
    """Measure the codes of a model file."""
    state = read_state(path)[1]
    banks = {n: t.codes.reshape(-1, *t.codes.shape[-2:]).numpy() for n, t in state.quantized.items()}

    def add(impl: str, value: float) -> None:
        recorder.add(path.stem, impl, "bytes", Sample(value, 0.0, 1), "bytes")

    add("entropy", sum(histogram_bytes(bank) for bank in banks.values()))
    measure(add, banks, six=all(t.bits <= 6 for t in state.quantized.values()))


def of_gaussians(recorder: Recorder) -> None:
    """Measure the made-up codes."""
    for case, (clip, largest) in GRIDS.items():

        def add(impl: str, value: float, case: str = case) -> None:
            recorder.add(case, impl, "bytes", Sample(value, 0.0, 1), "bytes")

        codes = made_up(clip, largest)
        add("entropy", codes.size / 8 * (2.047 - float(np.log2(clip / largest))))
        measure(add, {"made_up": codes[None]}, six=largest < 32)


def main() -> None:
    """Parse arguments, measure, write."""
    arguments: argparse.ArgumentParser = parser(__doc__ or "", CASES)
    arguments.add_argument("--artifact", type=Path, nargs="+", default=[], help="model files")
    arguments.set_defaults(device="cpu")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    recorder = Recorder("containers", torch.device("cpu"), None if args.quick else args.out)
    if "gaussian" in args.cases:
        of_gaussians(recorder)
    for path in args.artifact:
        of_artifact(recorder, path)
    if "program" in args.cases:
        for name, coder in (("pgolf range", "range"), ("brotli, lzma and zlib", "brotli")):
            recorder.add("program", name, "bytes", Sample(code_bytes(coder), 0.0, 1), "bytes")
    recorder.write()


if __name__ == "__main__":
    main()
