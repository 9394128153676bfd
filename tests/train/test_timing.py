"""Spans on the device and the age of the process."""

import subprocess
import sys
import time

import pytest
import torch

from pgolf.train import timing
from pgolf.train.timing import DeviceTimer, process_seconds
from tests.conftest import requires_gpu


def test_a_span_lasts_as_long_as_its_block():
    timer, around = DeviceTimer(torch.device("cpu")), []
    for seconds in (0.02, 0.0):
        began = time.perf_counter()
        with timer.span():
            time.sleep(seconds)
        around.append(1000 * (time.perf_counter() - began))
    first, second = timer.read()
    # A clock around each block bounds it from above, however long a busy machine lets it wait.
    assert 20 <= first <= around[0] and 0 <= second <= around[1]


@requires_gpu
def test_a_span_is_that_of_the_kernels_not_of_their_launch():
    device = torch.device("cuda")
    timer, x = DeviceTimer(device), torch.randn(4096, 4096, device=device)
    x @ x
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        with timer.span():
            x @ x
    launched = 1000 * (time.perf_counter() - began)
    torch.cuda.synchronize()
    whole = 1000 * (time.perf_counter() - began)
    spans = timer.read()
    assert len(spans) == 10 and launched < 0.5 * whole, "nothing waited for the device"
    assert 0.5 * whole < sum(spans) <= whole


def test_the_age_of_a_process_has_its_start_and_imports_in_it():
    program = "import time\nbegan = time.perf_counter()\nfrom pgolf.train.timing import process_seconds\n"
    program += "time.sleep(0.2)\nprint(time.perf_counter() - began, process_seconds())"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    inside, age = map(float, done.stdout.split())
    assert inside < age + 0.02 and age < time.perf_counter() - began + 0.02
    assert process_seconds() > time.perf_counter() - began


@pytest.mark.parametrize(
    "text", [None, "", "1 (a) b) R 0", f"1 (python) R {'0 ' * 40}", f"1 (x) R {('9' * 15 + ' ') * 40}"]
)
def test_a_system_that_does_not_say_when_a_process_began_gives_none(tmp_path, monkeypatch, text):
    """No such file (macOS), a short one, a field that is 0 (gVisor), a start that is still to come."""
    if text is not None:
        (tmp_path / "stat").write_text(text)
    monkeypatch.setattr(timing, "STAT", tmp_path / "stat")
    assert process_seconds() is None
