"""The two estimates of `pgolf size`: against a formula, Gaussian codes, and files that were written."""

import math
from dataclasses import replace

import pytest
from artifact_helpers import CONFIG, FACTS, make_state

from pgolf.artifact.predict import TRAINED, nearest_ledger, nearest_state, predict_ledger
from pgolf.artifact.write import write_artifact
from pgolf.config import ModelConfig, QuantConfig
from pgolf.model.gpt import GPT
from pgolf.presets import pr1855

LIMIT = 16_000_000


def codes_bytes(ledger):
    parts = dict(ledger.parts)
    return sum(n for name, n in parts.items() if name.endswith("bank") or name == "tok_emb")


def entropy_bytes(model, quant, *, noise):
    """N / 8 (2.047 + log2(Q / k)) bytes for N Gaussian weights; `noise` adds to the variance (Q / k)^2 of the
    codes: rounding 1/12, a trellis 1/16 more."""

    def bits(count, largest, clip):
        return count * (2.047 + math.log2((largest / clip) ** 2 + noise) / 2)

    d, h, layers = model.width, model.hidden, model.layers
    total = bits(2 * layers * d * h, 31, quant.mlp_clip)
    total += bits(2 * layers * d * (d + model.kv_width), 31, quant.attn_clip)
    return (total + bits(model.vocab_size * d, 63, quant.embed_clip)) / 8


SPREAD = QuantConfig(row_scales="spread", column_scales=False, matrix_bits=6, embed_bits=7, rate=0.0)
OLDER = replace(SPREAD, mlp_clip=12.0, attn_clip=13.0, embed_clip=15.0)


# Sums of the formula for the settings of PR #1855 and PR #1787; their files have 15.865e6 and 15.910e6 bytes.
@pytest.mark.parametrize("trellis", [False, True])
@pytest.mark.parametrize(("quant", "published"), [(SPREAD, 15.809e6), (OLDER, 15.579e6)])
def test_codes_of_the_record_follow_the_entropy_formula_and_the_measured_gains(quant, published, trellis):
    quant = replace(quant, trellis=trellis)
    model = pr1855().model
    assert entropy_bytes(model, quant, noise=0) == pytest.approx(published, rel=1e-3)
    parts = dict(predict_ledger(model, quant, limit=LIMIT).parts)
    gaussian = {name: size / TRAINED.get(name, 1.0) for name, size in parts.items()}
    matrices = sum(n for name, n in gaussian.items() if name.endswith("bank") or name == "tok_emb")
    noise = 1 / 12 + trellis / 16
    assert matrices == pytest.approx(entropy_bytes(model, quant, noise=noise), rel=1e-3)


def test_wider_clips_save_what_the_formula_says():
    model, quant = ModelConfig(), SPREAD
    saved = codes_bytes(predict_ledger(model, quant, limit=LIMIT)) - codes_bytes(
        predict_ledger(model, quant, limit=LIMIT, clip_scale=1.1)
    )
    assert saved == pytest.approx(35_913_728 * math.log2(1.1) / 8, rel=0.03)


def test_nearest_state_is_what_the_writer_counts(tmp_path):
    tensors = {n: p.detach() for n, p in GPT(CONFIG).named_parameters()}
    quant = replace(SPREAD, mlp_clip=12.0, attn_clip=12.0, embed_clip=12.0)
    ledger = nearest_ledger(tensors, CONFIG, quant, limit=LIMIT)
    state = nearest_state(tensors, CONFIG, quant)
    written = write_artifact(tmp_path / "a", state, CONFIG, **FACTS, limit=LIMIT)
    assert abs(ledger.total - written.total) <= 40  # the hashes in the header differ
    same = make_state()
    assert {n: q.bits for n, q in state.quantized.items()} == {n: q.bits for n, q in same.quantized.items()}
    assert list(state.gates) == list(same.gates) and list(state.small) == list(same.small)
    with pytest.raises(ValueError, match="lack the parameters tok_emb of their model"):
        nearest_state({n: t for n, t in tensors.items() if n != "tok_emb"}, CONFIG, quant)


def test_prediction_names_the_sections_of_a_real_file(tmp_path):
    ledger = predict_ledger(CONFIG, SPREAD, limit=LIMIT)
    written = write_artifact(tmp_path / "a", make_state(), CONFIG, **FACTS, limit=LIMIT, quality=1)
    assert set(dict(ledger.parts)) == set(dict(written.parts))
    assert ledger.limit == LIMIT and ledger.code == written.code


def test_scales_by_loss_weigh_what_the_600_s_model_weighed():
    # bench/results/20261123_nvidia-h100-80gb-hbm3_quantize.jsonl, rows+columns: the sections of codes.
    quant = replace(pr1855().quant, mean_bits=3.45, trellis=False, rate=0.0)
    ledger = predict_ledger(pr1855().model, quant, limit=LIMIT, clip_scale=0.980003)
    assert codes_bytes(ledger) == pytest.approx(15_739_571, rel=0.005)


@pytest.mark.parametrize(("clip_scale", "total"), [(0.953389, 15_988_501), (0.956769, 15_984_606)])
def test_a_trellis_weighs_what_two_600_s_models_weighed(clip_scale: float, total: int):
    # summary.json of bench/results/20261124_record_600s_1gpu_196k and 20261128_record_600s_2gpu.
    quant = replace(pr1855().quant, rate=0.0)
    ledger = predict_ledger(pr1855().model, quant, limit=LIMIT, clip_scale=clip_scale)
    assert ledger.total == pytest.approx(total, rel=0.003)


@pytest.mark.parametrize(
    ("clip_scale", "rate", "model_bytes"),
    [(0.9723, 1 / 12, 15_760_315), (0.9840, 0.0, 15_759_292), (1.0846, 0.0, 15_148_509)],
)
def test_rounding_with_an_eye_on_bits_weighs_what_a_600_s_model_weighed(clip_scale, rate, model_bytes):
    # bench/results/20261128_nvidia-h200_quantize.jsonl: trellis rate 1/12, trellis, trellis -4 %.
    quant = replace(pr1855().quant, rate=rate)
    ledger = predict_ledger(pr1855().model, quant, limit=LIMIT, clip_scale=clip_scale)
    assert ledger.model_bytes == pytest.approx(model_bytes, rel=0.002)
