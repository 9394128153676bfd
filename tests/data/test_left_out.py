"""Documents at the end of the training text are in no batch, and the others are all there."""

from pathlib import Path

import numpy as np
import pytest

from pgolf.data.left_out import cut_documents
from pgolf.data.shards import write_shard
from tests.data.test_loader import BOS, make, random_lengths, same, take, write_documents


def shards(folder: Path, *texts: list[int]) -> list[Path]:
    paths = [folder / f"x_train_{i}.bin" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        write_shard(path, np.array(text, dtype=np.uint16))
    return paths


@pytest.mark.parametrize(
    ("count", "sizes", "documents"),
    [
        (0, [7, 5], []),
        (1, [7, 3], [[BOS, 8]]),
        # Of the last shard nothing is left, nor of the document of the first one that ends in it.
        (2, [7], [[BOS, 7], [BOS, 8]]),
        (3, [4], [[BOS, 6, 6], [BOS, 7], [BOS, 8]]),
    ],
)
def test_documents_are_taken_off_the_end(tmp_path, count, sizes, documents):
    paths = shards(tmp_path, [9, 9, BOS, 5, BOS, 6, 6], [6, BOS, 7, BOS, 8])
    cut = cut_documents(paths, bos_id=BOS, count=count)
    assert (cut.paths, cut.sizes) == (paths[: len(sizes)], sizes)
    assert [d.tolist() for d in cut.documents] == documents


@pytest.mark.parametrize("count", [4, 9])
def test_a_text_that_would_be_empty_is_refused(tmp_path, count):
    paths = shards(tmp_path, [9, 9, BOS, 5, BOS, 6, 6], [6, BOS, 7, BOS, 8])
    with pytest.raises(
        ValueError, match=rf"quant\.cap_documents={count} leaves.*has 4 documents; pass at most 3"
    ):
        cut_documents(paths, bos_id=BOS, count=count)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shuffle": False},
        {"order": "stream"},
        {"order": "sequences"},
        {"order": "coprime"},
    ],
    ids=str,
)
def test_no_batch_has_their_tokens_on_any_number_of_ranks_or_after_a_restart(tmp_path, changes):
    """Every document has a token of its own, and the last shard is left out as a whole."""
    write_documents(tmp_path, [*random_lengths(2, 12), [4, 50]])
    with make(tmp_path, leave_out=5, **changes) as alone:
        left = {int(i) for d in alone.left_out for i in d} - {BOS}
        assert len(alone.left_out) == 5 and left
        batches = take(alone, 40)
        alone.restart(at=6)
        assert same(alone.next(), batches[6])
    seen = {int(i) for b in batches for part in (b.inputs, b.targets) for i in part}
    assert batches[-1].epoch > 3 and not seen & left
    if changes.get("order") not in ("sequences", "coprime"):  # those leave out what fills no window
        with make(tmp_path, **changes) as whole:
            every = {int(i) for b in take(whole, 40) for i in b.inputs}
        assert every - seen == left
    for rank in range(2):
        with make(tmp_path, leave_out=5, rank=rank, world_size=2, **changes) as shared:
            assert all(same(b, batches[2 * i + rank]) for i, b in enumerate(take(shared, 20)))
