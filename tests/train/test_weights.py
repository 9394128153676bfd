"""Checkpoints: round trip, clear errors, nothing lost when writing fails."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pgolf.presets import tiny
from pgolf.train.weights import copy_parameters, load_config, load_weights, save_weights


def weights() -> dict[str, torch.Tensor]:
    return {"a": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), "b": torch.zeros(0)}


def test_checkpoint_round_trip_is_exact(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, weights(), tiny(), steps=7, tokenizer_sha256="ab")
    tensors, config, facts = load_weights(path)
    assert config == tiny() and facts == {"steps": 7, "tokenizer_sha256": "ab"}
    assert all(torch.equal(tensors[k], v) for k, v in weights().items())
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_failed_write_keeps_the_old_file_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(path, weights(), tiny())
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*w\.safetensors: No space left.*another --train\.out"):
        save_weights(path, {"a": torch.ones(9)}, tiny())
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_bad_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_weights(tmp_path / "none.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_weights(foreign)


def test_copy_parameters_refuses_other_names():
    with pytest.raises(ValueError, match=r"do not fit the model: bias, extra"):
        copy_parameters(nn.Linear(2, 2), {"weight": torch.zeros(2, 2), "extra": torch.zeros(1)})


def test_copy_parameters_spreads_no_smaller_tensor_over_a_larger():
    with pytest.raises(ValueError, match=r"do not fit the model: weight must be \(2, 2\), got \(1, 2\)"):
        copy_parameters(nn.Linear(2, 2), {"weight": torch.ones(1, 2), "bias": torch.zeros(2)})


def test_metadata_that_is_no_json_names_the_file(tmp_path):
    path = tmp_path / "raw.safetensors"
    for text in ("{", "[" * 100_000):
        save_file({}, path, {"config": text})
        with pytest.raises(
            ValueError, match=r"raw.safetensors: its metadata is not JSON as `pgolf train` writes"
        ):
            load_config(path)
