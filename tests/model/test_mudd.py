"""MUDD connections and the strength of exclusive attention: formulas, start, causality, groups, storage."""

import math
from dataclasses import replace

import pytest
import torch

from pgolf.config import AdamConfig, ModelConfig, OptimConfig
from pgolf.dist import Dist
from pgolf.model.gates import exclude_self
from pgolf.model.gpt import GPT
from pgolf.model.mudd import Mudd, add_sources, source_layers
from pgolf.optim.groups import split_parameters
from pgolf.optim.step import Optimizer
from pgolf.presets import pr1493, pr1855
from pgolf.quant.quantized import dequantize_state
from tests.model.test_embed import quantized
from tests.model.test_gpt import logits, packed, randomized, small

ADDED = {"mudd": 7, "xsa_strength": True}
SHAPES = [{}, {"parallel": "gptj"}, {"parallel_from": 2, "recurrence_end": 1}]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_sum_is_that_of_the_formula_token_by_token():
    states = [randn(5, 12, seed=i) for i in range(3)]
    w = Mudd(randn(7, 12, seed=3), randn(3, 7, seed=4), randn(3, seed=5))
    out = add_sources(w, *states)
    for t in range(5):
        x = states[-1][t]
        u = w.inner @ (x / x.square().mean().sqrt())
        gelu = torch.tensor([float(z) * (1 + math.erf(float(z) / math.sqrt(2))) / 2 for z in u]).double()
        a = 0.1 * (w.outer @ gelu + w.bias)
        torch.testing.assert_close(out[t], x + sum(a[j] * states[j][t] for j in range(3)), rtol=0, atol=1e-6)


def test_a_strength_of_minus_one_removes_nothing_and_of_one_removes_twice():
    y, v = randn(7, 8, 16).float(), randn(7, 4, 16, seed=1).float()
    beyond = torch.tensor([-1.0, 0.0, 1.0, 0.5, -1.0, 0.0, 1.0, 0.5])
    out, once = exclude_self(y, v, beyond), exclude_self(y, v)
    for h in range(8):
        torch.testing.assert_close(out[:, h], y[:, h] + (1 + beyond[h]) * (once - y)[:, h])
    assert torch.equal(exclude_self(y, v, torch.zeros(8)), once)


def test_sources_are_those_of_the_published_form_at_any_depth():
    assert source_layers(pr1855().model) == ((3, 7), (3, 7, 9))
    assert source_layers(pr1493().model) == ((3, 7), (3, 7, 9))
    assert source_layers(small()) == ((1,), (1, 3))
    assert source_layers(replace(small(), parallel_from=5)) == ((1,), (1, 3))
    for layers in range(2, 20):
        for lanes in range(1, layers + 1):
            config = ModelConfig(layers=layers, xsa_layers=0, parallel_from=lanes, recurrence_repeats=0)
            first, second = source_layers(config)
            assert len(set(second)) == len(second) and second == (*first, layers - 2)
            assert all(0 <= i < layers - 2 for i in first)


def test_a_network_of_one_layer_or_without_exclusion_is_refused():
    one = {"layers": 1, "xsa_layers": 1, "parallel_from": 1, "recurrence_repeats": 0}
    with pytest.raises(ValueError, match=r"model\.mudd must be 0 .* or 1 to 4096 with model\.layers >= 2"):
        ModelConfig(mudd=4, **one)
    for width in (-1, 4097):
        with pytest.raises(ValueError, match=rf"add; got {width} with 11 layers"):
            ModelConfig(mudd=width)
    with pytest.raises(ValueError, match=r"model\.xsa_strength needs layers .* got model\.xsa_layers=0"):
        ModelConfig(xsa_strength=True, xsa_layers=0)
    with pytest.raises(ValueError, match=r"optim\.adam\.mudd_lr must be >= 0, got -1"):
        AdamConfig(mudd_lr=-1.0)


@pytest.mark.parametrize("change", SHAPES, ids=str)
def test_they_begin_without_effect_and_with_a_gradient(change):
    config = replace(small(), **change)
    ids, cu = packed([11, 13], config.vocab_size)
    plain = GPT(config, seed=3)
    larger = GPT(replace(config, **ADDED), seed=3)
    for name, p in plain.named_parameters():
        assert torch.equal(p, larger.get_parameter(name)), name
    with torch.no_grad():
        for model in (plain, larger):  # its projections start at 0, so that no later state depends on a layer
            model.mlp_down_bank.normal_(std=0.1, generator=torch.Generator().manual_seed(4))
            model.qo_bank.normal_(std=0.1, generator=torch.Generator().manual_seed(5))
    losses = [m(ids, ids.roll(-1), cu, max_seqlen=24, loop=True) for m in (plain, larger)]
    assert torch.equal(*losses)
    losses[1].mean().backward()
    for name in ("mudd_out", "mudd_bias", "xsa_strength"):
        assert larger.get_parameter(name).grad.abs().min() > 0, name


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("change", SHAPES, ids=str)
def test_nothing_comes_from_the_future_or_from_another_document(change, loop):
    config = replace(small(), **change, **ADDED)
    model, (ids, cu) = randomized(config), packed([11, 20], config.vocab_size)
    changed = ids.clone()
    changed[20] = 5 if ids[20] != 5 else 6
    other = ids.clone()
    other[10] = 5 if ids[10] != 5 else 6
    with torch.no_grad():
        before, after, apart = (logits(model, x, cu, loop=loop) for x in (ids, changed, other))
    assert torch.equal(before[:20], after[:20]) and not torch.equal(before[20:], after[20:])
    assert torch.equal(before[11:], apart[11:]) and not torch.equal(before[:11], apart[:11])


def test_the_optimizer_gives_them_a_learning_rate_of_their_own():
    model = GPT(small(**ADDED))
    groups = split_parameters(model)
    assert list(groups.mudd) == ["mudd_in", "mudd_out", "mudd_bias"]
    assert "xsa_strength" in groups.scalars and not groups.mudd.keys() & groups.scalars.keys()
    adam = AdamConfig(scalar_lr=0.02, mudd_lr=0.001, scalar_weight_decay=0.0, scalar_warmdown=1.0)
    optimizer = Optimizer(model, OptimConfig(adam=adam, min_lr=0.0), Dist.start("cpu"))
    for p in model.parameters():
        p.grad.fill_(1.0)
    optimizer.step(0.5)  # Adam's first step has the size of the learning rate, here half of it
    torch.testing.assert_close(model.mudd_bias, torch.full_like(model.mudd_bias, -0.0005))
    torch.testing.assert_close(model.xsa_strength, torch.full_like(model.xsa_strength, -0.01))
    assert {"mudd.mean.mudd_in", "mudd.square.mudd_out"} < optimizer.state_dict().keys()
    model = GPT(small())
    assert not any(
        key.startswith("mudd") for key in Optimizer(model, OptimConfig(), Dist.start("cpu")).state_dict()
    )


def test_the_wide_matrices_are_stored_as_int8_rows():
    weights, state = quantized(small(**ADDED))
    assert "mudd_in" in state.gates and state.gates["mudd_in"].bits == 8
    assert {"mudd_out", "mudd_bias", "xsa_strength"} <= state.small.keys()
    back, step = dequantize_state(state)["mudd_in"], weights["mudd_in"].abs().amax(-1, keepdim=True) / 127
    assert ((back - weights["mudd_in"]).abs() <= 0.51 * step).all()
