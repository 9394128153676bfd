"""Parts that are added in the middle of a training: the function stays the same, exactly."""

from dataclasses import replace

import pytest
import torch

from pgolf.config import Config, ModelConfig
from pgolf.errors import UserError
from pgolf.model.gpt import GPT
from pgolf.model.neutral import PARTS, additions
from pgolf.train.weights import clone_parameters, load_initial, save_weights

OTHER = ModelConfig(
    **{"vocab_size": 64, "layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "max_context": 32},
    **{"rope_dims": 4, "xsa_layers": 2, "parallel_from": 3, "recurrence_start": 1, "recurrence_end": 1},
    **{"recurrence_repeats": 1, "skip": "none", "resid_mix": False, "head_gate": "none", "smear_gate": False},
)
ADDED = {
    "smear": ({"smear_gate": True}, "smear_lambda"),
    "smear_window": ({"smear_gate": True, "smear_window": 5, "gate_window": 7}, "smear_lambda"),
    "bigram": ({"bigram_buckets": 50, "bigram_width": 8}, "bigram_table"),
    "values": ({"value_embed_layers": 2, "value_embed_width": 8}, "value_table"),
    "out": ({"head_gate": "out"}, "head_gate"),
    "sparse": ({"head_gate": "sparse", "sparse_gate_scale": 0.7}, "head_gate"),
    "dense": ({"head_gate": "dense"}, "head_gate"),
    "mix": ({"resid_mix": True}, "resid_mix"),
    "skip": ({"skip": "weighted"}, "skip_weights"),
    "mudd": ({"mudd": 6}, "mudd_out"),
    "strength": ({"xsa_strength": True}, "xsa_strength"),
    "all": ({"smear_gate": True, "skip": "weighted", "head_gate": "sparse", "resid_mix": True}, "head_gate"),
}


def trained(config: ModelConfig) -> GPT:
    """A model whose parameters are all different from 0, as after some training."""
    model = GPT(config, seed=1)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng))
    return model


def grown(model: GPT, config: ModelConfig) -> GPT:
    """The model with what `config` adds, from the weights of `model`."""
    added = additions(config, model.config, where="a.safetensors")
    larger, own = GPT(config, seed=5), dict(model.named_parameters())
    with torch.no_grad():
        for name, p in larger.named_parameters():
            if name in added.zeros:
                p.zero_()
            elif name not in added.names:
                p.copy_(own[name] * added.factors.get(name, 1.0))
    return larger


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ADDED)
def test_losses_are_the_same_bit_for_bit_and_the_new_part_has_a_gradient(case, dtype):
    changes, moving = ADDED[case]
    model = trained(OTHER)
    larger = grown(model, replace(OTHER, **changes))
    ids = torch.randint(0, 64, (33,), generator=torch.Generator().manual_seed(3))
    losses = []
    for each in (model, larger):
        each.prepare(torch.device("cpu"), attention="sdpa")
        each.compute_dtype = dtype
        cu = torch.tensor([0, 10, 32], dtype=torch.int32)
        losses.append(each(ids[:-1], ids[1:], cu, max_seqlen=32, loop=True))
    assert torch.equal(losses[0], losses[1])
    losses[1].mean().backward()
    assert dict(larger.named_parameters())[moving].grad.any()


def test_weights_alone_may_gain_parts_too(tmp_path):
    """train.init: the parameters are those of the grown model."""
    model = trained(OTHER)
    config = replace(OTHER, **ADDED["all"][0])
    save_weights(tmp_path / "raw.safetensors", clone_parameters(model), Config(model=OTHER))
    larger = GPT(config, seed=5)
    added = load_initial(tmp_path / "raw.safetensors", larger, Config(model=config), tokenizer_sha256="")
    expected = dict(grown(model, config).named_parameters())
    assert [n for n, p in larger.named_parameters() if not torch.equal(p, expected[n])] == []
    assert "head_gate" in str(added) and "attn_scale is multiplied by 2" in str(added)


def test_each_part_is_tested():
    switches = {part.settings[0] for part in PARTS}
    assert switches == {next(iter(changes)) for name, (changes, _) in ADDED.items() if name != "all"}


REFUSED = [
    ({"smear_gate": True, "smear_kind": "channel"}, r"model\.smear_gate is False there and True here"),
    ({"skip": "gated"}, r"model\.skip is none there and gated here"),
    (
        {"smear_gate": True, "xsa_layers": 1},
        r"of another model: model\.xsa_layers is 2 there and 1 here; give",
    ),
    ({"bigram_width": 8}, r"model\.bigram_width is 128 there and 8 here"),
    ({"width": 48, "heads": 4}, r"a\.safetensors is of another model: model\.width is 32 there and 48 here"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_has_no_neutral_start_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        additions(replace(OTHER, **changes), OTHER, where="a.safetensors")


def test_parts_are_not_taken_away_and_not_reshaped():
    gated = replace(OTHER, head_gate="out")
    with pytest.raises(UserError, match=r"model\.head_gate is out there and none here"):
        additions(OTHER, gated, where="a")
    # The window of both gates: new for the smear gate, another one for the head gate.
    with pytest.raises(UserError, match=r"head_gate has the shape \(4, 4, 12\) there and \(4, 4, 7\) here"):
        additions(replace(gated, smear_gate=True, gate_window=7), gated, where="a")
