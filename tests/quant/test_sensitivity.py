"""Curvature from gradients: against the definition, token by token."""

import pytest
import torch

from pgolf.quant.sensitivity import collect_curvature, unit_trace
from tests.quant.test_calibrate import CONFIG, FakeBatch, FakeDist, trained_like_model


def batches(count, tokens=16):
    g = torch.Generator().manual_seed(5)
    for _ in range(count):
        ids = torch.randint(0, CONFIG.vocab_size, (tokens + 1,), generator=g)
        yield FakeBatch(ids[:-1], ids[1:], torch.tensor([0, tokens], dtype=torch.int32))


def test_rows_are_the_squared_gradients_of_single_tokens():
    model = trained_like_model()
    parameter = model.mlp_up_bank
    expected = torch.zeros(parameter.shape[:-1])
    tokens = 0
    for batch in batches(1):
        loss = model(batch.inputs, batch.targets, batch.cu_seqlens, max_seqlen=16, loop=True)
        for one in loss:
            (gradient,) = torch.autograd.grad(one, [parameter], retain_graph=True)
            expected += gradient.square().sum(-1)
        tokens += len(loss)
    expected /= tokens
    # Random signs estimate it without bias: the mean over many draws comes near, and layer sums nearer.
    draws = [
        collect_curvature(model, batches(1), ["mlp_up_bank"], FakeDist(), seed=seed)["mlp_up_bank"].rows
        for seed in range(200)
    ]
    got = torch.stack(draws).mean(0)
    assert torch.allclose(got.sum(-1), expected.sum(-1), rtol=0.1)
    assert torch.allclose(got, expected, rtol=0.6, atol=float(expected.mean()) * 0.3)


def test_gram_has_the_rows_squares_as_its_trace_and_nothing_is_left_in_the_model():
    model = trained_like_model()
    found = collect_curvature(model, batches(2), model.quant_inputs(), FakeDist())
    assert set(found) == set(model.quant_inputs())
    for c in found.values():
        assert torch.allclose(c.gram.diagonal(dim1=-2, dim2=-1).sum(-1), c.rows.sum(-1), rtol=1e-4)
    assert found["tok_emb"].rows.shape == (1, CONFIG.vocab_size)
    assert all(p.grad is None for p in model.parameters())


def test_other_ranks_are_added():
    model = trained_like_model()
    alone = collect_curvature(model, batches(1), ["tok_emb"], FakeDist())["tok_emb"]
    shape = (1, CONFIG.vocab_size)
    # In call order: tokens, rows, gram. Another rank with as many tokens and zeros halves the mean.
    others = [torch.tensor([16.0], dtype=torch.float64), torch.zeros(shape), torch.zeros(1, 24, 24)]
    both = collect_curvature(model, batches(1), ["tok_emb"], FakeDist(others))["tok_emb"]
    assert torch.allclose(both.rows, alone.rows / 2)


def test_no_batches_are_explained():
    with pytest.raises(ValueError, match=r"at least one batch; raise quant\.gradient_batches"):
        collect_curvature(trained_like_model(), [], ["tok_emb"], FakeDist())


def test_unit_trace_survives_dead_inputs():
    got = unit_trace(torch.stack([torch.diag(torch.tensor([1.0, 3.0])), torch.zeros(2, 2)]))
    assert got[0].diagonal().tolist() == [0.25, 0.75]
    assert (got[1] == 0).all()
