"""Three ranks (gloo) score a text of two documents as one process does, in every way."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as td

from pgolf.config import METHODS
from pgolf.dist import Dist, pick_device
from pgolf.env import Launch
from pgolf.errors import RunError
from tests.conftest import requires_gpu
from tests.distributed import score_program
from tests.ranks import run_ranks


def test_three_ranks_score_as_one_does_in_every_way(tmp_path):
    done = run_ranks(3, Path(score_program.__file__), str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    alone = score_program.scores(Dist.start("cpu"))
    files = sorted(Path(tmp_path).glob("*.json"))
    assert len(files) == 3 and set(alone) == set(METHODS)
    for file in files:
        found = json.loads(file.read_text())
        for mode, nats in alone.items():
            assert found[mode] == pytest.approx(nats, rel=1e-5), mode


@requires_gpu
def test_ranks_that_share_a_gpu_score_as_one_does(tmp_path):
    world = 2 * torch.cuda.device_count()
    done = run_ranks(world, Path(score_program.__file__), str(tmp_path), "cuda", device="cuda")
    assert done.returncode == 0, done.stderr[-4000:]
    alone = score_program.scores(Dist.start("cuda"))
    files = sorted(Path(tmp_path).glob("*-shared.json"))
    assert len(files) == world
    for file in files:
        for mode, nats in json.loads(file.read_text()).items():
            assert nats == pytest.approx(alone[mode], rel=1e-2), mode


def test_only_who_asks_for_it_shares_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [pick_device("auto", rank, share_gpus=True).index for rank in range(5)] == [0, 1, 0, 1, 0]
    with pytest.raises(RunError, match="no GPU for local rank 2: 2 visible"):
        pick_device("cuda", 2)


@pytest.mark.parametrize(
    ("ranks", "here", "shared", "devices"),
    [(6, 6, True, 2), (3, 3, True, 2), (12, 6, True, 4), (2, 2, False, 2), (4, 2, False, 4)],
    ids=["three each", "unevenly", "two hosts", "one each", "two hosts, one each"],
)
def test_ranks_know_how_many_gpus_all_of_them_have(monkeypatch, ranks, here, shared, devices):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    launch = Launch(rank=0, world_size=ranks, local_rank=0, distributed=True)
    assert Dist(launch, torch.device("cpu"), shares_gpu=shared).devices == devices


def test_a_sum_of_ranks_that_share_a_gpu_goes_through_the_host(monkeypatch):
    dist = Dist(
        Launch(rank=0, world_size=2, local_rank=0, distributed=True), torch.device("cpu"), shares_gpu=True
    )
    group = object()
    monkeypatch.setattr(dist, "_host", group)
    monkeypatch.setattr(td, "all_reduce", lambda box, group: box.mul_(2) if group is dist._host else None)
    tensor = torch.arange(3)
    assert dist.all_reduce(tensor) is tensor and tensor.tolist() == [0, 2, 4]
