"""The loader on small artificial shards: a document is BOS and copies of an id that only it has."""

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf.config import DataConfig
from pgolf.data.loader import Batch, TrainLoader
from pgolf.data.shards import shard_tokens, write_shard
from pgolf.data.stream import DocumentStream, cut_segments
from tests.conftest import requires_gpu

BOS = 1
CPU = torch.device("cpu")


def write_documents(folder: Path, lengths_per_shard: list[list[int]]) -> None:
    ids = itertools.count(10)
    for number, lengths in enumerate(lengths_per_shard):
        documents = [[BOS] + [next(ids)] * (length - 1) for length in lengths]
        write_shard(
            folder / f"x_train_{number:06d}.bin", np.array(list(itertools.chain(*documents)), dtype=np.uint16)
        )


def random_lengths(shards: int, documents: int, longest: int = 60) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(1, longest, documents).tolist() for _ in range(shards)]


def make(folder: Path, **changes: object) -> TrainLoader:
    count = changes.pop("micro_tokens", 100)
    config = DataConfig(
        dir=folder,
        micro_tokens=count,
        batch_tokens=changes.pop("batch_tokens", count),
        shuffle=changes.pop("shuffle", True),
        order=changes.pop("order", "documents"),
        prefetch=changes.pop("prefetch", 2),
    )
    arguments = {"vocab_size": 1000, "bos_id": BOS, "max_context": 32, "seed": 3, "rank": 0, "world_size": 1}
    return TrainLoader(config, **{**arguments, "device": CPU, **changes})


def take(loader: TrainLoader, count: int) -> list[Batch]:
    return [loader.next() for _ in range(count)]


