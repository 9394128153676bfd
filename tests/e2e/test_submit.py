"""`pgolf submit`: the folder of small runs, what is refused, and that the folder alone can be scored."""

import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import brotli
import pytest

from pgolf import _C
from pgolf.artifact.code import TRAIN, code_program, reader_code
from pgolf.cli.main import main
from pgolf.data.text import sample_paths
from pgolf.report import submit
from pgolf.report.submit import LIBRARIES
from tests.e2e.conftest import SMALL, VAL_BYTES, VAL_DOCUMENTS, VAL_TOKENS

TTT = [f"--evaluate.adapters.{word}" for word in ("rank=2", "chunk=64", "chunk-max=64", "batch-tokens=8192")]


@pytest.fixture(scope="module")
def seeds(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs with a clock and test-time training, seeds 42 and 43."""
    out = tmp_path_factory.mktemp("seeds")
    words = [
        "train",
        "tiny",
        "--data",
        str(shards),
        *SMALL,
        "--seconds=60",
        "--steps=2",
        "--evaluate.ttt",
        *TTT,
    ]
    for seed in (42, 43):
        assert main([*words, "--out", str(out / str(seed)), "--seed", str(seed)]) == 0
    return [folder for seed in (42, 43) for folder in (out / str(seed)).iterdir()]


def write(runs: list[Path], out: Path, *more: str) -> int:
    return main(["submit", *map(str, runs), "--out", str(out), *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def written(seeds: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("record") / "record"
    assert write(seeds, out, "--author=Somebody", "--name=Small") == 0
    return out


def test_the_folder_holds_all_of_a_submission(written, seeds):
    both = {
        f"{name}{seed}{end}"
        for seed in (42, 43)
        for name, end in (("model_seed", ".pgolf"), ("train_seed", ".log"))
    }
    whole = {
        "README.md",
        "submission.json",
        "config.json",
        "evaluate_gpt.py",
        "requirements.txt",
        "tokenizer.model",
    }
    names = set(contents(written))
    assert names == both | whole
    assert [p.name for p in written.parent.iterdir()] == ["record"], "nothing is left beside it"
    data = json.loads((written / "submission.json").read_text())
    found = [json.loads((run / "summary.json").read_text()) for run in seeds]
    assert data["val_bpb"] == pytest.approx(sum(s["scores"]["ttt"]["bpb"] for s in found) / 2)
    assert data["seeds"] == [42, 43] and data["headline_score"] == "ttt" and "track" not in data
    assert data["bytes_total"] == max(s["bytes"]["total"] for s in found)
    text = (written / "README.md").read_text()
    assert text.startswith("# Small\n") and text.isascii()
    assert "seed 42 | seed 43 | mean | standard deviation" in text
    assert f"{VAL_DOCUMENTS} documents; decoding their ids gives back every byte" in text
    assert all(f"`{name}`" in text for name in names - {"README.md"})


def test_the_same_runs_give_the_same_bytes_in_any_order(written, seeds, tmp_path):
    assert write(seeds[::-1], tmp_path / "again", "--author=Somebody", "--name=Small") == 0
    assert contents(tmp_path / "again") == contents(written)


def test_the_folder_scores_with_nothing_else_of_pgolf(written, seeds, shards, tmp_path):
    (tmp_path / "pgolf.py").write_text("raise ImportError('another pgolf was imported')")
    scores = json.loads((seeds[0] / "summary.json").read_text())["scores"]
    for name, more in (("quantized", []), ("ttt", ["--ttt"])):
        done = scored(written, shards, tmp_path, "evaluate_gpt.py", *more)
        assert done.returncode == 0, done.stderr[-2000:]
        assert float(done.stdout.split()[0]) == pytest.approx(scores[name]["bpb"], abs=1e-5)
        total = json.loads((seeds[0] / "summary.json").read_text())["bytes"]["total"]
        assert f"= {total:,} bytes" in done.stdout


def scored(folder: Path, shards: Path, path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program of a submission on its first model, with `path` in front of the installed packages."""
    program, *more = command
    return subprocess.run(
        [sys.executable, program, "model_seed42.pgolf", "--data", str(shards), *more],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_older_run_keeps_its_code_which_needs_the_extension(seeds, shards, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(seeds[0], run)
    (run / "evaluate_gpt.py").unlink()
    package = Path(_C.__file__).parent
    sources = {p.relative_to(package.parent): p.read_text() for p in sorted(package.rglob("*.py"))}
    text = "".join(f"# {path}\n{source}\n" for path, source in sources.items())
    (run / "code.br").write_bytes(brotli.compress(text.encode(), quality=4))
    code = (run / "code.br").stat().st_size
    edited(run, "summary.json", lambda s: s["bytes"].update(code=code, total=s["bytes"]["model"] + code))
    assert write([run], tmp_path / "out") == 0
    assert (tmp_path / "out" / "code.br").stat().st_size == code
    assert not (tmp_path / "out" / "evaluate_gpt.py").exists()
    assert "compiled extension" in (tmp_path / "out" / "README.md").read_text()
    stub = tmp_path / "path" / "pgolf"
    stub.mkdir(parents=True)
    (stub / "__init__.py").touch()
    (stub / Path(_C.__file__).name).symlink_to(_C.__file__)
    (stub / "_C.cpython-39-other.so").write_bytes(b"of another Python")
    done = scored(tmp_path / "out", shards, stub.parent, "score.py")
    assert done.returncode == 0, done.stderr[-2000:]
    bpb = json.loads((run / "summary.json").read_text())["scores"]["quantized"]["bpb"]
    assert float(done.stdout.split()[0]) == pytest.approx(bpb, abs=1e-5)


def test_requirements_are_what_the_counted_code_imports(written):
    nodes = [node for source in reader_code().values() for node in ast.walk(ast.parse(source))]
    names = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    foreign = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"pgolf"}
    assert foreign == {*LIBRARIES, "flash_attn"}
    lines = (written / "requirements.txt").read_text().splitlines()
    assert [line.split("==")[0] for line in lines] == list(LIBRARIES)
    assert all(re.fullmatch(r"[a-z]+==[0-9.]+", line) for line in lines)


def edited(run: Path, name: str, change: Callable[[dict], object]) -> None:
    data = json.loads((run / name).read_text())
    change(data)
    (run / name).write_text(json.dumps(data))


def summary_with(change: Callable[[dict], object]) -> Callable[[Path], object]:
    return lambda run: edited(run, "summary.json", change)


def rescaled(score: dict, **changes: int) -> None:
    """Change the text that a score is about, and all figures that depend on it, so that they agree."""
    score.update(changes)
    score["bpb"] = score["nats"] / math.log(2) / score["bytes"]
    score["loss"] = score["nats"] / score["tokens"]


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no summary": (
        lambda run: (run / "summary.json").unlink(),
        "holds no summary.json: the run is not finished",
    ),
    "no log": (lambda run: (run / "log.txt").unlink(), "holds no log.txt, which a run writes"),
    "no json": (lambda run: (run / "summary.json").write_text("{"), "summary.json is not JSON"),
    "no entry": (summary_with(lambda s: s.pop("device")), "summary.json has no 'device'"),
    "no ledger": (summary_with(lambda s: s.update(bytes=None)), "the run is not finished"),
    "no ttt": (
        summary_with(lambda s: s["scores"].pop("ttt")),
        "has no score ttt, which config.json asks for",
    ),
    "too big": (
        summary_with(lambda s: s["bytes"].update(total=16_000_007, code=16_000_007 - s["bytes"]["model"])),
        "artifact is 16_000_007 bytes with its code, limit 16_000_000, 7 too many",
    ),
    "a total of its own": (
        summary_with(lambda s: s["bytes"].update(total=s["bytes"]["total"] - 5)),
        "bytes: total is .*, but its parts sum to",
    ),
    "a section less": (
        summary_with(lambda s: s["bytes"]["parts"].popitem()),
        "bytes: model is .*, but its parts sum to",
    ),
    "a section below zero": (
        summary_with(lambda s: s["bytes"]["parts"].update(header=-4)),
        "bytes: header is -4, expected a whole number of bytes",
    ),
    "another limit": (
        summary_with(lambda s: s["bytes"].update(limit=17_000_000)),
        "limit is 17,000,000, config.json says artifact.limit=16,000,000",
    ),
    "a clock that is no number": (
        summary_with(lambda s: s["seconds"].update(clock=math.nan)),
        "seconds of clock are nan, expected a number >= 0",
    ),
    "seconds below zero": (
        summary_with(lambda s: s["seconds"].update(save=-1.0)),
        "seconds of save are -1.0, expected a number >= 0",
    ),
    "an endless score": (
        summary_with(lambda s: s["scores"]["ttt"].update(seconds=math.inf)),
        "score ttt took inf s",
    ),
    "tokens of other steps": (
        summary_with(lambda s: s["train"].update(steps=3)),
        "4,096 training tokens, but 3 steps of data.batch_tokens=2,048 are 6,144",
    ),
    "training beyond the clock": (
        summary_with(lambda s: s["seconds"].update(train=s["seconds"]["clock"] + 5)),
        "training took .* s of a clock of",
    ),
    "an overrun that the clock denies": (
        summary_with(lambda s: s.update(overrun=7.5)),
        r"overrun is 7\.5, but a clock of .* s is 0.00 s above train.seconds=60",
    ),
    "sessions that are none": (
        summary_with(lambda s: s.update(sessions="two")),
        "summary.json: sessions is 'two', expected a list",
    ),
    "a session without an end": (
        summary_with(lambda s: s["sessions"].insert(0, {**s["sessions"][0], "end": None})),
        "a session is {'started': .*, which no run writes",
    ),
    "a session without a beginning": (
        summary_with(lambda s: s["sessions"].insert(0, {"lost_seconds": 1.0})),
        "each of sessions has no 'started', which a run writes",
    ),
    "seconds in a list": (
        summary_with(lambda s: s.update(seconds=[1, 2])),
        r"summary.json: seconds is \[1, 2\], expected an object",
    ),
    "a commit in numbers": (
        summary_with(lambda s: s.update(commit=7)),
        "summary.json: commit is 7, expected a string",
    ),
    "counts of the text in words": (
        summary_with(lambda s: s["data"].update(validation={"tokens": "many"})),
        "data, validation is {'tokens': 'many'}, expected whole numbers",
    ),
    "a key twice": (
        lambda run: (run / "config.json").write_text('{"name": "a", "name": "b"}'),
        r"config.json: given twice: 'name'; give every key once",
    ),
    "too slow": (
        summary_with(lambda s: [s["seconds"].update(clock=60.5), s.update(overrun=0.5)]),
        "the clock stopped at 60.50 s, train.seconds=60, 0.50 s too late",
    ),
    "a checkpoint": (
        lambda run: edited(run, "config.json", lambda c: c["train"].update(init="old/raw.safetensors")),
        "the run started from old/raw.safetensors, whose training its clock does not hold",
    ),
    "no artifact": (
        lambda run: [
            (run / "model.pgolf").unlink(),
            edited(
                run,
                "config.json",
                lambda c: [c["train"].update(quantize=False), c["evaluate"].update(ttt=False)],
            ),
        ],
        "the run made no artifact, train.quantize is off",
    ),
    "other settings": (
        lambda run: edited(run, "config.json", lambda c: c["train"].update(steps=3)),
        "they are of different runs, or one was edited",
    ),
    "other bytes": (
        summary_with(lambda s: s["bytes"].update(model=5, total=5 + s["bytes"]["code"], parts={"all": 5})),
        "summary.json says 5; it is not this run's",
    ),
    "torn artifact": (lambda run: os.truncate(run / "model.pgolf", 4000), "artifact"),
    "other code": (
        lambda run: (run / "evaluate_gpt.py").write_bytes(b"x"),
        "use the tree that ran it",
    ),
    "other machine": (
        summary_with(lambda s: s.update(world_size=8, device="GPU")),
        r"differ in more than the seed: device \(GPU and CPU\), world_size \(8 and 1\); submit them",
    ),
    "other text": (
        summary_with(lambda s: [rescaled(score, bytes=7) for score in s["scores"].values()]),
        rf"bytes of the validation text \(7 and {VAL_BYTES}\)",
    ),
    "an edited bpb": (
        summary_with(lambda s: s["scores"]["quantized"].update(bpb=0.9)),
        rf"score quantized: bpb is 0\.9, but its .* nats over {VAL_TOKENS:,} tokens and {VAL_BYTES:,} bytes",
    ),
    "an edited bpb of another score": (
        summary_with(lambda s: s["scores"]["ema"].update(bpb=s["scores"]["ema"]["bpb"] * (1 - 1e-6))),
        "score ema: bpb is",
    ),
    "an edited loss": (
        summary_with(lambda s: s["scores"]["ttt"].update(loss=1.5)),
        r"score ttt: loss is 1\.5, but its",
    ),
    "edited nats": (summary_with(lambda s: s["scores"]["ttt"].update(nats=1e5)), "score ttt: bpb is"),
    "no number": (
        summary_with(lambda s: s["scores"]["raw"].update(bpb="4.1")),
        "score raw: bpb is '4.1', expected a number, as a run writes it",
    ),
    "NaN": (
        summary_with(lambda s: s["scores"]["raw"].update(bpb=math.nan, nats=math.nan)),
        "score raw: nats is nan, expected a number above 0",
    ),
    "a score of less text": (
        summary_with(lambda s: rescaled(s["scores"]["ttt"], tokens=100)),
        f"score ttt is over 100 tokens, quantized over {VAL_TOKENS:,}",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_run_that_cannot_stand_in_a_record_is_refused(seeds, tmp_path, capsys, case):
    change, message = DAMAGE[case]
    shutil.copytree(seeds[0], tmp_path / "run")
    change(tmp_path / "run")
    assert write([tmp_path / "run", seeds[1]], tmp_path / "out") == 2
    assert re.search(message, capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == ["run"], "nothing is written"


def test_a_seed_twice_other_settings_and_no_run_are_refused(seeds, run, tmp_path, capsys):
    assert write([seeds[0], seeds[0]], tmp_path / "out") == 2
    assert "seed 42 twice, in" in capsys.readouterr().err
    assert write([run, seeds[1]], tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "train.seconds (0.0 and 60.0)" in err and "evaluate.ttt (False and True)" in err
    assert "train.seed" not in err and "train.out" not in err
    assert write([tmp_path / "none"], tmp_path / "out") == 2
    assert "no run folder at" in capsys.readouterr().err
    assert write([], tmp_path / "out") == 2
    assert "at least one run folder, got none" in capsys.readouterr().err


def test_a_run_of_a_number_of_steps_says_that_no_clock_limited_it(run, tmp_path):
    assert write([run], tmp_path / "out") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "No clock limited these runs" in text and "seed 42 (one seed)" in text
    # This run, unlike those of `seeds`, has drawn its losses.
    assert (tmp_path / "out" / "loss_seed42.png").read_bytes() == (run / "loss.png").read_bytes()
    assert "`loss_seed42.png`" in text


def test_a_folder_that_is_there_is_kept_unless_it_is_a_record_to_overwrite(
    seeds, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    out.mkdir()
    assert write(seeds, out) == 0, "an empty one is taken"
    capsys.readouterr()
    assert write(seeds[:1], out) == 2
    assert "already holds a submission; pass --overwrite" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(submit, "readme", lambda *_: 1 / 0)
        assert write(seeds[:1], out, "--overwrite") == 2
        assert "ZeroDivisionError" in capsys.readouterr().err
    assert (out / "model_seed43.pgolf").is_file() and list(tmp_path.iterdir()) == [out], "the old one, whole"
    assert write(seeds[:1], out, "--overwrite") == 0
    assert not (out / "model_seed43.pgolf").exists() and list(tmp_path.iterdir()) == [out]
    (out / "run").mkdir()
    assert write([out / "run"], out, "--overwrite") == 2
    assert "holds runs" in capsys.readouterr().err
    (out / "model_seed42.txt").touch()
    assert write(seeds[:1], out, "--overwrite") == 2
    assert (
        "holds model_seed42.txt, run, no part of a submission, which would be lost" in capsys.readouterr().err
    )
    (out / "submission.json").unlink()
    assert write(seeds[:1], out, "--overwrite") == 2
    assert "is there and is not a submission folder" in capsys.readouterr().err


def test_the_tokenizer_is_the_runs_own_or_said_to_be_missing(seeds, shards, tmp_path, capsys, monkeypatch):
    (tmp_path / "data").mkdir()
    assert write(seeds, tmp_path / "out", "--data", str(tmp_path / "data")) == 2
    assert "no tokenizer.model in" in capsys.readouterr().err
    (tmp_path / "data" / "tokenizer.model").write_bytes(b"another")
    assert write(seeds, tmp_path / "out", "--data", str(tmp_path / "data")) == 2
    assert "the runs' tokenizer" in capsys.readouterr().err
    monkeypatch.setattr(submit, "_shards", lambda *_: None)
    assert write(seeds, tmp_path / "own") == 0
    assert contents(tmp_path / "own")["tokenizer.model"] == (shards / "tokenizer.model").read_bytes()
    for run, own in zip(seeds, (tmp_path / "a", tmp_path / "b"), strict=True):
        shutil.copytree(run, own)
    (tmp_path / "a" / "tokenizer.model").unlink()
    (tmp_path / "b" / "tokenizer.model").write_bytes(b"another")
    assert write([tmp_path / "a", tmp_path / "b"], tmp_path / "out") == 0
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    assert "it was not found" in (tmp_path / "out" / "README.md").read_text()


WHOLE = f"Scored over the whole validation text: {VAL_TOKENS:,} tokens, {VAL_BYTES:,} bytes"


@pytest.fixture
def other(shards: Path, tmp_path: Path) -> Path:
    """Shards of another validation text with the runs' tokenizer."""
    (tmp_path / "v.jsonl").write_text('{"text": "another text"}\n')
    words = [
        "--train",
        str(sample_paths().val),
        "--val",
        str(tmp_path / "v.jsonl"),
        "--out",
        str(tmp_path / "s"),
    ]
    assert main(["data", "shards", *words, "--tokenizer", str(shards / "tokenizer.model")]) == 0
    return tmp_path / "s"


def test_the_whole_text_is_certified_only_by_a_manifest_with_the_scored_counts(
    written, seeds, other, tmp_path, capsys
):
    assert WHOLE in (written / "README.md").read_text()
    certified = json.loads((written / "submission.json").read_text())["val_text"]
    assert certified == "both counts agree with the manifest of the shards"
    assert write(seeds, tmp_path / "out", "--data", str(other)) == 2
    assert f"scored {VAL_TOKENS:,} tokens, the manifest's text has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_shards_what_the_runs_kept_certifies_or_does_not(
    seeds, other, tmp_path, monkeypatch, capsys
):
    def kept(change: Callable[[dict], object]) -> str:
        out = tmp_path / "out"
        run = Path(shutil.copytree(seeds[0], tmp_path / "run", dirs_exist_ok=True))
        edited(run, "summary.json", change)
        assert write([run, seeds[1]], out, *(["--overwrite"] if out.exists() else [])) == 0
        text = (out / "README.md").read_text()
        certified = json.loads((out / "submission.json").read_text())["val_text"]
        assert certified in text and (WHOLE in text) != ("not known to be the whole text" in text)
        assert ("not known" in capsys.readouterr().out) == (WHOLE not in text)
        return certified

    monkeypatch.setattr(submit, "_shards", lambda *_: None)
    assert "that the runs checked" in kept(lambda s: None)
    assert "the run rested on no manifest" in kept(lambda s: s.pop("data"))
    assert "the run rested on no manifest" in kept(lambda s: s.update(data={"manifest": None}))
    assert "rested on different manifests" in kept(lambda s: s["data"].update(manifest="0" * 64))
    assert f"{VAL_BYTES:,} bytes, the manifest's text has {VAL_BYTES + 1:,}" in kept(
        lambda s: s["data"]["validation"].update(bytes=VAL_BYTES + 1)
    )
    # The folder that the run names has another text now.
    monkeypatch.setattr(submit, "_shards", lambda *_: other)
    assert "that the runs checked" in kept(lambda s: None)
    assert "the run rested on no manifest" in kept(lambda s: s.pop("data"))


def test_a_manifest_that_is_there_certifies_only_runs_that_rested_on_it(seeds, shards, tmp_path, capsys):
    """Its counts are those of the scores all along."""
    runs = [Path(shutil.copytree(run, tmp_path / run.name)) for run in seeds]
    for data in ({"manifest": None}, None):
        for run in runs:
            edited(run, "summary.json", lambda s, data=data: s.update(data=data) if data else s.pop("data"))
        for number, more in enumerate(([], ["--data", str(shards)])):
            out = tmp_path / f"out{number}"
            assert write(runs, out, "--overwrite", *more) == 0
            told = json.loads((out / "submission.json").read_text())["val_text"]
            assert told == "not known to be the whole text: the run rested on no manifest"
            text = (out / "README.md").read_text()
            assert WHOLE not in text and "decoding their ids" not in text
    counts = json.loads((seeds[0] / "summary.json").read_text())["data"]["validation"]
    for run in runs:
        edited(run, "summary.json", lambda s: s.update(data={"manifest": "ab" * 32, "validation": counts}))
    capsys.readouterr()
    assert write(runs, tmp_path / "out", "--data", str(shards)) == 2
    assert re.search(r"its manifest.json has SHA-256 .*rested on abab", capsys.readouterr().err)
    assert write(runs, tmp_path / "out") == 0, "the folder is another by now, but the runs kept their counts"
    told = json.loads((tmp_path / "out" / "submission.json").read_text())["val_text"]
    assert told.endswith("that the runs checked")


def test_runs_from_before_their_code_was_kept_are_recorded_by_a_tree_of_the_same_code(
    seeds, tmp_path, monkeypatch, capsys
):
    shutil.copytree(seeds[0], tmp_path / "run")
    code = (tmp_path / "run" / "evaluate_gpt.py").read_bytes()
    (tmp_path / "run" / "evaluate_gpt.py").unlink()
    assert write([tmp_path / "run"], tmp_path / "out") == 0
    assert (tmp_path / "out" / "evaluate_gpt.py").read_bytes() == code
    monkeypatch.setattr("pgolf.report.finished_runs.counted_code", lambda *_: b"changed")
    assert write([tmp_path / "run"], tmp_path / "other") == 2
    assert "the code of this tree (the run kept none) has 7" in capsys.readouterr().err


def test_a_run_can_count_the_program_that_trains_as_the_challenge_asks(shards, tmp_path, capsys):
    words = [
        "train",
        "tiny",
        "--data",
        str(shards),
        *SMALL,
        "--seconds=60",
        "--steps=2",
        "--artifact.program=train",
    ]
    assert main([*words, "--out", str(tmp_path / "runs")]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    program = code_program(TRAIN)
    assert (run / "train_gpt.py").read_bytes() == program and not (run / "evaluate_gpt.py").exists()
    counted = json.loads((run / "summary.json").read_text())["bytes"]
    assert counted["code"] == len(program) > len(code_program())
    assert main(["size", str(run)]) == 0
    assert re.search(rf"code +{len(program):,} bytes", capsys.readouterr().out)
    out = tmp_path / "out"
    assert write([run], out, "--author=Somebody", "--name=Small") == 0
    assert (out / "train_gpt.py").read_bytes() == program and not (out / "evaluate_gpt.py").exists()
    done = scored(out, shards, tmp_path, "train_gpt.py", "--evaluate")
    assert done.returncode == 2 and "model_seed42.pgolf" in done.stderr, "--evaluate comes before the file"
    main(["submit", "--check", str(out)])
    said = capsys.readouterr().out
    failed = [line for line in said.splitlines() if line.startswith("fails")]
    assert "train_gpt.py is there" in said
    assert failed == ["fails   seeds     1 seeds: 42; 3 are the norm"]
