"""From shards to a scored artifact through the command line, on the CPU."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf.artifact.code import code_bytes, counted_code
from pgolf.artifact.read import read_artifact
from pgolf.cli.main import VERBS, main
from pgolf.data.shards import read_shard, write_shard
from pgolf.data.text import sample_paths
from pgolf.dist import Dist
from pgolf.presets import tiny
from pgolf.report.summary import PHASES, Summary
from pgolf.train import run as run_module
from pgolf.train import weights as weights_module
from pgolf.train.setup import set_up
from pgolf.train.weights import load_weights, save_weights
from tests.e2e.conftest import SMALL
from tests.forks import Forked
from tests.ranks import meeting_place


def summary(folder: Path) -> Summary:
    return Summary.load(folder / "summary.json")


def torchrun(world: int, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the command line on `world` ranks; if it hangs, the timeout makes the test fail."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "pgolf", *words],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )


def start_ranks(world: int, words: list[str], program: tuple[str, ...] = ("-m", "pgolf")) -> list[Forked]:
    """Start the command line on `world` ranks without torchrun, which would end the others when one ends."""
    place = meeting_place(world)
    return [
        Forked([*program, *words], env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]


def two_ranks(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the command line on two ranks, see `several_ranks`."""
    return several_ranks(2, words)


