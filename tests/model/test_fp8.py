"""Products of training in 8-bit floats: their rounding, their gradients, and which passes have them."""

import copy
import functools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pgolf.artifact.code import EVALUATE, TRAIN, code_text, reader_code
from pgolf.config import Config
from pgolf.errors import RunError, UserError
from pgolf.model import _no_fp8, fp8
from pgolf.model.fp8 import (
    LARGEST,
    Fp8Matrix,
    encode,
    fp8_linear,
    fp8_product,
    fp8_product_ref,
    input_scale,
    trained_as,
)
from pgolf.train.captured import Form, MicroSteps
from tests.conftest import requires_gpu
from tests.model.test_adapted import masked_attention
from tests.model.test_gpt import packed, randomized, small
from tests.train.test_captured import HOPPER, captured_on_gpu, make_batches, make_model, plan, take, unequal

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QKV = replace(Config(), train=replace(Config().train, fp8="qkv"))
SIZES = [(1, 16, 16), (17, 32, 64), (129, 512, 1024)]
"""Tokens, width and columns."""


def drawn(tokens: int, width: int, columns: int, dtype=torch.float32, device=CPU):
    """Normed rows and a matrix whose rows have different lengths, as the layers' matrices do."""
    rng = torch.Generator().manual_seed(tokens)
    n = F.rms_norm(torch.randn(tokens, width, generator=rng), (width,))
    w = torch.randn(columns, width, generator=rng) * torch.rand(columns, 1, generator=rng) / width**0.5
    return n.to(device, dtype), w.to(device, dtype)


def matrix_of(w: torch.Tensor) -> Fp8Matrix:
    return Fp8Matrix(w, *encode(w))


def rounding(values: torch.Tensor, scale: float) -> torch.Tensor:
    """The most that e4m3 changes a number: half of a step of eight in a power of two, or of the finest."""
    return (values.abs() / 16).maximum(torch.tensor(scale * 2.0**-10))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("product", [fp8_product, fp8_product_ref])
def test_the_product_is_as_exact_as_codes_of_four_bits(size, product):
    n, w = drawn(*size)
    codes, scale, of_input = encode(w)
    found, truth = product(n, codes, scale, of_input).double(), n.double() @ w.double().T
    by_n, by_w = rounding(n.double(), float(of_input)), rounding(w.double(), float(scale))
    most = by_n @ (w.double().abs() + by_w).T + n.double().abs() @ by_w.T
    assert (found - truth).abs().le(most + 1e-6).all()
    relative = float((found - truth).norm() / truth.norm())
    assert 0.005 < relative < 0.06 and (size[0] < 100 or relative > 0.03)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_product_is_that_of_the_reference(size, dtype):
    n, w = drawn(*size, dtype=dtype)
    coded = encode(w)
    found, wanted = fp8_product(n, *coded), fp8_product_ref(n, *coded)
    assert found.dtype == wanted.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-5)


