"""Started by `test_score_ranks.py`: every way to score, of one small text on all ranks.

score_program.py FOLDER [cuda]: with "cuda", ranks may share a GPU.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from pgolf.config import METHODS
from pgolf.dist import Dist
from tests.evaluate.legal_helpers import (
    make_text,
    random_documents,
    run_pass,
    small_config,
    small_model,
)

LENGTHS = [50, 45]
"""Fewer documents than ranks."""


def scores(dist: Dist) -> dict[str, float]:
    """Return the nats of every way to score."""
    torch.set_num_threads(1)
    model, text = small_model(), make_text(random_documents(LENGTHS))
    if dist.device.type == "cuda":
        shape = replace(small_config(), width=128, heads=2, kv_heads=1, rope_dims=16)
        model = small_model(shape=shape).prepare(dist.device)
    return {mode: run_pass(mode, model, text, dist, batch_tokens=32).nats for mode in METHODS}


if __name__ == "__main__":
    dist = Dist.start("cuda", share_gpus=True) if sys.argv[2:] == ["cuda"] else Dist.start("cpu")
    found = scores(dist)
    name = f"{dist.rank}{'-shared' if dist.shares_gpu else ''}.json"
    Path(sys.argv[1], name).write_text(json.dumps(found))
    dist.close()
