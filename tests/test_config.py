"""Settings out of range are refused where they are written, before anything is loaded or paid for."""

from dataclasses import replace

import pytest

from pgolf.config import Config, EvaluateConfig, from_dict
from pgolf.presets import PRESETS

# Each of these used to train (with the clock overrun, or for no step at all) or to end in a traceback.
BAD = [
    ("model", "heads", 0, "model.heads must be >= 1, got 0"),
    ("model", "kv_heads", 0, "model.kv_heads must be >= 1, got 0"),
    ("model", "mlp_mult", 0, "model.mlp_mult must be >= 1, got 0"),
    ("model", "loops", -1, "model.loops must be >= 0, got -1"),
    ("data", "batch_tokens", 0, "data.batch_tokens=0 must be a multiple of"),
    ("train", "steps", -5, "train.steps must be >= 0, got -5"),
    ("train", "seed", -1, "train.seed must be >= 0, got -1"),
    ("train", "warmup_steps", -1, "train.warmup_steps must be >= 0, got -1"),
    ("train", "quantize_reserve", -300.0, "train.quantize_reserve must be >= 0 s, got -300"),
    ("quant", "block", 0, "quant.block must be >= 1, got 0"),
]


@pytest.mark.parametrize(("section", "key", "value", "message"), BAD, ids=[f"{s}.{k}" for s, k, _, _ in BAD])
def test_a_setting_out_of_range_is_refused(section, key, value, message):
    for make in PRESETS.values():
        with pytest.raises(ValueError, match=message):
            replace(getattr(make(), section), **{key: value})
    with pytest.raises(ValueError, match=message):
        from_dict(Config, {section: {key: value}})


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
