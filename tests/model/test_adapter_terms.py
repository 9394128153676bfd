"""What heads and logits get from adapters, and attention from some tokens only."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pgolf.model import heads
from pgolf.model.attention import Asked, AttentionWeights, attention_branch, low_product, sdpa_attention
from pgolf.model.heads import doc_branch
from tests.model.test_gpt import small
from tests.model.test_heads import (
    BRANCHES,
    FORMS,
    fa4,  # noqa: F401
    layer,
    nodes,
    passed,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_product_with_the_terms_of_adapters_is_their_sum(device, dtype):
    rng = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=rng).to(device, dtype).requires_grad_()

    x, weight, upstream = draw(12, 16), draw(24, 16), draw(12, 24)
    low, bs = draw(3, 4, 8), [draw(3, 8, 4), draw(3, 12, 4)]
    lows, places = [low[:, :, :4], low[:, :, 4:]], [0, 12]
    terms = (lows[0], bs[0]), None, (lows[1], bs[1])
    found = heads.adapted_product(x, weight, terms, (places[0], 8, places[1]))
    sums = [low_product(*pair) for pair in zip(lows, bs, strict=True)]
    zeros = x.new_zeros(12, 4)
    wanted = F.linear(x, weight) + torch.cat((sums[0], zeros, sums[1]), dim=-1)
    leaves = (x, weight, low, *bs)
    tight = {} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 0.1}
    for got, want in zip(
        (found, *torch.autograd.grad(found, leaves, upstream)),
        (wanted, *torch.autograd.grad(wanted, leaves, upstream)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, **tight)
    if dtype == torch.float64:
        lows = [t.detach().clone().requires_grad_() for t in lows]
        torch.library.opcheck(torch.ops.pgolf._adapted_product.default, (x, weight, lows, bs, places))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_logits_are_not_rounded_to_the_dtype_of_their_factors(device, dtype, trained):
    rng = torch.Generator().manual_seed(0)
    shapes = (6, 16), (24, 16), (6, 24)
    hidden, table, extra = (torch.randn(s, generator=rng).to(device, dtype).requires_grad_() for s in shapes)
    table.requires_grad_(trained)
    upstream = torch.randn(6, 24, generator=rng).to(device)
    leaves = [t for t in (hidden, table, extra) if t.requires_grad]
    for more in (None, extra):
        found = heads.unrounded_logits(hidden, table, more)
        wanted = hidden.double() @ table.double().T + (0 if more is None else more.double())
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-5)
        gradients = (
            torch.autograd.grad(y, leaves, upstream.to(y.dtype), allow_unused=True) for y in (found, wanted)
        )
        for got, want in zip(*gradients, strict=True):
            if want is None:
                assert got is None
            else:
                torch.testing.assert_close(
                    got, want, rtol=2e-2, atol=1e-6 if dtype == torch.float64 else 0.05
                )


@pytest.mark.parametrize("count", [1, 64, 300])
def test_the_tokens_that_are_asked_for_attend_to_all_those_before_them(device, count):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float64
    rng = torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(600, h, 64, generator=rng).to(device, dtype) for h in (4, 2, 2, 4))
    starts = torch.tensor([0, 300, 600], dtype=torch.int32)
    angles = torch.zeros(600, 1, 1), torch.zeros(600, 1, 1)

    def run(leaves, cu, kernel):
        asked = Asked.last(count, 300, cu, angles)
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = asked.rows(kernel(asked, *leaves, cu, 300))
        return [y, *torch.autograd.grad(y, leaves, asked.rows(upstream.to(y)))]

    found = run((q, k, v), starts.to(device), heads.asked_attention)
    exact = [t.double().cpu() for t in (q, k, v)]
    wanted = run(exact, starts, lambda _, *inputs: sdpa_attention(*inputs))
    for name, got, want in zip(("y", "dq", "dk", "dv"), found, wanted, strict=True):
        error = (got.double().cpu() - want).norm() / want.norm()
        assert error < (1e-12 if dtype == torch.float64 else 0.01), name


class Products(TorchDispatchMode):
    """Collects the shapes of the factors of all products of two matrices."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.shapes.append((tuple(args[0].shape), tuple(args[1].shape)))
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("fa4")
@FORMS
def test_no_gradient_of_frozen_weights_is_computed(form):
    config, tokens = small(), 12
    leaves, context = layer(config, [tokens])
    low, b = (torch.ones(1, rows, 3, dtype=torch.float64) for rows in (tokens, config.kv_width))
    context["lora"] = (None, (low.requires_grad_(), b.requires_grad_()), None, None)

    def products(trained):
        mine = {n: t.detach().requires_grad_(n == "n" or trained) for n, t in leaves.items()}
        weights = AttentionWeights(mine["qkv"], mine["out"], mine["gain"], mine["gate"], None, None)
        y = BRANCHES[form](config, None, mine["n"], weights, exclusive=True, **context)
        with Products() as found:
            torch.autograd.grad(y.sum(), [t for t in (*mine.values(), low, b) if t.requires_grad])
        # That of a weight sums over tokens.
        return len(found.shapes), sum(second[0] == tokens for _, second in found.shapes)

    assert products(True) == (6, 3)  # of q, k and v together, of the gate, and of the output
    assert products(False) == (3, 0)


@pytest.mark.usefixtures("fa4")
@pytest.mark.parametrize("count", [1, 2, 6])
def test_tokens_that_are_not_asked_for_are_left_to_the_composed_operators_and_attend_to_nothing(count):
    config, calls = small(), []
    leaves, context = layer(config, [6, 6])
    widths = {"k_low": (2, 6, 3), "k_b": (2, config.kv_width, 3)}
    leaves |= {n: torch.ones(s, dtype=torch.float64).requires_grad_() for n, s in widths.items()}
    starts = context["cu_seqlens"]
    context["asked"] = Asked.last(count, 6, starts, context["rope"])

    def kernel(*inputs):
        calls.append(inputs)
        return sdpa_attention(*inputs)

    for k in (None, (leaves["k_low"], leaves["k_b"])):
        context["lora"] = None, k, None, None
        used = leaves if k else {n: t for n, t in leaves.items() if not n.startswith("k_")}
        plain = passed(attention_branch, sdpa_attention, config, used, context)
        found = passed(doc_branch, kernel, config, used, context)
        assert "_HeadsBackward" not in nodes(found[0]) and not calls
        for name, a, b in zip(("y", *used), found, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)