def several_ranks(world: int, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the command line on several ranks; return the largest exit status and what all of them said."""
    ranks = start_ranks(world, words)
    try:
        said = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    outputs = ["".join(texts) for texts in zip(*said, strict=True)]
    return subprocess.CompletedProcess(words, max(rank.returncode for rank in ranks), *outputs)


def test_run_writes_everything_and_learns(run, shards):
    names = {p.name for p in run.iterdir()}
    expected = {
        "config.json",
        "metrics.jsonl",
        "log.txt",
        "raw.safetensors",
        "ema.safetensors",
        "model.pgolf",
    }
    assert expected | {"summary.json"} <= names
    assert not [n for n in names if n.endswith(".tmp")]
    assert (run / "tokenizer.model").read_bytes() == (shards / "tokenizer.model").read_bytes()
    log = (run / "log.txt").read_text()
    assert 0 < log.index("memory: about ") < log.index("warm-up: ")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(6))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(r["grad_norm"] > 0 and r["skipped"] == 0 for r in rows)
    assert len({r["grad_norm"] for r in rows}) == 6, "each step has its own norm"
    assert [r["loop"] for r in rows] == [False, False, False, True, True, True]  # on from frac 0.35
    s = summary(run)
    assert s.train.steps == 6 and s.train.loop_step == 3
    assert 0 < s.train.ms_optimizer < s.train.ms_loop_off
    assert len((run / "evaluate_gpt.py").read_bytes()) == s.ledger.code
    assert {"python", "torch"} <= s.versions.keys() and s.started.endswith("Z")
    assert s.scores["quantized"].bytes == s.scores["raw"].bytes
    assert s.ledger.model_bytes == (run / "model.pgolf").stat().st_size
    assert json.loads((run / "summary.json").read_text()) == s.to_dict()


def test_scores_cover_every_byte_of_the_validation_text(run, shards):
    manifest = json.loads((shards / "manifest.json").read_text())
    scores = summary(run).scores
    assert {s.bytes for s in scores.values()} == {manifest["splits"]["val"]["bytes"]}


def test_artifact_scores_the_same_when_evaluated_alone(run, shards, capsys):
    artifact = str(run / "model.pgolf")
    assert main(["evaluate", artifact, "--data", str(shards), "--tokens", "640", "--device", "cpu"]) == 0
    shown = float(capsys.readouterr().out.split()[0])
    assert abs(shown - summary(run).scores["quantized"].bpb) < 1e-4


def test_quantizing_the_checkpoint_again_reproduces_the_artifact(run, shards, tmp_path, capsys):
    out = tmp_path / "again.pgolf"
    assert main(["quantize", str(run / "ema.safetensors"), "--data", str(shards), "--out", str(out)]) == 0
    again, first = read_artifact(out), read_artifact(run / "model.pgolf")
    assert again.state.keys() == first.state.keys()
    shown = re.search(r"; ([\d.]+) bpb", capsys.readouterr().out)
    assert shown and abs(float(shown[1]) - summary(run).scores["quantized"].bpb) < 0.02


def test_quantizing_on_what_cannot_be_right_is_refused_before_the_work(run, shards, tmp_path, capsys):
    words = ["quantize", str(run / "ema.safetensors"), "--data"]
    text, other = str(sample_paths().train), tmp_path / "other"
    model = str(tmp_path / "other.model")
    assert main(["data", "tokenizer", "--inputs", text, "--vocab-size", "512", "--out", model]) == 0
    other.mkdir()
    for path in shards.iterdir():
        shutil.copy(model if path.name == "tokenizer.model" else path, other / path.name)
    (other / "manifest.json").unlink()  # it would say before that the tokenizer is another
    out = tmp_path / "again.pgolf"
    assert main([*words, str(other), "--out", str(out)]) == 2
    assert "was trained with another tokenizer" in capsys.readouterr().err and not out.exists()
    assert main([*words, str(shards), "--out", str(tmp_path / "none" / "again.pgolf")]) == 2
    assert re.search(r"no folder .*none for --out .*; create it first", capsys.readouterr().err)


def test_saved_config_reproduces_the_run_bit_for_bit(run, shards, tmp_path):
    assert main(["train", str(run / "config.json"), "--out", str(tmp_path)]) == 0
    (again,) = tmp_path.iterdir()
    first, second = (load_weights(folder / "raw.safetensors")[0] for folder in (run, again))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_warm_up_leaves_no_trace(run, shards, tmp_path):
    words = ["train", str(run / "config.json"), "--out", str(tmp_path), "--train.warmup-steps", "0"]
    assert main(words) == 0
    (again,) = tmp_path.iterdir()
    for name in ("raw", "ema"):
        first, second = (load_weights(folder / f"{name}.safetensors")[0] for folder in (run, again))
        assert all(torch.equal(first[k], second[k]) for k in first), name


@pytest.mark.skipif(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, reason="a shell's background job")
def test_interrupted_run_keeps_its_weights(shards, tmp_path):
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SMALL, "--steps=100000"]
    process = Forked(["-m", "pgolf", *words])
    for line in process.stdout:
        if line.startswith("step     3"):
            process.send_signal(signal.SIGINT)
            break
    process.communicate(timeout=240)
    assert process.returncode == 130
    (folder,) = tmp_path.iterdir()
    for name in ("raw", "ema"):
        assert load_weights(folder / f"{name}.safetensors")[2]["steps"] >= 4


@pytest.mark.parametrize(("launch", "world"), [(torchrun, 2), (several_ranks, 4)])
def test_any_world_size_trains_the_same_model(run, shards, tmp_path, launch, world):
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SMALL]
    if launch is torchrun:  # new processes, in which the counted code takes as long as the rest
        words.append("--train.no-quantize")
    done = launch(world, words)
    assert done.returncode == 0, done.stderr[-2000:]  # the run itself asserts that replicas are bit-identical
    (folder,) = tmp_path.iterdir()
    alone, together = (load_weights(f / "raw.safetensors")[0] for f in (run, folder))
    for name in alone:
        torch.testing.assert_close(
            together[name], alone[name], atol=2e-3, rtol=2e-2, msg=lambda m, n=name: f"{n}: {m}"
        )
    ours, theirs = (summary(f).scores["raw"].bpb for f in (folder, run))
    assert abs(ours - theirs) < 1e-3


def test_a_bad_shard_fails_on_every_rank_without_a_hang(shards, tmp_path):
    broken = tmp_path / "shards"
    shutil.copytree(shards, broken)
    (shard,) = broken.glob("*_train_*.bin")
    shard.write_bytes(shard.read_bytes()[:-100])
    done = two_ranks(["train", "tiny", "--data", str(broken), "--out", str(tmp_path / "runs"), *SMALL])
    assert done.returncode != 0
    assert shard.name in done.stderr and "truncated" in done.stderr.lower(), done.stderr[-2000:]


def test_a_batch_that_does_not_divide_fails_on_every_rank(shards, tmp_path):
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SMALL]
    done = two_ranks([*words, "--data.batch-tokens=2560"])
    assert done.returncode != 0 and "x world size 2 = 1024" in done.stderr, done.stderr[-2000:]
    assert not list(tmp_path.iterdir())


BAD = [
    (["--model.vocab-size=500"], r"has 512 tokens, but model.vocab_size is 500"),
    (["--data.micro-tokens=500"], r"data.batch_tokens=2048 must be a multiple of"),
    (["--data=/nowhere"], r"/nowhere"),
    (["--optim.muon.coefficients=jordon"], r"must be one of .*jordan.*got 'jordon'"),
    (["--train.no-quantize", "--evaluate.ttt"], r"score\s+quantized\s+weights"),
]


@pytest.mark.parametrize("change, message", BAD, ids=["vocab", "batch", "folder", "coefficients", "rows"])
def test_bad_settings_give_one_line_and_exit_code_2(shards, tmp_path, capsys, change, message):
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SMALL, *change]
    try:
        code = main(words)
    except SystemExit as e:
        code = int(e.code or 0)
    assert code == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err + captured.out, re.DOTALL)
    assert not list(tmp_path.iterdir()), "a run that cannot start leaves no folder"


def rewritten(shard: Path, change) -> None:
    tokens = np.array(read_shard(shard))
    write_shard(shard, change(tokens))


UNUSABLE = {
    "no training text": ("train", lambda path: path.unlink(), r"no \*_train_\*\.bin"),
    "no validation text": (
        "val",
        lambda path: [p.unlink() for p in path.parent.glob("*_val_*")],
        r"no \*_val_\*\.bin",
    ),
    "foreign ids": (
        "val",
        lambda path: rewritten(path, lambda t: t + 512),
        r"not below the vocabulary size 512",
    ),
    "no documents": ("val", lambda path: rewritten(path, lambda t: np.where(t == 1, 5, t)), r"no BOS"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_data_that_could_not_be_scored_is_refused_before_the_run(shards, tmp_path, capsys, case):
    split, damage, message = UNUSABLE[case]
    shutil.copytree(shards, tmp_path / "shards")
    (tmp_path / "shards" / "manifest.json").unlink()  # it would not let the damage pass: test_data_law.py
    damage(next((tmp_path / "shards").glob(f"*_{split}_0*.bin")))
    words = ["train", "tiny", "--data", str(tmp_path / "shards"), "--out", str(tmp_path / "runs"), *SMALL]
    assert main(words) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "runs").exists(), "a run that cannot start leaves no folder"


def test_unknown_setting_is_refused_with_a_suggestion(capsys):
    with pytest.raises(SystemExit) as error:
        main(["train", "tiny", "--optim.muon.ns-step", "4"])
    assert error.value.code == 2
    assert "ns-steps" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(shards, tmp_path, capsys):
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SMALL]
    assert main([*words, "--optim.adam.embed-lr=1e30"]) == 2
    assert "the loss is" in (err := capsys.readouterr().err) and "at step" in err
    (folder,) = tmp_path.iterdir()
    assert (folder / "metrics.jsonl").exists() and (folder / "config.json").exists()


def test_every_verb_explains_itself(capsys):
    for verb in VERBS:
        try:
            main([verb, "--help"])
        except SystemExit as e:
            assert e.code in (0, None), verb
        assert "usage" in capsys.readouterr().out.lower(), verb


@pytest.mark.parametrize("preset, parameters", [("pr1855", "35,945,671"), ("naive", ""), ("tiny", "")])
def test_config_shows_what_a_run_would_do(capsys, preset, parameters):
    assert main(["config", preset]) == 0
    assert parameters in capsys.readouterr().out


def test_the_baseline_preset_runs_without_average_loop_or_gates(shards, tmp_path):
    sizes = [
        "width=32",
        "layers=3",
        "heads=2",
        "kv-heads=1",
        "rope-dims=16",
        "parallel-from=3",
        "max-context=64",
    ]
    words = [f"--model.{size}" for size in [*sizes, "vocab-size=512"]]
    words += ["--data.batch-tokens=1024", "--data.micro-tokens=512", "--seconds=0", "--steps=4"]
    assert main(["train", "naive", "--data", str(shards), "--out", str(tmp_path), *words]) == 0
    (folder,) = tmp_path.iterdir()
    s = summary(folder)
    assert s.scores.keys() == {"raw", "quantized"} and s.train.loop_step is None
    assert abs(s.scores["quantized"].bpb - s.scores["raw"].bpb) < 0.02  # 8 bits lose little
    assert read_artifact(folder / "model.pgolf").header.coder == "zlib"
    code = (folder / "evaluate_gpt.py").read_bytes()
    assert code == counted_code("zlib") and s.ledger.code == len(code) < code_bytes("range")


def test_every_way_to_score_counts_the_same_text(run, shards, tmp_path, capsys):
    out = tmp_path / "scores.json"
    words = ["evaluate", str(run / "model.pgolf"), "--data", str(shards), "--device", "cpu"]
    small = ["--ttt.rank=2", "--ttt.chunk=32", "--ttt.batch-tokens=4096", "--stride=32", "--tokens=2048"]
    part = ["--documents=8", "--mode", "plain", "sliding", "ttt", f"--json={out}"]
    assert main([*words, *small, *part]) == 0
    lines = capsys.readouterr().out.splitlines()
    scores = json.loads(out.read_text())["scores"]
    assert list(scores) == ["plain", "sliding", "ttt"] and len(lines) == 3
    for line, score in zip(lines, scores.values(), strict=True):
        assert abs(float(line.split()[0]) - score["bpb"]) < 1e-4
        assert "(first 8 documents only)" in line
    assert len({(s["tokens"], s["bytes"]) for s in scores.values()}) == 1
    assert main([*words, "--documents=-1"]) == 2
    assert "documents must be at least 1, got -1" in capsys.readouterr().err


def test_the_clock_keeps_time_for_slow_checkpoints_and_names_every_phase(
    shards, tmp_path, monkeypatch, capsys
):
    def slowly(*arguments, **facts):
        time.sleep(0.5)
        save_weights(*arguments, **facts)

    monkeypatch.setattr(weights_module, "save_weights", slowly)
    monkeypatch.setattr(run_module, "save_weights", slowly)
    # Progress and settings are written between the phases; how long a disk takes for them is not asked here.
    monkeypatch.setattr(os, "fsync", lambda file: None)
    words = [
        "train",
        "tiny",
        "--data",
        str(shards),
        "--out",
        str(tmp_path),
        *SMALL,
        "--seconds=600",
        "--steps=3",
        "--quant.cap-documents=2",
    ]
    assert main(words) == 0
    (folder,) = tmp_path.iterdir()
    assert not (folder / "rehearsal.safetensors").exists()
    s = summary(folder)
    assert s.phases["save"].seconds >= 1.0 and s.reserve >= 1.15 * 1.0
    # Two writes take a second: phases that lack one of them, or have it twice, are found on a busy machine.
    assert s.clock - 0.9 < s.spent("inside") <= s.clock
    scores = {f"score_{name}" for name in ("raw", "ema", "quantized")}
    further = {f"score_{way}" for way in ("sliding", "local", "ttt", "sgd", "phased", "causal_slot", "slot")}
    assert s.phases.keys() - {"start"} == PHASES.keys() - {"start"} - further >= scores
    parts = s.spent("before") + s.clock + s.spent("after")
    assert s.total - 0.9 < parts <= s.total


def test_a_run_without_an_artifact_ends_with_its_weights(shards, tmp_path):
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SMALL, "--train.no-quantize"]
    assert main([*words, "--seconds=60", "--steps=2"]) == 0
    (folder,) = tmp_path.iterdir()
    names = {p.name for p in folder.iterdir()}
    assert {"raw.safetensors", "ema.safetensors", "summary.json"} <= names and "model.pgolf" not in names
    s = summary(folder)
    assert list(s.scores) == ["raw", "ema"] and s.ledger is None and s.reserve == 0.0
    assert not {"calibrate", "quantize", "rehearse"} & s.phases.keys()


def test_a_failure_in_the_last_row_keeps_the_summary(shards, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(run_module, "score_as", fail)
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SMALL, "--steps=2"]
    assert main([*words, "--evaluate.ttt"]) == 2
    assert "out of memory" in capsys.readouterr().err
    (folder,) = tmp_path.iterdir()
    s = summary(folder)
    assert list(s.scores) == ["raw", "ema", "quantized"] and s.ledger.total > 0


def test_a_run_adds_the_rows_that_are_asked_for(shards, tmp_path):
    small = ["rank=2", "chunk=64", "chunk-max=64", "batch-tokens=8192"]
    asked = ["--evaluate.sliding", "--evaluate.stride=64", "--evaluate.local", "--evaluate.ttt"]
    asked += [f"--evaluate.adapters.{setting}" for setting in small]
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path), *SMALL, "--steps=3", *asked]
    assert main(words) == 0
    (folder,) = tmp_path.iterdir()
    scores = summary(folder).scores
    assert list(scores) == ["raw", "ema", "quantized", "sliding", "local", "ttt"]
    assert {s.bytes for s in scores.values()} == {scores["raw"].bytes}
    # A stride of the whole context is the plain pass.
    assert abs(scores["sliding"].bpb - scores["quantized"].bpb) < 1e-6


def test_the_summary_names_the_attention_that_the_ranks_agreed_on(shards, monkeypatch):
    def agree(model, *_, **__):
        model.attention_name = "varlen"

    monkeypatch.setattr("pgolf.train.setup.agree_on_kernels", agree)
    config = tiny()
    model, data = replace(config.model, vocab_size=512), replace(config.data, dir=shards)
    config = replace(config, model=model, data=data)
    made = set_up(config, Dist.start("cpu"), resume=None, train=True)
    assert made.model.attention_name == made.summary.attention == "varlen"
