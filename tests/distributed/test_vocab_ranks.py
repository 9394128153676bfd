"""`linear_softcap_ce` with DTensors on 1, 2 and 4 ranks (gloo), against one process in float64.

Each rank runs this file as a program (FILE FOLDER BACKEND), which writes what went wrong in each case to
rank<r>.json in FOLDER. The layouts are in vocab_cases.py.
"""

import copy
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from pgolf.ops import linear_softcap_ce, softcap_ce
from tests.conftest import requires_two_gpus
from tests.distributed.vocab_cases import (
    OPTIONS,
    REP,
    cases,
    grid_cases,
    inputs,
    logits_cases,
    place,
    run_cases,
    whole,
)
from tests.ranks import run_ranks

WORLDS = (1, 2, 4)
STEPS = 6


def given(mesh: DeviceMesh, hidden: Any, weight: Any, **more: Any) -> dict[str, Tensor]:
    """Return float32 hidden states, a weight and targets with the placements."""
    exact = inputs(**more)
    return {
        "hidden": place(exact["hidden"].float(), mesh, hidden),
        "weight": place(exact["weight"].float(), mesh, weight),
        "target": place(exact["target"], mesh, hidden),
    }


def raises(kind: type[Exception], pattern: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except kind as error:
        assert re.search(pattern, str(error), re.DOTALL), str(error)
    else:
        raise AssertionError(f"no error, expected {pattern}")


def alone(mesh: DeviceMesh) -> None:
    """One rank computes what a process without DTensors computes, bit for bit, with the fused operators."""
    exact = inputs()
    for (name, options), memory in ((o, m) for o in OPTIONS.items() for m in ("fast", "low")):
        for reduction in ("mean", "sum", "none"):
            call = {**options, "memory": memory, "reduction": reduction}
            call["bias"] = exact["bias"].float() if call.pop("bias", False) else None
            call["class_weight"] = exact["class_weight"].float() if call.pop("class_weight", False) else None
            results = []
            for placements in (None, [Shard(0)]):
                tensors = [place(exact[n].float(), mesh, placements) for n in ("hidden", "weight")]
                target = place(exact["target"], mesh, placements)
                loss = linear_softcap_ce(*tensors, target, **call)
                results.append([loss, *torch.autograd.grad(loss.sum(), tensors)])
            for plain, split in zip(*results, strict=True):
                assert isinstance(split, DTensor), name
                assert torch.equal(plain, split.to_local()), f"{name} {memory} {reduction}"
            call = {k: v for k, v in call.items() if k not in ("memory", "bias")}
            results = []
            for placements in (None, [Shard(2)]):
                logits = place(exact["logits"].float(), mesh, placements)
                loss = softcap_ce(logits, exact["target"], **call)
                results.append([loss, *torch.autograd.grad(loss.sum(), logits)])
            for plain, split in zip(*results, strict=True):
                assert torch.equal(plain, split.to_local()), f"logits, {name} {reduction}"


def refusals(mesh: DeviceMesh) -> None:
    """What is not supported is named, with what is given and what to do."""
    t, ranks = given(mesh, [REP], [Shard(0)]), mesh.size() > 1
    out = t["target"].to_local().clone()
    out[0, 1] = 103
    with torch.no_grad():
        raises(ValueError, "target must be in", lambda: linear_softcap_ce(**{**t, "target": out}))
        raises(ValueError, "bias must be", lambda: linear_softcap_ce(**t, bias=torch.ones(102)))
        raises(
            RuntimeError, "weight is a plain", lambda: linear_softcap_ce(**{**t, "weight": torch.ones(9, 8)})
        )
        raises(ValueError, "cap must be", lambda: linear_softcap_ce(**t, cap=-1.0))
        narrow = given(mesh, [REP], [Shard(0)])["weight"][:, :4]
        raises(ValueError, "weight must be", lambda: linear_softcap_ce(**{**t, "weight": narrow}))
        narrow = place(inputs()["logits"].float(), mesh, [Shard(2)])
        raises(ValueError, "softcap_ce: target must be", lambda: softcap_ce(narrow, t["target"][0]))
        raises(ValueError, "softcap_ce: target must be in", lambda: softcap_ce(narrow, out))
        raises(ValueError, "softcap_ce: cap must be", lambda: softcap_ce(narrow, t["target"], -1.0))
        raises(
            RuntimeError,
            "softcap_ce: logits is a plain",
            lambda: softcap_ce(torch.ones(3, 6, 9), t["target"]),
        )
    if not ranks:
        return
    wide = given(mesh, [REP], [Shard(1)])["weight"]
    plain = t["hidden"].to_local().detach()
    across = distribute_tensor(plain, mesh, [Shard(2)], src_data_rank=None)
    parts = DTensor.from_local(plain, mesh, [Partial()])
    other = DeviceMesh("cpu", list(reversed(range(mesh.size()))))
    elsewhere = given(other, [REP], [Shard(0)])["weight"]
    same = given(mesh, [REP], [REP])["weight"]
    replicated = r"weight must be a DTensor with Replicate\(\), or Shard\(0\)"
    for pattern, change in (
        (r"weight has \(Shard\(dim=1\),\).*" + replicated + ".*redistribute", {"weight": wide}),
        (r"hidden has \(Shard\(dim=2\),\).*" + replicated + ".*redistribute", {"hidden": across}),
        (r"hidden has \(Partial\(sum\),\)", {"hidden": parts}),
        (r"hidden is on DeviceMesh", {"weight": elsewhere}),
        (r"hidden is a plain tensor and weight has \(Replicate\(\),\)", {"weight": same, "hidden": plain}),
    ):
        raises(RuntimeError, pattern, lambda change=change: linear_softcap_ce(**{**t, **change}))
    sums = DTensor.from_local(inputs()["logits"].float(), mesh, [Partial()])
    pattern = r"softcap_ce: logits has \(Partial\(sum\),\).*Shard\(-1\) along one mesh dimension; use"
    raises(RuntimeError, pattern, lambda: softcap_ce(sums, t["target"]))
    odd = t["target"].to_local().clone()
    odd[1, 2] = td.get_rank()
    message = r"different targets at row 8 \(0 to .*each needs the same rows.*Shard\(0\)"
    raises(ValueError, message, lambda: linear_softcap_ce(plain, t["weight"], odd))


def second_order(mesh: DeviceMesh) -> None:
    t = given(mesh, [REP], [Shard(0)])
    leaves = (t["hidden"], t["weight"])
    # torch 2.11 cannot differentiate the backward pass of to_local(), and says so in its own words.
    refused = (
        "second derivatives are not implemented|^One of the differentiated Tensors appears to not have been"
    )
    grads = torch.autograd.grad(linear_softcap_ce(**t), leaves, create_graph=True)
    call = lambda: torch.autograd.grad(whole(grads[0]).sum(), leaves)  # noqa: E731
    raises(RuntimeError, f"linear_softcap_ce: {refused}", call)
    logits = place(inputs()["logits"].float(), mesh, [Shard(2)])
    (grad,) = torch.autograd.grad(softcap_ce(logits, t["target"]), logits, create_graph=True)
    call = lambda: torch.autograd.grad(whole(grad).sum(), logits)  # noqa: E731
    raises(RuntimeError, f"softcap_ce: {refused}", call)


def not_a_number(mesh: DeviceMesh) -> None:
    """A NaN stays in its row, and an ignored row has no loss whatever it has."""
    exact = inputs()
    hidden, target = exact["hidden"].float(), exact["target"]
    hidden[0, 1, 3] = math.nan
    hidden[1, 0] = math.nan
    target[1, 0] = -100
    x = place(hidden, mesh, [REP])
    w = place(exact["weight"].float(), mesh, [Shard(0)])
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 1e-2}):
        loss = linear_softcap_ce(x, w, target, reduction="none", **options)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert whole(loss).isnan().nonzero().tolist() == [[0, 1]]
        assert whole(grad).isnan().any(dim=2).nonzero().tolist() == [[0, 1]]
        assert (whole(grad)[1, 0] == 0).all()


