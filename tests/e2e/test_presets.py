"""Every preset, at reduced width, trains, quantizes, writes and scores on a CPU."""

import json
import math
from dataclasses import replace

import pytest

from pgolf.cli.main import main
from pgolf.presets import PRESETS

STEPS = 20
REDUCED = [
    "--model.vocab-size=512",
    "--model.width=32",
    "--model.heads=2",
    "--model.kv-heads=1",
    "--model.rope-dims=8",
    "--model.max-context=64",
    "--data.batch-tokens=512",
    "--data.micro-tokens=512",
    "--quant.calibration-batches=2",
    "--quant.gradient-batches=2",
    "--train.checkpoint-every=0",
    "--train.warmup-steps=1",
    "--evaluate.no-raw",
    "--evaluate.adapters.rank=8",
    "--evaluate.adapters.chunk=128",
    "--seconds=0",
    f"--steps={STEPS}",
]


# One of those whose settings are the same, as those of `best` and `best_1gpu`; other tests run `tiny`.
NAMES = {replace(make(), name="preset"): name for name, make in reversed(PRESETS.items()) if name != "tiny"}


@pytest.mark.parametrize("name", NAMES.values())
def test_a_preset_trains_and_its_file_scores_as_its_weights_do(name, shards, tmp_path):
    stages = {"pr2014": "16@0.1,32@0.7", "pr2135": "32@1"}.get(name, "")
    words = [*REDUCED, f"--train.context-stages={stages}"]
    assert main(["train", name, "--data", str(shards), "--out", str(tmp_path), *words]) == 0
    (folder,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.3 < math.log(512)
    scores = json.loads((folder / "summary.json").read_text())["scores"]
    averaged = scores.get("ema", scores["quantized"])["bpb"]
    assert abs(scores["quantized"]["bpb"] - averaged) < 0.05
