"""The counted program reads and scores an artifact with nothing else of pgolf, nor its extension."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from pgolf.artifact.code import CODE_NAME, code_bytes
from pgolf.artifact.read import load_model, read_artifact, read_state
from pgolf.artifact.write import write_artifact
from pgolf.cli.main import main
from pgolf.config import METHODS, EvaluateConfig, PhasesConfig, SgdConfig, TiltConfig, TttConfig
from pgolf.dist import Dist
from pgolf.evaluate.validation import DataFolder, score_as, score_model
from tests import forks

NO_PGOLF = """
import importlib.util, sys
assert importlib.util.find_spec("pgolf") is None
"""
WEIGHTS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
import pgolf
from pgolf.artifact.read import read_artifact
assert Path(pgolf.__file__).is_relative_to(sys.argv[2])
assert not any("pgolf/_C" in str(getattr(m, "__file__", "")) for m in list(sys.modules.values()))
torch.save(read_artifact(Path(sys.argv[1])).state, sys.argv[3])
"""
SCORES = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import torch
from pgolf.artifact.read import load_model
from pgolf.config import METHODS, EvaluateConfig, PhasesConfig, SgdConfig, TiltConfig, TttConfig
from pgolf.dist import Dist
from pgolf.evaluate.validation import DataFolder, score_as

torch.set_num_threads(1)
model = load_model(Path(sys.argv[1]), "cpu")
data_folder = DataFolder.open(Path(sys.argv[2]), vocab_size=model.config.vocab_size)
text, dist = data_folder.validation(documents=2), Dist.start("cpu")
settings = EvaluateConfig(
    stride=16,
    adapters=TttConfig(rank=2, members=2),
    tilt=TiltConfig(on=True, order=3),
    sgd=SgdConfig(chunk_tokens=512, epochs=1),
    phases=PhasesConfig(
        documents=1, count=1, chunk_tokens=512, adapters=TttConfig(rank=2, batch_documents=1)
    ),
)
found = {
    mode: score_as(mode, model, data_folder, text, dist, batch_tokens=512, settings=settings).bpb
    for mode in METHODS
}
print(json.dumps(found))
"""


def libraries() -> str:
    """Return a path entry with the installed packages but not pgolf: Python's own, where no pgolf is."""
    return str(Path(torch.__file__).parents[1])


def bare(*arguments: str, cwd: Path, environment: dict[str, str] | None = None):
    """Run an isolated Python (-I: no PYTHON variables, no user packages) in an almost empty environment.

    Editable installs of pgolf are files in site-packages, so Python starts without it (-S) and gets the
    libraries as one plain folder, in which an import of pgolf fails. PyTorch is loaded already (`forks`).
    """
    start = f"import sys; sys.path.append({libraries()!r}); sys.argv = sys.argv[1:]; import runpy\n{NO_PGOLF}"
    start += "runpy.run_path(sys.argv[0], run_name='__main__')"
    return forks.run(
        ["-c", start, *arguments],
        cwd=cwd,
        env={"CXX": os.environ["CXX"], **(environment or {})},
        start=(sys.executable, "-I", "-S", "-c", start, forks.__file__),
        modules=("torch",),
    )


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """The folder that `pgolf artifact code` writes."""
    folder = tmp_path_factory.mktemp("counted") / "code"
    assert main(["artifact", "code", str(folder)]) == 0
    return folder


def alone(run: Path, code: Path, folder: Path) -> None:
    """Put a program and an artifact, and nothing else, into a folder."""
    folder.mkdir()
    (folder / CODE_NAME).write_bytes((code / CODE_NAME).read_bytes())
    (folder / "model.pgolf").write_bytes((run / "model.pgolf").read_bytes())


def test_the_command_says_what_counts(tmp_path, capsys):
    assert main(["artifact", "code", str(tmp_path / "code")]) == 0
    assert f"{code_bytes():,} bytes counted" in capsys.readouterr().out
    assert (tmp_path / "code" / CODE_NAME).stat().st_size == code_bytes()
    assert main(["artifact", "code", str(tmp_path / "code")]) == 2


def test_the_program_scores_in_an_empty_folder_as_the_package_does(run, code, shards, tmp_path, one_thread):
    alone(run, code, tmp_path / "alone")
    done = bare(CODE_NAME, "model.pgolf", "--data", str(shards), cwd=tmp_path / "alone")
    assert done.returncode == 0, done.stderr[-2000:]
    model = load_model(run / "model.pgolf", "cpu")
    data_folder = DataFolder.open(shards, vocab_size=model.config.vocab_size)
    found = score_model(model, data_folder, 512, Dist.start("cpu"))
    assert float(done.stdout.split()[0]) == pytest.approx(found.bpb, abs=1e-6)
    counted = json.loads((run / "summary.json").read_text())["bytes"]["total"]
    assert f"= {counted:,} bytes" in done.stdout
    assert {p.name for p in (tmp_path / "alone").iterdir()} == {CODE_NAME, "model.pgolf"}


