"""Two hosts, as two network namespaces of this machine: torchrun --nnodes 2 over gloo, and a lost host."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgolf.cli.main import main
from tests.e2e.conftest import SMALL
from tests.e2e.conftest import shards as shards_of_the_sample

shards = shards_of_the_sample


NAMES = ("pgolf-a", "pgolf-b")
ADDRESSES = ("10.77.31.1", "10.77.31.2")
TIMEOUT_S = 5
WORDS = [*SMALL, "--train.checkpoint-every=0.2", f"--train.rank-timeout={TIMEOUT_S}", "--train.device=cpu"]
WORDS += ["--train.no-quantize"]  # for which each process would make the counted code, for seconds


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a virtual cable between them."""
    made: list[str] = []
    try:
        for name in NAMES:
            ip("netns", "add", name)
            made.append(name)
        ip(
            "link",
            "add",
            "pgolf-va",
            "netns",
            NAMES[0],
            "type",
            "veth",
            "peer",
            "name",
            "pgolf-vb",
            "netns",
            NAMES[1],
        )
        for name, link, address in zip(NAMES, ("pgolf-va", "pgolf-vb"), ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", link)
            for device in ("lo", link):
                ip("-n", name, "link", "set", device, "up")
    except (OSError, subprocess.SubprocessError) as e:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False)
        pytest.skip(f"no network namespaces here: {e}")
    yield NAMES
    for name in made:
        subprocess.run(["ip", "netns", "delete", name], check=False)


def start(host: int, port: int, words: list[str], log: Path) -> "subprocess.Popen[bytes]":
    """Run torchrun on one host; all output goes to `log`."""
    command = ["ip", "netns", "exec", NAMES[host], sys.executable, "-m", "torch.distributed.run"]
    command += ["--nnodes=2", "--nproc_per_node=1", f"--node_rank={host}"]
    command += [f"--master_addr={ADDRESSES[0]}", f"--master_port={port}", "-m", "pgolf", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"pgolf-v{'ab'[host]}"}
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


@pytest.mark.slow
def test_two_hosts_train_and_end_bit_identical(hosts, shards, tmp_path):
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path / "runs"), *WORDS]
    words += ["--train.rank-timeout=100"]  # on a busy machine neither may take the other for lost
    logs = [tmp_path / f"{host}.log" for host in range(2)]
    both = [start(host, 29631, words, logs[host]) for host in range(2)]
    codes = [process.wait(300) for process in both]
    assert codes == [0, 0], logs[0].read_text()[-3000:]  # the run asserts that replicas are equal
    (folder,) = (tmp_path / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["train"]["steps"] == 6


@pytest.mark.slow
def test_a_lost_host_ends_the_other_in_the_stated_time_and_the_run_goes_on(hosts, shards, tmp_path):
    words = [
        "train",
        "tiny",
        "--data",
        str(shards),
        "--out",
        str(tmp_path / "runs"),
        *WORDS,
        "--steps=100000",
    ]
    logs = [tmp_path / f"{host}.log" for host in range(2)]
    both = [start(host, 29632, words, logs[host]) for host in range(2)]
    end = time.monotonic() + 300
    while b"step     5" not in logs[0].read_bytes():
        assert time.monotonic() < end and both[0].poll() is None, logs[0].read_text()[-3000:]
        time.sleep(0.05)
    ip("-n", hosts[1], "link", "set", "pgolf-vb", "down")
    began = time.monotonic()
    reason = f"rank 1 has given no sign of life for {TIMEOUT_S} s"
    try:
        (folder,) = (tmp_path / "runs").iterdir()
        while reason not in (folder / "log.txt").read_text():
            assert time.monotonic() - began < TIMEOUT_S + 3 + 90, "not noticed in the stated time"
            time.sleep(0.05)
        assert both[0].wait(240) != 0
    finally:
        ip("-n", hosts[1], "link", "set", "pgolf-vb", "up")
        for process in both:
            process.kill()
            process.wait()
    # Each side of the cut names the other one, once.
    text = (folder / "log.txt").read_text()
    assert text.count(reason) == 1 and text.count("failed during train") <= 2
    assert main(["train", "--finish", str(folder)]) == 0
    assert json.loads((folder / "summary.json").read_text())["sessions"][0]["world_size"] == 2
