"""Started by `test_score_ranks.py`: every way to score, of one small text on all ranks."""

import json
import sys
from pathlib import Path

import torch

from pgolf.config import METHODS
from pgolf.dist import Dist
from tests.evaluate.legal_helpers import make_text, random_documents, run_pass, small_model

LENGTHS = [50, 45]
"""Fewer documents than ranks."""


def scores(dist: Dist) -> dict[str, float]:
    """Return the nats of every way to score."""
    torch.set_num_threads(1)
    model, text = small_model(), make_text(random_documents(LENGTHS))
    return {mode: run_pass(mode, model, text, dist, batch_tokens=32).nats for mode in METHODS}


if __name__ == "__main__":
    dist = Dist.start("cpu")
    found = scores(dist)
    Path(sys.argv[1], f"{dist.rank}.json").write_text(json.dumps(found))
    dist.close()
