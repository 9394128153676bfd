"""Started by `test_quant_ranks.py`: calibration with drift, and the codes, on all ranks."""

import sys
from pathlib import Path

import torch

from pgolf.config import QuantConfig
from pgolf.dist import Dist
from pgolf.quant.pipeline import Quantizer
from tests.quant.test_calibrate import batches, trained_like_model

CONFIG = QuantConfig(
    row_scales="spread",
    matrix_bits=5,
    embed_bits=5,
    column_scales=False,
    trellis=False,
    drift=0.7,
    gains=True,
    calibration_batches=12,
)
"""Scales by spread, because the random signs of the gradients, which others need, depend on the ranks."""


def calibrated(dist: Dist) -> Quantizer:
    """Return the quantizer from this rank's share of the text: every n-th batch of it on n ranks."""
    torch.set_num_threads(1)
    text = list(batches(CONFIG.calibration_batches))[dist.rank :: dist.world_size]
    return Quantizer.calibrated(trained_like_model(), iter(text), CONFIG, dist)


if __name__ == "__main__":
    dist = Dist.start("cpu")
    found = calibrated(dist)
    state = found.quantize()
    torch.save(
        {
            "hessians": found.drift.hessians,
            "shifts": found.drift.shifts,
            "codes": {name: q.codes for name, q in state.quantized.items()},
            "small": state.small,
        },
        Path(sys.argv[1], f"{dist.rank}.pt"),
    )
    dist.close()
