"""`pgolf evaluate`: what is known stays known when something fails later; what cannot work fails first."""

import json
import shutil
from pathlib import Path

import pytest

from pgolf.cli.evaluate import SHARED_GPU, sharing_note
from pgolf.cli.main import main
from pgolf.data.text import sample_paths
from pgolf.errors import RunError
from tests.ranks import run_ranks

AGREE = Path(__file__).with_name("agree_program.py")


@pytest.fixture
def words(run: Path, shards: Path, tmp_path: Path) -> list[str]:
    artifact, out = str(run / "model.pgolf"), str(tmp_path / "score.json")
    return ["evaluate", artifact, "--data", str(shards), "--documents=1", "--device=cpu", f"--json={out}"]


def test_scores_are_printed_before_a_later_way_fails(words, monkeypatch, capsys):
    def fails(*arguments, **settings):
        raise RunError("the loss is NaN")

    monkeypatch.setattr("pgolf.evaluate.validation.adapted_pass", fails)
    assert main([*words, "--mode", "plain", "ttt"]) == 2
    out, err = capsys.readouterr()
    assert " bpb  " in out and "  plain  (first 1 documents only)" in out and "the loss is NaN" in err


@pytest.mark.parametrize("verb", ["evaluate", "quantize"])
def test_ranks_have_the_same_heads_although_a_trial_failed_on_one(words, run, shards, tmp_path, verb):
    if verb == "quantize":
        out = tmp_path / "model.pgolf"
        words = [verb, str(run / "ema.safetensors"), f"--data={shards}", f"--out={out}", "--device=cpu"]
    done = run_ranks(2, AGREE, *words)
    assert done.returncode == 0, done.stderr
    why = "torch computes what is next to attention, because the output differs"
    note = "attention is doc with composed heads on all ranks, because rank 0 had doc with auto heads; rank 1"
    assert done.stderr.count(f"{note} had doc with composed heads, {why}") == 1
    assert done.stdout.count(" bpb") == 1  # one rank speaks, and the same one writes


def test_ranks_learn_that_the_one_that_writes_has_failed(run, shards, tmp_path):
    out = tmp_path / "model.pgolf"
    words = ["quantize", str(run / "ema.safetensors"), f"--data={shards}", f"--out={out}", "--device=cpu"]
    done = run_ranks(2, AGREE, *words, "--artifact.limit=70000")
    assert done.returncode != 0 and not out.exists()
    assert "rank 0 failed: " in done.stderr and "70,000" in done.stderr, done.stderr


def test_scores_are_written_before_a_test_of_legality_fails(words, monkeypatch, capsys, tmp_path):
    def fails(*arguments, **settings):
        raise RunError("no memory")

    monkeypatch.setattr("pgolf.cli.legality.examine", fails)
    assert main([*words, "--mode=plain", "--legality"]) == 2
    assert "  plain  " in capsys.readouterr().out
    assert json.loads((tmp_path / "score.json").read_text())["scores"]["plain"]["tokens"] > 0


def test_a_stride_that_does_not_fit_is_refused_before_anything_is_scored(words, capsys):
    assert main([*words, "--mode", "plain", "sliding", "--stride=65"]) == 2
    out, err = capsys.readouterr()
    assert not out and "--stride must be in [1, 64] (the model's max_context), got 65" in err
    assert main([*words, "--mode", "ttt", "sliding", "--context=32", "--stride=33"]) == 2
    assert "--stride must be in [1, 32] (--context), got 33" in capsys.readouterr().err
    assert main([*words, "--mode", "plain", "--stride=65"]) == 0  # plain has no stride


def test_local_attention_reaches_back_as_far_as_the_context_says(words, capsys, tmp_path):
    def scored(*more: str) -> dict[str, float]:
        assert main([*words, "--mode", "plain", "local", *more]) == 0
        scores = json.loads((tmp_path / "score.json").read_text())["scores"]
        assert scores["plain"]["tokens"] == scores["local"]["tokens"]
        return {mode: score["bpb"] for mode, score in scores.items()}

    near, far = scored("--context=8"), scored("--context=5000")
    assert abs(far["local"] - far["plain"]) < 1e-6  # no document is as long
    assert abs(near["local"] - near["plain"]) > 1e-4 and abs(near["local"] - far["local"]) > 1e-4
    # Windows need not fit into the tokens of a pass, and there is no stride.
    assert main([*words, "--mode=local", "--context=8", "--tokens=4", "--stride=99"]) == 0
    again = json.loads((tmp_path / "score.json").read_text())["scores"]["local"]["bpb"]
    assert abs(again - near["local"]) < 1e-6
    capsys.readouterr()
    assert main([*words, "--mode=local", "--tokens=0"]) == 2
    assert "--tokens must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("size", [512, 600])