def test_its_weights_are_those_of_the_package_bit_for_bit(run, code, tmp_path):
    (tmp_path / "weights.py").write_text(WEIGHTS)
    arguments = [str(run / "model.pgolf"), str(code), str(tmp_path / "weights.pt")]
    done = bare("weights.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found, ours = torch.load(tmp_path / "weights.pt"), read_artifact(run / "model.pgolf").state
    assert found.keys() == ours.keys() and len(ours) > 5
    for name, value in ours.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def general(run, shards, tmp_path_factory):
    """The folder that `pgolf artifact code --coder lzma` writes, with the run's weights in an lzma file."""
    folder = tmp_path_factory.mktemp("general") / "code"
    assert main(["artifact", "code", str(folder), "--coder", "lzma"]) == 0
    words = ["--data", str(shards), "--out", str(folder / "model.pgolf"), "--artifact.coder", "lzma"]
    assert main(["quantize", str(run / "ema.safetensors"), *words]) == 0
    return folder


def test_a_file_of_a_general_compressor_is_scored_without_a_compiler(run, general, shards, tmp_path):
    alone(general, general, tmp_path / "alone")
    words = [CODE_NAME, "model.pgolf", "--data", str(shards)]
    done = bare(*words, cwd=tmp_path / "alone", environment={"CXX": "false"})
    assert done.returncode == 0, done.stderr[-2000:]
    size = (general / "model.pgolf").stat().st_size
    assert (
        f"model {size:,} + code {code_bytes('lzma'):,} = {size + code_bytes('lzma'):,} bytes" in done.stdout
    )
    model = load_model(general / "model.pgolf", "cpu")
    data_folder = DataFolder.open(shards, vocab_size=model.config.vocab_size)
    found = score_model(model, data_folder, 512, Dist.start("cpu"))
    assert float(done.stdout.split()[0]) == pytest.approx(found.bpb, abs=1e-6)
    (tmp_path / "alone" / "model.pgolf").write_bytes((run / "model.pgolf").read_bytes())
    done = bare(*words, cwd=tmp_path / "alone")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "written with pgolf's range coder, which this program left out" in done.stderr


@pytest.mark.parametrize("coder", ["range", "brotli", "lzma", "zlib"])
def test_the_program_of_the_range_coder_reads_every_coder_bit_for_bit(run, code, tmp_path, coder):
    path = tmp_path / "model.pgolf"
    header, state = read_state(run / "model.pgolf")
    write_artifact(
        path,
        state,
        header.model,
        tokenizer_sha256=header.tokenizer_sha256,
        config_hash=header.config_hash,
        limit=header.limit,
        quality=1,
        coder=coder,
    )
    (tmp_path / "weights.py").write_text(WEIGHTS)
    done = bare("weights.py", str(path), str(code), str(tmp_path / "weights.pt"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found, ours = torch.load(tmp_path / "weights.pt"), read_artifact(run / "model.pgolf").state
    assert found.keys() == ours.keys() and all(torch.equal(found[name], ours[name]) for name in ours)


def test_every_way_to_score_agrees(run, code, shards, tmp_path, one_thread):
    (tmp_path / "scores.py").write_text(SCORES)
    done = bare("scores.py", str(run / "model.pgolf"), str(shards), str(code), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    model = load_model(run / "model.pgolf", "cpu")
    data_folder = DataFolder.open(shards, vocab_size=model.config.vocab_size)
    text, dist = data_folder.validation(documents=2), Dist.start("cpu")
    settings = EvaluateConfig(
        stride=16,
        adapters=TttConfig(rank=2, members=2),
        tilt=TiltConfig(on=True, order=3),
        sgd=SgdConfig(chunk_tokens=512, epochs=1),
        phases=PhasesConfig(
            documents=1, count=1, chunk_tokens=512, adapters=TttConfig(rank=2, batch_documents=1)
        ),
    )
    scores = json.loads(done.stdout.splitlines()[-1])
    assert list(scores) == list(METHODS)
    for mode, bpb in scores.items():
        ours = score_as(mode, model, data_folder, text, dist, batch_tokens=512, settings=settings).bpb
        assert bpb == pytest.approx(ours, abs=1e-6), mode


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["model.pgolf"], {"CXX": "no-such-compiler"}, "no C++ compiler 'no-such-compiler' found"),
        (["model.pgolf"], {"CXX": "false"}, "'false' could not compile the coder of the model file"),
        (["absent.pgolf"], {}, "no artifact at absent.pgolf"),
        (["torn.pgolf"], {}, "artifact"),
        (["model.pgolf", "--config", "absent.json"], {}, "absent.json is not the config.json of a run"),
    ],
)
def test_what_a_user_can_cause_is_one_sentence(run, code, shards, tmp_path, arguments, environment, message):
    folder = tmp_path / "alone"
    alone(run, code, folder)
    (folder / "torn.pgolf").write_bytes((run / "model.pgolf").read_bytes()[:4000])
    done = bare(CODE_NAME, *arguments, "--data", str(shards), cwd=folder, environment=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_the_settings_of_the_run_are_those_of_its_config(run, code, shards, tmp_path):
    folder = tmp_path / "alone"
    alone(run, code, folder)
    saved = json.loads((run / "config.json").read_text())
    saved["evaluate"]["stride"] = 16  # a sliding window would then have another score than segments
    saved["train"]["attention"] = "doc"  # whose kernels the program does not have
    (folder / "config.json").write_text(json.dumps(saved))
    found = {}
    for words in ((), ("--mode", "sliding"), ("--ttt",)):
        done = bare(CODE_NAME, "model.pgolf", "--data", str(shards), *words, cwd=folder)
        assert done.returncode == 0, done.stderr[-2000:]
        assert os.linesep in done.stdout
        found[words[-1] if words else "plain"] = float(done.stdout.split()[0])
    scores = json.loads((run / "summary.json").read_text())["scores"]
    assert found["plain"] == pytest.approx(scores["quantized"]["bpb"], abs=1e-6)
    assert len(set(found.values())) == 3
