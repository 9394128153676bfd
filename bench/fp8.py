"""Products of a block of pr1855 in bfloat16 and in 8-bit floats, what a conversion costs, and the whole MLP.

`train.fp8` holds one product of these. Which could join it follows from three numbers of each: the product in
bfloat16, the same from e4m3 codes with one scale for each operand, and the conversion of its input by a
kernel of its own, which reads bfloat16 and writes codes. A product gains if its codes come from a kernel that
computes the input anyway (which then writes them too), or if it saves more than a conversion takes.

The MLP is timed forward and backward as `norm_mlp`, as torch.compile makes it, and as torch.compile makes it
with e4m3 codes in both forward products and both gradients of inputs, e5m2 for what arrives from above.
Scales are constants: finding a largest value would come on top. Gradients of weights are in bfloat16.

Each contender runs until the clock has settled, so that its time is that of a GPU at its power limit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import RESULTS, Recorder, torch_name
from bench.step import record_settled
from pgolf.ops import norm_mlp, norm_mlp_ref

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SLOPE = 0.5
SHAPES = {
    "qkv": (512, 1024),
    "qkv_dx": (1024, 512),
    "out": (512, 512),
    "up": (512, 2048),
    "down": (2048, 512),
}
"""Columns of the input and of the output of a product. The gradient of the activation has the shape of `up`,
those of the inputs of up and out have the shapes of `down` and `out`."""


def scaled(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Return a b^T `(T, N)` in bfloat16 from codes `(T, K)` and `(N, K)`, times scale^2."""
    product: Tensor = torch._scaled_mm(
        a, b.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return product


class _Product(torch.autograd.Function):
    """x w^T from codes, as is the gradient of x; the gradient of w is a product in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _w: Tensor, codes: Tensor, codes_t: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, codes_t, scale)
        return scaled(x.to(E4M3), codes, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, codes_t, scale = ctx.saved_tensors
        return scaled(grad.to(E5M2), codes_t, scale), grad.t() @ x, None, None, None


def coded_mlp(x: Tensor, up: Tensor, down: Tensor, scale: Tensor) -> Tensor:
    """Return what `norm_mlp` does with x as the residual."""

    def product(x: Tensor, w: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x, w, w.to(E4M3), w.t().to(E4M3).contiguous(), scale)  # type: ignore[no-untyped-call]
        return out

    n = F.rms_norm(x, x.shape[-1:])
    return x + product(F.leaky_relu(product(n, up), SLOPE).square(), down)


def products(recorder: Recorder, tokens: int, seconds: float) -> None:
    """Time every product in both formats, and the conversion of its input."""
    device = recorder.device
    convert = torch.compile(lambda t: t.to(E4M3), dynamic=False)
    one = torch.ones((), device=device)
    for name, (inner, columns) in SHAPES.items():
        a = torch.randn(tokens, inner, device=device, dtype=torch.bfloat16)
        b = torch.randn(columns, inner, device=device, dtype=torch.bfloat16) / inner**0.5
        codes = a.to(E4M3), b.to(E4M3)
        calls: dict[str, Callable[[], object]] = {
            "bfloat16": lambda a=a, b=b: F.linear(a, b),
            "e4m3": lambda codes=codes: scaled(*codes, one),
            "conversion": lambda a=a: convert(a),
        }
        record_settled(recorder, f"t{tokens}_{name}", "ms", calls, seconds=seconds)


def mlp(recorder: Recorder, tokens: int, seconds: float) -> None:
    """Time the MLP, forward and backward."""
    device = recorder.device
    sizes = ((tokens, 512), (2048, 512), (512, 2048))
    leaves = [torch.randn(s, device=device, dtype=torch.bfloat16) for s in sizes]
    x, up, down = (t.div_(1 if i == 0 else 30).requires_grad_() for i, t in enumerate(leaves))
    upstream, one = torch.randn_like(x), torch.ones((), device=device)
    composed = torch.compile(lambda *w: norm_mlp_ref(*w, w[0], slope=SLOPE), dynamic=False, fullgraph=True)
    coded = torch.compile(coded_mlp, dynamic=False, fullgraph=True)
    forms: dict[str, Callable[[], Tensor]] = {
        "pgolf": lambda: norm_mlp(x, up, down, x, slope=SLOPE),
        torch_name("compile"): lambda: composed(x, up, down),
        f"{torch_name('compile')}, fp8": lambda: coded(x, up, down, one),
    }
    calls = {
        name: lambda form=form: torch.autograd.grad(form(), (x, up, down), upstream)
        for name, form in forms.items()
    }
    record_settled(recorder, f"t{tokens}_mlp", "ms_fwd_bwd", calls, seconds=seconds)


def main() -> None:
    """Parse arguments, time products and MLP, and write the results."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--tokens", type=int, default=98_304, help="rows of the products")
    parser.add_argument("--seconds", type=float, default=1.0, help="before and while a contender is timed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args()
    recorder = Recorder("fp8", torch.device("cuda"), args.out)
    products(recorder, args.tokens, args.seconds)
    mlp(recorder, args.tokens, args.seconds)
    recorder.write()


if __name__ == "__main__":
    main()
