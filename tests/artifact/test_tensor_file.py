"""Files of tensors without safetensors: each of the two reads what the other wrote, and damage is refused."""

import pytest
import safetensors
import safetensors.torch
import torch

from pgolf.artifact.tensor_file import DTYPES, SafetensorError, safe_open, save

TENSORS = {
    **{name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()},
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
}
METADATA = {"config": '{"a": 1}', "note": "text"}


def read(opener, path):
    with opener(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


@pytest.mark.parametrize("metadata", [METADATA, {}])
def test_each_reads_what_the_other_wrote(tmp_path, metadata):
    (tmp_path / "ours").write_bytes(save(TENSORS, metadata))
    (tmp_path / "theirs").write_bytes(safetensors.torch.save(TENSORS, metadata or None))
    for opener, name in ((safetensors.safe_open, "ours"), (safe_open, "theirs"), (safe_open, "ours")):
        tensors, found = read(opener, tmp_path / name)
        assert found == metadata and tensors.keys() == TENSORS.keys()
        for key, value in TENSORS.items():
            assert tensors[key].dtype == value.dtype and torch.equal(tensors[key], value), (name, key)


def test_damage_and_unknown_names_are_refused(tmp_path):
    whole = save(TENSORS, METADATA)
    path = tmp_path / "file"
    for damaged in (
        b"",
        whole[:5],
        whole[:100],
        whole[:-1],
        b"\xff" * 16 + whole,
        whole[:8] + b"[" + whole[9:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(SafetensorError, match="expected a safetensors file"):
            safe_open(path)
    path.write_bytes(whole)
    with safe_open(path) as file, pytest.raises(SafetensorError, match="no tensor 'absent'"):
        file.get_tensor("absent")
    with pytest.raises(FileNotFoundError):
        safe_open(tmp_path / "absent")
