"""A run that fits soft cap and scale to documents that it leaves out: resumed, on two ranks, stored."""

import json
import re
from pathlib import Path

import pytest

from pgolf.artifact.code import CODE_NAME
from pgolf.artifact.export import describe
from pgolf.artifact.read import read_artifact
from pgolf.cli.main import main
from pgolf.config import Config, from_dict, read_json
from pgolf.data.loader import TrainLoader
from tests.e2e.test_code import alone, bare
from tests.e2e.test_resume import SETTINGS, assert_same, here, stop_here
from tests.e2e.test_run import summary, two_ranks

LEFT = ["--quant.cap-documents=9"]
LINE = re.compile(r"fitted to ([\d,]+) tokens .*: softcap ([\d.]+), logit_scale ([\d.]+); .* (-[\d.]+)")


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cap")
    assert here(["train", "tiny", "--data", str(shards), "--out", str(out), *SETTINGS, *LEFT]) == 0
    (folder,) = out.iterdir()
    return folder


def test_only_the_file_has_the_fitted_numbers(whole):
    config, model = (
        from_dict(Config, read_json(whole / "config.json")),
        read_artifact(whole / "model.pgolf").header.model,
    )
    assert (config.model.softcap, config.model.logit_scale) == (30.0, 1.0)
    (found,) = LINE.findall((whole / "log.txt").read_text())
    assert (float(found[1]), float(found[2])) == (model.softcap, model.logit_scale) != (30.0, 1.0)
    assert (
        float(found[3]) < 0 and describe(whole / "model.pgolf")["model"]["logit_scale"] == model.logit_scale
    )
    seconds = summary(whole).phases["fit_cap"]
    assert seconds.where == "inside" and seconds.seconds > 0


def test_the_scores_are_those_of_the_file_and_of_the_training_cap(shards, whole, tmp_path):
    """The counted program, the package and the run agree on the file; the average has its own cap."""
    scores = {name: score.bpb for name, score in summary(whole).scores.items()}
    alone(whole, whole, tmp_path / "alone")
    words = ["--data", str(shards), "--config", str(whole / "config.json")]
    done = bare(CODE_NAME, "model.pgolf", *words, cwd=tmp_path / "alone")
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[0]) == pytest.approx(scores["quantized"], abs=1e-6)
    out = tmp_path / "scores.json"
    words = ["evaluate", str(whole / "model.pgolf"), "--data", str(shards), "--device", "cpu"]
    assert main([*words, "--tokens", "640", "--json", str(out), "--mode", "plain", "ttt"]) == 0
    assert json.loads(out.read_text())["scores"]["plain"]["bpb"] == pytest.approx(
        scores["quantized"], abs=1e-6
    )
    assert scores["ema"] != pytest.approx(scores["quantized"], abs=1e-6)


def test_it_resumes_bit_for_bit_without_the_documents(shards, whole, tmp_path):
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SETTINGS, *LEFT]
    stop_here([*words, "--train.checkpoint-every=0"], 5)
    (folder,) = tmp_path.iterdir()
    assert here(["train", "--resume", str(folder)]) == 0
    assert_same(folder, whole)
    assert (
        read_artifact(folder / "model.pgolf").header.model
        == read_artifact(whole / "model.pgolf").header.model
    )


def test_two_ranks_read_the_same_text_and_fit_the_same_numbers(shards, whole, tmp_path):
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SETTINGS, *LEFT]
    done = two_ranks(words)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = tmp_path.iterdir()
    model, one = (read_artifact(f / "model.pgolf").header.model for f in (folder, whole))
    assert model.softcap == pytest.approx(one.softcap, rel=0.02)
    assert model.logit_scale == pytest.approx(one.logit_scale, rel=0.02)
    log = [LINE.findall((f / "log.txt").read_text())[0][0] for f in (folder, whole)]
    assert log[0] == log[1]


def test_with_a_clock_the_fit_is_rehearsed(shards, tmp_path):
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SETTINGS, *LEFT]
    assert main([*words, "--seconds=20", "--steps=3"]) == 0
    (folder,) = tmp_path.iterdir()
    found = summary(folder)
    assert found.reserve >= found.phases["fit_cap"].seconds / 3 and found.reserve > 0


def test_training_reads_a_text_without_them(shards, tmp_path, monkeypatch):
    made, init = [], TrainLoader.__init__

    def watched(self, *args, **settings):
        init(self, *args, **settings)
        made.append((settings["leave_out"], len(self.left_out)))

    monkeypatch.setattr(TrainLoader, "__init__", watched)
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SETTINGS, *LEFT]
    assert main([*words, "--train.no-quantize", "--steps=1"]) == 0
    assert made == [(9, 9)]


def test_quantizing_again_fits_again(shards, whole, tmp_path, capsys):
    out, words = tmp_path / "model.pgolf", ["--data", str(shards), "--device", "cpu"]
    assert here(["quantize", str(whole / "ema.safetensors"), "--out", str(out), *words]) == 0
    assert len(LINE.findall(capsys.readouterr().out)) == 1
    again, first = (read_artifact(f).header.model for f in (out, whole / "model.pgolf"))
    # It is calibrated on other text, so the weights are not quite the same.
    assert again.softcap == pytest.approx(first.softcap, rel=0.1) and again.softcap != 30.0
    assert again.logit_scale == pytest.approx(first.logit_scale, rel=0.1) and again.logit_scale != 1.0
    more = ["quantize", str(whole / "ema.safetensors"), "--out", str(out), *words, "--quant.cap-documents=10"]
    assert main(more) == 2
    assert "is of a run that left out 9 documents" in capsys.readouterr().err


def test_more_documents_than_the_text_has_are_refused_before_there_is_a_folder(shards, tmp_path, capsys):
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path / "runs"), *SETTINGS]
    assert main([*words, "--quant.cap-documents=1000000"]) == 2
    assert "quant.cap_documents=1000000 leaves nothing to train on" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_snapshot_of_a_run_that_read_them_is_refused(shards, tmp_path, capsys):
    words = ["train", "tiny", "--data", str(shards), *SETTINGS]
    first = [*words, "--out", str(tmp_path / "first"), "--train.no-quantize", "--steps=2"]
    assert main([*first, "--train.snapshots=0.5"]) == 0
    (snapshot,) = (tmp_path / "first").glob("*/snapshots/*")
    capsys.readouterr()
    assert main([*words, "--out", str(tmp_path / "second"), f"--train.start={snapshot}", *LEFT]) == 2
    assert "is of a run that left out 0 documents" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()
