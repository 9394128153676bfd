"""Rounding along the trellis and reading it back, for the model's banks, compared with the reference.

`round_*` are the columns that GPTQ rounds one after the other (one column of every matrix of a bank), where
the latency counts; `round_all` and `values` take the model's 35.9 M codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.common import Recorder, parser, time_launched, torch_name
from pgolf.ops import trellis_round, trellis_round_ref, trellis_values, trellis_values_ref

COLUMNS = {"round_mlp_up": (11, 2048), "round_qo": (22, 512), "round_embedding": (1, 8192)}
CASES = [*COLUMNS, "round_all", "values"]
ROWS = 70144  # times 512: 35.9 M codes


def contenders(case: str, device: torch.device, rows: int) -> dict[str, Callable[[], object]]:
    """Return every implementation of a case; the reference needs much memory and takes only columns."""
    shape = COLUMNS.get(case, (512, rows))
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2.7).to(device)
    if case == "values":
        codes = x.T.round().to(torch.int8).contiguous()
        return {
            "pgolf": lambda: trellis_values(codes),
            torch_name("eager"): lambda: trellis_values_ref(codes),
        }
    found: dict[str, Callable[[], object]] = {"pgolf": lambda: trellis_round(x)}
    if case in COLUMNS:
        found[torch_name("eager")] = lambda: trellis_round_ref(x)
    return found


def main() -> None:
    """Parse arguments, measure, write."""
    args = parser(__doc__ or "", CASES).parse_args()
    recorder = Recorder("trellis", torch.device(args.device), None if args.quick else args.out)
    for case in args.cases:
        found = contenders(case, recorder.device, 1024 if args.quick else ROWS)
        repeats = 3 if args.quick else args.repeats
        for name, sample in time_launched(found, recorder.device, repeats=repeats, calls=1).items():
            recorder.add(case, name, "ms", sample, "ms")
    recorder.write()


if __name__ == "__main__":
    main()
