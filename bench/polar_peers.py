"""Other implementations of the polar iteration, which are imported when a bench runs.

All take a table of coefficients, except for torch's (one triple for all iterations, its own here) and dion's
(five triples of its own, those of `polar_express_golf`); the time does not depend on the coefficients. An
implementation that cannot be used is printed with the reason and left out. On a CPU most of them say so at
their first call, which `bench.ce_peers.working` prints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.ce_peers import find
from pgolf.optim.polar import JORDAN
from pgolf.peers import describe

Table = tuple[tuple[float, float, float], ...]
Iterate = Callable[[Tensor], Any]
"""The iteration of b matrices (b, m, n), which returns a tensor or b tensors."""
DION_ITERATIONS = 5


def each(iterate: Iterate, inputs: list[Tensor]) -> Callable[[], list[Any]]:
    """Return a call that iterates every input separately."""
    return lambda: [iterate(x) for x in inputs]


def others(table: Table) -> dict[str, Iterate]:
    """Return the iteration of every other package by name with version, torch's not among them."""
    return gram_newton_schulz(table) | emerging_optimizers(table) | dion(table) | speedrun_form(table)


def gram_newton_schulz(table: Table) -> dict[str, Iterate]:
    """Return its two forms, as written and compiled; the names contain the versions.

    By default it compiles into its own CUDA graphs ("reduce-overhead"), which a bench cannot capture again;
    so the benches compile it without graphs and capture its launches. Its standard form, with quack's
    symmetric products, is what it uses for square matrices.
    """
    found = find("gram-newton-schulz", "gram-newton-schulz", "gram_newton_schulz", "GramNewtonSchulz")
    quack = find("quack", "quack-kernels", "quack.gemm_interface", "gemm_symmetric")
    if found is None or quack is None:
        return {}
    name = f"{found[0]}, {quack[0]}"
    rows = [list(row) for row in table]
    compiled = {"fullgraph": True, "dynamic": False}
    made: dict[str, dict[str, Any]] = {
        name: {"compile_kwargs": None},
        f"{name}, compiled": {"compile_kwargs": compiled},
        f"{name}, standard form, compiled": {"compile_kwargs": compiled, "use_gram_newton_schulz": False},
    }
    try:
        return {n: found[1](ns_coefficients=rows, **settings) for n, settings in made.items()}
    except Exception as e:
        print(f"{name:<28} not usable: {describe(e)}")
        return {}


def emerging_optimizers(table: Table) -> dict[str, Iterate]:
    """Return the iteration with its batched symmetric product (SYRK) in Triton, in bfloat16.

    Its function `newton_schulz` takes float32 only, and uses this step if torch's precision of float32
    products is "medium"; here the step is called without the conversions.
    """
    module = "emerging_optimizers.orthogonalized_optimizers.muon_utils"
    name = "emerging-optimizers, batched SYRK"
    found = find(name, "emerging-optimizers", module, "batched_newton_schulz_step_tsyrk")
    if found is None:
        return {}

    def iterate(x: Tensor) -> Tensor:
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        x = (x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)).to(torch.bfloat16)
        for a, b, c in table:
            x = found[1](x, a, b, c)
        return x.mT if tall else x

    return {found[0]: iterate}


def dion(table: Table) -> dict[str, Iterate]:
    """Return the compiled iteration on its symmetric Triton products, if it has as many iterations."""
    found = find("dion, triton", "dion", "dion.polar_express", "polar_express_triton")
    if found is not None and len(table) != DION_ITERATIONS:
        print(f"{found[0]:<28} left out: it always makes {DION_ITERATIONS} iterations")
        return {}
    return {} if found is None else {found[0]: found[1]}


def torch_iteration(table: Table) -> dict[str, Iterate]:
    """Return what torch.optim.Muon calls for each matrix, a private function, with one triple.

    It overwrites an input in bfloat16, so that it gets a copy; in torch.optim.Muon the conversion makes one.
    """
    name = "torch.optim.Muon, iteration only"
    found = find(name, "torch", "torch.optim._muon", "_zeropower_via_newtonschulz")
    if found is None:
        return {}
    return {found[0]: lambda x: [found[1](matrix.clone(), JORDAN, len(table), 1e-7) for matrix in x]}


def speedrun_form(table: Table) -> dict[str, Iterate]:
    """Return the iteration on symmetric Triton products, with Triton's version in the name."""
    found = find("speedrun form, triton", "triton", "bench.triton_symmetric", "triton_newton_schulz")
    return {} if found is None else {found[0]: lambda x: found[1](x, table)}