def confident(mesh: DeviceMesh) -> None:
    """A loss near 0 keeps its digits, and so does its gradient, where 1 - p would lose them."""
    hidden = torch.zeros(2, 8, dtype=torch.float64)
    weight = torch.zeros(103, 8, dtype=torch.float64)
    hidden[:, 0], weight[60, 0] = 1.0, 20.0
    target, results = torch.full((2,), 60), []
    for dtype, split in ((torch.float64, False), (torch.float32, True)):
        x = place(hidden.to(dtype), mesh, [REP] if split else None)
        w = place(weight.to(dtype), mesh, [Shard(0)] if split else None)
        loss = linear_softcap_ce(x, w, target, None)
        results.append([whole(t).double() for t in (loss, *torch.autograd.grad(loss, (x, w)))])
    assert 0 < results[0][0] < 1e-6
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def frozen(mesh: DeviceMesh) -> None:
    """A tensor without gradient changes nothing about the others, and costs no all-reduce."""
    t = given(mesh, [REP], [Shard(0)])
    leaves = {n: t[n] for n in ("hidden", "weight")}
    want = dict(zip(leaves, torch.autograd.grad(linear_softcap_ce(**t), tuple(leaves.values())), strict=True))
    for name, tensor in leaves.items():
        only = {n: v if v is tensor else v.detach() for n, v in t.items()}
        (grad,) = torch.autograd.grad(linear_softcap_ce(**only), tensor)
        assert torch.equal(whole(grad), whole(want[name])), name
    with torch.no_grad():
        assert not linear_softcap_ce(**t).requires_grad
    other = torch.ones((), requires_grad=True)
    (linear_softcap_ce(**t).to_local() + other).backward()
    assert torch.equal(whole(t["weight"].grad), whole(want["weight"])) and other.grad == 1.0


