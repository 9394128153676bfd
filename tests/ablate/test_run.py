"""The runner of plans with cells that only write files, and one real ablation on a tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from socket import gethostname

import pytest

from pgolf.ablate import run as ablate
from pgolf.ablate.plan import Cell, read_plan
from pgolf.ablate.results import gather, read_cell
from pgolf.ablate.run import end, run_plan, start_process
from pgolf.cli.main import main
from pgolf.cli.overrides import load_base
from pgolf.config import to_dict
from pgolf.env import share_of_cores
from pgolf.files import write_json
from pgolf.train.guard import HeldError, held
from pgolf.train.signals import Stopped
from tests import forks
from tests.ablate.ablate_helpers import (
    DIVERGED,
    PLAN,
    FakeCells,
    FakeProcess,
    make_plan,
    run_all,
    small_overrides,
)
from tests.e2e.conftest import make_shards
from tests.forks import Forked


def test_finished_cells_are_skipped_and_crashed_ones_run_again(tmp_path):
    plan = make_plan(tmp_path)
    lines = run_all(plan, FakeCells(jordan2="out of memory"))
    assert "[3/6] jordan seed 2: crashed: exit code 2: out of memory" in lines[2]
    assert "min to go" in lines[0] and "base seed 1: 1.21000 bpb" in lines[0]
    assert not gather(plan, Path("p")).complete
    again = FakeCells()
    lines = run_all(plan, again)
    assert again.started == [("jordan", 2, None)] and lines[0] == "5 of 6 cells are there already"
    assert gather(plan, Path("p")).complete
    third = FakeCells()
    run_all(plan, third)
    assert third.started == []


def test_a_crash_is_told_by_what_the_command_said_not_by_its_last_line(tmp_path):
    plan = make_plan(tmp_path)
    fault = "  File a.py\npgolf train: TypeError: no\nThis is a fault of pgolf, not of the command: please"
    assert "exit code 2: pgolf train: TypeError: no" in run_all(plan, FakeCells(jordan2=fault))[2]


def test_changed_configuration_is_run_again_and_moved_results_are_kept(tmp_path):
    run_all(make_plan(tmp_path), FakeCells())
    (tmp_path / "out").rename(tmp_path / "moved")
    moved, longer = FakeCells(), FakeCells()
    run_all(make_plan(tmp_path, out=str(tmp_path / "moved"), name="other", seeds=[1, 2, 3, 4]), moved)
    assert {seed for _, seed, _ in moved.started} == {4}
    run_all(make_plan(tmp_path, out=str(tmp_path / "moved"), steps=6), longer)
    assert len(longer.started) == 6


def test_checkpoint_that_the_arms_start_from_may_move_but_not_become_another(tmp_path):
    def plan(path):
        return make_plan(tmp_path, overrides={"train.init": path}, seeds=[1])

    run_all(plan("here/run1/raw.safetensors"), FakeCells())
    moved, other = FakeCells(), FakeCells()
    run_all(plan("there/run1/raw.safetensors"), moved)
    run_all(plan("here/run2/raw.safetensors"), other)
    assert moved.started == [] and len(other.started) == 2


def test_torn_summary_is_run_again(tmp_path):
    plan = make_plan(tmp_path)
    run_all(plan, FakeCells())
    (summary,) = plan.cells()[0].folder.glob("*/summary.json")
    summary.write_text(summary.read_text()[:20])
    again = FakeCells()
    run_all(plan, again)
    assert again.started == [("base", 1, None)]


def test_a_summary_of_other_kinds_is_named(tmp_path):
    plan = make_plan(tmp_path)
    run_all(plan, FakeCells())
    (path,) = plan.cells()[0].folder.glob("*/summary.json")
    whole = json.loads(path.read_text())
    for wrong, said in (
        ({"train": [1]}, r"summary\.json: train is \[1\], expected an object"),
        ({"train": {}}, "the summary holds no training"),
        ({"seconds": {}}, "has no seconds of training"),
        ({"scores": 7}, r"summary\.json: scores is 7, expected an object"),
        ({"bytes": "many"}, r"summary\.json: bytes is 'many', expected an object"),
    ):
        path.write_text(json.dumps(whole | wrong))
        with pytest.raises(ValueError, match=f"{said}.*; or remove .* to run it again"):
            gather(plan, Path("p"))


DATA = {"manifest": "ab" * 32, "validation": {"tokens": 9, "documents": 2, "bytes": 30}}


def test_cells_keep_which_data_they_rested_on(tmp_path):
    plan = make_plan(tmp_path)
    run_all(plan, FakeCells())
    (path,) = plan.cells()[0].folder.glob("*/summary.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": DATA}))
    first, *others = gather(plan, Path("p")).cells
    assert first.manifest == "ab" * 32 and {cell.manifest for cell in others} == {None}


@pytest.mark.parametrize("fate", [DIVERGED, "nan"])
def test_diverged_cell_is_recorded_not_averaged_and_not_run_again(tmp_path, fate):
    plan = make_plan(tmp_path, seeds=[1, 2, 3, 4])
    run_all(plan, FakeCells(jordan2=fate))
    result = gather(plan, Path("p"))
    assert result.complete and result.of("jordan", "diverged")[2].message
    assert list(result.of("jordan")) == [1, 3, 4] and "nan" in result.of("jordan", "diverged")[2].message
    again = FakeCells()
    run_all(plan, again)
    assert again.started == []


def test_interrupt_leaves_finished_cells_intact(tmp_path):
    plan = make_plan(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_all(plan, FakeCells(base2="interrupt"))
    states = [read_cell(cell).status for cell in plan.cells()]
    assert states == ["finished"] * 3 + ["missing"] * 3
    again = FakeCells()
    run_all(plan, again)
    assert len(again.started) == 3


def test_interrupt_ends_the_cells_under_way(tmp_path):
    class Endless(FakeProcess):
        def poll(self):
            return None

    under_way = []

    def start(cell, gpu):
        if cell.arm == "jordan":
            raise KeyboardInterrupt
        under_way.append(Endless(0))
        return under_way[-1]

    with pytest.raises(KeyboardInterrupt):
        run_all(make_plan(tmp_path), start, gpus=2)
    assert [p.stopped for p in under_way] == [True]


def test_three_crashes_in_a_row_stop_the_plan(tmp_path):
    cells = FakeCells(
        **{f"{arm}{seed}": "no such folder" for arm in ("base", "jordan") for seed in (1, 2, 3)}
    )
    with pytest.raises(RuntimeError, match=r"3 cells in a row crashed, the last with: .*no such folder"):
        run_all(make_plan(tmp_path), cells)
    assert len(cells.started) == 3


def test_cells_spread_over_gpus(tmp_path):
    cells = FakeCells()
    run_all(make_plan(tmp_path), cells, gpus=2)
    assert len(cells.started) == 6 and {gpu for _, _, gpu in cells.started} == {0, 1}
    for arm in ("base", "jordan"):  # no arm has a GPU to itself
        assert len({gpu for a, _, gpu in cells.started if a == arm}) == 2


def test_gpus_are_shared_where_asked(tmp_path):
    cells, at_once = FakeCells(), []
    run_all(make_plan(tmp_path), lambda cell, gpu: at_once.append(gpu) or cells(cell, gpu), gpus=2, per_gpu=2)
    assert at_once[:4] == [0, 1, 0, 1] and len(at_once) == 6


def test_runs_of_fixed_seconds_share_no_gpu(tmp_path):
    plan = replace(make_plan(tmp_path), fixed_steps=False, length="10 s")
    with pytest.raises(ValueError, match="per_gpu 2 in a plan of 10 s: runs that share a GPU slow"):
        run_all(plan, FakeCells(), gpus=1, per_gpu=2)
    with pytest.raises(ValueError, match="per_gpu must be >= 1, got 0"):
        run_all(plan, FakeCells(), gpus=1, per_gpu=0)


# The real thing


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("corpus"))


def start_forked(cell: Cell, gpu: int | None, **_: object) -> Forked:
    """What `start_process` does, in a process that has loaded PyTorch already."""
    config = cell.folder / "config.json"
    write_json(config, to_dict(cell.config))
    return Forked(["-m", "pgolf", "train", str(config)], output=cell.folder / ablate.OUTPUT)


@pytest.mark.slow
def test_two_arms_and_two_seeds_end_to_end(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablate, "start_process", start_forked)  # which the last test of this file uses
    arms = {"base": {}, "hot": {"optim.muon.lr": 1e30, "optim.grad_clip": 0.0}}
    common = {**small_overrides(), "train.device": "cpu", "train.warmup_steps": 0}
    path, out = tmp_path / "plan.json", tmp_path / "out"
    changes = {"data": str(shards), "out": str(out), "overrides": common, "arms": arms, "seeds": [1, 2]}
    path.write_text(json.dumps({**PLAN, "steps": 3, **changes}))
    assert main(["ablate", str(path)]) == 0
    said = capsys.readouterr().out
    assert "[4/4]" in said and "min to go" in said
    plan = read_plan(path, load_base)
    result = gather(plan, path)
    one, two = result.of("base")[1], result.of("base")[2]
    assert one.values["steps"] == 3 and one.values["bytes"] > 0
    assert one.values["raw"] != two.values["raw"]
    assert sorted(result.of("hot", "diverged")) == [1, 2]
    assert "the loss is nan at step" in result.of("hot", "diverged")[1].message
    report = (out / "report.md").read_text()
    assert "no claim below 3" in report and "| hot | 1 | diverged |" in report
    (out / "report.md").unlink()
    assert main(["ablate", str(path), "--report-only"]) == 0
    assert (out / "report.md").read_text() == report
    ET.fromstring((out / "report.html").read_text())


def test_processes_side_by_side_share_the_cores(tmp_path, monkeypatch):
    """Each gets its share as threads; a variable that is set already stays."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS $TORCHINDUCTOR_COMPILE_THREADS"\n')
    program.chmod(0o755)
    monkeypatch.setattr(ablate.sys, "executable", str(program))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")
    cell = make_plan(tmp_path).cells()[0]
    cell.folder.mkdir(parents=True)
    assert start_process(cell, None, environment=share_of_cores(5)).wait() == 0
    assert (cell.folder / ablate.OUTPUT).read_text() == "3 7\n"
    assert share_of_cores(40)["OMP_NUM_THREADS"] == "1"


