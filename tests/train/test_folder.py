"""The folder of a run: its own, also where two runs of one name start in the same second."""

import threading
from pathlib import Path

import pytest

from pgolf.dist import Dist
from pgolf.train.session import make_folder


def test_runs_of_one_name_and_second_get_folders_of_their_own(tmp_path):
    dist, wanted = Dist.start("cpu"), tmp_path / "runs" / "20261124-000000-tiny"
    made: list[Path] = []
    starts = [threading.Thread(target=lambda: made.append(make_folder(wanted, dist))) for _ in range(4)]
    for thread in starts:
        thread.start()
    for thread in starts:
        thread.join()
    names = [wanted.name, *(f"{wanted.name}-{n}" for n in (2, 3, 4))]
    assert sorted(path.name for path in made) == names
    assert sorted(path.name for path in wanted.parent.iterdir()) == names


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        RuntimeError, match=r"cannot make .*file/run: Not a directory; choose another --train"
    ):
        make_folder(tmp_path / "file" / "run", Dist.start("cpu"))
