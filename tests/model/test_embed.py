"""Bigram hash, value embeddings, gates by channel: the hash by hand, initial values, groups, stored forms."""

import math
from dataclasses import replace

import pytest
import torch

from pgolf.config import ModelConfig, QuantConfig
from pgolf.model.embed import bigram_index
from pgolf.model.gpt import GPT, parameter_shapes
from pgolf.optim.groups import split_parameters
from pgolf.quant.pipeline import Quantizer, is_gate
from pgolf.quant.quantized import QuantizedState, dequantize_state
from tests.model.test_gpt import packed, randomized, small

TABLES = {"bigram_buckets": 40, "bigram_width": 6, "value_embed_layers": 2, "value_embed_width": 5}


def test_the_bucket_is_the_published_hash_within_a_document():
    ids = torch.tensor([1, 700, 8191, 1, 5])
    first = torch.tensor([True, False, False, True, False])
    expected = [2047, (36313 * 700 ^ 27191 * 1) % 2047, (36313 * 8191 ^ 27191 * 700) % 2047]
    expected += [2047, (36313 * 5 ^ 27191 * 1) % 2047]
    assert bigram_index(ids, first, 2048).tolist() == expected
    assert bigram_index(ids, first, 2).tolist() == [1, 0, 0, 1, 0]


def test_they_begin_as_published_and_each_part_learns():
    config = replace(small(), **TABLES)
    model = GPT(config, seed=3)
    sizes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sizes == parameter_shapes(config)
    assert sizes["bigram_table"] == (40, 6) and sizes["bigram_proj"] == (1, 32, 6)
    assert sizes["value_table"] == (96, 5) and sizes["value_proj"] == (1, config.kv_width, 5)
    assert not model.bigram_table.any()
    for projection in (model.bigram_proj[0], model.value_proj[0]):
        torch.testing.assert_close(projection.T @ projection, torch.eye(projection.shape[1]))
    assert model.bigram_scale.item() == pytest.approx(0.05)
    assert model.value_scale.item() == pytest.approx(0.1) and model.value_layer_scale.tolist() == [1, 1]
    assert model.value_table.std().item() == pytest.approx(0.01, rel=0.1)
    plain = GPT(small(), seed=3)  # what other parts begin with does not depend on them
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in plain.named_parameters())
    # Output projections begin at 0, so the values learn nothing before they have moved.
    with torch.no_grad():
        model.qo_bank[config.layers :] += 0.1
    ids, cu = packed([11, 13], config.vocab_size)
    model(ids, ids.roll(-1), cu, max_seqlen=24, loop=True).mean().backward()
    assert model.bigram_table.grad.any() and model.value_proj.grad.any()


def test_projections_go_to_the_scalars_and_tables_to_the_embeddings():
    groups = split_parameters(GPT(replace(small(), **TABLES)))
    assert {"bigram_proj", "value_proj"} < groups.scalars.keys()
    assert groups.banks.keys() == set(GPT.bank_names)
    assert groups.embed.keys() == {"tok_emb", "bigram_table", "value_table"}
    assert {"bigram_scale", "value_scale", "value_layer_scale"} < groups.scalars.keys()
    assert split_parameters(GPT(small())).embed.keys() == {"tok_emb"}


def quantized(config: ModelConfig) -> tuple[dict[str, torch.Tensor], QuantizedState]:
    """Return the weights of a model whose parts are all random, and what is stored of them."""
    model = randomized(config)
    inputs = model.quant_inputs()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    keys = {key: weights[name].shape[-1] for name, keys in inputs.items() for key in keys}
    hessians = {key: torch.eye(size) for key, size in keys.items()}
    settings = QuantConfig(row_scales="spread", column_scales=False, trellis=False, rate=0.0)
    return weights, Quantizer(weights, inputs, hessians, settings).quantize()


def test_tables_are_stored_in_int8_rows_and_large_matrices_too():
    assert is_gate("bigram_table", (40, 6)) and is_gate("value_table", (8192, 128))
    assert not is_gate("bigram_proj", (1, 512, 128)) and is_gate("bigram_proj", (1, 768, 128))
    weights, state = quantized(replace(small(), **TABLES))
    assert {"bigram_table", "value_table"} <= state.gates.keys()
    assert {"bigram_proj", "value_proj", "bigram_scale", "value_layer_scale"} <= state.small.keys()
    back = dequantize_state(state)
    for name in ("bigram_table", "value_table"):
        step = weights[name].abs().amax(-1, keepdim=True) / 127
        assert ((back[name] - weights[name]).abs() <= 0.51 * step).all()


def test_gates_by_channel_begin_at_a_half_and_are_stored_in_float16():
    config = replace(small(), smear_kind="channel", smear_window=5)
    model = GPT(config)
    names, others = ({n for n, _ in m.named_parameters()} for m in (model, GPT(small())))
    assert names ^ others == {"smear_logit", "smear_weight", "smear_lambda"}
    assert model.smear_logit.shape == (config.width,) and not model.smear_logit.any()
    assert "smear_logit" in split_parameters(model).scalars
    weights, state = quantized(config)
    assert torch.equal(state.small["smear_logit"], weights["smear_logit"].half())


def test_the_smear_gate_may_read_other_channels_than_the_head_gates():
    shapes = parameter_shapes(replace(small(), head_gate="out", gate_window=24, smear_window=12))
    assert shapes["head_gate"] == (5, 4, 24) and shapes["smear_weight"] == (1, 12)
    assert parameter_shapes(replace(small(), gate_window=24))["smear_weight"] == (1, 24)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bigram_buckets": 1}, r"model\.bigram_buckets must be 0 \(no bigram hash\) or >= 2, got 1"),
        ({"bigram_width": 0}, r"model\.bigram_width must be >= 1, got 0"),
        ({"value_embed_layers": 12}, r"model\.value_embed_layers must be in \[0, layers=11\], got 12"),
        ({"value_embed_width": 0}, r"model\.value_embed_width must be >= 1, got 0"),
        ({"smear_window": 513}, r"model\.smear_window must be in \[0, width=512\], got 513"),
        ({"leaky_slope": -0.1}, r"model\.leaky_slope must be in \[0, 1\], got -0\.1"),
        ({"leaky_slope": math.inf}, r"model\.leaky_slope must be a finite number"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**change)
