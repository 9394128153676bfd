import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf.data.loader import (
    ValBatch,
    buffer_size,
    load_validation,
    validation_batches,
    validation_segments,
    validation_totals,
)
from pgolf.data.shards import write_shard
from pgolf.data.text import iterate_documents, sample_paths
from pgolf.data.tokenizer import Tokenizer

BOS = 1
CPU = torch.device("cpu")


def batches(folder: Path, **changes: object) -> list[ValBatch]:
    arguments: dict[str, object] = {"bos_id": BOS, "max_context": 128, "batch_tokens": 1000}
    return list(validation_batches(folder, **{"tokenizer": None, "device": CPU, **arguments, **changes}))


def scored(batch: ValBatch) -> list[tuple[list[int], list[int], list[int]]]:
    """Return (inputs, targets, bytes) of each real segment."""
    bounds = batch.cu_seqlens.tolist()
    found = []
    for start, stop in itertools.pairwise(bounds):
        assert stop - start <= batch.max_seqlen
        if start < min(stop, batch.tokens):
            part = slice(start, stop)
            found.append(tuple(t[part].tolist() for t in (batch.inputs, batch.targets, batch.target_bytes)))
    return found


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


def test_every_target_is_scored_once_with_its_bytes(sample_shards: Path) -> None:
    text = load_validation(sample_shards)
    found = [segment for batch in batches(sample_shards) for segment in scored(batch)]
    inputs, targets, sizes = (list(itertools.chain(*parts)) for parts in zip(*found, strict=True))
    assert inputs == text.tokens[:-1].tolist()
    assert targets == text.tokens[1:].tolist()
    assert sizes == text.bytes[1:].tolist()
    for segment in found:
        assert BOS not in segment[0][1:], "two documents in one segment"


# 128 is one segment per buffer, 333 leaves padding in each, 10**6 puts everything in one.
@pytest.mark.parametrize("batch_tokens", [128, 333, 10**6])
def test_segments_do_not_depend_on_the_buffer(sample_shards: Path, batch_tokens: int) -> None:
    reference = [s for b in batches(sample_shards) for s in scored(b)]
    got = batches(sample_shards, batch_tokens=batch_tokens)
    assert [s for b in got for s in scored(b)] == reference
    for number, batch in enumerate(got, start=1):
        # The last buffer ends with the text, rounded up, so a million tokens of padding are not computed.
        size = batch_tokens if number < len(got) else min(batch_tokens, -(-batch.tokens // 64) * 64)
        assert batch.inputs.shape == batch.targets.shape == batch.target_bytes.shape == (size,)
        assert (batch.targets[batch.tokens :] == -100).all()
        assert (batch.target_bytes[batch.tokens :] == 0).all()
        assert (batch.inputs[batch.tokens :] == 0).all()
        assert batch.cu_seqlens.numel() % 64 == 0
        assert batch.cu_seqlens[-1] == size


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


@pytest.mark.parametrize("world_size", [2, 7])
def test_ranks_share_the_buffers_round_robin(sample_shards: Path, world_size: int) -> None:
    whole = batches(sample_shards)
    parts = [batches(sample_shards, rank=r, world_size=world_size) for r in range(world_size)]
    for index, batch in enumerate(whole):
        got = parts[index % world_size][index // world_size]
        assert torch.equal(got.inputs, batch.inputs)
        assert got.tokens == batch.tokens
    assert sum(len(p) for p in parts) == len(whole)


def test_totals_are_the_bytes_of_the_documents(sample_shards: Path) -> None:
    documents = [d.text for d in iterate_documents(sample_paths().val)]
    tokens, size = validation_totals(sample_shards)
    assert size == sum(len(text.encode()) for text in documents)
    found = batches(sample_shards)
    assert tokens == sum(b.tokens for b in found)
    assert size == sum(int(b.target_bytes.sum()) for b in found)


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
    (batch,) = batches(tmp_path, max_context=8, batch_tokens=8)
    assert scored(batch) == [([BOS, 5, 6, 7], [5, 6, 7, BOS], [2, 3, 4, 0]), ([BOS], [8], [5])]
    assert validation_totals(tmp_path) == (5, 14)


def test_bytes_of_the_first_token_do_not_count_as_it_is_never_a_target(tmp_path: Path) -> None:
    write(tmp_path, "x_val_0.bin", [5, BOS, 6])
    write(tmp_path, "x_val_bytes_0.bin", [9, 0, 2])
    assert validation_totals(tmp_path) == (2, 2)
    assert sum(int(b.target_bytes.sum()) for b in batches(tmp_path)) == 2


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
        batches(tmp_path)


@pytest.mark.parametrize("max_context", [0, 1001])
def test_a_segment_must_fit_the_buffer(sample_shards: Path, max_context: int) -> None:
    with pytest.raises(
        ValueError, match=rf"max_context must be in \[1, batch_tokens=1000\].*got {max_context}"
    ):
        batches(sample_shards, max_context=max_context)
