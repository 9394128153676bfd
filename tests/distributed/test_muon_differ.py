"""Sharded `pgolf.optim.Muon` on ranks that hold different values: every rank raises in the same step.

There is one launch of three ranks over gloo. Each rank runs this file as a program (FILE
FOLDER), which writes rank<r>.json in FOLDER, by case [number of complete steps, error], and asserts nothing.
"""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as td
from torch import nn

import pgolf.optim
from pgolf.optim.ranks import fingerprint
from tests.conftest import requires_gpu, requires_two_gpus
from tests.ranks import run_ranks

WORLD, STEPS, ODD = 3, 3, 1  # in the last step rank ODD is another


def randn(shape, rng):
    return torch.randn(shape, generator=rng).to(
        f"cuda:{td.get_rank()}" if td.get_backend() == "nccl" else "cpu"
    )


def model(rank, case):
    rng = torch.Generator().manual_seed(1 if case == "other start" and rank == ODD else 0)
    shapes = {"wide": (5, 12), "stack": (3, 4, 6), "gain": (7,), "unused": (4, 4), "empty": (0, 4)}
    if case == "fewer parameters" and rank == ODD:
        del shapes["stack"]
    return {name: nn.Parameter(randn(shape, rng)) for name, shape in shapes.items()}


def make(rank, case, params, group=None):
    lr = 0.03 if case == "other lr" and rank == ODD else 0.02
    matrices = [(n, p) for n, p in params.items() if n != "gain"]
    groups = [{"params": matrices, "lr": lr}, {"params": [("gain", params["gain"])], "use_muon": False}]
    return pgolf.optim.Muon(groups, sharded=True, process_group=group)


def disturb(case, params, optimizer):
    """Change a value on the rank ODD before its last step."""
    wide = params["wide"]
    if case == "no gradient":
        wide.grad = None
    elif case == "no gradients":
        for p in params.values():
            p.grad = None
    elif case == "no gradient of AdamW":
        params["gain"].grad = None
    elif case == "gradient more":
        params["unused"].grad = torch.ones_like(params["unused"])
    elif case == "other gradients":
        for p in params.values():
            p.grad = None if p.grad is None else p.grad + 0.1
    elif case == "one element":
        params["stack"].grad[2, 3, 5] *= 1 + 1e-6
    elif case == "other sign":
        wide.grad.neg_()
    elif case == "AdamW's gradient":
        params["gain"].grad.mul_(2)
    elif case == "nan":
        wide.grad[0, 0] = torch.nan
    elif case == "sparse":
        wide.grad = wide.grad.to_sparse()
    elif case == "loaded state":
        state = optimizer.state_dict()
        state["state"][0]["momentum_buffer"] = state["state"][0]["momentum_buffer"] * 2
        optimizer.load_state_dict(state)


ERRORS = {
    "no gradient": "the gradient of parameter wide",
    "no gradients": "the gradient of parameter wide.*the gradient of parameter stack.* and 1 more",
    "no gradient of AdamW": "the gradient of parameter gain",
    "gradient more": "the gradient of parameter unused",
    "other gradients": "values of the gradient of parameter wide.*parameter stack.*parameter gain",
    "one element": "values of the gradient of parameter stack",
    "other sign": "values of the gradient of parameter wide",
    "AdamW's gradient": "values of the gradient of parameter gain",
    "nan": "values of the gradient of parameter wide",
    "sparse": "the gradient of parameter wide",
    "loaded state": "values of momentum_buffer of parameter wide",
    "other start": "values of parameter wide.*parameter stack.*parameter unused",
    "other lr": "lr of group 0",
    "fewer parameters": "rank 1 against rank 0",
}
FIRST_STEP = {"other start", "other lr", "fewer parameters"}
SAME = {"same", "same nan", "same loaded", "same alone"}


def run(rank, case, group=None):
    params = model(rank, case)
    optimizer = make(rank, case, params, group)
    for step in range(STEPS):
        rng = torch.Generator().manual_seed(100 + step)
        for name, p in params.items():
            p.grad = None if name == "unused" else randn(p.shape, rng)
        last = step == STEPS - 1
        if last and rank == ODD:
            disturb(case, params, optimizer)
        if last and case == "same nan":
            params["wide"].grad[0, 0] = torch.nan
        if last and case == "same loaded":
            optimizer.load_state_dict(optimizer.state_dict())
        before = {n: p.detach().clone() for n, p in params.items()}
        try:
            optimizer.step()
        except RuntimeError as e:
            kept = all(torch.equal(p, before[n]) for n, p in params.items())
            return [step, str(e) if kept else f"parameters changed before: {e}"]
    return [STEPS, ""]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of each rank by case."""
    folder = tmp_path_factory.mktemp("differ")
    done = run_ranks(WORLD, Path(__file__), str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(WORLD)]


@pytest.mark.parametrize("case", list(ERRORS))
def test_every_rank_raises_within_the_step_and_names_what_differs(ranks, case):
    for rank, found in enumerate(ranks):
        steps, error = found[case]
        assert steps == (0 if case in FIRST_STEP else STEPS - 1), f"rank {rank}: {error}"
        pattern = rf"^Muon: the ranks differ in .*{ERRORS[case]}"

        assert re.search(pattern, error), error
        assert "rank 1 against rank 0" in error
        assert "DistributedDataParallel" in error


@pytest.mark.parametrize("case", sorted(SAME))
def test_ranks_that_hold_the_same_step_on(ranks, case):
    assert [found[case] for found in ranks] == [[STEPS, ""]] * WORLD


def test_a_group_of_some_ranks_names_them_by_their_global_number(ranks):
    steps, error = ranks[2]["pair"]
    assert steps == STEPS - 1
    assert "rank 2 against rank 1" in error or "rank 1 against rank 2" in error
    assert ranks[0]["pair"] == [STEPS, ""]


@requires_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprints_on_cuda_see_one_element_and_are_the_same_each_time(dtype):
    tensors = [torch.randn(n, 257, device="cuda").to(dtype) for n in (1, 300, 4000)]
    first, second = fingerprint(tensors), fingerprint([t.clone() for t in tensors])
    assert first.shape == (4, 3) and first.dtype == torch.float64 and torch.equal(first, second)
    changed = [t.clone() for t in tensors]
    changed[2][1234, 56] = 7.0
    assert (fingerprint(changed) != first).any(0).tolist() == [False, False, True]


@requires_two_gpus
def test_ranks_over_nccl_raise_within_the_step(tmp_path):
    done = run_ranks(2, Path(__file__), str(tmp_path), "nccl", device="cuda")
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2)]
    for case, message in (("other gradients", "values of the gradient"), ("no gradient", "the gradient of")):
        for rank in found:
            assert rank[case][0] == STEPS - 1 and message in rank[case][1], rank[case]
    assert [rank["same"] for rank in found] == [[STEPS, ""]] * 2


def main(folder, backend="gloo"):
    """Run every case on this rank."""
    torch.set_num_threads(1)
    td.init_process_group(backend)
    rank = td.get_rank()
    if backend == "nccl":
        torch.cuda.set_device(rank)
    pairs = [td.new_group([0]), td.new_group([1, 2])] if backend == "gloo" else []
    found = {}
    for case in [*ERRORS, *sorted(SAME)] if backend == "gloo" else ["same", "other gradients", "no gradient"]:
        found[case] = run(rank, case)
    if pairs:
        found["pair"] = run(rank, "other gradients" if rank else "same", pairs[min(rank, 1)])
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    td.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
