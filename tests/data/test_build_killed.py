"""A shard build of which processes are killed: it ends, leaves no process behind, and can be finished."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgolf.data.build import ShardsJob, build_shards
from pgolf.data.manifest import verify_folder
from pgolf.data.shards import find_shards
from pgolf.data.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks into /proc")

BOUND_S = 120.0
"""Seconds within which a build must end; it takes less than one where nothing else runs."""
SLOW = """
import sys, time
from pathlib import Path
from pgolf.data import build

def slow(path, *, text_key):
    for number, batch in enumerate(read_batches(path, text_key=text_key, batch_bytes=100)):
        print("batch", flush=True)
        # The first ones come at once, so that both workers are started before one of them waits for work.
        time.sleep(0.05 if number > 4 else 0.0)
        yield batch

read_batches, build.read_batches = build.read_batches, slow
if __name__ == "__main__":
    train, val, model, out = map(Path, sys.argv[1:])
    job = build.ShardsJob(train=(train,), val=(val,), tokenizer=model, out=out, jobs=2, shard_tokens=50)
    build.build_shards(job, report=print)
"""


def state(process: int) -> tuple[str, int] | None:
    """Return the state and the parent of a process, or None if it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return fields[0], int(fields[1])


def workers(parent: int) -> list[int]:
    found = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    ours = [pid for pid in found if (state(pid) or ("", 0))[1] == parent]
    return [pid for pid in ours if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def gone(process: int) -> bool:
    found = state(process)
    return found is None or found[0] == "Z"


@pytest.fixture
def files(tmp_path: Path, tokenizer: Tokenizer) -> dict[str, Path]:
    texts = "\n<|endoftext|>\n".join(f"document {n} " + "word " * 20 for n in range(2000))
    (tmp_path / "train.txt").write_text(texts)
    (tmp_path / "val.txt").write_text("held out\n")
    (tmp_path / "slow.py").write_text(SLOW)
    names = {"train": tmp_path / "train.txt", "val": tmp_path / "val.txt"}
    return {**names, "tokenizer": tokenizer.path, "out": tmp_path / "out"}


@pytest.fixture
def running(files: dict[str, Path], tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A build that would take minutes, with running worker processes."""
    command = [sys.executable, str(tmp_path / "slow.py"), *map(str, files.values())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while not list(files["out"].glob("*_train_*.bin")):
        assert process.stdout.readline(), process.communicate()[1]
    yield process
    process.kill()
    process.communicate()


def finish(files: dict[str, Path]) -> None:
    """The folder is refused; doing the same job again gives the same result as a build without a kill."""
    with pytest.raises(ValueError, match=r"unfinished build of shards.*pgolf data shards --train"):
        find_shards(files["out"], "train")
    split = {name: (files[name],) for name in ("train", "val")}
    settings = {"tokenizer": files["tokenizer"], "jobs": 1, "shard_tokens": 50_000}
    again = build_shards(ShardsJob(**split, **settings, out=files["out"]), report=lambda line: None)
    other = files["out"].with_name("other")
    assert again == build_shards(ShardsJob(**split, **settings, out=other), report=lambda line: None)
    assert verify_folder(files["out"], training=True) == again
    assert {p.name for p in files["out"].iterdir()} == {p.name for p in other.iterdir()}


def test_a_killed_worker_ends_the_build(running: subprocess.Popen[str], files: dict[str, Path]) -> None:
    both = workers(running.pid)
    assert len(both) == 2
    os.kill(both[0], signal.SIGKILL)
    _, err = running.communicate(timeout=BOUND_S)
    assert running.returncode == 1
    assert "a worker process died while it encoded the train text" in err
    assert all(map(gone, both))
    finish(files)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_the_build(
    running: subprocess.Popen[str], files: dict[str, Path], number: signal.Signals
) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("ignored by whoever started the tests")
    both = workers(running.pid)
    assert len(both) == 2
    running.send_signal(number)
    running.wait(timeout=BOUND_S)
    assert running.returncode != 0
    end = time.monotonic() + BOUND_S
    while not all(map(gone, both)):
        assert time.monotonic() < end, "a worker waits for ever"
        time.sleep(0.05)
    finish(files)


def test_a_running_build_is_not_taken_for_one_that_was_killed(
    running: subprocess.Popen[str], files: dict[str, Path]
) -> None:
    before = sorted(files["out"].glob("*.bin"))
    split = {name: (files[name],) for name in ("train", "val")}
    job = ShardsJob(**split, tokenizer=files["tokenizer"], out=files["out"], overwrite=True, jobs=1)
    with pytest.raises(RuntimeError, match=r"another build is running in .*out; wait for it"):
        build_shards(job, report=lambda line: None)
    assert set(before) <= set(files["out"].glob("*.bin")), "nothing was removed"
    assert running.poll() is None
