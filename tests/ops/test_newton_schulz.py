"""newton_schulz compared with float64 and with the same iteration in eager low precision."""

import math

import pytest
import torch
from torch import Tensor

from pgolf.ops import newton_schulz, newton_schulz_ref
from tests.conftest import requires_gpu
from tests.ops.checks import assert_replays_like_a_call

# Muon's polynomial (Keller Jordan), and the first, second and last of a Polar Express table.
JORDAN = [(3.4445, -4.7750, 2.0315)]
POLAR = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# 1x1; sides that are no multiple of 8; one past a tile of 64 and of 128, wide, tall and square; batches.
SHAPES = [(1, 1), (5, 7), (7, 5), (65, 129), (129, 65), (3, 65, 65), (2, 130, 264), (2, 264, 130)]
# Enough tiles of 128 that the CUDA kernel takes the large tiles (at least one per multiprocessor).
LARGE = [(160, 136, 129), (160, 129, 136)]


def make_input(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=g) * 3).to(device=device, dtype=dtype)


def eager_low_precision(x: Tensor, table: list[tuple[float, float, float]]) -> Tensor:
    """The iteration as a Muon in PyTorch does it, in float16: one rounding after each product."""
    tall = x.shape[-2] > x.shape[-1]
    X = x.mT if tall else x
    X = (X.float() / (X.float().norm(dim=(-2, -1), keepdim=True) + 1e-7)).half()
    for a, b, c in table:
        A = X @ X.mT
        B = (b * A.float() + c * (A @ A).float()).to(X.dtype)
        X = (a * X.float() + (B @ X).float()).to(X.dtype)
    return (X.mT if tall else X).to(x.dtype)


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def assert_accurate(x: Tensor, table: list[tuple[float, float, float]]) -> None:
    got = newton_schulz(x, table)
    want = newton_schulz_ref(x.double(), table)
    assert got.dtype == x.dtype and got.shape == x.shape and got.device == x.device
    error = relative_error(got, want)
    if x.device.type == "cpu":
        # float32 throughout; the last rounding is half a spacing of the dtype.
        bound = {torch.float32: 2e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11 + 2e-5}[x.dtype]
    else:
        bound = 1.5 * relative_error(eager_low_precision(x, table), want) + 1e-3
    assert error <= bound, f"relative error {error:.2e} against float64, bound {bound:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype, device) -> None:
    assert_accurate(make_input(shape, dtype, device), JORDAN * 2)


@pytest.mark.parametrize("shape", LARGE)
def test_many_matrices_match_float64(shape: tuple[int, ...], device) -> None:
    if device.type == "cpu":
        shape = (5, *shape[1:])
    assert_accurate(make_input(shape, torch.bfloat16, device), JORDAN)


def test_real_bank_comes_close_to_orthogonal(device) -> None:
    shape = (11, 512, 2048) if device.type == "cuda" else (1, 512, 2048)
    x = make_input(shape, torch.bfloat16, device)
    s = torch.linalg.svdvals(newton_schulz(x, POLAR).float())
    assert s.min() > 0.8 and s.max() < 1.2, f"singular values {s.min():.3f}..{s.max():.3f}"


def test_polynomial_acts_on_the_singular_values(device) -> None:
    # Three known singular values: the result must be U p(S) V^T, with the norm of S taken out first.
    g = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(9, 3, generator=g))
    v, _ = torch.linalg.qr(torch.randn(12, 3, generator=g))
    s = torch.tensor([2.0, 1.0, 0.5])
    got = newton_schulz((u * s @ v.T).to(device), POLAR[:2], eps=0.0).cpu()
    p = s / s.norm()
    for a, b, c in POLAR[:2]:
        p = a * p + b * p**3 + c * p**5
    tolerance = 1e-5 if device.type == "cpu" else 5e-3
    torch.testing.assert_close(got, u * p @ v.T, rtol=tolerance, atol=tolerance)


def test_scale_of_each_matrix_does_not_matter(device) -> None:
    x = make_input((3, 20, 33), torch.float32, device)
    scale = torch.tensor([1e-6, 1.0, 1e6], device=device).view(3, 1, 1)
    rounding = 1e-5 if device.type == "cpu" else 1e-2
    torch.testing.assert_close(
        newton_schulz(x * scale, POLAR, eps=0.0),
        newton_schulz(x, POLAR, eps=0.0),
        rtol=rounding,
        atol=rounding,
    )


def test_zero_matrix_stays_zero_and_nan_stays_in_its_matrix(device) -> None:
    x = make_input((3, 8, 16), torch.bfloat16, device)
    x[0] = 0
    x[1, 3, 3] = math.nan
    got = newton_schulz(x, JORDAN)
    assert (got[0] == 0).all()
    assert got[1].isnan().all()
    assert got[2].isfinite().all()


