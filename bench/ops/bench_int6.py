"""pack_int6 and unpack_int6 on the model's 35.9 M codes, against the references in eager mode and compiled.

GB/s counts the bytes that must move: one per code and three per four codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.common import Recorder, Sample, parser, time_launched, torch_name
from pgolf.ops import pack_int6, pack_int6_ref, unpack_int6, unpack_int6_ref

ROWS, COLUMNS = 70144, 512  # 35.9 M codes
CASES = ["pack", "unpack"]


def contenders(case: str, codes: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return every implementation of a case."""
    if case == "pack":
        compiled = torch.compile(pack_int6_ref, dynamic=False, fullgraph=True)
        return {
            "pgolf": lambda: pack_int6(codes),
            torch_name("eager"): lambda: pack_int6_ref(codes),
            torch_name("compile"): lambda: compiled(codes),
        }
    packed = pack_int6(codes)
    compiled = torch.compile(unpack_int6_ref, dynamic=False, fullgraph=True)
    return {
        "pgolf": lambda: unpack_int6(packed, COLUMNS),
        torch_name("eager"): lambda: unpack_int6_ref(packed, COLUMNS),
        torch_name("compile"): lambda: compiled(packed, COLUMNS),
    }


def measure(recorder: Recorder, case: str, rows: int, repeats: int) -> None:
    """Time one case and record it."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-32, 32, (rows, COLUMNS), generator=g, dtype=torch.int8).to(recorder.device)
    moved = codes.numel() * 1.75e-9  # GB
    calls = 10 if recorder.device.type == "cuda" else 1
    for name, sample in time_launched(
        contenders(case, codes), recorder.device, repeats=repeats, calls=calls
    ).items():
        rate = moved / (sample.value * 1e-3)
        recorder.add(
            case, name, "gb_per_s", Sample(rate, rate * sample.spread / sample.value, sample.n), "GB/s"
        )


def main() -> None:
    """Parse arguments, measure, write."""
    args = parser(__doc__ or "", CASES).parse_args()
    recorder = Recorder("int6", torch.device(args.device))
    for case in args.cases:
        torch.compiler.reset()
        measure(recorder, case, 1024 if args.quick else ROWS, 3 if args.quick else args.repeats)
    if not args.quick:
        recorder.write(args.out)


if __name__ == "__main__":
    main()
