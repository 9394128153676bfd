"""Settings out of range are refused when a configuration is made, before anything is loaded or run."""

import json
import math
from dataclasses import replace

import pytest

from pgolf.config import Config, EvaluateConfig, from_dict, to_dict
from pgolf.presets import PRESETS

# Each of these used to train (with the clock overrun, or for no step at all) or to end in a traceback.
BAD = [
    ("model", "heads", 0, "model.heads must be >= 1, got 0"),
    ("model", "kv_heads", 0, "model.kv_heads must be >= 1, got 0"),
    ("model", "mlp_mult", 0, "model.mlp_mult must be >= 1, got 0"),
    ("model", "recurrence_repeats", -1, "model.recurrence_repeats must be >= 0, got -1"),
    ("data", "batch_tokens", 0, "data.batch_tokens=0 must be a multiple of"),
    ("train", "steps", -5, "train.steps must be >= 0, got -5"),
    ("train", "seed", -1, "train.seed must be >= 0, got -1"),
    ("train", "warmup_steps", -1, "train.warmup_steps must be >= 0, got -1"),
    ("train", "quantize_reserve", -300.0, "train.quantize_reserve must be >= 0 s, got -300"),
    ("quant", "lqer_top", 0, "quant.lqer_top must be >= 1, got 0"),
    ("quant", "drift", 1.5, r"quant.drift must be in \[0, 1\], got 1.5"),
    ("model", "rope_base", 0.0, "model.rope_base must be > 0, got 0.0"),
    ("model", "rope_base", -1.0, "model.rope_base must be > 0, got -1.0"),
    ("model", "qk_gain", -5.0, "model.qk_gain must be > 0, got -5.0"),
    ("model", "embed_init_std", 0.0, "model.embed_init_std must be > 0, got 0.0"),
    ("model", "sparse_gate_scale", -1.0, "model.sparse_gate_scale must be >= 0, got -1.0"),
    ("train", "seed", 2**63, "train.seed must be at most 9,223,372,036,854,775,807"),
    ("train", "warmup_steps", 10**9, "train.warmup_steps must be at most 1,000, got 1000000000"),
    ("train", "steps", 10**5000, "train.steps must be at most .*, got a number of 16610 bits"),
    ("model", "layers", 10**12, "model.layers must be at most 1,024"),
    ("model", "recurrence_repeats", 10**9, "model.recurrence_repeats must be at most 64"),
    ("model", "width", 2**60, "model.width must be at most 65,536"),
    ("model", "mlp_mult", 10**9, "model.mlp_mult must be at most 256"),
    ("model", "max_context", 2**63, "model.max_context must be at most 16,777,216"),
    ("data", "prefetch", 10**9, "data.prefetch must be at most 1,024"),
    ("data", "batch_tokens", 2**64, "data.batch_tokens must be at most"),
    ("quant", "lqer_rank", 2**40, "quant.lqer_rank must be at most 65,536"),
    ("quant", "calibration_batches", 2**30, "quant.calibration_batches must be at most 1,048,576"),
    ("quant", "gradient_batches", 2**30, "quant.gradient_batches must be at most 1,048,576"),
    ("artifact", "limit", 2**70, "artifact.limit must be at most"),
    ("evaluate", "stride", 2**63, "evaluate.stride must be at most"),
    ("artifact", "limit", 0, "artifact.limit must be > 0 bytes, got 0"),
    ("artifact", "limit", -1, "artifact.limit must be > 0 bytes, got -1"),
]

OPTIMIZER_BAD = [
    ("muon", "lr", -0.1, "optim.muon.lr must be >= 0, got -0.1"),
    ("muon", "weight_decay", -0.1, "optim.muon.weight_decay must be >= 0, got -0.1"),
    ("muon", "momentum", 1.0, r"optim.muon.momentum must be in \[0, 1\), got 1.0"),
    ("muon", "normalize", 1.0, r"optim.muon.normalize must be in \[0, 1\), got 1.0"),
    ("muon", "normalize", -0.1, r"optim.muon.normalize must be in \[0, 1\), got -0.1"),
    ("muon", "slow_age", -0.1, r"optim.muon.slow_age is a fraction of the run in \[0, 1\], got -0.1"),
    ("muon", "slow_weight", 1.5, r"optim.muon.slow_weight must be in \[0, 1\], got 1.5"),
    ("muon", "momentum_age", 1.5, r"optim.muon.momentum_age is a fraction of the run in \[0, 1\], got 1.5"),
    ("adam", "embed_lr", -1.0, "optim.adam.embed_lr must be >= 0, got -1.0"),
    ("adam", "scalar_lr", -1.0, "optim.adam.scalar_lr must be >= 0, got -1.0"),
    ("adam", "embed_weight_decay", -1.0, "optim.adam.embed_weight_decay must be >= 0"),
    ("adam", "scalar_weight_decay", -1.0, "optim.adam.scalar_weight_decay must be >= 0"),
    ("adam", "beta1", 1.0, r"optim.adam.beta1 must be in \[0, 1\), got 1.0"),
    ("adam", "beta2", 1.5, r"optim.adam.beta2 must be in \[0, 1\), got 1.5"),
    ("adam", "beta1", -0.1, r"optim.adam.beta1 must be in \[0, 1\), got -0.1"),
    ("adam", "eps", 0.0, "optim.adam.eps must be > 0, got 0.0"),
]


