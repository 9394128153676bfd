"""trellis_round and trellis_values: golden values, all paths of short chains, the gain, errors."""

from itertools import product

import pytest
import torch
from torch import Tensor

from pgolf.ops import _trellis_compiled, trellis_round, trellis_round_ref, trellis_values, trellis_values_ref

# 256 numbers are a chain; 257 and 700 begin others, 1 and 33 are shorter.
SHAPES = [(1,), (5, 33), (2, 3, 256), (4, 257), (3, 700), (0, 5), (3, 0)]


def numbers(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 2.7).to(device)


def squared_error(values: Tensor, x: Tensor) -> float:
    return float((values.double() - x.double()).square().sum())


# By hand from csrc/kernels/trellis.h: the states before these codes are 0, 1, 2, 5, 11 and 23.
def test_golden_values(device) -> None:
    codes = torch.tensor([1, 0, 0, 0, 0, 0], dtype=torch.int8, device=device).unsqueeze(1)
    expected = [0.75, 0.25, -0.25, 0.25, -0.25, -0.25]
    assert trellis_values(codes).flatten().tolist() == expected
    assert trellis_values_ref(codes).flatten().tolist() == expected


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1), (33, 7), (256, 3), (257, 3), (2, 700, 5)])
def test_values_are_the_references(shape: tuple[int, ...], device) -> None:
    g = torch.Generator().manual_seed(sum(shape))
    codes = torch.randint(-128, 128, shape, generator=g, dtype=torch.int8).to(device)
    assert torch.equal(trellis_values(codes), trellis_values_ref(codes))


@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_is_as_good_as_the_references_and_can_be_read_back(shape: tuple[int, ...], device) -> None:
    x = numbers(shape, device)
    values = trellis_round(x)
    assert values.shape == x.shape and values.dtype == torch.float32
    if x.numel():
        best = squared_error(trellis_round_ref(x), x)
        assert abs(squared_error(values, x) - best) <= 1e-4 * best
        assert (values - x).abs().max() < 1
        chains = values.reshape(-1, shape[-1])
        codes = chains.round().to(torch.int8).T.contiguous()
        assert torch.equal(trellis_values(codes).T, chains)


@pytest.mark.parametrize("seed", range(5))
def test_no_path_of_a_short_chain_is_better(seed: int, device) -> None:
    x = torch.randn(6, generator=torch.Generator().manual_seed(seed)) * 3
    steps = torch.tensor(list(product((-1, 0, 1, 2), repeat=6)))
    values = trellis_values_ref((x.floor() + steps).to(torch.int8).T.contiguous()).T
    best = float((values - x).square().sum(1).min())
    assert abs(squared_error(trellis_round(x.to(device)).cpu(), x) - best) < 1e-5


def test_error_is_a_quarter_below_plain_rounding_at_the_same_entropy(device) -> None:
    x = numbers((400, 256), device)
    values = trellis_round(x)
    assert squared_error(values, x) < 0.76 * squared_error(x.round(), x)

    def entropy(codes: Tensor) -> float:
        p = codes.unique(return_counts=True)[1].double() / codes.numel()
        return float(-(p * p.log2()).sum())

    assert entropy(values.round()) < entropy(x.round()) + 0.008


def test_every_256_numbers_a_chain_begins(device) -> None:
    x = numbers((3, 700), device)
    parts = [trellis_round(part.contiguous()) for part in x.split(256, dim=1)]
    assert torch.equal(trellis_round(x), torch.cat(parts, dim=1))


def test_strided_input_is_read_in_logical_order(device) -> None:
    x = numbers((40, 6), device)
    assert torch.equal(trellis_round(x.T), trellis_round(x.T.contiguous()))
    codes = x.round().to(torch.int8)
    assert torch.equal(trellis_values(codes.T), trellis_values(codes.T.contiguous()))


def test_opcheck_accepts_the_operators(device) -> None:
    x = numbers((3, 7), device)
    torch.library.opcheck(torch.ops.pgolf.trellis_round, (x,))
    torch.library.opcheck(torch.ops.pgolf.trellis_values, (x.to(torch.int8),))


def test_compile_in_one_graph_matches_eager(device) -> None:
    x = numbers((5, 18), device)
    compiled = torch.compile(lambda c: trellis_values(trellis_round(c).to(torch.int8)) + 1, fullgraph=True)
    assert torch.equal(compiled(x), trellis_values(trellis_round(x).to(torch.int8)) + 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d: trellis_round(torch.zeros(4, device=d).half()), TypeError, "x must be float32, got Half"),
        (lambda d: trellis_round(torch.zeros((), device=d)), ValueError, r"x must be \(..., n\)"),
        (lambda d: trellis_values(torch.zeros(4, 4, device=d)), TypeError, "codes must be int8, got Float"),
        (
            lambda d: trellis_values(torch.zeros(4, dtype=torch.int8, device=d)),
            ValueError,
            r"codes must be \(..., n, columns\), got \[4\]",
        ),
    ],
)
def test_bad_input_is_named(call, error, message: str, device) -> None:
    with pytest.raises(error, match=message):
        call(device)


@pytest.mark.parametrize("shape", [(1, 1), (3, 255), (5, 257), (2, 1000), (0, 7), (7, 0)])
def test_the_program_that_trains_rounds_as_the_extension_does(shape):
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    assert torch.equal(_trellis_compiled.best_values(x), trellis_round(x))
    assert _trellis_compiled.best_values(x.T.contiguous().T).shape == x.shape
