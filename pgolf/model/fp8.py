"""Products of training in 8-bit floats (e4m3), for `train.fp8`; a model that scores has none of this.

    y = (s_n s_w) (e4m3(n / s_n) e4m3(W / s_w)^T)     dn = dy W     dW = dy^T n

W are the matrices of queries, keys and values, n is their normed input. Only the forward product is rounded;
the gradients are those of the unrounded product, in bfloat16. Why this product and no other was counted with
the passes over a `(T, D)` tensor in bfloat16 that a conversion takes (`bench/fp8.py` times both):
torch.compile computes n, so its kernel also writes the codes, half a pass. The inputs of the other products
(the attention's output, the activation of the MLP, the gradients of both) come from kernels of pgolf, so each
would need a conversion that reads what was written, 1.5 passes for each D columns, which is what its product
saves. A weight's gradient would need both operands transposed.

n needs no search for its largest value: no element of a row of D numbers with the root mean square 1 is above
sqrt(D). So s_n is a power of two that D gives. s_w is the largest weight of all layers over 448, the largest
number of the format; a float's relative error hardly depends on a scale.

Legend: `T` tokens, `D` width, `N` columns of queries, keys and values, `L` layers.
Source: the format is arXiv 2209.05433; modded-nanogpt (pull request 306) has its up projection like this.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.config import Config
from pgolf.errors import RunError, UserError
from pgolf.model.attention import first_difference
from pgolf.model.blocks import Folded
from pgolf.model.gpt import GPT
from pgolf.ops._compiler import room_for_graphs
from pgolf.peers import describe

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""Largest number of the format; its smallest normal one is 2^-6, and it keeps 4 significant bits."""
ROUNDED = 1.01
"""How much longer than sqrt(D) an element may be after it was rounded to bfloat16."""
MULTIPLE = 16
"""Of which the sizes of a matrix must be multiples in torch's product."""


class Fp8Matrix(NamedTuple):
    """The matrix of queries, keys and values of a layer, with its codes."""

    exact: Tensor  # (N, D), compute dtype
    codes: Tensor  # (N, D) e4m3
    scale: Tensor  # () float32: what a code of 1 means
    input_scale: Tensor  # () float32: the same of the input's codes


class _Bank(NamedTuple):
    """The matrices of all layers, in place of the tensor in `Folded`."""

    exact: Tensor  # (L, N, D)
    codes: Tensor  # (L, N, D)
    scale: Tensor
    input_scale: Tensor

    def unbind(self) -> list[Fp8Matrix]:
        """Return the matrix of each layer."""
        pairs = zip(self.exact.unbind(), self.codes.unbind(), strict=True)
        return [Fp8Matrix(exact, codes, self.scale, self.input_scale) for exact, codes in pairs]


def input_scale(width: int) -> float:
    """Return s_n, a power of two, for normed rows of `width` numbers."""
    return float(2.0 ** math.ceil(math.log2(ROUNDED * math.sqrt(width) / LARGEST)))


