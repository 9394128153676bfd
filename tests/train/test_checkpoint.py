"""Checkpoints: whole at any number of ranks, or refused by name; nothing in them is executed."""

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pgolf.optim.bank_muon import Shard
from pgolf.train import checkpoint as module
from pgolf.train.checkpoint import (
    FAILED,
    IDLE,
    INDEX,
    WRITTEN,
    Checkpointer,
    Parts,
    newest_checkpoint,
    read_checkpoint,
    remove_after,
    write_shard_file,
)


class FakeDist:
    """One rank of several; `rows` are what all ranks said in the last collective."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.is_main = rank, world_size, rank == 0
        self.device = torch.device("cpu")
        self.rows: Callable[[], list[list[int]]] | None = None
        self.mine: list[int] = []

    def gather_ints(self, values: list[int]) -> list[list[int]]:
        self.mine = values
        return self.rows() if self.rows is not None else [values]


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "weights.emb": torch.randn(7, 5, generator=rng),
        "weights.gain": torch.randn((), generator=rng),
        "weights.empty": torch.zeros(0, 3),
        "optim.counts": torch.tensor([1.0, 2.0, 3.0]),
        "optim.muon.momentum.up": torch.randn(5, 4, 3, generator=rng).bfloat16(),
        "optim.muon.momentum.one": torch.randn(1, 4, 3, generator=rng),
    }


def parts(tensors: dict[str, torch.Tensor], rank: int, world: int) -> Parts:
    """Cut the momentum as BankMuon does; ranks past the last matrix have none."""
    whole = {k: t.clone() for k, t in tensors.items() if "momentum" not in k}
    sharded = {}
    for name, t in tensors.items():
        if "momentum" in name:
            size = -(-t.shape[0] // world)
            starts = [min(r * size, t.shape[0]) for r in range(world + 1)]
            spans = tuple(itertools.pairwise(starts))
            sharded[name] = Shard(t[spans[rank][0] : spans[rank][1]].clone(), spans)
    return Parts(whole, sharded)


def write(run: Path, tensors: dict[str, torch.Tensor], world: int, step: int = 10) -> list[Checkpointer]:
    """Write a checkpoint with `world` ranks, the main one completing it last."""
    dists = [FakeDist(rank, world) for rank in range(world)]
    writers = [Checkpointer(run, dist, parts(tensors, dist.rank, world)) for dist in dists]
    for writer in writers:
        writer.start(step, {"elapsed": 1.5})
        writer.wait()
        assert writer.state == WRITTEN
    for dist in dists[1:]:
        dist.rows = lambda: [[1] * 5] * world
        writers[dist.rank].settle()
    dists[0].rows = lambda: [dists[0].mine, *(dist.mine for dist in dists[1:])]
    assert writers[0].settle() is None
    writers[0].wait()
    assert writers[0].state == IDLE
    return writers


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_what_any_number_of_ranks_wrote_comes_back_whole(tmp_path, world):
    tensors = state()
    write(tmp_path, tensors, world)
    found, complaints = newest_checkpoint(tmp_path)
    assert found is not None and not complaints
    assert found.step == 10 and found.facts["elapsed"] == 1.5
    loaded = found.load()
    assert loaded.keys() == tensors.keys()
    for name, t in tensors.items():
        assert loaded[name].dtype == t.dtype and torch.equal(loaded[name], t), name
    assert len(list(found.folder.glob("*.safetensors"))) == world


def test_replicated_tensors_are_dealt_out_and_written_once(tmp_path):
    tensors = {f"weights.{i}": torch.full((100 + i,), float(i)) for i in range(8)}
    write(tmp_path, tensors, 4)
    found, _ = newest_checkpoint(tmp_path)
    assert found is not None
    keys = [set(load_file(found.folder / name)) for name in found.files]
    assert [len(k) for k in keys] == [2, 2, 2, 2] and set.union(*keys) == set(tensors)


def test_a_shard_is_what_safetensors_reads_and_has_the_hash_that_is_told(tmp_path):
    tensors = {"a": torch.randn(3, 5).bfloat16(), "b": torch.tensor(True), "c": torch.arange(4)}
    size, digest = write_shard_file(tmp_path / "x.safetensors", tensors)
    assert (tmp_path / "x.safetensors").stat().st_size == size
    assert module.file_sha256(tmp_path / "x.safetensors") == digest.hex()
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[k], t) for k, t in tensors.items())


def test_the_copy_is_of_the_moment_of_start_though_training_goes_on(tmp_path, monkeypatch):
    tensors = state()
    live = parts(tensors, 0, 1)
    writer = Checkpointer(tmp_path, FakeDist(0, 1), live)
    writer.start(1, {})
    for t in live.whole.values():
        t.fill_(99.0)
    writer.wait()
    assert writer.settle() is None
    writer.wait()
    found, _ = newest_checkpoint(tmp_path)
    assert found is not None and torch.equal(found.load()["weights.emb"], tensors["weights.emb"])


def test_the_two_newest_stay(tmp_path):
    for step in (5, 10, 15):
        write(tmp_path, state(step), 1, step)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000010", "step-00000015"]
    remove_after(tmp_path, 10)
    found, _ = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 10
    assert (tmp_path / "checkpoints" / "step-00000015.bad").is_dir(), "kept, out of the way"


def test_a_process_that_is_killed_while_it_removes_an_old_one_leaves_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "rmtree", lambda *_, **__: None)  # killed before the first file went
    for step in (5, 10, 15):
        write(tmp_path, state(step), 1, step)
    assert (tmp_path / "checkpoints" / "step-00000005").is_dir()
    assert not (tmp_path / "checkpoints" / "step-00000005" / module.INDEX).exists()


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path):
    write(tmp_path, state(), 1)
    found, complaints = newest_checkpoint(tmp_path, identity="another")
    assert found is None and "is a checkpoint of another run" in complaints[0]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def edit(path: Path, change: Callable[[dict], object], *, sign: bool = True) -> None:
    data = json.loads(path.read_text())
    change(data)
    if sign:
        data.pop("sha256", None)
        data["sha256"] = module._digest(data)
    path.write_text(json.dumps(data))


SHARD = "shard-00-of-01.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda f: (f / INDEX).unlink(), "was not completed"),
    "torn index": (lambda f: (f / INDEX).write_bytes((f / INDEX).read_bytes()[:50]), "not an index"),
    "edited index": (lambda f: edit(f / INDEX, lambda d: d["facts"].update(step=11), sign=False), "SHA-256"),
    "a bit of a shard": (lambda f: flip(f / SHARD, -3), "damaged"),
    "a shard cut off": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-8]), "damaged"),
    "a shard missing": (lambda f: (f / SHARD).unlink(), "missing"),
    "another format": (lambda f: edit(f / INDEX, lambda d: d.update(format="x 9")), "format 'x 9'"),
    "a path as a name": (
        lambda f: edit(f / INDEX, lambda d: d["files"].update({"../../x": {"bytes": 1, "sha256": ""}})),
        "must list shard-00",
    ),
    "deep nesting": (lambda f: (f / INDEX).write_text("[" * 100_000), "not an index"),
    "not an object": (lambda f: (f / INDEX).write_text("[1, 2]"), "not an index"),
    "pickle as an index": (lambda f: (f / INDEX).write_bytes(pickle.dumps(Bomb())), "not an index"),
    "rows of nobody": (
        lambda f: edit(f / INDEX, lambda d: d["rows"]["optim.muon.momentum.up"].update({SHARD: [1, 6]})),
        "missing or doubled",
    ),
}
EXECUTED: list[str] = []


class Bomb:
    """A pickle that leaves a trace when it is loaded."""

    def __reduce__(self):
        return EXECUTED.append, ("boom",)


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_taken(tmp_path, case):
    damage, message = DAMAGE[case]
    write(tmp_path, state(1), 1, 5)
    write(tmp_path, state(2), 1, 10)
    folder = tmp_path / "checkpoints" / "step-00000010"
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_checkpoint(folder).load()
    assert not EXECUTED
    if case != "rows of nobody":  # only found by reading the tensors
        found, complaints = newest_checkpoint(tmp_path)
        assert found is not None and found.step == 5
        assert len(complaints) == 1 and "step-00000010" in complaints[0]


def test_a_hostile_shard_is_refused_and_not_executed(tmp_path):
    write(tmp_path, state(), 1)
    folder = tmp_path / "checkpoints" / "step-00000010"
    (folder / SHARD).write_bytes(pickle.dumps(Bomb()))

    def tell(data: dict) -> None:
        data["files"][SHARD] = {
            "bytes": (folder / SHARD).stat().st_size,
            "sha256": module.file_sha256(folder / SHARD),
        }

    edit(folder / INDEX, tell)
    with pytest.raises(ValueError, match="not a readable shard"):
        read_checkpoint(folder).load()
    assert not EXECUTED


def test_a_disk_that_is_full_costs_the_checkpoint_and_not_the_run(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_shard_file", fail)
    writer = Checkpointer(tmp_path, FakeDist(0, 1), parts(state(), 0, 1))
    writer.start(3, {})
    writer.wait()
    assert writer.state == FAILED
    problem = writer.settle()
    assert problem is not None and "step 3" in problem and "No space left" in problem
    assert writer.state == IDLE and newest_checkpoint(tmp_path) == (None, [])
    monkeypatch.undo()
    writer.start(4, {})
    writer.wait()
    assert writer.settle() is None