def test_an_artifact_of_another_vocabulary_is_refused(run, shards, tmp_path, capsys, size):
    model, other = tmp_path / "other.model", tmp_path / "other"
    text = ["--inputs", str(sample_paths().train), "--vocab-size", str(size)]
    assert main(["data", "tokenizer", *text, "--out", str(model)]) == 0
    shutil.copytree(shards, other)
    shutil.copy(model, other / "tokenizer.model")
    (other / "manifest.json").unlink()  # it would say before that the tokenizer is another
    capsys.readouterr()
    assert main(["evaluate", str(run / "model.pgolf"), f"--data={other}", "--device=cpu"]) == 2
    said = capsys.readouterr().err
    if size == 512:
        assert "model.pgolf was trained with another tokenizer (sha256 " in said
        assert "use a folder with the tokenizer.model of the run" in said
    else:
        assert "tokenizer.model has 600 tokens, but model.vocab_size is 512; pass" in said


def test_legality_on_several_ranks_is_refused_before_anything_is_scored(words, monkeypatch, capsys):
    monkeypatch.setattr("pgolf.artifact.read.read_artifact", lambda path: pytest.fail("too late"))
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main([*words, "--legality"]) == 2
    assert "--legality runs on one rank; score without torchrun" in capsys.readouterr().err


def test_sums_that_are_kept_decide_whether_adapters_are_compiled(words, monkeypatch, tmp_path):
    """What is worth compiling depends on the number of GPUs, and compiled kernels round differently."""
    from pgolf.evaluate import ttt

    made, asked = ttt.adapted_pass, []

    def asks(*arguments, compiled=None, **settings):
        asked.append(compiled)
        return made(*arguments, compiled=False, **settings)

    monkeypatch.setattr("pgolf.evaluate.validation.adapted_pass", asks)
    command = [*words, "--mode=ttt", "--ttt.rank=2", f"--sums={tmp_path / 'sums'}"]
    for worth in (True, False):
        monkeypatch.setattr(ttt, "worth_compiling", lambda *of, worth=worth: worth)
        assert main(command) == 0
    assert asked == [True, True]
    (tmp_path / "sums" / "ttt.sums").unlink()
    assert main(command) == 0
    assert main(words[:-1]) == 0 and asked == [True, True, False]


def test_settings_that_no_way_uses_are_named(words, capsys):
    unused = ["--ttt.rank=2", "--sgd.epochs=1", "--tilt.boost=1", "--slot.steps=1"]
    assert main([*words, "--mode=phased", "--phases.adapters.rank=2", *unused]) == 0
    said = capsys.readouterr().err
    for name in ("sgd", "slot", "ttt"):
        assert f"note: --{name} has no effect on phased" in said
    assert "; its adapters are --phases.adapters" in said and "--tilt has no effect without --tilt.on" in said
    assert "--phases has" not in said
    assert main([*words, "--mode", "ttt", "causal_slot", "--ttt.rank=2", "--slot.steps=1"]) == 0
    assert "has no effect" not in capsys.readouterr().err


def test_with_its_config_a_model_is_scored_as_its_run_did(words, run, tmp_path, capsys):
    saved = json.loads((run / "config.json").read_text())
    saved["evaluate"] |= {"sliding": True, "context": 48, "stride": 24}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(saved))

    def scored(*more: str) -> dict[str, float]:
        assert main([*words, *more]) == 0
        scores = json.loads((tmp_path / "score.json").read_text())["scores"]
        return {mode: score["bpb"] for mode, score in scores.items()}

    as_run = scored(f"--config={path}")
    assert as_run == scored("--mode", "plain", "sliding", "--context=48", "--stride=24")
    assert scored("--config", str(path), "--stride=12")["sliding"] != as_run["sliding"]
    capsys.readouterr()
    scored(f"--config={path}", "--ttt.rank=3")
    assert "--ttt has no effect on plain, sliding" in "".join(capsys.readouterr())
    scored(f"--config={path}")
    said = capsys.readouterr().err
    assert "has no effect" not in said and "note: plain has windows of 48 tokens; the run itself" in said
    scored(f"--config={path}", "--context=0")
    assert "plain has windows" not in capsys.readouterr().err
    assert main([*words, f"--config={tmp_path / 'none.json'}"]) == 2
    assert "none.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "processes", "memory", "said"),
    [
        ("ttt", 1, SHARED_GPU, True),
        ("plain", 1, SHARED_GPU, False),
        ("ttt", 3, SHARED_GPU, False),
        ("ttt", 1, SHARED_GPU - 1, False),
    ],
)
def test_who_scores_with_one_process_on_a_large_gpu_learns_that_three_are_faster(
    mode, processes, memory, said
):
    assert ("nproc_per_node=3" in sharing_note(mode, processes, memory)) is said
