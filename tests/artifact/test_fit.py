"""fit_artifact lands just below the limit, from both sides, and next_try finds any falling curve."""

import math

import pytest
import torch
from artifact_helpers import CONFIG, FACTS, make_state

from pgolf.artifact.fit import MOST_TRIES, Try, fit_artifact, next_try, write_quantized
from pgolf.artifact.header import ArtifactError
from pgolf.artifact.read import read_state
from pgolf.artifact.write import write_artifact
from pgolf.config import ArtifactConfig, Config, EvaluateConfig
from pgolf.quant.quantized import QuantizedState


def fit(path, calls, limit, *, make=make_state):
    def quantize(clip_scale):
        calls.append(clip_scale)
        return make(clip_scale=clip_scale)

    return fit_artifact(path, quantize, CONFIG, **FACTS, limit=limit)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Counted bytes of the tiny model at the configured clips."""
    path = tmp_path_factory.mktemp("fit") / "a"
    return write_artifact(path, make_state(), CONFIG, **FACTS, limit=80_000).total


@pytest.mark.parametrize("change", [-4_000, -1_500, -60, -1, 0, 40, 700, 1_500])
def test_lands_within_a_thousandth_below_the_limit(tmp_path, plain, change):
    limit, calls = plain + change, []
    ledger = fit(tmp_path / "a", calls, limit)
    assert 0.999 * limit <= ledger.total <= limit
    assert ledger.model_bytes == (tmp_path / "a").stat().st_size
    assert calls[0] == 1.0 and len(calls) <= 5
    if abs(change) > 100:
        assert (ledger.clip_scale > 1) == (change < 0)
    _, back = read_state(tmp_path / "a")
    expected = make_state(clip_scale=ledger.clip_scale)
    assert all(torch.equal(q.codes, expected.quantized[n].codes) for n, q in back.quantized.items())


def test_half_the_clips_are_the_finest_grid_that_is_tried(tmp_path):
    calls = []
    ledger = fit(tmp_path / "a", calls, 16_000_000)
    assert calls == [1.0, 0.5] and ledger.clip_scale == 0.5 and ledger.total < 16_000_000


def test_an_impossible_limit_is_refused_with_the_smallest_ledger(tmp_path):
    calls = []
    with pytest.raises(ArtifactError, match=r"artifact is .*, limit 1_000") as e:
        fit(tmp_path / "a", calls, 1000)
    assert 1 < len(calls) <= MOST_TRIES and max(calls) == 64.0 and list(tmp_path.iterdir()) == []
    assert "tok_emb" in str(e.value)


def test_a_state_that_does_not_shrink_gives_up(tmp_path):
    calls = []
    with pytest.raises(ArtifactError, match="artifact is "):
        fit(tmp_path / "a", calls, 51_000 - 20_000, make=lambda clip_scale: make_state())
    assert len(calls) <= MOST_TRIES
    empty = fit(tmp_path / "b", [], 10**6, make=lambda clip_scale: QuantizedState({}, {}, {}))
    assert empty.total < 10**6


@pytest.mark.parametrize("slope", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("bend", [-0.2, 0.0, 0.2])
@pytest.mark.parametrize("excess", [-2.0, -0.3, -0.01, 0.002, 0.5, 3.0])
def test_next_try_finds_the_window_on_bent_curves(slope, bend, excess):
    """Bytes as a bent line over log2(clip), PR #1855's size; the predicted slope is off by up to 30 %."""
    weights, limit = 35_900_000, 16_000_000
    octave = weights / 8

    def measure(x):
        return round(limit + excess * 1e6 - octave * slope * (x + bend * x * abs(x)))

    tries = [Try(0.0, measure(0.0))]
    while not 0.999 * limit <= tries[-1].total <= limit:
        place = next_try(tries, limit=limit, weights=weights)
        assert place is not None and math.log2(0.5) <= place <= math.log2(64)
        tries.append(Try(place, measure(place)))
        assert len(tries) <= 5


@pytest.mark.parametrize("filled", [False, True])
def test_a_quantization_that_is_there_is_not_made_again(tmp_path, plain, filled):
    class Fake:
        def __init__(self):
            self.calls = []

        def quantize(self, factor=1.0):
            self.calls.append(factor)
            return make_state(clip_scale=factor)

    artifact = ArtifactConfig(limit=plain - 1_500 if filled else 16_000_000, fit=filled)
    config = Config(model=CONFIG, evaluate=EvaluateConfig(stride=16), artifact=artifact)
    sha = FACTS["tokenizer_sha256"]
    once, again = Fake(), Fake()
    write_quantized(tmp_path / "a", once, config, tokenizer_sha256=sha)
    write_quantized(tmp_path / "b", again, config, tokenizer_sha256=sha, first=make_state())
    assert once.calls[0] == 1.0 and again.calls == once.calls[1:]
    assert len(again.calls) > 0 if filled else again.calls == []
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