# Two on one plan, and those that are killed


def test_a_plan_that_another_process_runs_is_refused_with_its_number(tmp_path):
    plan = make_plan(tmp_path)
    with (
        held(plan.out),
        pytest.raises(HeldError, match=rf"process {os.getpid()} on {gethostname()} since 20"),
    ):
        run_all(plan, FakeCells())
    assert not (plan.out / "cells").exists()
    assert len(run_all(plan, FakeCells())) == 6  # the lock went with its block


def test_the_lock_goes_with_its_process_however_that_ends(tmp_path):
    program = (
        f"from pgolf.train.guard import *\nfrom pathlib import Path\n"
        f"with held(Path({str(tmp_path)!r})):\n    print('held', flush=True)\n    time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(HeldError, match=f"process {other.pid} on "), held(tmp_path):
            pass
        other.kill()
    with held(tmp_path):
        pass


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_cells_under_way_and_says_so(tmp_path, signum):
    if signal.getsignal(signum) is signal.SIG_IGN:
        pytest.skip("ignored by whoever started the tests")

    class Endless(FakeProcess):
        def poll(self):
            os.kill(os.getpid(), signum)
            return None

        def wait(self, timeout=None):
            os.kill(os.getpid(), signum)  # once more: the end is not cut short
            return 0

    process, lines, before = Endless(None), [], signal.getsignal(signum)
    with pytest.raises(Stopped, match=f"stopped by {signum.name}") as e:
        run_plan(
            make_plan(tmp_path),
            lambda cell, gpu: process,
            gpus=0,
            commit="abc",
            say=lines.append,
            poll_seconds=0.0,
        )
    assert e.value.signum == signum and process.stopped
    assert lines[-1] == f"stopped by {signum.name}: ending 1 runs under way; 0 of 6 cells are kept"
    assert signal.getsignal(signum) == before


def test_a_child_that_does_not_end_when_asked_is_killed():
    sleeps = "import time; print(flush=True); time.sleep(600)"
    deaf = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {sleeps}"
    children = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        for program in (deaf, sleeps)
    ]
    for child in children:
        child.stdout.readline()
    assert end(children, grace=5.0) == 1
    assert [child.returncode for child in children] == [-signal.SIGKILL, -signal.SIGTERM]
    for child in children:
        child.stdout.close()