def mixed(mesh: DeviceMesh) -> None:
    """Autocast, and bfloat16 hidden states with a float32 weight, are as accurate as on one process."""
    exact, options = inputs(), {"z_loss": 1e-2, "label_smoothing": 0.1}
    names = ("hidden", "weight", "bias")
    for low, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        results = []
        for layout in (None, [Shard(0)]):
            dtypes = (low, torch.float32, torch.float32)
            places = (layout and [REP], layout, layout)
            leaves = [place(exact[n].to(d), mesh, p) for n, d, p in zip(names, dtypes, places, strict=True)]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                hidden, weight, bias = leaves
                loss = linear_softcap_ce(hidden, weight, exact["target"], bias=bias, **options)
            grads = torch.autograd.grad(loss, leaves)
            assert [g.dtype for g in grads] == list(dtypes)
            results.append([loss, *grads])
        for ours, theirs in zip(*reversed(results), strict=True):
            error, size = (whole(ours) - whole(theirs)).norm(), whole(theirs).norm()
            assert error <= 5e-3 * size, f"{error} of {size}"


def transposed(mesh: DeviceMesh) -> None:
    """Hidden states of any strides and any leading shape will do."""
    t = given(mesh, [REP], [Shard(0)], leading=(4, 3, 2))
    want = linear_softcap_ce(**t)
    grads = torch.autograd.grad(want, (t["hidden"], t["weight"]))
    across = t["hidden"].to_local().detach().transpose(0, -1).contiguous().transpose(0, -1)
    x = DTensor.from_local(across, mesh, [REP]).requires_grad_()
    got = linear_softcap_ce(x, t["weight"], t["target"].to_local().int())
    for ours, theirs in zip((got, *torch.autograd.grad(got, (x, t["weight"]))), (want, *grads), strict=True):
        torch.testing.assert_close(whole(ours), whole(theirs), rtol=1e-6, atol=1e-8)


def collectives(mesh: DeviceMesh) -> None:
    """However many chunks there are, two all-reduces make the loss, one the gradient; no logits are kept."""
    t = given(mesh, [REP], [Shard(0)], vocab=8192 * mesh.size(), leading=(1024,))
    activities = [torch.profiler.ProfilerActivity.CPU]
    counts = []
    with torch.profiler.profile(activities=activities, profile_memory=True) as forward:
        loss = linear_softcap_ce(**t, reduction="sum")
    with torch.profiler.profile(activities=activities, profile_memory=True) as backward:
        loss.backward()
    for profile in (forward, backward):
        counts.append(sum(e.name == "_c10d_functional::all_reduce" for e in profile.events()))
        assert max(e.self_cpu_memory_usage for e in profile.events()) <= 16 << 20  # all logits are 32 MiB
    assert counts == [2, 1]


