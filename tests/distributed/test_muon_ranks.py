"""Sharded `pgolf.optim.Muon` on several ranks (gloo) compared with one process.

There is one launch of four ranks: first all four share the matrices, then two pairs do. Each rank runs this
file as a program (FILE FOLDER), which writes rank<r>.safetensors in FOLDER and asserts nothing.
"""

import functools
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as td
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pgolf.optim
from tests.distributed.muon_cases import assert_equal, flat, iterated, of_case, take_steps, tensors
from tests.ranks import run_ranks

WORLD, STEPS, BATCH = 4, 3, 16
# 11 matrices of five shapes, a number that neither 2 nor 4 divides, and then the parameters of AdamW.
SHAPES = [(5, 12), (3, 5, 12), (13, 4), (6, 3, 2, 2), (9, 7), (7, 7), (7, 7)]


def train_matrices(shapes, **sharing):
    """Train on gradients that are the same on every rank; return parameters and optimizer state."""
    params = [nn.Parameter(t) for t in tensors([*shapes, (4,)], 0)]
    matrices = params[:-1]
    groups = [
        {"params": matrices[:4], "row_normalize": True, "normalize": 0.9},
        {"params": matrices[4:5], "split_sizes": (5, 2, 2), "normalize": 0.5, "cautious": True},
        {"params": matrices[5:], "ns_coefficients": "polar_express_golf", "ns_steps": 4},
        {"params": params[-1:], "use_muon": False},
    ]
    return take_steps(params, groups, STEPS, **sharing)


def train_compact(**sharing):
    """Train bfloat16 parameters with an 8-bit momentum and split weights."""
    params = [nn.Parameter(t.bfloat16()) for t in tensors([*SHAPES, (3, 300), (4,)], 0)]
    groups = [{"params": params[:-1]}, {"params": params[-1:], "use_muon": False}]
    options = {"momentum_bits": 8, "master_weights": "split"}
    return take_steps(params, groups, STEPS, lambda step, i, grad: grad.bfloat16(), **options, **sharing)


def train_ddp(rank, world, **sharing):
    """Train a network on this rank's part of each batch, with gradients averaged by DDP."""
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 2))
    for p, value in zip(net.parameters(), tensors([p.shape for p in net.parameters()], 5), strict=True):
        p.data.copy_(0.4 * value)
    groups = [
        {"params": [p for p in net.parameters() if p.dim() == 2]},
        {"params": [p for p in net.parameters() if p.dim() < 2], "use_muon": False, "lr": 1e-3},
    ]
    optimizer = pgolf.optim.Muon(groups, lr=0.02, **sharing)
    model = DistributedDataParallel(net) if world > 1 else net
    for step in range(STEPS):
        x, y = (t.chunk(world)[rank] for t in tensors([(BATCH, 6), (BATCH, 2)], 100 + step))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


def cases(rank=0, world=1, pair=None):
    """Return all tensors of a rank by case."""
    sharing = {"sharded": world > 1}
    found = {
        "world": train_matrices(SHAPES, **sharing),
        "pairs": train_matrices(SHAPES, **sharing, process_group=pair),
        "one": train_matrices(SHAPES[:1], **sharing),
        "ddp": train_ddp(rank, world, **sharing),
        "compact": train_compact(**sharing),
    }
    return flat(found)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The tensors of each rank at the end."""
    folder = tmp_path_factory.mktemp("dropin")
    done = run_ranks(WORLD, Path(__file__), str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return [load_file(folder / f"rank{r}.safetensors") for r in range(WORLD)]


@pytest.fixture(scope="module")
def alone():
    """The tensors of one process at the end."""
    return cases()


@pytest.mark.parametrize("case", ["world", "pairs", "one", "ddp", "compact"])
def test_ranks_end_identical_bit_for_bit(ranks, case):
    for other in ranks[1:]:
        assert_equal(of_case(other, case), of_case(ranks[0], case))


@pytest.mark.parametrize("case", ["world", "pairs", "one", "ddp"])
def test_ranks_end_where_one_process_does(ranks, alone, case):
    # Products of a batch round like those of its parts to the last bits; the map amplifies by 990.
    torch.testing.assert_close(of_case(ranks[0], case), of_case(alone, case), rtol=2e-4, atol=2e-5)


def test_compact_states_end_where_one_process_does(ranks, alone):
    found, wanted = (of_case(t, "compact") for t in (ranks[0], alone))
    assert found.keys() == wanted.keys()
    assert {str(t.dtype) for t in found.values()} >= {"torch.int8", "torch.float32", "torch.bfloat16"}
    # The gradients are given, so that the codes do not depend on the iteration; weights may round elsewhere.
    codes = [name for name in found if "momentum_codes" in name or "momentum_scales" in name]
    assert len(codes) == 2 * (len(SHAPES) + 1)
    assert_equal({name: found[name] for name in codes}, {name: wanted[name] for name in codes})
    for name in (name for name in found if name.startswith("param")):
        torch.testing.assert_close(found[name], wanted[name], rtol=2**-7, atol=2e-5)


def test_each_rank_iterates_only_its_share(ranks):
    total = iterated(lambda: train_matrices(SHAPES))
    assert total == 11 * STEPS
    world, pairs = ([int(r[f"iterated.{name}"]) for r in ranks] for name in ("world", "pairs"))
    assert sum(world) == total
    assert min(world) > 0
    assert pairs[:2] == pairs[2:]
    assert sum(pairs[:2]) == total


def main(folder):
    """Run every case on this rank."""
    torch.set_num_threads(1)
    td.init_process_group("gloo")
    rank = td.get_rank()
    pairs = [td.new_group([0, 1]), td.new_group([2, 3])]
    found = cases(rank, WORLD, pairs[rank // 2])
    for name, group in (("world", None), ("pairs", pairs[rank // 2])):
        run = functools.partial(train_matrices, SHAPES, sharded=True, process_group=group)
        found[f"iterated.{name}"] = torch.tensor(iterated(run))
    save_file({name: t.contiguous() for name, t in found.items()}, folder / f"rank{rank}.safetensors")
    td.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
