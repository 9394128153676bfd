"""A writer killed at any moment leaves the old file or the new one, and nothing that the next write minds."""

import random
import signal
import subprocess
import sys
import time

import pytest
from artifact_helpers import CONFIG, FACTS, make_state

from pgolf.artifact.read import read_state
from pgolf.artifact.write import save_file, write_artifact

# What save_file does, without the seconds that importing torch takes; in pieces, to be met in the middle.
WRITER = """
import sys
from pathlib import Path
from pgolf.files import atomic_file
path, versions = Path(sys.argv[1]), [Path(name).read_bytes() for name in sys.argv[2:]]
print("ready", flush=True)
for i in range(10**6):
    with atomic_file(path) as file:
        for begin in range(0, len(versions[i % 2]), 500):
            file.write(versions[i % 2][begin : begin + 500])
"""


def start(path, versions):
    words = [sys.executable, "-c", WRITER, str(path), *map(str, versions)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Two artifacts, the old one and the new one."""
    folder = tmp_path_factory.mktemp("versions")
    for seed in (3, 4):
        state = make_state(seed=seed)
        write_artifact(folder / f"{seed}", state, CONFIG, **FACTS, limit=16_000_000, quality=0)
    return [folder / "3", folder / "4"]


def test_killed_writers_leave_whole_files_and_no_temporaries(tmp_path, versions):
    """Twenty processes overwrite one file again and again, each killed at a random moment of its writes."""
    path, delay = tmp_path / "model.pgolf", random.Random(1)
    whole = {version.read_bytes() for version in versions}
    save_file(path, versions[0].read_bytes())
    interrupted = 0
    for _ in range(20):
        process = start(path, versions)
        time.sleep(delay.uniform(0.0, 0.02))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert path.read_bytes() in whole
        read_state(path)
        interrupted += len(list(tmp_path.iterdir())) > 1
    assert interrupted > 0, "no process was killed while it wrote; the test shows nothing"
    save_file(path, versions[1].read_bytes())
    assert [p.name for p in tmp_path.iterdir()] == ["model.pgolf"], "a dead writer's temporary is still there"
    assert path.read_bytes() == versions[1].read_bytes()


def test_a_living_writer_keeps_its_temporary(tmp_path, versions):
    """Two processes may write the same file: the last one wins, and neither takes the other's temporary."""
    path = tmp_path / "model.pgolf"
    process = start(path, versions)
    try:
        for _ in range(50):
            save_file(path, versions[0].read_bytes())
            read_state(path)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