def opcheck(mesh: DeviceMesh) -> None:
    """The operators satisfy torch's checks of schemas, fake kernels and autograd."""
    t = given(mesh, [REP], [Shard(0)], vocab=8, leading=(5,))
    x, w, y = (t[n].to_local().detach() for n in ("hidden", "weight", "target"))
    each = len(w)
    weights = torch.rand(8, generator=torch.Generator().manual_seed(1))
    rule = (weights, 30.0, -100, 1e-3, 0.1, each * mesh.get_local_rank(), 8)
    ops, group = torch.ops.pgolf, mesh.get_group().group_name
    leaves = (x.clone().requires_grad_(), w.clone().requires_grad_())
    torch.library.opcheck(ops._vocab_linear_ce, (*leaves, y, *rule, group, False))
    _, ce, lse = ops._vocab_linear_ce(x, w, y, *rule, group, False)
    rule = (*rule, 0.3)
    logits = (x @ w.t()).requires_grad_()
    torch.library.opcheck(ops._vocab_ce, (logits, y, *rule, group, False))
    _, ce, lse = ops._vocab_ce(logits.detach(), y, *rule, group, False)
    torch.library.opcheck(ops._vocab_ce_backward, (torch.ones(5), logits.detach(), y, ce, lse, *rule))
    rule = rule[:-1]
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops._vocab_linear_ce_backward, (torch.ones(5), x, w, y, ce, lse, *rule, *needs))


def compiled(mesh: DeviceMesh) -> None:
    """torch.compile makes one graph and the same numbers."""
    for hidden, weight in (
        ([REP], [Shard(0)]),
        ([Shard(1)], [Shard(0)]),
        ([Shard(0)], [REP]),
        (None, [Shard(0)]),
    ):
        t = given(mesh, hidden, weight)

        def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            return linear_softcap_ce(hidden * 2, weight, target, z_loss=1e-2, label_smoothing=0.1)

        torch.compiler.reset()
        leaves = (t["hidden"], t["weight"])
        results = []
        for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            value = f(**t)
            results.append([value, *torch.autograd.grad(value, leaves)])
        for eager, graph in zip(*results, strict=True):
            assert getattr(graph, "placements", None) == getattr(eager, "placements", None)
            torch.testing.assert_close(whole(graph), whole(eager), rtol=1e-6, atol=1e-7)

    logits = place(inputs()["logits"].float(), mesh, [Shard(2)])
    dense = lambda x: softcap_ce(x * 2, t["target"], z_loss=1e-2)  # noqa: E731
    results = []
    for f in (dense, torch.compile(dense, fullgraph=True, backend="aot_eager")):
        value = f(logits)
        results.append([value, *torch.autograd.grad(value, logits)])
    for eager, graph in zip(*results, strict=True):
        assert graph.placements == eager.placements
        torch.testing.assert_close(whole(graph), whole(eager), rtol=1e-6, atol=1e-7)


class Network(nn.Module):
    """A small network whose loss is fused with its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(103, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 103)

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        hidden = self.down(torch.relu(self.up(self.embed(tokens))))
        head = self.head
        return linear_softcap_ce(hidden, head.weight, target, 10.0, bias=head.bias, z_loss=1e-3)


def train(net: nn.Module, part: slice = slice(None)) -> list[Tensor]:
    """Train on rows `part` of one batch; return the losses and parameters as whole tensors."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, foreach=False)
    losses = []
    tokens = torch.randint(103, (4, 7), generator=torch.Generator().manual_seed(3))
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = net(tokens[part, :-1], tokens[part, 1:])
        loss.backward()
        optimizer.step()
        losses.append(whole(loss.detach()))
    assert losses[-1] < losses[0]
    return [*losses, *(whole(p.detach()) for p in net.parameters())]


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(4)
    net = Network()
    return net, copy.deepcopy(net)