def same(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("inputs", "targets", "cu_seqlens")
    ) and (a.max_seqlen, a.epoch) == (b.max_seqlen, b.epoch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_documents(tmp_path, random_lengths(shards=3, documents=40))
    return tmp_path


def test_without_shuffle_batches_are_the_files_in_order_over_epochs(folder: Path) -> None:
    files = [np.fromfile(p, dtype="<u2")[512:] for p in sorted(folder.iterdir())]
    stream = np.concatenate(files * 2).astype(np.int64)
    with make(folder, shuffle=False) as loader:
        for m, batch in enumerate(take(loader, (stream.size - 1) // 100)):
            assert torch.equal(batch.inputs, torch.from_numpy(stream[m * 100 : m * 100 + 100]))
            assert torch.equal(batch.targets, torch.from_numpy(stream[m * 100 + 1 : m * 100 + 101]))
            assert batch.epoch == pytest.approx((m + 1) * 100 / (stream.size / 2))


def test_batches_have_the_documented_types(folder: Path) -> None:
    with make(folder) as loader:
        batch = loader.next()
    assert (batch.inputs.dtype, batch.targets.dtype, batch.cu_seqlens.dtype) == (
        torch.int64,
        torch.int64,
        torch.int32,
    )
    assert (batch.inputs.shape, batch.targets.shape, batch.max_seqlen) == ((100,), (100,), 32)


# 1 rank is the reference; 3 does not divide the number of batches.
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_global_batches_do_not_depend_on_the_number_of_ranks(folder: Path, world_size: int) -> None:
    with make(folder) as loader:
        expected = take(loader, 4 * world_size)
    for rank in range(world_size):
        with make(folder, rank=rank, world_size=world_size) as loader:
            for got, want in zip(take(loader, 4), expected[rank::world_size], strict=True):
                assert same(got, want)


def test_order_depends_on_the_seed_and_only_on_it(folder: Path) -> None:
    def inputs(**changes: object) -> torch.Tensor:
        with make(folder, **changes) as loader:
            return torch.cat([b.inputs for b in take(loader, 20)])

    assert torch.equal(inputs(seed=7), inputs(seed=7, prefetch=5))
    assert not torch.equal(inputs(seed=7), inputs(seed=8))


def test_each_epoch_holds_every_document_once_in_another_order(folder: Path) -> None:
    paths = sorted(folder.iterdir())
    total = sum(shard_tokens(p) for p in paths)
    expected = np.sort(np.concatenate([np.fromfile(p, dtype="<u2")[512:] for p in paths]))
    stream = DocumentStream(paths, vocab_size=1000, bos_id=BOS, seed=0, shuffle=True)
    first, second = stream.read(0, total), stream.read(total, total)
    assert np.array_equal(np.sort(first), expected)
    assert np.array_equal(np.sort(second), expected)
    assert not np.array_equal(first, second)
    for epoch in (first, second):  # documents stay whole: an id changes only at a BOS
        inside = (epoch[1:] != BOS) & (epoch[:-1] != BOS)
        assert np.array_equal(epoch[1:][inside], epoch[:-1][inside])


def test_a_shorter_context_cuts_the_same_tokens_as_a_loader_of_that_context(folder: Path) -> None:
    with make(folder) as plain, make(folder, max_context=7) as short, make(folder, shorter=(7, 20)) as loader:
        for context, other in ((7, short), (None, plain), (7, short), (20, plain)):
            batch, one, two = loader.next(context), short.next(), plain.next()
            assert torch.equal(batch.inputs, one.inputs) and torch.equal(batch.targets, one.targets)
            assert batch.max_seqlen == 32 and not batch.shorter
            if context != 20:
                assert torch.equal(batch.cu_seqlens, (one if other is short else two).cu_seqlens)
            assert int(batch.cu_seqlens.diff().max()) <= (context or 32)


def test_restart_repeats_the_batches_and_can_skip(folder: Path) -> None:
    with make(folder, rank=1, world_size=2) as loader:
        expected = take(loader, 12)
        loader.restart()
        assert all(same(a, b) for a, b in zip(take(loader, 5), expected, strict=False))
        loader.restart(at=9)
        assert same(loader.next(), expected[9])


def segments(cu_seqlens: torch.Tensor, total: int) -> list[tuple[int, int]]:
    bounds = cu_seqlens.tolist()
    assert len(bounds) % 64 == 0
    assert bounds[0] == 0
    assert bounds[-1] == total
    real = bounds[: bounds.index(total) + 1]
    assert set(bounds[len(real) :]) <= {total}
    return list(itertools.pairwise(real))


def test_segments_isolate_documents_and_respect_the_longest_context(folder: Path) -> None:
    with make(folder, micro_tokens=1000) as loader:
        batches = take(loader, 5)
    lengths = set()
    for batch in batches:
        tokens = batch.inputs.tolist()
        found = segments(batch.cu_seqlens, 1000)
        starts = {start for start, _ in found}
        assert {i for i, t in enumerate(tokens) if t == BOS} <= starts
        for start, stop in found:
            assert 1 <= stop - start <= 32
            lengths.add(stop - start)
            assert len({t for t in tokens[start:stop] if t != BOS}) <= 1, "two documents in one segment"
            cut = start > 0 and tokens[start] != BOS
            assert not cut or start - 32 in starts, "a document is cut before max_context"
    assert 32 in lengths


@pytest.mark.parametrize(
    ("starts", "total", "expected"),
    [
        ([0], 1, [0]),
        ([0], 4, [0]),
        ([0], 5, [0, 4]),
        ([0, 1, 9], 13, [0, 1, 5, 9]),
        ([0, 8], 17, [0, 4, 8, 12, 16]),
    ],
)
def test_cut_segments(starts: list[int], total: int, expected: list[int]) -> None:
    assert cut_segments(np.array(starts), total, 4).tolist() == expected


def test_a_corpus_smaller_than_a_micro_batch_wraps(tmp_path: Path) -> None:
    write_documents(tmp_path, [[3], [4]])
    with make(tmp_path, micro_tokens=50) as loader:
        a, b = take(loader, 2)
    assert a.targets[-1] == b.inputs[0]
    assert (a.inputs == BOS).sum() in (14, 15)
    assert b.epoch == pytest.approx(100 / 7)


def test_more_than_63_segments_take_the_next_multiple_of_64(tmp_path: Path) -> None:
    write_documents(tmp_path, [[2] * 100])
    for micro_tokens, size in ((126, 64), (128, 128)):  # 63 and 64 segments, plus the end
        with make(tmp_path, micro_tokens=micro_tokens) as loader:
            assert loader.next().cu_seqlens.numel() == size


def test_shuffle_leaves_out_the_tail_of_a_document_of_another_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "x_train_0.bin", np.array([9, 9, BOS, 5, BOS, 6, 6], dtype=np.uint16))
    with make(tmp_path, micro_tokens=50) as loader:
        assert 9 not in loader.next().inputs.tolist()
    with make(tmp_path, micro_tokens=50, shuffle=False) as loader:
        assert loader.next().inputs[:4].tolist() == [9, 9, BOS, 5]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([5, 6, 7], r"x_train_000003\.bin: no BOS \(id 1\) in 3 tokens"),
        (
            [BOS, 6, 1000],
            r"x_train_000003\.bin: token 1000 at position 2 is not below the vocabulary size 1000",
        ),
    ],
)
def test_bad_shard_surfaces_in_next_again_and_again(folder: Path, tokens: list[int], message: str) -> None:
    write_shard(folder / "x_train_000003.bin", np.array(tokens, dtype=np.uint16))
    with make(folder) as loader:
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                take(loader, 200)


def test_bad_arguments_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.dir is not set.*pgolf data shards"):
        TrainLoader(
            DataConfig(),
            vocab_size=8,
            bos_id=1,
            max_context=8,
            seed=0,
            rank=0,
            world_size=1,
            device=CPU,
        )
    with pytest.raises(ValueError, match=r"rank must be in \[0, world_size=2\), got 2"):
        make(folder, rank=2, world_size=2)
    with pytest.raises(ValueError, match="seed must be >= 0, got -1"):
        make(folder, seed=-1)
    with pytest.raises(ValueError, match="max_context must be >= 1, got 0"):
        make(folder, max_context=0)
    with pytest.raises(FileNotFoundError, match="no data folder at"):
        make(tmp_path / "none")


@pytest.fixture
def no_new_threads() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.usefixtures("no_new_threads")
def test_close_ends_the_thread_and_next_then_fails(folder: Path) -> None:
    loader = make(folder, prefetch=1)
    loader.next()
    loader.close()
    loader.close()
    with pytest.raises(RuntimeError, match="the loader is closed"):
        loader.next()


@requires_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_batches_equal_cpu_batches(folder: Path, device: str) -> None:
    with make(folder) as cpu, make(folder, device=torch.device(device)) as cuda:
        for want, got in zip(take(cpu, 10), take(cuda, 10), strict=True):
            assert got.inputs.is_cuda
            assert torch.equal(want.inputs, got.inputs.cpu())
            assert torch.equal(want.targets, got.targets.cpu())
            assert torch.equal(want.cu_seqlens, got.cu_seqlens.cpu())
