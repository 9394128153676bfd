"""Fake quantization against the composed reference: values, gradients, and the model that trains with it."""

import pytest
import torch

from pgolf.model.fake_quant import FakeQuant, fake_quantize
from pgolf.model.gpt import GPT
from pgolf.ops.int6 import quantize_pack_sdclip_ref, unpack_dequantize_ref
from pgolf.quant.grid import dequantize, quantize, sdclip_scales
from tests.model.test_gpt import opaque_attention, packed, randomized, small

GRIDS = FakeQuant(attn_clip=3.0, mlp_clip=2.0)
"""Narrow enough that weights are clamped."""
CLIPS = {"qo_bank": 3.0, "kv_bank": 3.0, "mlp_up_bank": 2.0, "mlp_down_bank": 2.0}


def composed(weight: torch.Tensor, clip: float) -> torch.Tensor:
    return unpack_dequantize_ref(*quantize_pack_sdclip_ref(weight, clip, 6), weight.shape[-1], 6).float()


@pytest.mark.parametrize("columns", [2, 31, 96])
def test_values_are_the_composed_ones_and_the_gradient_passes(device, columns):
    rng = torch.Generator().manual_seed(columns)
    weight = torch.randn(3, 8, columns, generator=rng).to(device).requires_grad_()
    out = fake_quantize(weight, 2.0)
    assert out.dtype == torch.float32
    assert torch.equal(out, composed(weight.detach(), 2.0))
    direction = torch.randn(out.shape, generator=rng).to(device)
    (gradient,) = torch.autograd.grad(out, weight, direction)
    assert torch.equal(gradient, direction)


def test_the_grid_is_that_of_the_quantizer():
    weight = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    scales = sdclip_scales(weight, bits=6, clip=13.0)
    plain = dequantize(quantize(weight, scales, bits=6), scales)
    torch.testing.assert_close(fake_quantize(weight, 13.0), plain, rtol=2**-8, atol=0)


def test_a_forward_pass_is_that_of_the_rounded_model_and_so_is_its_gradient():
    config = small()
    model, twin = randomized(config), randomized(config)
    with torch.no_grad():
        for name, clip in CLIPS.items():
            bank = dict(twin.named_parameters())[name]
            bank.copy_(composed(bank, clip))
    ids, cu = packed([11, 13], config.vocab_size)

    def run(gpt: GPT, grids: FakeQuant | None) -> torch.Tensor:
        losses = gpt(ids, ids.roll(-1), cu, max_seqlen=24, loop=True, rounding=grids)
        losses.mean().backward()
        return losses.detach()

    assert torch.equal(run(model, GRIDS), run(twin, None))
    for (name, p), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, other.grad), name
    plain = run(randomized(config), None)
    assert not torch.allclose(plain, run(model, GRIDS), atol=1e-4)
    # It is a matter of the call: the next one without it sees the weights as they are.
    assert torch.equal(plain, run(model, None))


@pytest.mark.parametrize("compile", ["blocks", "model"])
def test_compiled_passes_round_too_without_breaks(compile):
    assert opaque_attention is not None
    config = small()
    model, (ids, cu) = randomized(config), packed([11, 13], config.vocab_size)
    model.prepare(torch.device("cpu"), compile=compile, backend="aot_eager")
    model._attention = torch.ops.pgolf_test.attention
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        found = {
            grids: model(ids, ids, cu, max_seqlen=24, loop=True, rounding=grids) for grids in (None, GRIDS)
        }
        for grids, losses in found.items():
            eager = randomized(config)(ids, ids, cu, max_seqlen=24, loop=True, rounding=grids)
            torch.testing.assert_close(losses, eager, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[None], found[GRIDS], atol=1e-3)
    assert not torch._dynamo.utils.counters["graph_break"]