@pytest.mark.parametrize("scale", [1e-20, 1e20, 1e37])
def test_tiny_and_huge_norms_are_scaled_first(scale, device) -> None:
    # Squares of these overflow or vanish in float32.
    x = make_input((2, 5, 7), torch.float32, device)
    torch.testing.assert_close(
        newton_schulz(x * scale, POLAR, eps=0.0), newton_schulz(x, POLAR, eps=0.0), rtol=0, atol=3e-2
    )


def test_zero_matrix_stays_zero_without_eps(device) -> None:
    x = torch.stack((torch.zeros(5, 7), torch.full((5, 7), 1e-42))).to(device)
    got = newton_schulz(x, JORDAN, eps=0.0)
    assert (got[0] == 0).all() and got[1].isfinite().all()
    assert (newton_schulz_ref(x, JORDAN, eps=0.0)[0] == 0).all()


def test_eps_is_added_to_the_norm(device) -> None:
    x = torch.full((1, 1), 3.0, device=device)
    torch.testing.assert_close(newton_schulz(x, [(1.0, 0.0, 0.0)], eps=1.0).item(), 0.75)


@pytest.mark.parametrize("shape", [(0, 4, 4), (0, 4), (2, 0, 3), (4, 0)])
def test_empty_input_gives_empty_output(shape: tuple[int, ...], device) -> None:
    assert newton_schulz(torch.zeros(shape, device=device), JORDAN).shape == shape


def test_transposed_view_gives_the_transposed_result(device) -> None:
    x = make_input((2, 24, 40), torch.float32, device)
    rounding = 1e-5 if device.type == "cpu" else 1e-2
    torch.testing.assert_close(
        newton_schulz(x.mT, JORDAN), newton_schulz(x, JORDAN).mT.contiguous(), rtol=rounding, atol=rounding
    )


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    x = make_input((2, 130, 264), torch.float32, torch.device("cpu"))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):  # 1 and 2 split the batch, 3 splits each product
            torch.set_num_threads(count)
            results.append(newton_schulz(x, JORDAN))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_result_is_the_same_on_every_call(device) -> None:
    x = make_input((4, 129, 200), torch.bfloat16, device)
    assert torch.equal(newton_schulz(x, POLAR), newton_schulz(x, POLAR))


def test_opcheck_accepts_the_operator(device) -> None:
    x = make_input((2, 9, 17), torch.float32, device)
    torch.library.opcheck(torch.ops.pgolf.newton_schulz, (x, [3.4445, -4.7750, 2.0315], 1e-7, 0))


def test_compile_in_one_graph_matches_eager(device) -> None:
    x = make_input((2, 9, 17), torch.float32, device)

    def update(x: Tensor) -> Tensor:
        return newton_schulz(x * 2, POLAR) * 0.5

    torch.testing.assert_close(torch.compile(update, fullgraph=True)(x), update(x))


@requires_gpu
def test_cuda_graph_replays() -> None:
    x = make_input((3, 128, 256), torch.bfloat16, torch.device("cuda"))
    assert_replays_like_a_call(lambda: [newton_schulz(x, POLAR)], lambda: x.copy_(x.flip(0)))


def test_backward_says_that_it_is_not_differentiable(device) -> None:
    x = make_input((4, 6), torch.float32, device).requires_grad_()
    with pytest.raises(
        RuntimeError, match=r"newton_schulz: not differentiable; call it under torch.no_grad\(\)"
    ):
        newton_schulz(x, JORDAN).sum().backward()


@pytest.mark.parametrize(
    ("x", "table", "eps", "error", "message"),
    [
        (torch.zeros(4), JORDAN, 1e-7, ValueError, r"x must be \(m, n\) or \(b, m, n\), got \[4\]"),
        (torch.zeros(1, 1, 4, 4), JORDAN, 1e-7, ValueError, r"x must be \(m, n\) or \(b, m, n\)"),
        (torch.zeros(4, 4), [], 1e-7, ValueError, "must be 1 to 10 triples .* got 0 numbers"),
        (torch.zeros(4, 4), JORDAN * 11, 1e-7, ValueError, "must be 1 to 10 triples .* got 33 numbers"),
        (torch.zeros(4, 4), [(1.0, 2.0)], 1e-7, ValueError, r"must be triples \(a, b, c\), got \(1.0, 2.0\)"),
        (torch.zeros(4, 4), [(1.0, 0.0, math.nan)], 1e-7, ValueError, "must be finite, got nan in triple 0"),
        (torch.zeros(4, 4), JORDAN, -1.0, ValueError, "eps must be >= 0, got -1"),
        (torch.zeros(4, 4).double(), JORDAN, 1e-7, TypeError, "dtype must be float32, .* got Double"),
    ],
)
def test_bad_input_is_named(x: Tensor, table, eps: float, error, message: str, device) -> None:
    with pytest.raises(error, match=message):
        newton_schulz(x.to(device), table, eps=eps)