@pytest.mark.parametrize(("section", "key", "value", "message"), BAD, ids=[f"{s}.{k}" for s, k, _, _ in BAD])
def test_a_setting_out_of_range_is_refused(section, key, value, message):
    for make in PRESETS.values():
        with pytest.raises(ValueError, match=message):
            replace(getattr(make(), section), **{key: value})
    with pytest.raises(ValueError, match=message):
        from_dict(Config, {section: {key: value}})


def test_a_window_of_ema_nesterov_that_ends_before_it_begins_is_refused():
    late = {"ema_nesterov_from": 0.8, "ema_nesterov_until": 0.7}
    with pytest.raises(ValueError, match=r"ema_nesterov_from must be at most ema_nesterov_until=0\.7"):
        from_dict(Config, {"optim": {**late, "ema_nesterov": 0.5}})
    from_dict(Config, {"optim": late})  # off


def test_pairs_of_an_odd_number_of_heads_are_refused():
    three = {"model": {"heads": 3, "kv_heads": 3, "width": 48}}
    for pairs, key in (("qk", "heads"), ("qkv", "heads"), ("kv", "kv_heads")):
        with pytest.raises(ValueError, match=rf"head_pairs={pairs} needs an even model\.{key}, got 3"):
            from_dict(Config, {**three, "optim": {"muon": {"head_pairs": pairs}}})
    from_dict(Config, {**three, "optim": {"muon": {"head_pairs": "off"}}})
    # The keys of one head have no pair.
    with pytest.raises(ValueError, match=r"needs an even model\.kv_heads, got 1"):
        from_dict(Config, {"model": {"kv_heads": 1}, "optim": {"muon": {"head_pairs": "qk"}}})


def test_an_order_that_is_unknown_or_asks_for_two_orders_is_refused():
    with pytest.raises(ValueError, match=r"config\.data\.order must be one of .*'stream'.*, got 'shuffled'"):
        from_dict(Config, {"data": {"order": "shuffled"}})
    for order in ("sequences", "coprime"):
        with pytest.raises(ValueError, match=f"data.shuffle=false reads in .*data.order={order} "):
            from_dict(Config, {"data": {"order": order, "shuffle": False}})
    assert from_dict(Config, {"data": {"order": "stream", "shuffle": False}}).data.order == "stream"


@pytest.mark.parametrize(("section", "key", "value", "message"), OPTIMIZER_BAD)
def test_a_rate_that_means_nothing_is_refused(section, key, value, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Config, {"optim": {section: {key: value}}})


def fractions(data, path=()):
    """Yield the path of every number with a fraction."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from fractions(value, (*path, key))
        elif isinstance(value, float):
            yield (*path, key)


FRACTIONS = list(fractions(to_dict(Config())))


@pytest.mark.parametrize("path", [*FRACTIONS, ("train", "quantize_reserve")], ids=".".join)
def test_no_number_may_be_nan_or_infinite(path):
    for value in (math.nan, math.inf, -math.inf):
        data = to_dict(Config())
        node = data
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        with pytest.raises(ValueError, match=r"must be|is a fraction"):
            from_dict(Config, json.loads(json.dumps(data)))


def test_every_fraction_was_found():
    assert len(FRACTIONS) > 35 and ("evaluate", "adapters", "lr") in FRACTIONS


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/tmp/x", "a\\b", "a\nb", "a\0b", "\x1b[31m", ".x", "-x", " x", "n" * 129],
)
def test_a_name_that_is_no_part_of_a_path_is_refused(name):
    with pytest.raises(ValueError, match="name is part of a folder's name"):
        replace(Config(), name=name)
    with pytest.raises(ValueError, match="name is part of a folder's name"):
        from_dict(Config, {"name": name})


def test_names_in_other_letters_are_fine():
    for name in ("l\xe4ufe 2", "a.b_c-d", "\u0434", "x" * 128):
        assert replace(Config(), name=name).name == name


@pytest.mark.parametrize("value", [5, ["a"], None, 10**400])
def test_values_of_the_wrong_kind_are_named(value):
    for section, key in (("train", "out"), ("model", "softcap")):
        with pytest.raises((TypeError, ValueError), match=rf"config.{section}.{key}: "):
            from_dict(Config, {section: {key: [value] if value == 5 else value}})


def test_a_configuration_that_is_no_object_is_refused_at_any_depth():
    with pytest.raises(TypeError, match=r"config: expected an object, got list"):
        from_dict(Config, [1])  # a JSON file may hold anything
    with pytest.raises(TypeError, match=r"config.model: expected an object, got int"):
        from_dict(Config, {"model": 5})


def test_a_stride_that_no_window_has_is_refused_before_the_run():
    far = EvaluateConfig(sliding=True, stride=300)
    with pytest.raises(ValueError, match=r"evaluate.stride must be at most model.max_context=256, got 300"):
        replace(PRESETS["tiny"](), evaluate=far)
    assert replace(PRESETS["tiny"](), evaluate=replace(far, sliding=False)).evaluate.stride == 300


def test_adapters_have_bounds_too():
    with pytest.raises(ValueError, match=r"ttt\.rank must be at most 65,536, got 1000000"):
        from_dict(Config, {"evaluate": {"adapters": {"rank": 10**6}}})
    with pytest.raises(ValueError, match=r"ttt\.seed must be at most"):
        from_dict(Config, {"evaluate": {"adapters": {"seed": 2**64}}})
