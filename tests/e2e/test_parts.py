"""A run with all parts of published stacks that `pr1855` does not have: resumed, stored, scored."""

import json
from pathlib import Path

import pytest
import torch

from pgolf.artifact.code import CODE_NAME
from pgolf.artifact.read import read_artifact
from pgolf.cli.main import main
from pgolf.config import Config, from_dict, read_json
from pgolf.optim.step import Optimizer
from pgolf.train.weights import load_weights
from tests.e2e.test_code import alone, bare
from tests.e2e.test_resume import SETTINGS, STEPS, assert_same, here, stop_here

PARTS = [
    "--model.leaky-slope=0.3",
    "--model.parallel=gptj",
    "--model.smear-over-bos",
    "--model.smear-kind=channel",
    "--model.bigram-buckets=300",
    "--model.bigram-width=16",
    "--model.value-embed-layers=2",
    "--model.value-embed-width=16",
    "--model.mudd=8",
    "--model.xsa-strength",
    "--train.fake-quant-from=0.5",
    "--train.context-stages=16@0.2,32@0.6",
    "--optim.average=swa",
    "--optim.swa-from=0.4",
    "--optim.swa-every=3",
]


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("parts")
    words = ["train", "tiny", "--data", str(shards), "--out", str(out), *SETTINGS, *PARTS]
    assert here(words) == 0
    (folder,) = out.iterdir()
    return folder


def test_the_log_says_what_begins_and_what_is_illegal(whole):
    text = (whole / "log.txt").read_text()
    config = from_dict(Config, read_json(whole / "config.json"))
    assert text.count(config.model.illegal) == 1 and "The challenge ruled that illegal" in text
    assert text.count(f"from step {STEPS // 2} on forward passes round the matrices to 6 bits") == 1
    assert "warm-up: loop on, rounded ready at" in text
    for step, tokens in ((0, 16), (3, 32), (8, 64)):
        assert text.count(f"from step {step} on segments have up to {tokens} tokens") == 1
    assert Config().model.illegal == ""


def test_the_average_is_the_mean_of_the_snapshots(shards, tmp_path, monkeypatch):
    """Of those after 6, 9 and 12 steps: from 0.4 of 12 steps on, every third."""
    step, after = Optimizer.step, []

    def watched(self, frac, **about):
        step(self, frac, **about)
        after.append({name: p.detach().clone() for name, p in self._params.items()})

    monkeypatch.setattr(Optimizer, "step", watched)
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SETTINGS, *PARTS]
    assert main([*words, "--train.no-quantize", "--evaluate.no-raw", "--evaluate.no-ema"]) == 0
    (folder,) = tmp_path.iterdir()
    averaged = load_weights(folder / "ema.safetensors")[0]
    kept = [after[i - STEPS - 1] for i in (6, 9, 12)]
    for name, found in averaged.items():
        torch.testing.assert_close(found, torch.stack([t[name] for t in kept]).mean(0))


@pytest.mark.parametrize("step", [3, 8])
def test_it_resumes_bit_for_bit_before_and_after_the_switches(shards, whole, tmp_path, step):
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SETTINGS, *PARTS]
    stop_here([*words, "--train.checkpoint-every=0"], step)
    (folder,) = tmp_path.iterdir()
    assert here(["train", "--resume", str(folder)]) == 0
    assert_same(folder, whole)


def test_the_counted_program_of_its_folder_scores_it_as_the_run_did(shards, whole, tmp_path):
    alone(whole, whole, tmp_path / "alone")
    # A smear gate over BOS makes the score depend on how documents are packed, so by the run's settings.
    words = ["--data", str(shards), "--config", str(whole / "config.json")]
    done = bare(CODE_NAME, "model.pgolf", *words, cwd=tmp_path / "alone")
    assert done.returncode == 0, done.stderr[-2000:]
    scored = json.loads((whole / "summary.json").read_text())["scores"]["quantized"]["bpb"]
    assert float(done.stdout.split()[0]) == pytest.approx(scored, abs=1e-5)


def test_its_artifact_is_read_scored_and_continued(shards, whole, capsys):
    artifact = read_artifact(whole / "model.pgolf")
    model = artifact.header.model
    assert model.parallel == "gptj" and model.bigram_buckets == 300 and model.value_embed_layers == 2
    kinds = {t.name: t.kind for t in artifact.header.tensors}
    assert kinds["bigram_table"] == kinds["value_table"] == kinds["mudd_in"] == "gate"
    assert kinds["bigram_proj"] == kinds["value_scale"] == kinds["smear_logit"] == "small"
    assert kinds["mudd_out"] == kinds["mudd_bias"] == kinds["xsa_strength"] == "small"
    assert artifact.state["mudd_out"].any() and artifact.state["xsa_strength"].any()
    words = ["--data", str(shards), "--tokens", "640", "--device", "cpu"]
    for more in ([], ["--mode", "sliding"], ["--mode", "ttt"]):
        assert main(["evaluate", str(whole / "model.pgolf"), *words, *more]) == 0
    assert main(["generate", str(whole), "--prompt", "The city", "--tokens", "20", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("The city") == 1
