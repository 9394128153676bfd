"""Cases of `linear_softcap_ce` with DTensors, which ranks compare with one process in float64.

A case returns nothing and raises if something is wrong; `run_cases` turns that into text.
"""

import functools
import itertools
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from pgolf.ops import _smoothed_ce as smoothed
from pgolf.ops import linear_softcap_ce, linear_softcap_ce_ref, softcap_ce, softcap_ce_ref

WIDTH = 8
REP = Replicate()
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no cap": {"cap": None},
    "low cap": {"cap": 1.5, "memory": "low"},
    "z loss": {"z_loss": 1e-2},
    "class weight": {"class_weight": True},
    "smoothing": {"label_smoothing": 0.2},
    "scale": {"logit_scale": 0.4},
    "bias": {"bias": True},
    "all": {
        "cap": 5.0,
        "z_loss": 1e-2,
        "class_weight": True,
        "label_smoothing": 0.2,
        "logit_scale": 0.4,
        "bias": True,
        "memory": "low",
    },
}


def inputs(vocab: int = 103, leading: tuple[int, ...] = (3, 6), labels: str = "spread") -> dict[str, Tensor]:
    """Return whole float64 tensors, the same on all ranks, with values that float32 holds exactly."""
    g = torch.Generator().manual_seed(7)
    target = torch.randint(vocab, leading, generator=g)
    if labels == "last":
        target.fill_(vocab - 1)
    target.view(-1)[:: 1 if labels == "ignored" else 5] = -100
    return {
        "logits": 4.0 * torch.randn(*leading, vocab, generator=g).double(),
        "hidden": torch.randn(*leading, WIDTH, generator=g).double(),
        "weight": torch.randn(vocab, WIDTH, generator=g).double(),
        "bias": torch.randn(vocab, generator=g).double(),
        "class_weight": torch.rand(vocab, generator=g).double(),
        "target": target,
    }


def place(tensor: Tensor, mesh: DeviceMesh, placements: Any) -> Tensor:
    """Return a leaf with the placements, on the mesh's device; plain without them."""
    tensor = tensor.to(mesh.device_type)
    if placements is not None:
        tensor = distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def near(what: str, got: Tensor, want: Tensor, rtol: float) -> None:
    error, size = (got.double().cpu() - want).norm().item(), want.norm().item()
    assert error <= rtol * size + 1e-30, f"{what}: {error} of {size}"


def compare(
    mesh: DeviceMesh,
    placed: dict[str, Any],
    options: dict[str, Any],
    reduction: str = "mean",
    dtype: torch.dtype = torch.float32,
    **shape: Any,
) -> None:
    """Compare the loss and each gradient, and the placements of both, with one process in float64."""
    exact = inputs(**shape)
    options = dict(options)
    options.setdefault("cap", 30.0)
    bias, weighted = options.pop("bias", False), options.pop("class_weight", False)
    names = ["logits"] if "logits" in placed else ["hidden", "weight", *(["bias"] if bias else [])]
    states = placed[names[0]]
    fused, usual = (
        (softcap_ce, softcap_ce_ref) if names == ["logits"] else (linear_softcap_ce, linear_softcap_ce_ref)
    )
    truth = {n: exact[n].clone().requires_grad_() for n in names}
    given = {n: place(exact[n].to(dtype), mesh, placed.get(n, placed.get("weight"))) for n in names}
    # As in a network, states are no leaves; torch 2.11 replicates the gradient of a leaf in uneven parts.
    given[names[0]] = given[names[0]] * 1.0
    given[names[0]].retain_grad()
    class_weight = exact["class_weight"] if weighted else None
    ours = None
    if class_weight is not None:
        ours = place(class_weight.to(dtype), mesh, placed.get("class_weight", placed.get("weight"))).detach()
    target = place(exact["target"], mesh, placed.get("target", states))
    call = {"reduction": reduction, **options}
    if names == ["logits"]:
        call.pop("memory", None)
    got = fused(**given, target=target, class_weight=ours, **call)
    call.pop("memory", None)
    want = usual(**truth, target=exact["target"], class_weight=class_weight, **call)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.shape == want.shape
    # On a GPU, torch's setting may let float32 products round to TF32.
    single = 2e-6 if mesh.device_type == "cpu" else 2e-3
    rtol = {torch.float64: 1e-12, torch.float32: single, torch.bfloat16: 2e-2}[dtype]
    near("loss", whole(got), want, rtol)
    if reduction == "none":
        rows = [p if p.is_shard() and p.dim < want.dim() else REP for p in states or [REP] * mesh.ndim]
        assert list(got.placements) == rows, got.placements
        upstream = torch.linspace(-1.0, 2.0, want.numel(), dtype=torch.float64).reshape(want.shape)
        (whole(got) * upstream.to(mesh.device_type)).sum().backward()
        (want * upstream).sum().backward()
    else:
        assert all(p.is_replicate() for p in got.placements), got.placements
        (got * 1.5).backward()
        (want * 1.5).backward()
    for name in names:
        grad, tensor = given[name].grad, given[name]
        assert grad.dtype == dtype
        assert isinstance(grad, DTensor) == isinstance(tensor, DTensor)
        if isinstance(tensor, DTensor):
            assert grad.placements == tensor.placements, f"{name}: {grad.placements}"
            assert grad.to_local().shape == tensor.to_local().shape
        near(f"gradient of {name}", whole(grad), truth[name].grad, rtol * 4)


