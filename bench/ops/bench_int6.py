"""Packing and the fused quantizers on the model's 35.9 M codes, compared with the references and with a copy.

GB/s counts the bytes that must be read or written: codes, packed bits, float32 weights (quantize), bfloat16
weights (dequantize) and the scales of the rows. `copy` moves the same number of bytes with Tensor.copy_, half
read and half written, which shows the bandwidth of the memory. `gcodes_per_s` is the same speed in 10^9 codes
per second. More is better for both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.common import Recorder, Sample, parser, time_launched, torch_name
from pgolf.ops import (
    pack_int6,
    pack_int6_ref,
    quantize_pack,
    quantize_pack_sdclip,
    unpack_dequantize,
    unpack_int6,
    unpack_int6_ref,
)
from pgolf.quant.grid import dequantize, quantize, sdclip_scales

ROWS, COLUMNS = 70144, 512  # 35.9 M codes
CASES = ["pack", "unpack", "quantize_pack", "quantize_pack_sdclip", "unpack_dequantize"]
OTHER_BITS = [f"{case}_{bits}bit" for case in CASES[2:] for bits in (4, 5, 7, 8)]
CLIP = 12.0


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


def fused(case: str, weight: Tensor, bits: int) -> dict[str, Callable[[], object]]:
    """Return every implementation of a fused case; the peer writes one byte per code, not packed bits."""
    packed, scales = quantize_pack_sdclip(weight, CLIP, bits)
    codes = quantize(weight, scales, bits=bits)

    def eager_sdclip() -> Tensor:
        return quantize(weight, sdclip_scales(weight, bits=bits, clip=CLIP), bits=bits)

    ours: dict[str, Callable[[], object]] = {
        "quantize_pack": lambda: quantize_pack(weight, scales, bits),
        "quantize_pack_sdclip": lambda: quantize_pack_sdclip(weight, CLIP, bits),
        "unpack_dequantize": lambda: unpack_dequantize(packed, scales, COLUMNS, bits),
    }
    eager: dict[str, Callable[[], object]] = {
        "quantize_pack": lambda: quantize(weight, scales, bits=bits),
        "quantize_pack_sdclip": eager_sdclip,
        "unpack_dequantize": lambda: dequantize(codes, scales).bfloat16(),
    }
    return {"pgolf": ours[case], torch_name("eager") + " unpacked": eager[case]}


def copy_of(moved: int, device: torch.device) -> Callable[[], object]:
    """Return a copy that moves `moved` bytes, counting reads and writes."""
    source = torch.ones(moved // 8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure(recorder: Recorder, case: str, rows: int, repeats: int) -> None:
    """Time one case and record it."""
    g = torch.Generator().manual_seed(0)
    base, bits = (case[: -len("_4bit")], int(case[-4])) if case.endswith("bit") else (case, 6)
    found: dict[str, Callable[[], object]]
    if base in ("pack", "unpack"):
        codes = torch.randint(-32, 32, (rows, COLUMNS), generator=g, dtype=torch.int8).to(recorder.device)
        found, a_code, a_row = {**contenders(base, codes)}, 1.0 + bits / 8, 0
    else:
        weight = (torch.randn(rows, COLUMNS, generator=g) * 0.02).to(recorder.device)
        found, a_row = fused(base, weight, bits), 2
        a_code = (2.0 if base == "unpack_dequantize" else 4.0) + bits / 8
    moved = round(rows * (COLUMNS * a_code + a_row))
    found["copy"] = copy_of(moved, recorder.device)
    calls = 10 if recorder.device.type == "cuda" else 1
    for name, sample in time_launched(found, recorder.device, repeats=repeats, calls=calls).items():
        for metric, amount, unit in (("gb_per_s", moved, "GB/s"), ("gcodes_per_s", rows * COLUMNS, "G/s")):
            rate = amount * 1e-9 / (sample.value * 1e-3)
            spread = rate * sample.spread / sample.value
            recorder.add(case, name, metric, Sample(rate, spread, sample.n), unit)


def main() -> None:
    """Parse arguments, measure, write."""
    args = parser(__doc__ or "", CASES + OTHER_BITS).parse_args()
    recorder = Recorder("int6", torch.device(args.device), None if args.quick else args.out)
    for case in args.cases:
        torch.compiler.reset()
        measure(recorder, case, 1024 if args.quick else ROWS, 3 if args.quick else args.repeats)
    recorder.write()


if __name__ == "__main__":
    main()
