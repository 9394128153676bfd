"""The orders that ignore documents, against the formulas in `pgolf/data/windows.py`."""

import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.data import windows as module
from pgolf.data.shards import read_shard, write_shard
from pgolf.data.windows import Windows, WindowStream, coprime_windows, row_starts, shuffled_windows
from tests.data.test_loader import BOS, make, random_lengths, same, segments, take, write_documents

ORDERS = ["sequences", "coprime", "stream"]


def pairs(windows: Windows) -> list[tuple[int, int]]:
    return list(zip(windows.shards.tolist(), windows.starts.tolist(), strict=True))


def the_windows(size: int, context: int, phase: int) -> list[int]:
    """Return the starts of a shard's windows by the published formula."""
    assert 0 <= phase <= min(context - 1, max(0, size - context - 1)), "the phase is out of range"
    return [phase + i * context for i in range((size - 1 - phase) // context)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 99))
def test_a_pass_of_sequences_has_every_window_of_one_phase_per_shard_once(
    sizes: list[int], context: int, seed: int
) -> None:
    sizes[0] += context
    order = shuffled_windows(sizes, context, seed)
    for _ in range(3):  # fewer windows than a piece has, so each piece is a pass
        found = pairs(next(order))
        assert len(set(found)) == len(found)
        for shard, size in enumerate(sizes):
            starts = sorted(start for index, start in found if index == shard)
            assert starts == the_windows(size, context, starts[0] % context if starts else 0)
            assert not starts or starts[-1] + context + 1 <= size
            assert bool(starts) == (size > context)


def test_every_phase_and_every_order_of_windows_is_as_probable_as_the_published_draws_make_it() -> None:
    def published(left: tuple[int, ...], labels: tuple[int, ...]) -> float:
        """Return the probability that samples come from these shards, each drawn by its windows left."""
        if not labels:
            return 1.0
        rest = tuple(n - (shard == labels[0]) for shard, n in enumerate(left))
        return left[labels[0]] / sum(left) * published(rest, labels[1:])

    passes, windows = 6_000, (1, 2, 3)
    seen, inside = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
    for found in islice(shuffled_windows([n + 1 for n in windows], 1, 7), passes):
        seen[tuple(found.shards.tolist())] += 1
        inside[tuple(found.starts[found.shards == 2].tolist())] += 1
    assert len(seen) == 60 and len(inside) == 6
    for labels, number in seen.items():
        expected = passes * published(windows, labels)
        assert abs(number - expected) < 5 * math.sqrt(expected), labels
    assert all(abs(number - passes / 6) < 5 * math.sqrt(passes / 6) for number in inside.values())
    phases = Counter(int(found.starts.min()) for found in islice(shuffled_windows([100], 8, 7), 2000))
    assert phases.keys() == set(range(8))
    assert all(abs(number - 250) < 5 * math.sqrt(250) for number in phases.values())


def test_a_long_pass_comes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = next(shuffled_windows([500, 300], 10, 3))
    monkeypatch.setattr(module, "_PIECE", 7)
    pieces = list(islice(shuffled_windows([500, 300], 10, 3), -(-whole.starts.size // 7)))
    assert [w for piece in pieces for w in pairs(piece)] == pairs(whole)


def coprime_passes(starts: list[int], size: int, context: int) -> Iterator[tuple[int, list[int]]]:
    """Yield phase and blocks of each complete pass over a shard, whose phase is the remainder of a start."""
    while starts:
        phase = starts[0] % context
        blocks = (size - 1 - phase) // context
        if len(starts) >= blocks:
            assert {s % context for s in starts[:blocks]} == {phase}
            yield phase, [s // context for s in starts[:blocks]]
        starts = starts[blocks:]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 150), min_size=1, max_size=4), st.integers(1, 30), st.integers(0, 99))
def test_a_shard_is_walked_with_a_coprime_stride(sizes: list[int], context: int, seed: int) -> None:
    sizes[0] += context
    # One window per step, so the order within a shard can be seen.
    steps = list(islice(coprime_windows(sizes, context, seed, batch=1), 300))
    found = [pairs(step)[0] for step in steps]
    assert {shard for shard, _ in found} <= {i for i, size in enumerate(sizes) if size > context}
    for shard, size in enumerate(sizes):
        starts = [start for index, start in found if index == shard]
        for phase, blocks in coprime_passes(starts, size, context):
            number = len(blocks)
            assert sorted(blocks) == [w // context for w in the_windows(size, context, phase)]
            strides = {(b - a) % number for a, b in pairwise(blocks)}
            assert len(strides) <= 1 and all(math.gcd(t, number) == 1 for t in strides)


def test_passes_of_the_coprime_order_differ_in_phase_start_and_stride() -> None:
    steps = islice(coprime_windows([1000], 9, 1, batch=1), 110 * 30)
    passes = list(coprime_passes([int(step.starts[0]) for step in steps], 1000, 9))
    assert len(passes) >= 29
    assert len({phase for phase, _ in passes}) == 9
    assert len({blocks[0] for _, blocks in passes}) > 15
    assert len({(blocks[1] - blocks[0]) % len(blocks) for _, blocks in passes}) > 10


def test_a_step_may_take_the_end_of_a_pass_and_whole_passes_after_it() -> None:
    sizes = np.array([1000, 5, 100])  # the second has no window
    walks = module._Walks(sizes, 9, np.random.default_rng(4))
    taken = [walks.take(np.array([1, 0]), np.array(counts)) for counts in ([7, 250], [3, 20], [40, 90])]
    shards, starts = (np.concatenate([getattr(w, name) for w in taken]) for name in ("shards", "starts"))
    assert np.bincount(shards).tolist() == [360, 0, 50]
    for shard in (0, 2):
        passes = list(coprime_passes(starts[shards == shard].tolist(), int(sizes[shard]), 9))
        assert len(passes) >= 3
        for phase, blocks in passes:
            assert sorted(blocks) == [w // 9 for w in the_windows(int(sizes[shard]), 9, phase)]


@pytest.mark.parametrize(
    ("shards", "batch", "expected"),
    [
        (100, 384, {0: 8, 900: 36, 1800: 64, 2200: 64}),
        (20, 384, {0: 8, 900: 14, 1800: 20}),
        (5, 384, {0: 5, 900: 5, 1800: 5}),
        (100, 12, {0: 8, 900: 10, 1800: 12}),
        (100, 3, {0: 3, 1800: 3}),
    ],
)
def test_a_step_mixes_more_and_more_shards(shards: int, batch: int, expected: dict[int, int]) -> None:
    steps = coprime_windows([4000] * shards, 8, 2, batch)
    for number, step in enumerate(islice(steps, max(expected) + 1)):
        assert step.shards.size == step.starts.size == batch
        if number in expected:
            assert np.unique(step.shards).size == expected[number]


def test_shards_are_drawn_by_a_power_of_the_windows_that_they_have_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "GROWTH_STEPS", 1)
    monkeypatch.setattr(module, "FEWEST_SHARDS", 1)
    monkeypatch.setattr(module, "MOST_SHARDS", 1)
    sizes, draws = [11, 41, 161], 2000
    for step, power in ((0, 0.9), (1, 0.5)):
        expected, found = np.zeros(3), np.zeros(3)
        for seed in range(draws):
            first, second = islice(coprime_windows(sizes, 1, seed, batch=4), 2)
            left = np.array(sizes) - 1
            if step:
                left[first.shards[0]] -= 4
            weights = left.astype(np.float64) ** power
            expected += weights / weights.sum()
            found[(second if step else first).shards[0]] += 1
        assert (abs(found - expected) < 5 * np.sqrt(expected)).all(), (found, expected)


def test_the_windows_beyond_one_of_each_shard_are_shared_out_by_the_same_weights() -> None:
    sizes, batch, draws = [101, 1001, 10_001], 1000, 60
    weights = (np.array(sizes) - 1.0) ** 0.9
    expected = 1 + (batch - 3) * weights / weights.sum()
    found = np.array(
        [np.bincount(next(coprime_windows(sizes, 1, s, batch)).shards, minlength=3) for s in range(draws)]
    )
    assert (found >= 1).all()
    assert (abs(found.mean(0) - expected) < 5 * np.sqrt(expected / draws)).all()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_documents(tmp_path, random_lengths(shards=3, documents=40))
    return tmp_path


@pytest.mark.parametrize("number", [32, 96, 7, 31, 100])
def test_rows_are_the_windows_one_after_another_for_any_size_of_a_read(folder: Path, number: int) -> None:
    paths = sorted(folder.iterdir())
    text = [read_shard(path) for path in paths]
    sizes = [tokens.size for tokens in text]
    picked = [w for step in islice(coprime_windows(sizes, 32, 0, batch=5), 20) for w in pairs(step)]
    inputs = np.concatenate([text[shard][at : at + 32] for shard, at in picked])
    targets = np.concatenate([text[shard][at + 1 : at + 33] for shard, at in picked])
    order = coprime_windows(sizes, 32, 0, batch=5)
    stream = WindowStream(paths, vocab_size=1000, context=32, order=order)
    for at in range(0, inputs.size - number, 2 * number):  # a rank of two reads every second piece
        got = stream.read(at, number)
        assert np.array_equal(got[0], inputs[at : at + number])
        assert np.array_equal(got[1], targets[at : at + number])
        assert got[0].dtype == got[1].dtype == np.int64


@settings(deadline=None)
@given(st.integers(0, 500), st.integers(1, 200), st.integers(1, 60))
def test_rows_begin_at_the_multiples_of_the_context(first: int, number: int, context: int) -> None:
    expected = sorted({0, *(i for i in range(number) if (first + i) % context == 0)})
    assert row_starts(first, number, context).tolist() == expected


def test_the_stream_is_the_files_in_order_and_ends_rows_only_at_their_length(folder: Path) -> None:
    stream = np.concatenate([read_shard(p) for p in sorted(folder.iterdir())] * 2).astype(np.int64)
    with make(folder, order="stream", micro_tokens=96) as loader:
        for m, batch in enumerate(take(loader, (stream.size - 1) // 96)):
            assert torch.equal(batch.inputs, torch.from_numpy(stream[m * 96 : m * 96 + 96]))
            assert torch.equal(batch.targets, torch.from_numpy(stream[m * 96 + 1 : m * 96 + 97]))


@pytest.mark.parametrize("order", ORDERS)
def test_segments_are_rows_that_documents_cross(folder: Path, order: str) -> None:
    with make(folder, order=order, micro_tokens=96, shorter=(20,)) as loader:
        batches, (short,) = take(loader, 10), [loader.next(20)]
    assert all(segments(b.cu_seqlens, 96) == [(0, 32), (32, 64), (64, 96)] for b in batches)
    assert segments(short.cu_seqlens, 96) == [(0, 20), (20, 32), (32, 52), (52, 64), (64, 84), (84, 96)]
    rows = torch.cat([b.inputs.view(3, 32) for b in batches])
    targets = torch.cat([b.targets.view(3, 32) for b in batches])
    assert torch.equal(rows[:, 1:], targets[:, :-1])
    assert (rows[:, 1:] == BOS).any(), "no document begins within a row"
    assert batches[9].max_seqlen == 32 and batches[9].epoch > 0


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_global_batches_do_not_depend_on_the_number_of_ranks(
    folder: Path, order: str, world_size: int
) -> None:
    with make(folder, order=order) as loader:
        expected = take(loader, 4 * world_size)
    for rank in range(world_size):
        with make(folder, order=order, rank=rank, world_size=world_size) as loader:
            for got, want in zip(take(loader, 4), expected[rank::world_size], strict=True):
                assert same(got, want)


@pytest.mark.parametrize("order", ORDERS)
def test_restart_at_any_place_goes_on_as_if_it_had_read_everything(folder: Path, order: str) -> None:
    with make(folder, order=order, rank=1, world_size=2) as loader:
        expected = take(loader, 60)  # several passes
        for at in (0, 1, 17, 40, 58):
            loader.restart(at=at)
            assert all(same(a, b) for a, b in zip(take(loader, 2), expected[at:], strict=False))


@pytest.mark.parametrize("order", ORDERS)
def test_the_text_of_a_step_does_not_depend_on_the_micro_batch(folder: Path, order: str) -> None:
    def step(micro_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        with make(folder, order=order, micro_tokens=micro_tokens, batch_tokens=960) as loader:
            batches = take(loader, 960 // micro_tokens)
        return torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])

    whole = step(960)
    for micro_tokens in (32, 96, 80, 20):
        assert all(torch.equal(a, b) for a, b in zip(step(micro_tokens), whole, strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_order_depends_on_the_seed_except_in_the_stream(folder: Path, order: str) -> None:
    def inputs(**changes: object) -> torch.Tensor:
        with make(folder, order=order, **changes) as loader:
            return torch.cat([b.inputs for b in take(loader, 20)])

    assert torch.equal(inputs(seed=7), inputs(seed=7, prefetch=5))
    assert torch.equal(inputs(seed=7), inputs(seed=8)) == (order == "stream")


@pytest.mark.parametrize("order", ["sequences", "coprime"])
def test_ranks_share_out_the_windows_of_a_pass(tmp_path: Path, order: str) -> None:
    """Every id is unique, so the first id of a row says which window it is."""
    write_shard(tmp_path / "x_train_0.bin", np.arange(2, 900, dtype=np.uint16))
    ranks = []
    for rank in range(3):
        with make(tmp_path, order=order, micro_tokens=16, max_context=8, rank=rank, world_size=3) as loader:
            ranks.append([row for b in take(loader, 19) for row in b.inputs.view(2, 8)[:, 0].tolist()])
    passed = (898 - 1 - 7) // 8  # windows of a pass, at least
    in_order = [row for i in range(0, 38, 2) for rows in ranks for row in rows[i : i + 2]][:passed]
    assert len(set(in_order)) == passed, "two ranks read the same window in one pass"
    assert len({first % 8 for first in in_order}) == 1


@pytest.mark.parametrize("order", ORDERS)
def test_a_text_smaller_than_a_micro_batch_is_repeated(tmp_path: Path, order: str) -> None:
    write_documents(tmp_path, [[9], [20]])
    with make(tmp_path, order=order, micro_tokens=64, max_context=8) as loader:
        a, b = take(loader, 2)
    assert a.inputs.numel() == b.inputs.numel() == 64
    assert b.epoch == pytest.approx(128 / 29)


@pytest.mark.parametrize("order", ["sequences", "coprime"])
def test_a_shard_without_a_window_is_left_out_and_a_text_without_one_is_refused(
    tmp_path: Path, order: str
) -> None:
    write_shard(tmp_path / "x_train_0.bin", np.full(32, 5, dtype=np.uint16))  # one token short
    with pytest.raises(ValueError, match=f"data.order={order} needs a shard of at least 33 tokens.* has 32;"):
        make(tmp_path, order=order)
    write_shard(tmp_path / "x_train_1.bin", np.full(33, 6, dtype=np.uint16))
    with make(tmp_path, order=order) as loader:
        assert {t for b in take(loader, 5) for t in b.inputs.tolist()} == {6}
    with (
        make(tmp_path, order="documents", max_context=4) as loader,
        pytest.raises(ValueError, match="no BOS"),
    ):
        loader.next()


@pytest.mark.parametrize("order", ORDERS)
def test_an_id_beyond_the_vocabulary_is_named(folder: Path, order: str) -> None:
    tokens = np.full(400, 5, dtype=np.uint16)
    tokens[0], tokens[203] = BOS, 1000
    write_shard(folder / "x_train_000003.bin", tokens)
    with make(folder, order=order) as loader:
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"x_train_000003\.bin: token 1000 at position 203 is not below"
            ):
                take(loader, 200)
