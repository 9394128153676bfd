"""The fit of soft cap and scale: it finds what was planted, never makes the text worse, and ranks agree."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pgolf.config import QuantConfig
from pgolf.data.loader import IGNORED_TARGET
from pgolf.errors import UserError
from pgolf.model.gpt import GPT
from pgolf.quant import cap as module
from pgolf.quant.cap import fit_cap, fit_quantized
from pgolf.quant.pipeline import Quantizer
from pgolf.quant.quantized import dequantize_state
from tests.quant.test_calibrate import CONFIG, FakeDist, batches, trained_like_model

BOS, VOCAB, WIDTH = 1, 60, 24


class Dist(FakeDist):
    """One of `world_size` ranks, which sees the numbers of the others."""

    def __init__(self, rank=0, rows=()):
        super().__init__()
        self.rank, self.world_size, self.rows, self.sent = rank, 1 + len(rows), list(rows), []

    def gather(self, values):
        self.sent.append(values)
        return [values]


def planted(scale, cap, *, given=(1.0, 30.0), rows=20_000, seed=0):
    """A model that passes its input on, and targets drawn with another scale and cap than it has."""
    config = replace(CONFIG, vocab_size=VOCAB, width=WIDTH, softcap=given[1], logit_scale=given[0])
    model, g = GPT(config).prepare(torch.device("cpu")), torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=g)
    with torch.no_grad():
        model.tok_emb.copy_(3 * torch.randn(VOCAB, WIDTH, generator=g))
    y = cap * torch.tanh(scale * (hidden @ model.tok_emb.detach().T) / cap)
    targets = torch.multinomial(y.softmax(1), 1, generator=g)[:, 0]
    return model, hidden, targets, y


def fit_states(monkeypatch, model, parts, dist=None):
    """Fit to given final states instead of those of a text."""
    s = model.config.logit_scale
    monkeypatch.setattr(module, "_states", lambda model, part, dist: (s * part[0], part[1]))
    return fit_cap(model, parts, dist or Dist())


@pytest.mark.parametrize("given", [(1.0, 30.0), (0.8, 12.0), (1.3, 60.0)])
@pytest.mark.parametrize(("scale", "cap"), [(0.8, 20.0), (1.1, 14.0), (1.0, 30.0)])
def test_it_finds_a_planted_scale_and_cap(monkeypatch, scale, cap, given):
    model, hidden, targets, y = planted(scale, cap, given=given)
    found = fit_states(monkeypatch, model, [(hidden, targets)])
    assert (found.logit_scale, found.softcap) == (
        pytest.approx(scale, rel=0.05),
        pytest.approx(cap, rel=0.06),
    )
    truth = torch.nn.functional.cross_entropy(y.double(), targets).item()
    assert found.after <= truth + 1e-6 and found.after > truth - 1e-3 and found.tokens == 20_000
    # At the end nothing is to be gained any more: the fit of the fit moves by its last digits.
    model.config = found.applied(model.config)
    again = fit_states(monkeypatch, model, [(hidden, targets)])
    assert again.before == pytest.approx(found.after, abs=1e-6)
    assert again.before - again.after < 1e-6


def test_its_derivatives_are_those_of_autograd(monkeypatch):
    """The gradient; and the curvature, which is the mean of the Hessian over targets that p itself draws."""
    model, hidden, targets, _ = planted(0.9, 20.0, rows=300)
    at = torch.tensor([0.1, 3.0], dtype=torch.float64, requires_grad=True)
    z = (hidden @ model.tok_emb.detach().T).double()

    def loss(at, weights):
        y = at[1].exp() * torch.tanh(at[0].exp() * z / at[1].exp())
        return -(weights * y.log_softmax(1)).sum(1).mean()

    def measured(a):
        dist, start = Dist(), np.array([0.0, np.log(30.0)])
        return module._measure([(hidden, targets)], model.tok_emb.detach(), a.detach().numpy(), start, dist)

    found, hot = measured(at), torch.nn.functional.one_hot(targets, VOCAB).double()
    (gradient,) = torch.autograd.grad(loss(at, hot), [at])
    np.testing.assert_allclose(found.gradient, gradient.numpy(), rtol=1e-4, atol=1e-6)
    y = at[1].exp() * torch.tanh(at[0].exp() * z / at[1].exp())
    p = y.softmax(1).detach()
    np.testing.assert_allclose(
        found.curvature,
        torch.autograd.functional.hessian(lambda x: loss(x, p), at).numpy(),
        rtol=1e-3,
        atol=1e-6,
    )


def test_chunks_of_rows_and_ranks_change_nothing(monkeypatch):
    model, hidden, targets, _ = planted(0.8, 20.0, rows=3000)
    whole = fit_states(monkeypatch, model, [(hidden, targets)])
    monkeypatch.setattr(module, "CHUNK", 700 * VOCAB)
    parts = [(hidden[:1100], targets[:1100]), (hidden[1100:], targets[1100:])]
    assert fit_states(monkeypatch, model, parts)[:2] == pytest.approx(whole[:2], rel=1e-4)


def test_numbers_that_cannot_be_improved_are_returned_as_they_are(monkeypatch):
    model, hidden, targets, _ = planted(0.8, 20.0, given=(1.0123456789, 30.123456789), rows=500)
    model.tok_emb.data.zero_()  # all logits are 0, whatever the numbers are
    found = fit_states(monkeypatch, model, [(hidden, targets)])
    assert (found.logit_scale, found.softcap) == (1.0123456789, 30.123456789)
    assert found.before == found.after == pytest.approx(np.log(VOCAB))


def documents():
    rng = np.random.default_rng(4)
    return [np.array([BOS, *rng.integers(2, 97, n)], dtype=np.uint16) for n in (3, 40, 17, 0, 9)]


def test_documents_are_packed_as_training_packs_them():
    batches = module._batches(documents(), bos_id=BOS, context=16, tokens=32)
    text = np.concatenate(documents())
    assert len(batches) == 3 and all(len(b.inputs) == 32 for b in batches)
    inputs, targets = (torch.cat([getattr(b, n) for b in batches]) for n in ("inputs", "targets"))
    assert inputs[: text.size - 1].tolist() == text[:-1].tolist()
    assert targets[: text.size - 1].tolist() == text[1:].tolist()
    assert set(targets[text.size - 1 :].tolist()) == {IGNORED_TARGET}
    assert batches[0].cu_seqlens[:5].tolist() == [0, 4, 20, 32, 32]
    assert batches[1].cu_seqlens[:5].tolist() == [0, 13, 29, 31, 32]


def test_the_quantized_model_is_what_is_fitted_and_the_weights_come_back():
    model = trained_like_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    config = QuantConfig(row_scales="spread", column_scales=False, matrix_bits=4, embed_bits=4, trellis=False)
    state = Quantizer.calibrated(
        model, batches(4), replace(config, calibration_batches=4), FakeDist()
    ).quantize()
    found = fit_quantized(model, state, documents(), Dist(), bos_id=BOS, tokens=64)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert found.tokens == sum(map(len, documents())) - 1 and found.after < found.before
    other = GPT(found.applied(CONFIG)).prepare(torch.device("cpu"))
    other.load_state_dict(dequantize_state(state))
    for reader, wanted in ((other, found.after), (trained_like_model(), None)):
        (b,) = module._batches(documents(), bos_id=BOS, context=16, tokens=128)
        with torch.no_grad():
            nats = reader(b.inputs, b.targets, b.cu_seqlens, max_seqlen=16, loop=True)
        mean = float(nats.double().sum()) / found.tokens
        assert mean == pytest.approx(wanted, abs=2e-3) if wanted else abs(mean - found.before) > 1e-3


def test_documents_without_targets_are_refused():
    with pytest.raises(UserError, match=r"are empty; raise quant\.cap_documents"):
        fit_cap(
            trained_like_model(), module._batches(documents()[3:4], bos_id=BOS, context=16, tokens=64), Dist()
        )


def test_a_negative_number_of_documents_is_refused():
    with pytest.raises(ValueError, match=r"quant\.cap_documents must be >= 0, got -1"):
        QuantConfig(cap_documents=-1)