def reductions(mesh: DeviceMesh) -> tuple[str, ...]:
    """Return those that every option and layout is tested with: all on two ranks, elsewhere that of rows.

    A reduction follows the collectives, so it does not depend on the number of ranks.
    """
    return ("mean", "sum", "none") if mesh.size() == 2 else ("none",)


def cases(mesh: DeviceMesh) -> dict[str, Callable[[], None]]:
    """Return the cases of one mesh dimension by name."""
    found: dict[str, Callable[[], None]] = {}

    def add(name: str, *arguments: Any, **more: Any) -> None:
        found[name] = lambda: compare(mesh, *arguments, **more)

    vocabulary = {"hidden": [REP], "weight": [Shard(0)]}
    for (name, options), reduction in itertools.product(OPTIONS.items(), reductions(mesh)):
        add(f"vocabulary, {name}, {reduction}", vocabulary, options, reduction)
    layouts: dict[str, dict[str, Any]] = {
        "plain hidden": {"hidden": None, "weight": [Shard(0)]},
        "plain target": {"hidden": [REP], "weight": [Shard(0)], "target": None},
        "sequence": {"hidden": [Shard(1)], "weight": [Shard(0)]},
        "sequence, plain target": {"hidden": [Shard(1)], "weight": [Shard(0)], "target": None},
        "rows of FSDP2": {"hidden": [Shard(0)], "weight": [Shard(0)]},
        "replicated others": {"hidden": [REP], "weight": [Shard(0)], "bias": [REP], "class_weight": [REP]},
        "plain others": {"hidden": [REP], "weight": [Shard(0)], "bias": None, "class_weight": None},
        "data parallel": {"hidden": [Shard(0)], "weight": [REP]},
        "all replicated": {"hidden": [REP], "weight": [REP]},
    }
    for (name, placed), reduction in itertools.product(layouts.items(), reductions(mesh)):
        add(f"{name}, {reduction}", placed, OPTIONS["all"], reduction)
    for name, placed in layouts.items():
        add(f"{name}, defaults", placed, {})
        add_odd(add, mesh, name, placed, OPTIONS["bias"])
    found["several chunks"] = lambda: in_chunks(lambda: compare(mesh, vocabulary, OPTIONS["all"]))
    return found


