"""A run with products in 8-bit floats: what it changes, what it leaves, and how it goes on."""

import json

import pytest
import torch

from pgolf.cli.main import main
from pgolf.train.weights import load_weights
from tests.e2e.conftest import SMALL
from tests.e2e.test_resume import here, stop_here

WORDS = [*SMALL, "--data.batch-tokens=512", "--steps=10", "--train.checkpoint-every=0"]


def folder_of(out):
    (folder,) = out.iterdir()
    return folder


def weights(folder):
    return load_weights(folder / "raw.safetensors")[0]


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("fp8")
    words = ["train", "tiny", "--data", str(shards), "--out", str(out), *WORDS, "--train.fp8=qkv"]
    assert here(words) == 0
    return folder_of(out)


def test_it_changes_the_training_and_is_scored_in_full_precision(whole, shards, tmp_path, capsys):
    words = ["train", "tiny", "--data", str(shards), *WORDS, "--train.no-quantize"]
    assert here([*words, "--out", str(tmp_path / "plain")]) == 0
    plain, found = weights(folder_of(tmp_path / "plain")), weights(whole)
    assert any(not torch.equal(found[name], tensor) for name, tensor in plain.items())
    assert all(tensor.isfinite().all() for tensor in found.values())
    # The raw weights have the same score in a run that knows nothing of fp8.
    again = ["--out", str(tmp_path / "again"), "--train.init", str(whole / "raw.safetensors")]
    assert here([*words, *again, "--steps=1", "--optim.muon.lr=0", *STILL]) == 0
    scored = [json.loads((f / "summary.json").read_text()) for f in (whole, folder_of(tmp_path / "again"))]
    assert len({summary["scores"]["raw"]["bpb"] for summary in scored}) == 1
    capsys.readouterr()
    assert main(["evaluate", str(whole / "model.pgolf"), "--data", str(shards)]) == 0
    assert f"{scored[0]['scores']['quantized']['bpb']:.4f}" in capsys.readouterr().out


STILL = [f"--optim.adam.{name}=0" for name in ("embed-lr", "scalar-lr", "mudd-lr")]


def test_a_run_that_was_stopped_goes_on_bit_for_bit(whole, shards, tmp_path):
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *WORDS, "--train.fp8=qkv"]
    stop_here(words, at_step=6)
    assert here(["train", "--resume", str(folder_of(tmp_path))]) == 0
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(folder_of(tmp_path))[name], tensor), name
    assert (folder_of(tmp_path) / "model.pgolf").read_bytes() == (whole / "model.pgolf").read_bytes()


def test_a_refusal_leaves_no_folder(shards, tmp_path, capsys):
    words = ["--out", str(tmp_path / "out"), *WORDS, "--train.fp8=qkv", "--model.width=24", "--model.heads=3"]
    assert main(["train", "tiny", "--data", str(shards), *words]) == 2
    assert "multiples of 16, got 24 and 16; change them, or use train.fp8=off" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
