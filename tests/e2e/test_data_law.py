"""All verbs refuse a data folder that differs from its manifest; results on a folder without one say so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pgolf.cli.main import main
from pgolf.data.manifest import NO_MANIFEST
from pgolf.data.shards import read_shard, write_shard
from pgolf.data.text import iterate_documents, sample_paths
from pgolf.data.tokenizer import train_tokenizer
from pgolf.evaluate.validation import DataFolder
from pgolf.files import file_sha256
from tests.e2e.conftest import SMALL, VAL_DOCUMENTS, VAL_TOKENS

SIDE = "text_val_bytes_000000.bin"


def double(folder: Path) -> None:
    write_shard(folder / SIDE, 2 * np.array(read_shard(folder / SIDE)))


def swap_tokenizer(folder: Path) -> None:
    texts = (document.text for document in iterate_documents(sample_paths().train))
    train_tokenizer(texts, folder / "tokenizer.model", vocab_size=512)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "doubled sidecar": (double, f"{SIDE}: SHA-256 is"),
    "missing shard": (
        lambda f: [p.unlink() for p in f.glob("*_val_*")],
        "text_val_000000.bin, which does not ex",
    ),
    "stray shard": (
        lambda f: shutil.copyfile(f / "text_train_000000.bin", f / "x_train_000007.bin"),
        "holds x_train_000007.bin, which manifest.json does not list",
    ),
    "swapped tokenizer": (swap_tokenizer, "tokenizer.model: SHA-256 is"),
    "unfinished": (lambda f: (f / "UNFINISHED").write_text("the command\n"), "finish it with: the command"),
}


def command(verb: str, run: Path, data: Path, out: Path) -> list[str]:
    return {
        "train": ["train", "tiny", "--data", str(data), "--out", str(out), *SMALL],
        "evaluate": ["evaluate", str(run / "model.pgolf"), "--data", str(data)],
        "quantize": ["quantize", str(run / "raw.safetensors"), "--data", str(data), "--out", str(out)],
        "inspect": ["data", "inspect", str(data)],
        "submit": ["submit", str(run), "--data", str(data), "--out", str(out)],
    }[verb]


@pytest.mark.parametrize("verb", ["train", "evaluate", "quantize", "inspect", "submit"])
@pytest.mark.parametrize("case", DAMAGE)
def test_every_verb_refuses_what_is_not_as_the_manifest_says(
    shards: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, case: str
) -> None:
    damage, message = DAMAGE[case]
    if (verb, case) == ("submit", "swapped tokenizer"):
        message = "the runs' tokenizer"  # it knows which it must be, and looks at nothing else before
    data = Path(shutil.copytree(shards, tmp_path / "shards"))
    damage(data)
    assert main(command(verb, run, data, tmp_path / "out")) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_keeps_what_the_manifest_said(shards: Path, run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    said = json.loads((shards / "manifest.json").read_text())["splits"]["val"]
    assert summary["data"] == {"manifest": file_sha256(shards / "manifest.json"), "validation": said}
    assert (
        f"{VAL_DOCUMENTS} documents, {said['tokens']:,} tokens, {said['bytes']:,} bytes"
        in (run / "log.txt").read_text()
    )


def test_the_hash_of_training_shards_is_checked_on_request(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(shards, tmp_path / "shards"))
    path = next(data.glob("*_train_*.bin"))
    ids = np.array(read_shard(path))
    write_shard(path, np.concatenate((ids[:1], ids[1:][::-1])))
    opened = DataFolder.open(data, vocab_size=512)
    assert opened.manifest is not None and "is as its manifest.json says" in opened.checked
    assert "not checked: SHA-256, documents and bytes (data.verify checks the first two)" in opened.checked
    whole = DataFolder.open(shards, vocab_size=512, verify=True)
    assert whole.checked.endswith("not checked: the bytes of the training text")
    out = str(tmp_path / "out")
    assert main(["train", "tiny", "--data", str(data), "--out", out, *SMALL, "--data.verify"]) == 2
    assert f"{path.name}: SHA-256 is" in capsys.readouterr().err
    assert main(["data", "inspect", str(data)]) == 2
    assert f"{path.name}: SHA-256 is" in capsys.readouterr().err


def test_results_on_another_tools_folder_say_so(
    shards: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(shards, tmp_path / "shards"))
    for name in ("plain", "bare"):
        if name == "bare":
            (data / "manifest.json").unlink()
        found = tmp_path / f"{name}.json"
        words = ["--documents", "2", "--tokens", "2048", "--json", str(found)]
        assert main([*command("evaluate", run, data, tmp_path), *words]) == 0
        assert (NO_MANIFEST in capsys.readouterr().out) == (name == "bare")
        told = json.loads(found.read_text())["data"]
        assert (told["manifest"] is None) == (told["checked"] == NO_MANIFEST) == (name == "bare")
    out, short = str(tmp_path / "out"), ["--steps=1", "--train.no-quantize"]
    assert main(["train", "tiny", "--data", str(data), "--out", out, *SMALL, *short]) == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert json.loads((folder / "summary.json").read_text())["data"] == {"manifest": None}
    assert NO_MANIFEST in (folder / "log.txt").read_text()
    assert main(["data", "inspect", str(data)]) == 0
    assert NO_MANIFEST in capsys.readouterr().out


def test_documents_without_bytes_are_refused_before_they_are_scored(
    shards: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, texts in (("t", ["something to train on"]), ("v", ["", "held out"])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    paths = ["--train", str(tmp_path / "t.jsonl"), "--val", str(tmp_path / "v.jsonl")]
    model = ["--tokenizer", str(shards / "tokenizer.model"), "--out", str(tmp_path / "out")]
    assert main(["data", "shards", *paths, *model]) == 0
    score = command("evaluate", run, tmp_path / "out", tmp_path)
    assert main([*score, "--documents", "1"]) == 2
    assert "the 1 tokens to score have no bytes" in capsys.readouterr().err
    assert main([*score, "--documents", "2", "--tokens", "2048"]) == 0


def test_evaluate_says_how_many_documents_it_scored(
    shards: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score = [*command("evaluate", run, shards, tmp_path), "--tokens", "2048", "--json", str(tmp_path / "j")]
    for asked, note in (("3", "first 3 documents only"), ("1000000", ""), (str(VAL_DOCUMENTS), "")):
        assert main([*score, "--documents", asked]) == 0
        out = capsys.readouterr().out
        assert note in out and ("documents only" in out) == bool(note)
        told = json.loads((tmp_path / "j").read_text())
        assert told["documents"] == (3 if note else "all")
        assert (told["scores"]["plain"]["tokens"] == VAL_TOKENS) == (not note)


def test_evaluate_refuses_what_it_cannot_do_before_it_reads_the_data(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "none"
    for artifact, more, message in (
        ("model.pgolf", ["--json", str(tmp_path / "a" / "j")], f"no folder {tmp_path / 'a'} for --json"),
        ("model.pgolf", ["--json", str(tmp_path)], f"--json {tmp_path} is a folder, expected a file"),
        ("model.pgolf", ["--tokens", "63"], "--tokens must be at least the model's max_context, 64, got 63"),
        ("raw.safetensors", [], f"{run / 'raw.safetensors'} is a checkpoint, expected an artifact"),
        ("", [], f"{run} is a folder, expected an artifact; pass {run / 'model.pgolf'}"),
        ("log.txt", [], str(run / "log.txt")),
    ):
        assert main(["evaluate", str(run / artifact), "--data", str(nowhere), *more]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
