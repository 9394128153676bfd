"""Three ranks (gloo) score a text of two documents as one process does, in every way."""

import json
from pathlib import Path

import pytest

from pgolf.config import METHODS
from pgolf.dist import Dist
from tests.distributed import score_program
from tests.ranks import run_ranks


def test_three_ranks_score_as_one_does_in_every_way(tmp_path):
    done = run_ranks(3, Path(score_program.__file__), str(tmp_path), timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    alone = score_program.scores(Dist.start("cpu"))
    files = sorted(Path(tmp_path).glob("*.json"))
    assert len(files) == 3 and set(alone) == set(METHODS)
    for file in files:
        found = json.loads(file.read_text())
        for mode, nats in alone.items():
            assert found[mode] == pytest.approx(nats, rel=1e-5), mode
