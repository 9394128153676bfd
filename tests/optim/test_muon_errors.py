"""Errors of `pgolf.optim.Muon`."""

import pytest
import torch
from torch import nn

import pgolf.optim
from pgolf.optim.polar import JORDAN
from pgolf.optim.ranks import TOLERANCE, fingerprint


def parameters(shapes, dtype=torch.float32):
    return [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, r"lr must be >= 0, got -1\.0"),
        ({"lr": float("nan")}, r"lr must be >= 0, got nan"),
        ({"lr": torch.ones(2)}, r"tensor lr must have one element, got shape \(2,\)"),
        ({"weight_decay": -0.1}, r"weight_decay must be >= 0, got -0\.1"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\], got 1\.5"),
        ({"normalize": 1.0}, r"normalize must be in \[0, 1\), got 1\.0"),
        ({"normalize": -0.5}, r"normalize must be >= 0, got -0\.5"),
        ({"eps": -1e-7}, r"eps must be >= 0, got -1e-07"),
        ({"ns_steps": 0}, r"ns_steps must be in \[1, 10\], got 0"),
        ({"ns_steps": 11}, r"ns_steps must be in \[1, 10\], got 11"),
        ({"ns_coefficients": "polar"}, r"must be one of \('jordan', .*got 'polar'"),
        ({"ns_coefficients": (1.0, 2.0)}, r"must be a triple \(a, b, c\), a list .*got \(1\.0, 2\.0\)"),
        ({"ns_coefficients": [(1.0, 2.0)] * 5}, r"must be a triple"),
        ({"ns_coefficients": (3.4, 4.8, 2.0)}, "polar coefficients diverge: iteration 0"),
        ({"ns_coefficients": [JORDAN] * 4}, r"has 4 triples, but ns_steps=5; pass ns_steps=4"),
        ({"adjust_lr_fn": "spectral"}, r"one of \(None, 'original', 'match_rms_adamw'\), got 'spectral'"),
        ({"maximize": True}, r"maximize is not supported; negate the loss"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pgolf.optim.Muon(parameters([(3, 3)]), **arguments)


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"params": parameters([(4,)])}, ValueError, r"parameter 0 of shape \(4,\) is not .*use_muon=False"),
        ({"params": [("gain", nn.Parameter(torch.ones(())))]}, ValueError, r"parameter gain of shape \(\)"),
        ({"params": parameters([(1,) * 6])}, ValueError, r"not a matrix: Muon takes 2-D"),
        (
            {"params": parameters([(2, 2)], dtype=torch.complex64)},
            TypeError,
            r"is torch\.complex64, expected a real dtype; put it in a group with use_muon=False",
        ),
        (
            {"params": parameters([(2, 9, 4)]), "split_sizes": (4, 4)},
            ValueError,
            r"has 9 rows; split_sizes must be .* add up to it, got \[4, 4\]",
        ),
        ({"params": parameters([(4, 4)]), "split_sizes": (4, 0)}, ValueError, r"got \[4, 0\]"),
        ({"params": parameters([(2,)]), "use_muon": False, "betas": (0.9, 1)}, ValueError, r"betas must be"),
        ({"params": parameters([(2, 2)]), "maximize": True}, ValueError, r"negate the loss"),
        ({"params": parameters([(2, 2)]), "cautious": "yes"}, TypeError, r"True or False, got 'yes'"),
        (
            {"params": parameters([(2, 2)]), "update_floor": -1},
            ValueError,
            r"update_floor must be >= 0, got -1",
        ),
    ],
    ids=["1-D", "named", "6-D", "complex", "split", "split-empty", "betas", "maximize", "cautious", "floor"],
)
def test_bad_groups_are_refused_and_not_added(group, error, message):
    named = isinstance(group["params"][0], tuple)
    optimizer = pgolf.optim.Muon([("w", p) for p in parameters([(3, 3)])] if named else parameters([(3, 3)]))
    with pytest.raises(error, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = pgolf.optim.Muon(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients are not supported; use nn\.Embedding\(sparse="):
        optimizer.step()


def test_fingerprints_see_permutations_signs_and_small_elements():
    """Norm and largest element alone do not distinguish ranks that learned other rows of an embedding."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(40, 30, generator=rng)
    small = torch.full((50,), 1e-7)
    small[7] = 1.0
    flipped, scrambled = small.clone(), x.clone()
    flipped[20] *= -1
    scrambled[:2] = x[[1, 0]]
    pairs = [(x, x.flip(0)), (x, scrambled), (small, flipped), (x.bfloat16(), x.flip(1).bfloat16())]
    for one, other in pairs:
        first, second = fingerprint([one, x])[:, 0], fingerprint([other, x])[:, 0]
        assert torch.equal(fingerprint([one])[:, 0], first) and not torch.equal(first, second)
        assert ((first - second).abs() > TOLERANCE * first.abs()).any()
    assert (fingerprint([torch.tensor([1.0, float("nan")])]) == -1).any()