def encode(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, their scale and the scale of the input's codes of `matrices` `(..., D)`, all without
    gradients; a matrix that is not finite has no finite products."""
    with torch.no_grad():
        values = matrices.detach().float()
        scale = (values.abs().amax() / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        return (values / scale).to(E4M3), scale, torch.full_like(scale, input_scale(matrices.shape[-1]))


def fp8_product(n: Tensor, codes: Tensor, scale: Tensor, of_input: Tensor) -> Tensor:
    """Return `(T, N)` in the dtype of `n` `(T, D)`: torch's product of e4m3 codes.

    The other arguments are fields of `Fp8Matrix`. On CUDA, `n` is bfloat16, and products are added with the
    precision of the tensor cores ("fast accumulation").
    """
    product: Tensor = torch._scaled_mm(
        _codes(n),
        codes.t(),
        scale_a=of_input,
        scale_b=scale,
        out_dtype=n.dtype,
        use_fast_accum=True,
    )
    return product


def fp8_product_ref(n: Tensor, codes: Tensor, scale: Tensor, of_input: Tensor) -> Tensor:
    """Compute `fp8_product` from what the codes mean, with a float32 product."""
    return (F.linear(_codes(n).float(), codes.float()) * (scale * of_input)).to(n.dtype)


def _codes(n: Tensor) -> Tensor:
    """Return e4m3(n / s_n); NaN where no normed row has such an element, on every device."""
    values = n.float() / input_scale(n.shape[-1])
    return torch.where(values.abs() <= LARGEST, values, math.nan).to(E4M3)


class _Fp8Linear(torch.autograd.Function):
    """`fp8_linear` and its gradients."""

    @staticmethod
    def forward(ctx: Any, n: Tensor, exact: Tensor, codes: Tensor, scale: Tensor, of_input: Tensor) -> Tensor:
        ctx.save_for_backward(n, exact)
        product = fp8_product if n.is_cuda else fp8_product_ref
        return product(n, codes, scale, of_input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        n, exact = ctx.saved_tensors
        return grad @ exact, grad.t() @ n, None, None, None


def fp8_linear(n: Tensor, matrix: Fp8Matrix) -> Tensor:
    """Return n W^T from e4m3 codes of both, with the gradients of the product without them.

    Torch's product computes it on CUDA, `fp8_product_ref` elsewhere. It works under torch.compile and in CUDA
    graphs.

    Args:
        n: `(T, D)`, rows with a root mean square of 1; larger elements than such rows have make NaN.
        matrix: `(N, D)`; D and N are multiples of 16.

    Returns:
        `(T, N)`, dtype of `n`.

    Raises:
        ValueError: the shapes disagree. TypeError: the dtypes of n and W do.
    """
    if n.dim() != 2 or n.shape[1] != matrix.exact.shape[1]:
        raise ValueError(
            f"fp8_linear: n must be (T, {matrix.exact.shape[1]}) as W is {tuple(matrix.exact.shape)}, got "
            f"{tuple(n.shape)}"
        )
    if n.dtype != matrix.exact.dtype:
        raise TypeError(f"fp8_linear: n must be {matrix.exact.dtype} as W is, got {n.dtype}")
    out: Tensor = _Fp8Linear.apply(n, *matrix)  # type: ignore[no-untyped-call]
    return out


def trained_as(config: Config, model: GPT) -> GPT:
    """Return the model whose passes train `model`: itself, or a twin with the same parameters and fp8.

    The programs that stand alone have `_no_fp8.py` in place of this module.

    Args:
        config: with train.fp8.
        model: prepared. It stays as it is, for scores and quantization.

    Raises:
        UserError: a width is no multiple of 16. RunError: the GPU or torch has no such product.
    """
    if config.train.fp8 == "off":
        return model
    model._kernels()  # prepares the model if that has not been done
    _check(config.train.fp8, model)
    twin, encoded = copy.copy(model), encode
    if model.compiled:
        room_for_graphs(model.config.layers)
        encoded = torch.compile(encode, fullgraph=True, dynamic=False)
    if model._compiled_layers is not None:
        twin._compiled_layers = torch.compile(twin.layers, fullgraph=True, dynamic=False)

    def fold(*arguments: Any) -> Folded:
        folded = model._fold(*arguments)
        bank: Any = _Bank(folded.qkv, *encoded(folded.qkv))
        return folded._replace(qkv=bank)

    twin._fold = fold
    twin._branch = functools.partial(model._branch, project=fp8_linear)
    return twin


def _check(name: str, model: GPT) -> None:
    """Refuse what `fp8_linear` cannot compute: widths of `model`, or its device."""
    width, others = model.config.width, 2 * model.config.kv_width
    if width % MULTIPLE or others % MULTIPLE:
        raise UserError(
            f"train.fp8={name} needs a model.width, and a width of keys and values together, that are "
            f"multiples of {MULTIPLE}, got {width} and {others}; change them, or use train.fp8=off"
        )
    if problem := _problem(model.tok_emb.device):
        raise RunError(
            f"train.fp8={name} needs a GPU of compute capability 8.9 or newer, and a torch with products of "
            f"8-bit floats for it (here: {problem}); use train.fp8=off"
        )


@functools.lru_cache(maxsize=8)
def _problem(device: torch.device) -> str:
    """Return why `device` cannot compute `fp8_linear`, after a trial on a GPU; empty if it can."""
    if device.type != "cuda":
        return ""
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
        return torch.cuda.get_device_name(device)
    rng = torch.Generator().manual_seed(0)
    n, w = (torch.randn(rows, 64, generator=rng).to(device, torch.bfloat16) for rows in (80, 96))
    try:
        n, coded = F.rms_norm(n, (64,)), encode(w)
        worse = first_difference(("output",), [fp8_product(n, *coded)], [fp8_product_ref(n, *coded)])
    except Exception as e:
        return f"a trial raised {describe(e)}"
    return f"in a trial the product differs from its reference by {worse[1]:.1e} of the norm" if worse else ""
