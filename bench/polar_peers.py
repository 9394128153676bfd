"""Other implementations of the polar iteration, which are imported when a bench runs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench.ce_peers import find
from pgolf.peers import describe

Table = tuple[tuple[float, float, float], ...]


def each(iterate: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Return a call that iterates every input separately."""
    return lambda: [iterate(x) for x in inputs]


def gram_newton_schulz(table: Table) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return its iteration of (b, m, n), as written and compiled; the names contain the versions.

    By default it compiles into its own CUDA graphs ("reduce-overhead"), which a bench cannot capture again;
    so the benches compile it without graphs and capture its launches.
    """
    found = find("gram-newton-schulz", "gram-newton-schulz", "gram_newton_schulz", "GramNewtonSchulz")
    quack = find("quack", "quack-kernels", "quack.gemm_interface", "gemm_symmetric")
    if found is None or quack is None:
        return {}
    name = f"{found[0]}, {quack[0]}"
    rows = [list(row) for row in table]
    try:
        return {
            name: found[1](ns_coefficients=rows, compile_kwargs=None),
            f"{name}, compiled": found[1](
                ns_coefficients=rows, compile_kwargs={"fullgraph": True, "dynamic": False}
            ),
        }
    except Exception as e:
        print(f"{name:<28} not usable: {describe(e)}")
        return {}


def speedrun_form(table: Table) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the iteration on symmetric Triton products, with Triton's version in the name."""
    found = find("speedrun form, triton", "triton", "bench.triton_symmetric", "triton_newton_schulz")
    return {} if found is None else {found[0]: lambda x: found[1](x, table)}