def test_what_eight_bits_hold_is_exact():
    n = torch.tensor([[1.0, -1.0, 0.5, 1.5] * 4, [0.0] * 16])
    w = torch.tensor([[448.0, 1.0, 0.0, -3.5] * 4, [0.0] * 16])
    for product in (fp8_product, fp8_product_ref):
        assert torch.equal(product(n, *encode(w)), n @ w.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_unrounded_product(dtype):
    n, w = (t.requires_grad_() for t in drawn(33, 64, 96, dtype=dtype))
    upstream = torch.randn(33, 96, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(fp8_linear(n, matrix_of(w)), (n, w), upstream.to(dtype))
    leaves = [t.detach().double().requires_grad_() for t in (n, w)]
    wanted = torch.autograd.grad(F.linear(*leaves), leaves, upstream.to(dtype).double())
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(
            got.double(),
            want,
            rtol=0,
            atol=(1e-5 if got.dtype == n.dtype == torch.float32 else 0.03) * float(want.abs().max()),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 48, 256, 512, 1024, 4096])
def test_every_normed_row_has_codes(width, dtype):
    """The longest element of all is that of a row with one."""
    x = torch.zeros(2, width, dtype=dtype)
    x[0, 3], x[1, 5] = 7.0, -1e-2
    n = F.rms_norm(x, (width,), eps=1e-12)
    scale = input_scale(width)
    assert math.frexp(scale)[0] == 0.5, "a power of two"
    codes = fp8._codes(n).float()
    assert codes.isfinite().all() and LARGEST / 2.1 < float(codes.abs().max()) <= LARGEST
    torch.testing.assert_close(codes * scale, n.float(), rtol=1 / 16, atol=0)


@pytest.mark.parametrize("product", [fp8_product, fp8_product_ref])
def test_zeros_are_zeros_and_what_is_not_finite_stays_so(product):
    n, w = drawn(4, 32, 48)
    n[1] = 0.0
    assert (product(n, *encode(torch.zeros_like(w))) == 0).all()
    good = product(n, *encode(w))
    assert (good[1] == 0).all() and good.isfinite().all()
    for bad in (math.nan, math.inf, -math.inf, 1e6):
        spoiled = n.clone()
        spoiled[2, 7] = bad
        found = product(spoiled, *encode(w))
        assert found[2].isnan().all() and torch.equal(found[[0, 1, 3]], good[[0, 1, 3]]), bad
    for bad in (math.nan, math.inf):
        spoiled = w.clone()
        spoiled[5, 1] = bad
        assert product(n, *encode(spoiled)).isnan().any(1).all(), bad


def test_what_does_not_fit_is_named():
    n, w = drawn(4, 32, 48)
    with pytest.raises(ValueError, match=r"n must be \(T, 32\) as W is \(48, 32\), got \(4, 16\)"):
        fp8_linear(n[:, :16], matrix_of(w))
    with pytest.raises(ValueError, match=r"n must be \(T, 32\) .*, got \(2, 2, 32\)"):
        fp8_linear(n.view(2, 2, 32), matrix_of(w))
    with pytest.raises(TypeError, match=r"n must be torch.float32 as W is, got torch.bfloat16"):
        fp8_linear(n.bfloat16(), matrix_of(w))


def compiles(device) -> None:
    torch._dynamo.reset()
    dtype = torch.float32 if device == CPU else torch.bfloat16
    n, w = (t.requires_grad_() for t in drawn(64, 64, 96, dtype=dtype, device=device))

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return fp8_linear(F.rms_norm(x, x.shape[1:]), matrix_of(w)).float().square().sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=False)
    found, wanted = ([y, *torch.autograd.grad(y, (n, w))] for y in (compiled(n, w), run(n, w)))
    torch._dynamo.reset()
    for got, want in zip(found, wanted, strict=True):
        # One number in many may be on the other side of a tie; a wrong gradient is wrong by all of it.
        assert (got - want).norm() < (1e-3 if device == CPU else 0.01) * want.norm()


def test_it_compiles_to_one_graph():
    compiles(CPU)


def losses(model, *, loop: bool = True, rounding=None) -> torch.Tensor:
    ids, cu = packed([11, 1, 13], model.config.vocab_size)
    return model(ids, ids.roll(-1), cu, max_seqlen=13, loop=loop, rounding=rounding)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize(
    "change", [{}, {"value_embed_layers": 2, "value_embed_width": 6}, {"parallel": "gptj"}]
)
def test_the_twin_trains_the_same_parameters_and_leaves_the_model_as_it_was(change, loop):
    model = randomized(replace(small(), **change)).prepare(CPU)
    before = losses(model, loop=loop).detach()
    twin = trained_as(QKV, model)
    assert dict(twin.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert all(p is q for p, q in zip(twin.parameters(), model.parameters(), strict=True))
    rounded = losses(twin, loop=loop)
    error = float((rounded.detach() - before).norm() / before.norm())
    assert 1e-4 < error < 0.1, "of the rounding"
    assert torch.equal(losses(model, loop=loop), before)
    rounded.mean().backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in model.parameters())
    with torch.no_grad():
        model.qo_bank.mul_(2.0)
    assert not torch.equal(losses(twin, loop=loop), rounded), "the codes are those of today's weights"


def test_the_twin_computes_what_its_codes_mean_with_the_gradients_of_exact_products():
    model = randomized(small()).prepare(CPU)
    twin, meant, fold = trained_as(QKV, model), copy.copy(model), model._fold
    scales = []

    def recorded(*arguments):
        folded = fold(*arguments)
        scales.append(encode(folded.qkv)[1])
        return folded

    def project(n, w):
        exact, of_input = F.linear(n, w), input_scale(n.shape[1])
        pairs = ((n, of_input), (w, scales[-1]))
        coded = F.linear(*((t / scale).to(fp8.E4M3).float() * scale for t, scale in pairs))
        return exact + (coded - exact).detach()

    meant._fold, meant._branch = recorded, functools.partial(model._branch, project=project)
    found = passed(twin)
    for name, wanted in passed(meant).items():
        torch.testing.assert_close(
            found[name], wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()), msg=name
        )


def passed(model) -> dict[str, torch.Tensor]:
    """The losses of a pass, and the gradients of their mean."""
    model.zero_grad()
    found = losses(model)
    found.mean().backward()
    return {"losses": found.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}


