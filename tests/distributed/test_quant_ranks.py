"""Three ranks (gloo) that calibrate with drift have one process's moments, and make the same codes."""

from pathlib import Path

import torch

from pgolf.dist import Dist
from tests.distributed import quant_program
from tests.ranks import run_ranks


def test_ranks_agree_on_drift_and_codes(tmp_path):
    done = run_ranks(3, Path(quant_program.__file__), str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [torch.load(file) for file in sorted(tmp_path.glob("*.pt"))]
    assert len(ranks) == 3
    for other in ranks[1:]:
        for part, tensors in ranks[0].items():
            assert all(torch.equal(other[part][key], tensor) for key, tensor in tensors.items()), part
    alone = quant_program.calibrated(Dist.start("cpu")).drift
    for part, tensors in (("hessians", alone.hessians), ("shifts", alone.shifts)):
        for key, wanted in tensors.items():
            # Sums in another order may turn a code or two, which moves the drift a little.
            allowed = 0.02 * float(wanted.diagonal().abs().mean())
            torch.testing.assert_close(ranks[0][part][key], wanted, rtol=0.02, atol=allowed)