def add_odd(
    add: Callable[..., None], mesh: DeviceMesh, name: str, placed: dict[str, Any], option: dict[str, Any]
) -> None:
    """Add the cases of a layout with other dtypes, targets and sizes; bfloat16 with `option`."""
    if mesh.device_type == "cpu":
        add(f"{name}, float64", placed, OPTIONS["all"], dtype=torch.float64)
    add(f"{name}, bfloat16", placed, option, dtype=torch.bfloat16)
    add(f"{name}, targets on the last rank", placed, {}, labels="last")
    add(f"{name}, all ignored", placed, OPTIONS["all"], labels="ignored")
    add(f"{name}, ranks without classes", placed, OPTIONS["all"], vocab=3)
    add(f"{name}, no rows", placed, {}, leading=(0, 2))


def logits_cases(mesh: DeviceMesh) -> dict[str, Callable[[], None]]:
    """Return the cases of `softcap_ce` on one mesh dimension."""
    found: dict[str, Callable[[], None]] = {}

    def add(name: str, *arguments: Any, **more: Any) -> None:
        found[name] = lambda: compare(mesh, *arguments, **more)

    vocabulary = {"logits": [Shard(2)], "target": [REP], "class_weight": [Shard(0)]}
    for (name, options), reduction in itertools.product(OPTIONS.items(), reductions(mesh)):
        add(f"vocabulary, {name}, {reduction}", vocabulary, options, reduction)
    layouts: dict[str, dict[str, Any]] = {
        "vocabulary": vocabulary,
        "plain others": {"logits": [Shard(2)], "target": None},
        "rows": {"logits": [Shard(1)]},
        "all replicated": {"logits": [REP]},
    }
    for name, placed in layouts.items():
        add(f"{name}, none", placed, OPTIONS["all"], "none")
        add(f"{name}, mean", placed, OPTIONS["all"], "mean")
        add_odd(add, mesh, name, placed, OPTIONS["scale"])
    found["several chunks"] = lambda: in_chunks(lambda: compare(mesh, vocabulary, OPTIONS["all"]))
    return found


def grid_cases(mesh: DeviceMesh) -> dict[str, Callable[[], None]]:
    """Return the cases of a mesh with one dimension that splits rows and one that splits the vocabulary."""
    found: dict[str, Callable[[], None]] = {}
    weight = [REP, Shard(0)]
    layouts: dict[str, dict[str, Any]] = {
        "rows": {"hidden": [Shard(0), REP], "weight": weight},
        "rows and sequence": {"hidden": [Shard(0), Shard(1)], "weight": weight},
        "rows twice": {"hidden": [Shard(0), Shard(0)], "weight": weight},
        "sequence": {"hidden": [REP, Shard(1)], "weight": weight},
        "same rows": {"hidden": [REP, REP], "weight": weight, "target": None},
        "transposed": {"hidden": [Shard(1), Shard(0)], "weight": [Shard(0), REP]},
        "rows only": {"hidden": [Shard(0), Shard(1)], "weight": [REP, REP]},
        "logits": {"logits": [Shard(0), Shard(2)], "target": [Shard(0), REP], "class_weight": None},
    }
    for (name, placed), reduction in itertools.product(layouts.items(), ("mean", "none")):
        for options in ("defaults", "all"):
            found[f"{name}, {options}, {reduction}"] = functools.partial(
                compare, mesh, placed, OPTIONS[options], reduction
            )
    return found


def in_chunks(case: Callable[[], None]) -> None:
    """Run a case with chunks of a few rows."""
    kept = smoothed._CHUNK_BYTES, smoothed._PRODUCT_BYTES, smoothed._PRODUCT_ROWS
    try:
        small = (3 * 4 * 103, 1, 7)
        sizes = (dict.fromkeys(("cpu", "cuda"), n) for n in small)
        smoothed._CHUNK_BYTES, smoothed._PRODUCT_BYTES, smoothed._PRODUCT_ROWS = sizes
        case()
    finally:
        smoothed._CHUNK_BYTES, smoothed._PRODUCT_BYTES, smoothed._PRODUCT_ROWS = kept


def run_cases(named: dict[str, Callable[[], None]]) -> dict[str, str]:
    """Run all cases; return "right" or the traceback of each."""
    results = {}
    for name, case in named.items():
        try:
            case()
            results[name] = "right"
        except Exception:
            results[name] = traceback.format_exc()
    return results