def tensor_parallel(mesh: DeviceMesh, layout: Any, local: bool) -> None:
    """Tensor parallelism, with hidden states whole or split by sequence, trains as one process does."""
    usual, split = networks()
    plan = {
        "up": ColwiseParallel(),
        "down": RowwiseParallel(output_layouts=layout, use_local_output=local),
        "head": ColwiseParallel(use_local_output=False),
    }
    parallelize_module(split, mesh, plan)
    for got, want in zip(train(split), train(usual), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def fsdp_and_tensor_parallel(mesh: DeviceMesh) -> None:
    """FSDP2 over tensor parallelism trains as one process does."""
    usual, split = networks()
    plan = {
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
        "head": ColwiseParallel(use_local_output=False),
    }
    parallelize_module(split, mesh["tp"], plan)
    fully_shard(split, mesh=mesh["dp"])
    each, mine = 4 // mesh["dp"].size(), mesh["dp"].get_local_rank()
    results = train(split, slice(each * mine, each * (mine + 1)))
    for got, want in zip(results[STEPS:], train(usual)[STEPS:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def two_vocabulary_dims(mesh: DeviceMesh) -> None:
    """A weight that two mesh dimensions split, and a plain tensor on such a mesh, are refused."""
    t = given(mesh, [REP, REP], [Shard(0), Shard(0)])
    raises(RuntimeError, r"weight has \(Shard\(dim=0\), Shard\(dim=0\)\)", lambda: linear_softcap_ce(**t))
    logits = place(inputs()["logits"].float(), mesh, [Shard(2), Shard(2)])
    raises(RuntimeError, r"softcap_ce: logits has \(Shard", lambda: softcap_ce(logits, t["target"]))
    t = given(mesh, None, [REP, Shard(0)])
    raises(RuntimeError, "hidden is a plain tensor.*from_local", lambda: linear_softcap_ce(**t))


def all_cases() -> dict[str, dict[str, Callable[[], None]]]:
    """Return the cases of these ranks in groups."""
    world = td.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    each = [refusals, second_order, not_a_number, confident, frozen, mixed, transposed]
    each += {1: [alone, opcheck], 2: [collectives, compiled], 4: []}[world]
    found = {
        "layouts": cases(mesh),
        "logits": logits_cases(mesh),
        "others": {f.__name__: lambda f=f: f(mesh) for f in each},
        "training": {
            f"{layout}, local {local}": lambda a=layout, b=local: tensor_parallel(mesh, a, b)
            for layout, local in ((Replicate(), True), (Replicate(), False), (Shard(1), False))
        },
    }
    for shape in {1: [(1, 1)], 2: [(1, 2), (2, 1)], 4: [(2, 2)]}[world]:
        grid = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        found[f"grid {shape}"] = grid_cases(grid)
        found["training"][f"fsdp {shape}"] = lambda grid=grid: fsdp_and_tensor_parallel(grid)
        if world == 4:
            found["others"]["two dimensions"] = lambda grid=grid: two_vocabulary_dims(grid)
    return found


def cuda_cases() -> dict[str, dict[str, Callable[[], None]]]:
    """Return the cases that also run on GPUs."""
    world = td.get_world_size()
    grids = {s: init_device_mesh("cuda", s, mesh_dim_names=("dp", "tp")) for s in ((1, world), (world, 1))}
    found = {f"grid {shape}": grid_cases(mesh) for shape, mesh in grids.items()}
    mesh = init_device_mesh("cuda", (world,))
    return {"layouts": cases(mesh), "logits": logits_cases(mesh), **found}


def program(folder: Path, backend: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    td.init_process_group(backend)
    groups = cuda_cases() if backend == "nccl" else all_cases()
    results = {name: run_cases(group) for name, group in groups.items()}
    (folder / f"rank{td.get_rank()}.json").write_text(json.dumps(results))
    td.destroy_process_group()


@pytest.fixture(scope="module", params=WORLDS)
def finished(request, tmp_path_factory) -> list[dict[str, dict[str, str]]]:
    return results_of(request.param, tmp_path_factory.mktemp("ranks"), "gloo")


def results_of(world: int, folder: Path, backend: str) -> list[dict[str, dict[str, str]]]:
    """Return the results of each rank by group and case."""
    device = "cuda" if backend == "nccl" else "cpu"
    done = run_ranks(world, Path(__file__), str(folder), backend, device=device)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(world)]


@pytest.mark.parametrize("group", ["layouts", "logits", "grid", "training", "others"])
def test_ranks_compute_what_one_process_computes(finished, group: str) -> None:
    assert_right(finished, group)


@requires_two_gpus
def test_gpus_compute_what_one_process_computes(tmp_path) -> None:
    results = results_of(2, tmp_path, "nccl")
    for group in ("layouts", "logits", "grid"):
        assert_right(results, group)


def assert_right(finished: list[dict[str, dict[str, str]]], group: str) -> None:
    wrong, count = [], 0
    for rank, results in enumerate(finished):
        for name in (n for n in results if n.startswith(group)):
            count += len(results[name])
            wrong += [f"rank {rank}, {c}: {text}" for c, text in results[name].items() if text != "right"]
    assert count
    assert not wrong, "\n".join(wrong[:5])


if __name__ == "__main__":
    program(Path(sys.argv[1]), sys.argv[2])
