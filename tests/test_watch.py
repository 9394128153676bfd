"""The watch over the ranks: every rank learns in time which rank was lost, and no other rank is named."""

import threading
import time

import pytest
import torch.distributed as td

from pgolf import watch as module
from pgolf.watch import Watch


@pytest.fixture
def watches(monkeypatch):
    """A function that starts ranks and returns their watches and the messages that each received."""
    monkeypatch.setattr(module, "GRACE_S", 0.0)
    started: list[Watch] = []

    def start(size: int, timeout_s: float = 300.0) -> tuple[list[Watch], dict[int, list[str]]]:
        store, told, found = td.HashStore(), {r: [] for r in range(size)}, dict[int, Watch]()

        def make(number: int) -> None:
            found[number] = Watch(number, size, store, timeout_s=timeout_s)
            found[number].attend(beat=lambda: None, on_lost=told[number].append)

        threads = [threading.Thread(target=make, args=(r,)) for r in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        started.extend(found.values())
        return [found[r] for r in range(size)], told

    yield start
    for watch in started:
        watch.leave()


def wait_until(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)


def die(watch: Watch) -> None:
    """Close a rank's connections without a farewell, as the system does for a killed process."""
    watch._tell = lambda line: None
    watch.leave()


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_rank_that_dies_is_named_to_all_others_at_once(watches, victim):
    ranks, told = watches(3)
    die(ranks[victim])
    others = [r for r in range(3) if r != victim]
    wait_until(lambda: all(told[r] for r in others))  # long before its silence would be noticed
    assert [told[r] for r in others] == [[f"rank {victim} ended without a message (killed?)"]] * 2
    assert ranks[others[0]].reason() == told[others[0]][0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_falls_silent_is_noticed_after_the_timeout(watches, victim, monkeypatch):
    ranks, told = watches(2, timeout_s=2.0)
    monkeypatch.setattr(ranks[victim], "_tell", lambda line: None)  # alive, connected, mute: like SIGSTOP
    wait_until(lambda: told[1 - victim])
    assert told[1 - victim] == [
        f"rank {victim} has given no sign of life for 2 s (stopped, or its host cannot be reached)"
    ]


def test_the_reason_of_a_failing_rank_reaches_the_others(watches):
    ranks, told = watches(3)
    ranks[2].leave("out of memory\nat line 3")
    wait_until(lambda: told[0] and told[1])
    assert told[0] == told[1] == ["rank 2 failed: out of memory at line 3"]


def test_ranks_that_say_goodbye_are_not_lost(watches, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.2)
    monkeypatch.setattr(module, "SUSPENDED_S", 1.0)  # a pause of this whole process is no silence
    ranks, told = watches(3, timeout_s=3.0)
    time.sleep(3.5)  # longer than the timeout: beats keep everybody alive
    ranks[1].leave()
    time.sleep(0.6)
    ranks[0].leave()
    time.sleep(0.6)
    ranks[2].leave()
    assert not any(told.values())


def test_a_farewell_right_after_a_beat_arrives(watches, monkeypatch):
    """It was lost in one of thirty of these, while an acknowledgement of the beat was pending."""
    monkeypatch.setattr(module, "BEAT_S", 0.0)
    monkeypatch.setattr(module, "PERIOD_S", 0.002)
    for _ in range(60):
        ranks, told = watches(2)
        time.sleep(0.02)
        ranks[1].leave()
        time.sleep(0.06)
        ranks[0].leave()
        assert not any(told.values())


def test_a_rank_that_beats_before_rank_0_has_read_its_hello_is_welcome(watches, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.0)
    monkeypatch.setattr(module, "PERIOD_S", 0.001)
    read = module._read_line

    def late(peer: object) -> object:
        time.sleep(0.1)
        return read(peer)

    monkeypatch.setattr(module, "_read_line", late)
    ranks, told = watches(2)
    time.sleep(0.1)
    assert not any(told.values()) and len(ranks) == 2


def test_one_process_needs_no_connection_and_beats(monkeypatch):
    beats: list[float] = []
    monkeypatch.setattr(module, "PERIOD_S", 0.02)
    watch = Watch(0, 1, None, timeout_s=5.0)
    watch.attend(beat=lambda: beats.append(time.monotonic()), on_lost=print)
    wait_until(lambda: len(beats) > 5)
    watch.leave()
    count = len(beats)
    time.sleep(0.1)
    assert len(beats) == count and watch.reason() is None


def test_a_rank_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(module, "MEET_S", 0.3)
    with pytest.raises(RuntimeError, match=r"rank 0 of 3: ranks \[1, 2\] did not connect within 0\.3 s"):
        Watch(0, 3, td.HashStore(), timeout_s=5.0)
    with pytest.raises(RuntimeError, match=r"rank 2 of 3: rank 0 did not answer within 0\.3 s"):
        Watch(2, 3, td.HashStore(), timeout_s=5.0)


def test_time_spent_before_counts_towards_the_meeting():
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"ranks \[1\] did not connect"):
        Watch(0, 2, td.HashStore(), timeout_s=5.0, meet_by=began - 1.0)
    with pytest.raises(RuntimeError, match="rank 0 did not answer"):
        Watch(1, 2, td.HashStore(), timeout_s=5.0, meet_by=began - 1.0)
    assert time.monotonic() - began < 100.0  # MEET_S is 120


def test_what_never_comes_back_is_given_up_and_what_it_raises_is_passed_on():
    never = threading.Event()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^rank 0 is late$"):
        module.before(began + 0.2, never.wait, "rank 0 is late")
    never.set()
    assert module.before(began + 600.0, lambda: 7, "") == 7
    with pytest.raises(TimeoutError, match=r"^of its own$"):
        module.before(began + 600.0, lambda: fail(TimeoutError("of its own")), "rank 0 is late")


def fail(error: Exception) -> None:
    raise error