def test_late_rounding_to_six_bits_comes_first():
    twin = trained_as(QKV, randomized(small()).prepare(CPU))
    assert losses(twin, rounding=lambda _, bank: 0 * bank).isfinite().all()
    assert not torch.equal(losses(twin, rounding=lambda _, bank: bank / 2), losses(twin))


@pytest.mark.parametrize("compile", ["blocks", "model"])
def test_compiled_passes_equal_launched_ones(compile):
    torch._dynamo.reset()
    wanted = losses(trained_as(QKV, randomized(small()).prepare(CPU)))
    wanted.mean().backward()
    model = randomized(small()).prepare(CPU, compile=compile, backend="aot_eager")
    model._attention, model.compiled = masked_attention, True
    with pytest.MonkeyPatch.context() as patch:
        compiler = torch.compile
        patch.setattr(torch, "compile", lambda f, **how: compiler(f, **{**how, "backend": "aot_eager"}))
        twin = trained_as(QKV, model)
    found = losses(twin)
    plain = losses(model)
    found.mean().backward()
    torch._dynamo.reset()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert (plain - wanted).norm() > 1e-4 * wanted.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_off_is_the_model_itself():
    model = randomized(small()).prepare(CPU)
    assert trained_as(Config(), model) is model


def test_widths_that_are_no_multiples_of_16_are_refused():
    model = randomized(replace(small(), width=24, heads=3, kv_heads=1, rope_dims=4)).prepare(CPU)
    with pytest.raises(
        UserError, match=r"train.fp8=qkv needs a model.width.* multiples of 16, got 24 and 16"
    ):
        trained_as(QKV, model)


def test_a_gpu_without_such_products_is_refused(monkeypatch):
    fp8._problem.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A10")
    assert fp8._problem(CUDA) == "NVIDIA A10"
    fp8._problem.cache_clear()
    model = randomized(small()).prepare(CPU)
    monkeypatch.setattr(fp8, "_problem", lambda _: "NVIDIA A10")
    with pytest.raises(RunError, match=r"8\.9 or newer.*\(here: NVIDIA A10\); use train.fp8=off"):
        trained_as(QKV, model)


def test_a_trial_says_what_is_wrong_with_a_product(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.Tensor, "to", without_device(torch.Tensor.to))
    for product, message in {
        lambda n, *coded: fp8_product_ref(n, *coded) * 1.1: "differs from its reference by 1.0e-01",
        lambda *_: 1 / 0: "a trial raised ZeroDivisionError",
        fp8_product: "",
    }.items():
        fp8._problem.cache_clear()
        monkeypatch.setattr(fp8, "fp8_product", product)
        assert message in fp8._problem(CUDA) and bool(message) == bool(fp8._problem(CUDA))
    fp8._problem.cache_clear()


def without_device(to):
    """Let what is moved to a GPU stay where it is."""
    return lambda tensor, *how: to(tensor, *(part for part in how if part != CUDA))


def test_the_programs_that_stand_alone_train_without():
    for program in (EVALUATE, TRAIN):
        assert "_scaled_mm" not in code_text(program) and "float8" not in code_text(program)
    assert "trained_as" in reader_code(TRAIN)["pgolf/model/fp8.py"]
    model = object()
    assert _no_fp8.trained_as(QKV, model) is model


@requires_gpu
@pytest.mark.parametrize("size", [*SIZES, (98_304, 512, 1024)], ids=str)
def test_on_a_gpu_the_product_is_that_of_the_reference(size):
    n, w = drawn(*size, dtype=torch.bfloat16, device=CUDA)
    coded = encode(w)
    found, wanted = fp8_product(n, *coded), fp8_product_ref(n, *coded)
    assert (found - wanted).float().norm() < 5e-3 * wanted.float().norm()


@requires_gpu
def test_on_a_gpu_it_compiles_to_one_graph():
    compiles(CUDA)


@requires_gpu
@pytest.mark.parametrize("compile", ["off", "blocks", "model"])
def test_captured_passes_of_the_twin_equal_launched_ones(compile):
    torch._dynamo.reset()
    model = make_model(HOPPER, "cuda", attention="auto", compile=compile)
    twin, batches = trained_as(QKV, model), make_batches(HOPPER, device="cuda")
    passes = plan(batches)
    launching = MicroSteps(twin, CUDA, passes=3)
    take(launching, twin, passes)  # compiles
    launched = take(launching, twin, passes)
    micro = captured_on_gpu(twin, batches, [Form(loop=False), Form(loop=True)])
    for wanted, got in zip(launched, take(micro, twin, passes), strict=True):
        assert torch.equal(wanted["total"], got["total"])
    plain = take(MicroSteps(model, CUDA, passes=3), model, passes)
    assert unequal(plain, launched) != [], "the model itself has no fp8"
