"""Runs on rows that ignore documents: each order trains, scores, and resumes bit for bit."""

import json
from pathlib import Path

import pytest

from pgolf.cli.main import main
from pgolf.config import read_json
from tests.e2e.test_resume import SETTINGS, STEPS, assert_same, here, stop_here


@pytest.fixture(scope="module", params=["sequences", "coprime", "stream"])
def whole(request, shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp(request.param)
    words = ["train", "tiny", "--data", str(shards), "--out", str(out), *SETTINGS]
    assert here([*words, f"--data.order={request.param}", "--train.context-stages=32@0.5"]) == 0
    (folder,) = out.iterdir()
    assert read_json(folder / "config.json")["data"]["order"] == request.param
    return folder


def test_it_learns_and_its_file_is_scored(whole):
    losses = [json.loads(line)["loss"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.1
    assert read_json(whole / "summary.json")["scores"]["quantized"]["bpb"] > 0


def test_it_resumes_bit_for_bit_and_only_in_its_order(shards, whole, tmp_path):
    order = read_json(whole / "config.json")["data"]["order"]
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SETTINGS]
    stop_here([*words, f"--data.order={order}", "--train.context-stages=32@0.5"], 4)
    (folder,) = tmp_path.iterdir()
    assert main(["train", "--resume", str(folder), "--data.order=documents"]) == 2
    assert here(["train", "--resume", str(folder)]) == 0
    assert_same(folder, whole)
