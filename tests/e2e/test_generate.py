"""`pgolf generate` and `pgolf.load` on a small run, on its checkpoints, and on files that do not fit."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pgolf
from pgolf.cli.demo import written_lines
from pgolf.cli.main import main
from pgolf.data.text import sample_paths
from pgolf.data.tokenizer import Tokenizer
from pgolf.model.gpt import GPT

PAGE = Path(__file__).parents[2] / "docs" / "generate.md"
CPU = ["--device", "cpu"]


@pytest.fixture
def alone(run: Path, tmp_path: Path) -> Path:
    """The artifact of the run in a folder that has neither a tokenizer nor a configuration."""
    (tmp_path / "alone").mkdir()
    return Path(shutil.copy(run / "model.pgolf", tmp_path / "alone"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another tokenizer of the same size as the run's."""
    path = tmp_path_factory.mktemp("other") / "other.model"
    words = ["--inputs", str(sample_paths().train), "--vocab-size", "512", "--out", str(path)]
    assert main(["data", "tokenizer", *words]) == 0
    return path


def test_the_verb_prints_the_prompt_and_what_follows(run, capsys):
    words = ["generate", str(run), "--prompt", "The city", "--tokens", "30", *CPU]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*words, "--seed", seed]) == 0
        said = capsys.readouterr()
        texts.append(said.out)
        assert re.fullmatch(r"[\d,]+ characters in [\d.]+ s on cpu\n", said.err)
    assert texts[0] == texts[1] != texts[2] and all(t.startswith("The city") for t in texts)
    model, tokenizer = pgolf.load(run, device="cpu")
    found = "".join(pgolf.generate(model, tokenizer, "The city", tokens=30, seed=1))
    assert texts[0] == f"The city{found}\n"


def test_a_folder_gives_its_artifact_else_the_averaged_weights(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    left = {}
    for name in ("model.pgolf", "ema.safetensors", "raw.safetensors"):
        by_folder, by_file = (pgolf.load(p, device="cpu").model for p in (folder, folder / name))
        assert isinstance(by_folder, GPT) and not by_folder.training
        assert torch.equal(by_folder.tok_emb, by_file.tok_emb), name
        left[name] = by_file.tok_emb
        (folder / name).unlink()
    assert not torch.equal(left["model.pgolf"], left["ema.safetensors"])
    with pytest.raises(FileNotFoundError, match=r"holds none of model\.pgolf"):
        pgolf.load(folder)


def test_the_tokenizer_is_looked_for_next_to_the_model_then_where_the_run_found_it(
    run, shards, tmp_path, other
):
    assert pgolf.load(run, device="cpu").tokenizer.path == run / "tokenizer.model"
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for disturb in (
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b"no tokenizer"),
        lambda file: shutil.copy(other, file),
    ):
        disturb(folder / "tokenizer.model")
        for name in ("model.pgolf", "raw.safetensors"):
            assert pgolf.load(folder / name, device="cpu").tokenizer.path == shards / "tokenizer.model"


def test_a_tokenizer_can_be_named(alone, run, shards, capsys):
    for words in (
        ["--tokenizer", str(run / "tokenizer.model")],
        ["--tokenizer", str(run)],
        ["--data", str(shards)],
    ):
        assert main(["generate", str(alone), "--tokens", "3", *words, *CPU]) == 0


def test_a_model_without_its_tokenizer_is_refused(alone, run, other, tmp_path, capsys):
    def said(*words: str) -> str:
        assert main(["generate", *words, *CPU]) == 2
        error = capsys.readouterr().err
        assert error.startswith("pgolf generate: ") and error.count("\n") == 1
        return error

    assert re.search(r"no tokenizer with SHA-256 \w{16}\.\.\., which .*alone", said(str(alone)))
    shutil.copy(other, alone.with_name("tokenizer.model"))
    assert "tokenizer.model is another one" in said(str(alone))
    for words in ([str(alone)], [str(run / "ema.safetensors")]):
        assert re.search(
            r"other.model has SHA-256 .* was trained with", said(*words, "--tokenizer", str(other))
        )
    assert "no tokenizer at" in said(str(alone), "--tokenizer", str(tmp_path / "none.model"))


def test_what_is_no_model_is_refused_in_one_line(run, tmp_path, capsys):
    (tmp_path / "text.pgolf").write_text("nothing")
    cases = {
        str(tmp_path / "none"): "no model at",
        str(tmp_path / "text.pgolf"): "artifact is truncated",
        str(tmp_path): "holds none of model.pgolf, ema.safetensors and raw.safetensors",
        str(run / "log.txt"): "not a pgolf artifact",
    }
    for path, says in cases.items():
        assert main(["generate", path, *CPU]) == 2
        assert says in capsys.readouterr().err
    for word in ("--temperature=-1", "--top-p=0", "--tokens=0", "--top-k=-1", "--seed=-1"):
        assert main(["generate", str(run), word, *CPU]) == 2
        assert "must be" in capsys.readouterr().err


def test_load_takes_a_string_and_returns_a_pair(run):
    model, tokenizer = pgolf.load(str(run / "model.pgolf"))
    assert isinstance(model, GPT) and isinstance(tokenizer, Tokenizer)
    with pytest.raises(ValueError, match="device must be one of"):
        pgolf.load(run, device="tpu")


def test_parts_of_the_package_come_on_first_use():
    program = (
        "import pgolf, sys; assert 'torch' not in sys.modules; "
        "print(pgolf.optim.Muon.__name__, pgolf.ops.softcap_ce.__name__, pgolf.load.__name__, *dir(pgolf))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Muon softcap_ce load ")
    assert {"generate", "load", "ops", "optim"} <= set(done.stdout.split())
    with pytest.raises(AttributeError, match="module 'pgolf' has no attribute 'lode'"):
        _ = pgolf.lode


def test_the_page_runs_as_printed(run, shards, tmp_path, monkeypatch, capsys):
    """Run a command in a folder that has the files that it names."""
    shutil.copytree(run, tmp_path / "runs" / "RUN")
    for name in ("model.pgolf", "tokenizer.model"):
        shutil.copy(run / name, tmp_path)
    (tmp_path / "shards").symlink_to(shards)
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(program, PAGE.name, "exec"), {})
    assert capsys.readouterr().out.startswith("The city of")
    commands = [line for line in text.splitlines() if line.startswith("pgolf generate")]
    assert len(commands) > 2
    for line in commands:
        assert main([*shlex.split(line, comments=True)[1:], *CPU]) == 0, line


def test_the_demo_writes_lines_of_one_width(run):
    lines = written_lines(run)
    assert all(0 < len(next(lines)) <= 100 for _ in range(3))
