"""Signals: a request while training, an exception elsewhere, silence once the process is ending."""

import os
import signal
import time

import pytest

from pgolf.train import signals as module
from pgolf.train.signals import WATCHED, Signals, Stopped


@pytest.mark.parametrize("number", WATCHED)
def test_a_signal_raises_outside_of_training_and_waits_inside(number):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("ignored by whoever started the tests")
    before = signal.getsignal(number)
    with Signals() as signals, signals.deferred():
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert signals.requested == number
    assert signal.getsignal(number) is before
    with Signals() as signals, pytest.raises(Stopped) as stopped:
        os.kill(os.getpid(), number)
        time.sleep(1.0)
    assert stopped.value.signum == number
    assert str(stopped.value) == f"stopped by {signal.Signals(number).name}"


def test_the_echo_of_a_signal_is_not_a_second_one_but_a_later_one_is(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Signals() as signals, signals.deferred():
        for after in (0.0, 0.1, module.ECHO_S - 0.2):  # the terminal's, torchrun's, the shell's
            now[0] += after
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        now[0] += 0.2
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.0)


def test_a_process_that_is_ending_is_not_disturbed():
    with Signals() as signals:
        signals.close()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    assert signals.requested == 0


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert signals.requested == 0
    finally:
        signal.signal(signal.SIGHUP, before)
