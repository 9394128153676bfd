"""Every trained parameter is in exactly one group, or an error names it."""

import pytest
import torch
from torch import nn

from pgolf.config import ModelConfig
from pgolf.model.gpt import GPT
from pgolf.optim.groups import head_blocks, split_parameters


class Toy(nn.Module):
    bank_names = ("bank", "inner.bank")
    embed_names = ("emb",)

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))
        self.emb = nn.Parameter(torch.zeros(5, 2))
        self.bank = nn.Parameter(torch.zeros(2, 3, 4))
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.inner = nn.Module()
        self.inner.bank = nn.Parameter(torch.zeros(1, 2, 2))
        self.inner.gate = nn.Parameter(torch.zeros(()))


def test_split_puts_every_trained_parameter_in_one_group():
    model = Toy()
    groups = split_parameters(model)
    assert list(groups.banks) == ["bank", "inner.bank"]
    assert list(groups.embed) == ["emb"]
    assert list(groups.scalars) == ["gain", "inner.gate"]
    assert groups.banks["inner.bank"] is model.inner.bank


def test_split_rejects_unknown_frozen_and_doubled_names():
    model = Toy()
    model.bank_names = ("bank", "frozen", "typo")
    with pytest.raises(ValueError, match="not trained parameters of Toy: frozen, typo; bank_names and"):
        split_parameters(model)
    model.bank_names = ("bank", "emb")
    with pytest.raises(ValueError, match=r"once in bank_names and embed_names; named twice: emb"):
        split_parameters(model)


def test_split_rejects_flat_banks_and_other_dtypes():
    model = Toy()
    model.bank_names = ("bank", "gain")
    with pytest.raises(ValueError, match=r"bank gain must be \(matrices, rows, cols\), got shape \(3,\)"):
        split_parameters(model)
    with pytest.raises(TypeError, match=r"parameter gain must be float32, got torch.bfloat16"):
        split_parameters(Toy().to(torch.bfloat16))


def test_split_rejects_models_without_names():
    with pytest.raises(
        TypeError, match=r"Linear.bank_names must be a tuple of parameter names, got NoneType"
    ):
        split_parameters(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ("off", {}),
        ("qk", {"qo_bank": (3, 16), "kv_bank": (3, 16)}),
        ("kv", {"kv_bank": (6, 16)}),
        ("qkv", {"qo_bank": (3, 16), "kv_bank": (6, 16)}),
    ],
)
def test_pairs_of_heads_are_rows_of_the_projections_that_are_named(pairs, expected):
    config = ModelConfig(
        **{"vocab_size": 64, "layers": 3, "width": 48, "heads": 6, "kv_heads": 2, "rope_dims": 4},
        **{"parallel_from": 2, "xsa_layers": 0, "recurrence_repeats": 0, "max_context": 32},
    )
    model = GPT(config)
    assert head_blocks(model, pairs) == expected
    assert (model.qo_bank.shape, model.kv_bank.shape) == ((6, 48, 48), (6, 16, 48))
    if expected:
        with pytest.raises(TypeError, match=rf"optim\.muon\.head_pairs={pairs} needs a GPT, got Toy"):
            head_blocks(Toy(), pairs)
