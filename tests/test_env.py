"""The ranks of a launch, the threads of a process, and the commit of the sources."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pgolf import env

ROOT = Path(__file__).resolve().parents[1]
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture
def ranks(monkeypatch):
    def put(*values):
        for name, value in zip(RANKS, values, strict=True):
            monkeypatch.setenv(name, value)

    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    return put


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("0", "", "0"), "WORLD_SIZE must be a whole number >= 0, got ''"),
        (("", "", ""), "RANK must be a whole number >= 0, got ''"),
        (("-1", "2", "0"), "RANK must be a whole number >= 0, got '-1'"),
        (("0", "2", "x"), "LOCAL_RANK must be a whole number >= 0, got 'x'"),
        (("2", "2", "0"), "RANK must be below WORLD_SIZE=2, got 2"),
    ],
)
def test_a_place_among_ranks_that_is_none_is_named(ranks, values, message):
    ranks(*values)
    with pytest.raises(RuntimeError, match=message):
        env.launch()
    ranks("1", "2", "1")
    assert env.launch() == env.Launch(rank=1, world_size=2, local_rank=1, distributed=True)


def test_a_containers_quota_is_counted_as_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    limit = tmp_path / "cpu.max"
    monkeypatch.setattr(env, "CGROUP_LIMITS", (limit,))
    for text, cores in (
        ("max 100000", 16),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("9900000 100000", 16),
    ):
        limit.write_text(text + "\n")
        assert env.usable_cores() == cores
    limit.write_text("-1\n")  # cgroup 1
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert env.usable_cores() == 16
    limit.write_text("400000\n")
    assert env.usable_cores() == 4


SHOW = """
import os, sys
from pgolf.env import settle_threads, share_of_cores, threads_note
settle_threads()
names = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT")
print(*(os.environ.get(n, "-") for n in names), share_of_cores(1)["OMP_NUM_THREADS"])
print(threads_note(1))
"""


def settled(**variables):
    base = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_", "LOCAL_WORLD"))}
    command = [sys.executable, "-c", SHOW]
    done = subprocess.run(command, env={**base, **variables}, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_openmp_waits_passively_unless_the_user_says_otherwise():
    assert settled()[0].startswith("PASSIVE ")
    assert settled(OMP_WAIT_POLICY="ACTIVE", OMP_NUM_THREADS="7")[0] == "ACTIVE 7 - 7"
    assert settled(GOMP_SPINCOUNT="100")[0].startswith("- ")
    assert "they sleep while they wait" in settled()[1]
    assert "they spin while they wait" in settled(OMP_WAIT_POLICY="ACTIVE")[1]
    assert "they wait with GOMP_SPINCOUNT=100" in settled(GOMP_SPINCOUNT="100")[1]


def test_processes_of_one_host_share_its_cores():
    cores = env.usable_cores()
    # Children of this process get their own share: that of this process was no word of the user's.
    share = str(max(1, cores // 4))
    assert settled(LOCAL_WORLD_SIZE="4")[0] == f"PASSIVE {share} - {cores}"
    alone = "-" if cores == len(os.sched_getaffinity(0)) else str(cores)
    for here in ("1", "", "0", "x"):
        assert settled(LOCAL_WORLD_SIZE=here)[0] == f"PASSIVE {alone} - {cores}"


def test_a_loaded_machine_is_said(monkeypatch):
    monkeypatch.setattr(env, "usable_cores", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (5.25, 0.0, 0.0))
    assert "other programs keep 5.2 cores busy" in env.threads_note(2)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.0, 0.0))
    assert "busy" not in env.threads_note(2)


def git(folder, *arguments):
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def somebodys(tmp_path):
    """Another repository that contains this package."""
    git(tmp_path, "init", "-q")
    package = tmp_path / "site-packages" / "pgolf"
    package.mkdir(parents=True)
    (package / "env.py").write_text("")
    (tmp_path / "setup.py").write_text("")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "theirs"\n')
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "theirs")
    return package


def test_a_package_in_somebodys_repository_does_not_have_its_commit(somebodys, tmp_path):
    """Before, the commit of that repository was returned."""
    assert env.source_commit(somebodys) == ("unknown", True)
    beside = tmp_path / "pgolf"  # vendored at the top, beside their own setup.py
    shutil.copytree(somebodys, beside)
    assert env.source_commit(beside) == ("unknown", True)
    (somebodys / env.BUILD_INFO).write_text('{"commit": "abc", "dirty": false}')
    assert env.source_commit(somebodys) == ("abc", False)
    (somebodys / env.BUILD_INFO).write_text('{"commit"')
    assert env.source_commit(somebodys) == ("unknown", True)


def test_a_source_tree_asks_git_only_at_the_top_of_its_repository(tmp_path, monkeypatch):
    root = tmp_path / "outer" / "tree"
    (root / "pgolf").mkdir(parents=True)
    (root / "setup.py").write_text("")
    (root / "pyproject.toml").write_text('[project]\nname = "pgolf"\n')
    git(tmp_path / "outer", "init", "-q")
    git(tmp_path / "outer", "add", "-A")
    git(tmp_path / "outer", "commit", "-q", "-m", "a monorepo")
    assert env.source_commit(root / "pgolf") == ("unknown", True)
    (root / ".commit").write_text("copied\n")
    assert env.source_commit(root / "pgolf") == ("copied", False)
    (root / ".commit").unlink()
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "ours")
    ours = git(root, "rev-parse", "HEAD")
    # As in a hook of the outer repository, whose variables git would follow.
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "outer" / ".git"))
    assert env.source_commit(root / "pgolf") == (ours, False)
    (root / "setup.py").write_text("# changed\n")
    assert env.source_commit(root / "pgolf") == (ours, True)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the list of the sources, which git has")
def test_an_sdist_holds_everything_and_knows_its_commit(tmp_path):
    """Before, csrc and CMakeLists.txt were missing, so that it could not be built."""
    copy, out = tmp_path / "tree", tmp_path / "out"
    left_out = ("build", "*.so", ".venv", "results", "*.egg-info", ".git", "runs", "demo")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*left_out))
    (copy / ".commit").write_text("c0ffee\n")
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats", "gztar", "--dist-dir", str(out)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    (archive,) = out.glob("*.tar.gz")
    shutil.unpack_archive(archive, out)
    (root,) = (path for path in out.iterdir() if path.is_dir())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    needed = [f for f in tracked.split() if f.startswith(("csrc/", "pgolf/", "tests/", "examples/"))]
    needed += ["CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile"]
    assert len(needed) > 150
    assert [f for f in needed if not (root / f).is_file()] == []
    assert not list(root.rglob("*.so")) and not list(root.rglob("__pycache__"))
    assert json.loads((root / "pgolf" / env.BUILD_INFO).read_text()) == {"commit": "c0ffee", "dirty": False}
    assert env.source_commit(root / "pgolf") == ("c0ffee", False)
