"""A folder that differs from its manifest is refused; the error names the file and how to correct it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgolf.data.build import ShardsJob, build_shards
from pgolf.data.loader import load_validation
from pgolf.data.manifest import verify_folder
from pgolf.data.shards import read_shard, write_shard
from pgolf.data.text import iterate_documents, sample_paths
from pgolf.data.tokenizer import Tokenizer, train_tokenizer

TEXTS = [f"document {n} is held out, {'word ' * n}" for n in range(12)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder with several shards of both splits."""
    folder = tmp_path_factory.mktemp("made")
    for split in ("val", "train"):
        lines = (json.dumps({"text": f"{split} {text}"}) + "\n" for text in TEXTS)
        (folder / f"{split}.jsonl").write_text("".join(lines))
    files = {split: (folder / f"{split}.jsonl",) for split in ("val", "train")}
    job = ShardsJob(**files, tokenizer=tokenizer.path, out=folder / "shards", shard_tokens=100, jobs=1)
    build_shards(job, report=lambda line: None)
    assert len(list(job.out.glob("*_val_0*.bin"))) > 2
    return job.out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "shards"))


def change(name: str, to: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], object]:
    return lambda folder: write_shard(folder / name, to(np.array(read_shard(folder / name))))


def manifest(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        data = json.loads((folder / "manifest.json").read_text())
        edit(data)
        (folder / "manifest.json").write_text(json.dumps(data))

    return apply


def moved(tokens: np.ndarray) -> np.ndarray:
    return np.concatenate((tokens[:1], tokens[2:], tokens[1:2]))


def more(number: int, *keys: str) -> Callable[[dict[str, Any]], None]:
    """Add `number` to entries of the manifest and to the totals of the split, so that both agree."""

    def edit(data: dict[str, Any]) -> None:
        for name in ("text_val_000000.bin", "text_val_bytes_000000.bin"):
            for key in keys:
                data["files"][name][key] += number
        for key in keys:
            data["splits"]["val"][key] += number

    return edit


def copy(name: str, to: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copyfile(folder / name, folder / to)


def another_tokenizer(folder: Path) -> None:
    texts = (document.text for document in iterate_documents(sample_paths().val))
    size = Tokenizer(folder / "tokenizer.model").vocab_size
    train_tokenizer(texts, folder / "tokenizer.model", vocab_size=size)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a validation shard is missing": (
        lambda folder: [p.unlink() for p in sorted(folder.glob("*_val_*"))[:1]],
        r"lists .*text_val_000000\.bin, which does not exist; copy the folder again",
    ),
    "a sidecar is missing": (
        lambda folder: (folder / "text_val_bytes_000001.bin").unlink(),
        r"lists .*text_val_bytes_000001\.bin, which does not exist",
    ),
    "a training shard is missing": (
        lambda folder: (folder / "text_train_000001.bin").unlink(),
        r"lists .*text_train_000001\.bin, which does not exist",
    ),
    "the tokenizer is missing": (
        lambda folder: (folder / "tokenizer.model").rename(folder / "t.model"),
        r"lists .*tokenizer\.model, which does not exist",
    ),
    "a stray shard": (
        copy("text_train_000000.bin", "other_train_000000.bin"),
        r"holds other_train_000000\.bin, which manifest\.json does not list; move",
    ),
    "a validation shard twice": (
        lambda folder: [
            copy(f"text_val_{kind}000000.bin", f"text_val_{kind}000099.bin")(folder)
            for kind in ("", "bytes_")
        ],
        r"holds text_val_000099\.bin, text_val_bytes_000099\.bin, which",
    ),
    "a stray sidecar": (copy("text_val_bytes_000000.bin", "x_val_bytes_9.bin"), r"holds x_val_bytes_9\.bin"),
    "sidecar doubled": (
        change("text_val_bytes_000000.bin", lambda sizes: 2 * sizes),
        r"text_val_bytes_000000\.bin: SHA-256 is .*copy the folder again, or make it again: pgolf data",
    ),
    "ids in another order": (change("text_val_000000.bin", moved), r"text_val_000000\.bin: SHA-256 is"),
    "shorter training shard": (
        change("text_train_000000.bin", lambda tokens: tokens[:-1]),
        r"text_train_000000\.bin: \d+ tokens, but manifest\.json says",
    ),
    "swapped shards": (
        lambda folder: [
            (folder / "text_val_000000.bin").rename(folder / "x"),
            (folder / "text_val_000001.bin").rename(folder / "text_val_000000.bin"),
            (folder / "x").rename(folder / "text_val_000001.bin"),
        ],
        r"text_val_000000\.bin: ",
    ),
    "another tokenizer": (another_tokenizer, r"tokenizer\.model: SHA-256 is .*changed, damaged or swapped"),
    "other documents": (
        manifest(more(1, "documents")),
        r"text_val_000000\.bin: documents \d+, but manifest\.json says",
    ),
    "other bytes": (
        manifest(more(-1, "bytes")),
        r"text_val_bytes_000000\.bin: bytes \d+, but manifest\.json says",
    ),
    "other totals": (
        manifest(lambda data: data["splits"]["val"].update(tokens=5)),
        r"damaged manifest \(the files of val sum to .*'tokens': \d+",
    ),
    "other vocabulary": (
        manifest(lambda data: data.update(vocab_size=2048)),
        r"tokenizer\.model: vocab_size 1,024, but manifest\.json says 2,048",
    ),
    "other BOS": (manifest(lambda data: data.update(bos_id=2)), r"tokenizer\.model: bos_id 1, .* says 2"),
    "a number that is none": (
        manifest(lambda data: data["files"]["text_val_000000.bin"].update(tokens="12")),
        "damaged manifest",
    ),
    "a path in a name": (
        manifest(
            lambda data: data["files"].update({"../a_train_0.bin": data["files"]["text_train_000000.bin"]})
        ),
        r"damaged manifest \('\.\./a_train_0\.bin' cannot be the name of a file of split 'train'",
    ),
    "a sidecar that is not listed": (
        manifest(lambda data: data["files"].pop("text_val_bytes_000000.bin")),
        r"damaged manifest \(the sidecar of text_val_000000\.bin is not listed with the same counts",
    ),
    "a key twice": (
        lambda folder: (folder / "manifest.json").write_text(
            (folder / "manifest.json").read_text().replace('"bos_id": 1', '"bos_id": 1, "bos_id": 1')
        ),
        r"damaged manifest \(given twice: 'bos_id'",
    ),
    "lossless in words": (
        manifest(lambda data: data.update(lossless="yes")),
        r"damaged manifest \(lossless is 'yes', expected true or false",
    ),
    "a name that is none": (
        manifest(lambda data: data.update(name=None)),
        r"name is None, expected the prefix",
    ),
    "another name": (
        manifest(lambda data: data.update(name="other")),
        r"'text_train_000000\.bin' does not begin with the name of the shards, 'other'",
    ),
    "a hash that is none": (
        manifest(lambda data: data["files"]["text_train_000000.bin"].update(sha256=[1])),
        r"sha256 of text_train_000000\.bin is \[1\], expected 64 hex digits",
    ),
    "a split with letters of patterns": (
        manifest(lambda data: data["files"]["text_train_000000.bin"].update(split="train(")),
        r"'text_train_000000\.bin' cannot be the name of a file of split 'train\('",
    ),
    "a split that is a list": (
        manifest(lambda data: data["files"]["text_train_000000.bin"].update(split=["train"])),
        r"'text_train_000000\.bin' cannot be the name of a file of split \['train'\]",
    ),
    "more documents than tokens": (
        manifest(
            lambda data: [
                data["files"]["text_train_000000.bin"].update(documents=10**6),
                data["splits"]["train"].update(
                    documents=sum(i["documents"] for i in data["files"].values() if i["split"] == "train")
                ),
            ]
        ),
        r"text_train_000000\.bin has 1,000,000 documents in \d+ tokens",
    ),
    "deep JSON": (
        lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
        "damaged manifest",
    ),
    "unfinished": (
        lambda folder: (folder / "UNFINISHED").touch(),
        "holds an unfinished build of shards.*pgolf data shards",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_not_as_the_manifest_says_is_refused(folder: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    assert verify_folder(folder) is not None
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as e:
        verify_folder(folder)
    assert re.search("pgolf data shards", str(e.value)), "no remedy"


def test_training_shards_are_hashed_on_request(folder: Path) -> None:
    change("text_train_000000.bin", moved)(folder)
    assert verify_folder(folder) is not None, "the size is right"
    with pytest.raises(ValueError, match=r"text_train_000000\.bin: SHA-256 is"):
        verify_folder(folder, training=True)


def test_other_tools_folders_have_no_manifest_and_their_gaps_are_found_where_they_show(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    assert verify_folder(folder, training=True) is None
    assert load_validation(folder).bytes.sum() == sum(len(f"val {text}") for text in TEXTS)
    (folder / "text_val_000001.bin").unlink()
    with pytest.raises(ValueError, match=r"text_val_bytes_000001\.bin has no shard next to it"):
        load_validation(folder)


def test_no_folder_and_a_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(FileNotFoundError, match=rf"no data folder at .*{path.name}.*pgolf data shards"):
            verify_folder(path)


def test_a_validation_text_of_empty_documents_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "x_val_0.bin", np.array([1, 1, 1]))
    write_shard(tmp_path / "x_val_bytes_0.bin", np.array([0, 0, 0]))
    with pytest.raises(ValueError, match=r"the validation text has no bytes \(only empty documents\)"):
        load_validation(tmp_path)
