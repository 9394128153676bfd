"""newton_schulz(algorithm="standard"): an emulation that justifies its numerics (CPU), and the kernel (GPU).

tests/ops/test_newton_schulz.py compares it with float64; csrc/tests/test_newton_schulz_portable.cpp runs the
source of the kernel on the host.
"""

import math

import pytest
import torch
from torch import Tensor

from bench.portable_emulation import DTYPES, KINDS, deviation, emulate, make_matrix
from pgolf.ops import newton_schulz, newton_schulz_ref
from pgolf.optim.polar import coefficients
from tests.conftest import requires_gpu, requires_hopper

TABLE = coefficients("polar_express_golf", 5)
# Sides that are no multiple of 8, large batches of small matrices, tall and wide; tiles of both sizes.
SHAPES = [(5, 257, 511), (7, 320, 1000), (64, 128, 128), (9, 2048, 64)]
# Small squares, which the Hopper kernel takes as well.
SMALL = [(9, 32, 32), (9, 64, 64), (9, 96, 96), (6, 192, 192), (6, 256, 256)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_remainders_keep_float16_near_the_exact_map(kind: str, dtype: torch.dtype) -> None:
    # Equal singular values may all lie where the composed polynomial is steep.
    bound = 0.02 if kind == "flat" else 0.01
    for shape in [(64, 128), (105, 105), (129, 71)]:
        x = make_matrix(kind, *shape, dtype, seed=0)
        assert deviation(emulate(x, TABLE, "remainders"), x, TABLE) < bound


def test_float16_alone_does_not() -> None:
    x = make_matrix("exact", 64, 128, torch.bfloat16, seed=0)
    assert deviation(emulate(x, TABLE, "float16"), x, TABLE) > 0.02
    assert deviation(emulate(x, TABLE, "bfloat16"), x, TABLE) > 0.2


def test_remainders_last_as_long_as_the_table_needs() -> None:
    # Muon's polynomial multiplies the noise of a zero singular value by 3.4 in each of ten iterations.
    x, table = make_matrix("exact", 64, 128, torch.bfloat16, seed=0), coefficients("jordan", 10)
    assert deviation(emulate(x, table, "remainders"), x, table) < 0.01
    assert deviation(emulate(x, table, "float16"), x, table) > 0.5


def make_batch(shape: tuple[int, int, int], kind: str, dtype: torch.dtype) -> Tensor:
    different = torch.stack([make_matrix(kind, *shape[1:], dtype, seed) for seed in range(min(shape[0], 5))])
    return different.repeat(math.ceil(shape[0] / len(different)), 1, 1)[: shape[0]]


@requires_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES + SMALL)
def test_singular_values_follow_the_exact_map(
    shape: tuple[int, int, int], kind: str, dtype: torch.dtype
) -> None:
    x = make_batch(shape, kind, dtype)
    got = newton_schulz(x.cuda(), TABLE, algorithm="standard").cpu()
    # The last matrices, which other blocks compute.
    off = deviation(got[-5:], x[-5:], TABLE)
    assert off < 0.01, f"{kind} {shape} {dtype}: singular values off by {off:.4f}"
    # Every matrix as its copies.
    copies = got[: shape[0] // 5 * 5].view(-1, 5, *shape[1:])
    assert torch.equal(copies, copies[:1].expand_as(copies))


@requires_hopper
@pytest.mark.parametrize("shape", [(64, 128, 128), *SMALL])
def test_both_kernels_can_be_chosen_for_small_squares(shape: tuple[int, int, int]) -> None:
    x = make_batch(shape, "gaussian", torch.bfloat16)
    found = {a: newton_schulz(x.cuda(), TABLE, algorithm=a).cpu() for a in ("standard", "gram")}
    for algorithm, got in found.items():
        off = deviation(got[-5:], x[-5:], TABLE)
        assert off < 0.01, f"{algorithm} {shape}: singular values off by {off:.4f}"
    chosen = newton_schulz(x.cuda(), TABLE).cpu()
    assert any(torch.equal(chosen, got) for got in found.values())


@requires_gpu
@pytest.mark.parametrize("shape", [(6, 33, 70), (6, 128, 256), (6, 200, 72)])
def test_extremes_stay_in_their_matrix(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).cuda()
    want = newton_schulz(x, TABLE, eps=0.0, algorithm="standard")
    assert ((want - newton_schulz_ref(x, TABLE, eps=0.0)).norm() / want.norm()).item() < 5e-3
    scaled = x * torch.tensor([0.0, 1.0, 1.0, 2.0**100, 2.0**-100, 1.0], device="cuda").view(6, 1, 1)
    scaled[1, 3, 3] = math.nan
    scaled[2, 3, 3] = math.inf
    got = newton_schulz(scaled, TABLE, eps=0.0, algorithm="standard")
    assert (got[0] == 0).all() and got[1:3].isnan().all()
    # Powers of two are taken out exactly.
    assert torch.equal(got[3:], want[3:])


@requires_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_that_is_not_aligned(dtype: torch.dtype) -> None:
    # One matrix, whose rows do not start at multiples of 16 bytes, as the whole batch would be written.
    x = make_batch((3, 72, 131), "gaussian", dtype).cuda()
    together = newton_schulz(x, TABLE, algorithm="standard")
    for i in range(3):
        assert torch.equal(newton_schulz(x[i], TABLE, algorithm="standard"), together[i])
