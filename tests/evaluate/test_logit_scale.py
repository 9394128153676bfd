"""model.logit_scale acts wherever there are logits, and with 1 nothing is computed for it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pgolf.config import METHODS, ModelConfig
from pgolf.model.generate import Decoder
from pgolf.model.gpt import GPT
from tests.evaluate.legal_helpers import (
    TTT,
    make_text,
    random_documents,
    small_config,
    small_model,
    token_losses,
)

SCALE = 0.7


def scaled_model() -> GPT:
    return small_model(shape=replace(small_config(), logit_scale=SCALE, softcap=5.0))


def test_the_loss_is_that_of_the_formula():
    model, text = scaled_model(), make_text(random_documents([12]))
    ids = torch.from_numpy(text.tokens.astype("int64"))
    cu = torch.tensor([0, 13], dtype=torch.int32)
    with torch.no_grad():
        found = model(ids[:-1], ids[1:], cu, max_seqlen=13, loop=True)
        model.config = replace(model.config, logit_scale=1.0)
        hidden, table = model.hidden(ids[:-1], cu, max_seqlen=13, loop=True)
    y = 5.0 * torch.tanh(SCALE * (hidden @ table.T) / 5.0)
    torch.testing.assert_close(found, F.cross_entropy(y, ids[1:], reduction="none"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gradient", ["window", "chunk"])
@pytest.mark.parametrize("two_caps", [False, True])
@pytest.mark.parametrize("mode", METHODS)
def test_every_way_to_score_is_that_of_scaled_final_states(monkeypatch, mode, gradient, two_caps):
    if (gradient == "chunk" and mode not in ("ttt", "phased")) or (two_caps and mode != "phased"):
        pytest.skip("the setting has no effect on it")
    from tests.evaluate import legal_helpers

    phases = replace(legal_helpers.PHASES, two_caps=two_caps)
    monkeypatch.setattr(legal_helpers, "PHASES", phases)
    text, settings = (
        make_text(random_documents([30, 25, 40, 9, 33])),
        {"config": replace(TTT, gradient=gradient)},
    )
    found = token_losses(mode, scaled_model(), text, **settings)
    plain = small_model(shape=replace(small_config(), softcap=5.0))
    without = token_losses(mode, plain, text, **settings)
    layers = GPT.layers
    monkeypatch.setattr(GPT, "layers", lambda self, *a, **k: SCALE * layers(self, *a, **k))
    wanted = token_losses(mode, plain, text, **settings)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), atol=0, rtol=0, equal_nan=True)
    assert abs(found - without)[1:].max() > 0.01


def test_generation_has_the_logits_of_scaled_final_states(monkeypatch):
    ids = random_documents([11])[0]
    found = Decoder(scaled_model()).feed(ids)
    plain = small_model(shape=replace(small_config(), softcap=5.0))
    assert not torch.allclose(found, Decoder(plain).feed(ids), atol=0.01)
    layers = GPT.layers
    monkeypatch.setattr(GPT, "layers", lambda self, *a, **k: SCALE * layers(self, *a, **k))
    assert torch.equal(found, Decoder(plain).feed(ids))


def test_a_scale_of_one_computes_nothing():
    """So results keep their bits, and a GPU launches no further kernel."""
    hidden = torch.randn(3, 32)
    assert small_model().scaled(hidden) is hidden
    assert torch.equal(scaled_model().scaled(hidden), SCALE * hidden)


def test_a_scale_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"model\.logit_scale must be > 0, got 0"):
        ModelConfig(logit_scale=0.0)
