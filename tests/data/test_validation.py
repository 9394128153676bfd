from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf.data.loader import (
    buffer_size,
    load_validation,
    validation_segments,
    validation_totals,
)
from pgolf.data.shards import write_shard
from pgolf.data.text import iterate_documents, sample_paths
from pgolf.data.tokenizer import Tokenizer

BOS = 1
CPU = torch.device("cpu")


@pytest.mark.parametrize("max_context", [1, 2, 3, 100])
def test_segments_hold_every_token_but_the_first_once(max_context: int) -> None:
    tokens = np.array([BOS, 5, 6, 7, BOS, BOS, 8, 9, BOS], dtype=np.uint16)
    starts, lengths = validation_segments(tokens, bos_id=BOS, max_context=max_context)
    covered = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
    assert np.array_equal(covered, np.arange(8))
    assert lengths.max() <= max_context
    assert {0, 4, 5} <= set(starts.tolist())
    if max_context == 3:
        assert starts.tolist() == [0, 3, 4, 5]


@pytest.mark.parametrize(
    ("count", "first", "last", "cpu", "cuda"),
    [
        (900, True, False, 1000, 1000),  # a full buffer: one shape for all of them
        (7, False, True, 64, 1000),  # the rest of a text: on a GPU its own shape would be compiled
        (7, True, True, 64, 64),
        (65, True, True, 128, 128),
        (300, True, True, 320, 512),
        (1000, True, True, 1000, 1000),
    ],
)
def test_a_buffer_is_padded_to_what_is_needed(count, first, last, cpu, cuda) -> None:
    for device, expected in ((CPU, cpu), (torch.device("cuda"), cuda)):
        assert buffer_size(count, 1000, first=first, last=last, device=device) == expected


def test_totals_are_the_bytes_of_the_documents(sample_shards: Path) -> None:
    documents = [d.text for d in iterate_documents(sample_paths().val)]
    tokens, size = validation_totals(sample_shards)
    assert size == sum(len(text.encode()) for text in documents)
    text = load_validation(sample_shards)
    assert (tokens, size) == (text.tokens.size - 1, int(text.bytes[1:].sum()))


def copy_without(folder: Path, to: Path, word: str) -> Path:
    for path in folder.iterdir():
        if word not in path.name:
            (to / path.name).write_bytes(path.read_bytes())
    return to


def test_byte_table_gives_the_sidecars_bytes_on_the_sample(
    sample_shards: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    exact = load_validation(sample_shards)
    bare = copy_without(sample_shards, tmp_path, "_bytes_")
    for given in (None, tokenizer):  # the folder's own tokenizer, and one that is passed in
        assert np.array_equal(load_validation(bare, tokenizer=given).bytes, exact.bytes)


def test_without_sidecar_and_tokenizer_validation_fails(sample_shards: Path, tmp_path: Path) -> None:
    bare = copy_without(copy_without(sample_shards, tmp_path, "_bytes_"), tmp_path, "nothing")
    (bare / "tokenizer.model").unlink()
    for side in bare.glob("*_bytes_*"):
        side.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.model in"):
        validation_totals(bare)


def write(folder: Path, name: str, tokens: list[int]) -> None:
    write_shard(folder / name, np.array(tokens, dtype=np.uint16))


def test_several_shards_are_one_stream(tmp_path: Path) -> None:
    write(tmp_path, "x_val_0.bin", [BOS, 5, 6])
    write(tmp_path, "x_val_1.bin", [7, BOS, 8])
    write(tmp_path, "x_val_bytes_0.bin", [0, 2, 3])
    write(tmp_path, "x_val_bytes_1.bin", [4, 0, 5])
    text = load_validation(tmp_path)
    assert text.tokens.tolist() == [BOS, 5, 6, 7, BOS, 8] and text.bytes[1:].tolist() == [2, 3, 4, 0, 5]
    assert validation_totals(tmp_path) == (5, 14)


def test_bytes_of_the_first_token_do_not_count_as_it_is_never_a_target(tmp_path: Path) -> None:
    write(tmp_path, "x_val_0.bin", [5, BOS, 6])
    write(tmp_path, "x_val_bytes_0.bin", [9, 0, 2])
    assert validation_totals(tmp_path) == (2, 2)
    assert int(load_validation(tmp_path).bytes[1:].sum()) == 2


def test_wrong_sidecars_are_named(tmp_path: Path) -> None:
    write(tmp_path, "x_val_0.bin", [BOS, 5, 6])
    write(tmp_path, "x_val_1.bin", [7, BOS, 8])
    write(tmp_path, "x_val_bytes_0.bin", [0, 2])
    with pytest.raises(ValueError, match=r"x_val_bytes_1\.bin is missing, but other shards"):
        validation_totals(tmp_path)
    write(tmp_path, "x_val_bytes_1.bin", [0, 2, 3])
    with pytest.raises(ValueError, match=r"x_val_bytes_0\.bin: 2 entries for the 3 tokens of x_val_0\.bin"):
        validation_totals(tmp_path)


def test_ids_of_another_tokenizer_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path, "x_val_0.bin", [BOS, 5, 1024])
    with pytest.raises(ValueError, match="token 1024 is not below 1024, the vocabulary size of"):
        validation_totals(tmp_path, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="token 1024 at position 2 is not below the vocabulary size 512"):
        validation_totals(tmp_path, vocab_size=512)


def test_text_without_documents_or_targets_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "x_val_0.bin", [BOS])
    write(tmp_path, "x_val_bytes_0.bin", [0])
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        validation_totals(tmp_path)
    write(tmp_path, "x_val_0.bin", [5, 6])
    write(tmp_path, "x_val_bytes_0.bin", [1, 1])
    with pytest.raises(ValueError, match=r"no BOS \(id 1\) in 2 validation tokens"):
        validation_segments(load_validation(tmp_path).tokens, bos_id=BOS, max_context=8)