PARENT_PROGRAM = """
import subprocess, sys, time
from pgolf.env import with_parent
child = "from pgolf.env import follow_parent; follow_parent(); import time; print(flush=True); time.sleep(99)"
process = subprocess.Popen([sys.executable, "-c", child], env=with_parent(), stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid, flush=True)
time.sleep(600)
"""


def gone(pid: int, within: float = 120.0) -> bool:
    """Return whether a process ends in time (a zombie that nobody waits for has ended)."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_a_child_does_not_outlive_a_parent_that_was_killed():
    command = [sys.executable, "-c", PARENT_PROGRAM]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        parent.kill()
    assert gone(child)


def test_a_child_whose_parent_ended_first_does_not_start():
    program = "from pgolf.env import follow_parent; follow_parent(); print('on')"
    environment = {**os.environ, "PGOLF_PARENT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "process 1, which started this one, has ended" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_no_training_goes_on_after_its_ablation_ended(shards, tmp_path, signum):
    overrides = {**small_overrides(), "data.batch_tokens": 512, "train.quantize": False}
    make_plan(tmp_path, data=str(shards), steps=10**6, overrides=overrides, metric="raw", seeds=[1])
    command = ["-m", "pgolf", "ablate", str(tmp_path / "plan.json")]
    with Forked(command) as ablation:
        output = tmp_path / "out" / "cells" / "base" / "seed1" / "output.txt"
        until = time.monotonic() + 240
        while time.monotonic() < until and not (output.is_file() and "step     1" in output.read_text()):
            time.sleep(0.1)
        assert "step     1" in output.read_text()
        (child,) = Path(f"/proc/{ablation.pid}/task/{ablation.pid}/children").read_text().split()
        second = forks.run(command)
        assert second.returncode == 2 and f"held by process {ablation.pid} on" in second.stderr
        ablation.send_signal(signum)
        text = "".join(ablation.communicate(timeout=240))
    assert gone(int(child))
    if signum == signal.SIGTERM:
        assert ablation.returncode == 128 + signum
        assert "stopped by SIGTERM: ending 1 runs under way; 0 of 2 cells are kept" in text
