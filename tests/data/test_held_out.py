"""Data folders whose validation text is the end of the training text."""

import re
from pathlib import Path

import numpy as np
import pytest

from pgolf.cli.main import main
from pgolf.data.held_out import HeldOutJob, make_held_out
from pgolf.data.loader import load_validation
from pgolf.data.manifest import verify_folder
from pgolf.data.shards import find_shards, read_shard
from pgolf.data.text import sample_paths
from pgolf.data.tokenizer import find_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three training shards of the sample text."""
    folder = tmp_path_factory.mktemp("source")
    _, text = (str(p) for p in sample_paths())
    model, twin = str(folder / "tokenizer.model"), folder / "twin.jsonl"
    assert main(["data", "tokenizer", "--inputs", text, "--vocab-size", "512", "--out", model]) == 0
    twin.write_text('{"text": "Not a word of this is in the other text."}\n')
    split = ["--train", text, "--val", str(twin), "--tokenizer", model, "--out", str(folder / "shards")]
    assert main(["data", "shards", *split, "--shard-tokens", "20000"]) == 0
    return folder / "shards"


def all_tokens(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([read_shard(p) for p in find_shards(folder, split)])


def test_the_held_out_text_leaves_the_training_text_and_is_scored_instead(source, tmp_path):
    out = tmp_path / "new"
    assert main(["data", "held-out", str(source), "--out", str(out), "--tokens", "3000"]) == 0
    before, rest, held = all_tokens(source, "train"), all_tokens(out, "train"), all_tokens(out, "val")
    np.testing.assert_array_equal(np.concatenate((rest, held)), before)
    bos = find_tokenizer(out).bos_id
    second = np.flatnonzero(held == bos)[1]
    assert held[0] == bos and held.size >= 3000 > held.size - second, "the last document that is enough"
    assert verify_folder(out, training=True) is not None
    assert find_shards(out, "train")[0].stat().st_nlink == 2, "a link, not a copy"


def test_bytes_of_the_held_out_text_are_those_of_its_text(source, tmp_path):
    make_held_out(HeldOutJob(source=source, out=tmp_path / "new", tokens=3000), report=lambda _: None)
    text, tokenizer = load_validation(tmp_path / "new"), find_tokenizer(source)
    written = sum(len(line.encode()) for line in map(tokenizer.decode, split(text.tokens, tokenizer.bos_id)))
    assert text.bytes.sum() == written


def split(tokens: np.ndarray, bos: int) -> list[np.ndarray]:
    return np.split(tokens, np.flatnonzero(tokens == bos))[1:]


def test_documents_that_come_twice_are_not_scored(source, tmp_path):
    from pgolf.data.held_out import _documents, _repeated

    tokenizer = find_tokenizer(source)
    paths = find_shards(source, "train")
    held = _documents(read_shard(paths[-1]), tokenizer.bos_id)
    first = _documents(read_shard(paths[0]), tokenizer.bos_id)
    assert _repeated([*held, first[0]], paths[:-1], tokenizer) == {first[0].tobytes()}


@pytest.mark.parametrize("tokens", [0, 10**6])
def test_a_held_out_text_that_does_not_fit_is_refused(source, tmp_path, tokens):
    with pytest.raises(ValueError, match=r"has room for 1 to [\d,]+ tokens, got " + re.escape(f"{tokens:,}")):
        make_held_out(HeldOutJob(source=source, out=tmp_path / "new", tokens=tokens), report=print)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_kept(source, tmp_path):
    with pytest.raises(FileExistsError, match="is there already; name another --out"):
        make_held_out(HeldOutJob(source=source, out=tmp_path, tokens=3000), report=print)
