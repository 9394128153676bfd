"""A thread per process that notices ranks which were killed or stopped, and saves the run's clock.

Collectives alone notice that late: a gloo collective waits for a stopped rank until its timeout of ten
minutes, and a host that waits for NCCL does not return at all. So each rank has a TCP connection to rank 0
and writes one line per second. A process that dies closes its connection, which is noticed at once. A process
that is stopped (by SIGSTOP, or because its host cannot be reached) stops writing, which is noticed after
`timeout_s` seconds. Rank 0 tells the others which rank was lost.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from torch.distributed import DistError

from pgolf import env
from pgolf.errors import RunError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

Result = TypeVar("Result")

PERIOD_S = 0.25
BEAT_S = 1.0
MEET_S = 120.0
"""Seconds within which all ranks must connect, counted from the start of the first one that waits."""
GRACE_S = 3.0
"""Seconds in which the main thread may end the process by itself after a rank was lost."""
SUSPENDED_S = 5.0
"""Seconds; a longer pause of this thread means that this process was stopped itself, so that the silence of
the other ranks during the pause does not count."""
_LONGEST_LINE = 4096
_KEY = "pgolf/watch"


@dataclass
class _Peer:
    rank: int
    socket: socket.socket
    seen: float
    buffer: bytes = b""
    left: bool = False


class Watch:
    """Watches the other ranks and calls a function when one is lost; call `leave` before the process ends.

    Args:
        rank, world_size: of this process.
        store: where rank 0 announces its address; None for a single process.
        timeout_s: seconds of silence after which a rank counts as lost.
        meet_by: value of `time.monotonic()` by which all ranks must have connected; default: `MEET_S` from
            now.

    Raises:
        RuntimeError: a rank, which the message names, did not connect within `MEET_S`.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Store | None,
        *,
        timeout_s: float,
        meet_by: float | None = None,
    ) -> None:
        self._rank, self._world_size, self._timeout_s = rank, world_size, timeout_s
        self._beat: Callable[[], object] = lambda: None
        self._on_lost: Callable[[str], object] = _exit
        self._peers: list[_Peer] = []
        self._farewell: str | None = None
        self._lost: str | None = None
        self._heard, self._done = threading.Event(), threading.Event()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, name="pgolf-watch", daemon=True)
        if store is not None and world_size > 1:
            self._meet(store, time.monotonic() + MEET_S if meet_by is None else meet_by)
            self._thread.start()
            atexit.register(self.leave)  # a program that ends without calling `leave` is not a lost rank

    def attend(self, *, beat: Callable[[], object], on_lost: Callable[[str], object]) -> None:
        """Set the functions that the thread calls from now on.

        Args:
            beat: called four times per second.
            on_lost: called once, with a sentence that names the lost rank, unless this process is leaving
                already or ends within `GRACE_S`. Before `attend` is called, a lost rank ends the process.
        """
        self._beat, self._on_lost = beat, on_lost
        if not self._thread.is_alive() and not self._done.is_set():
            self._thread.start()

    def reason(self, *, wait_s: float = 0.0) -> str | None:
        """Return a sentence that names the lost rank, or None; waits up to `wait_s` seconds for one."""
        self._heard.wait(wait_s)
        return self._lost

    def leave(self, reason: str = "") -> None:
        """Tell the other ranks that this one ends, and why, if it ends because of a failure."""
        if self._farewell is None:
            self._farewell = " ".join(reason.split())[: _LONGEST_LINE // 2]
            self._done.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=5.0)

    def _meet(self, store: Store, end: float) -> None:
        """Connect every rank to rank 0, whose address is in `store`, before the time `end`."""
        try:
            if self._rank == 0:
                with socket.create_server(("", 0), backlog=self._world_size) as listener:
                    token = secrets.randbits(64)
                    store.set(_KEY, f"{listener.getsockname()[1]} {token}")
                    self._accept(listener, token, end)
            else:
                store.wait([_KEY], timedelta(seconds=_left(end)))
                port, token = (int(word) for word in store.get(_KEY).split())
                peer = socket.create_connection((env.main_address(), port), timeout=_left(end))
                peer.sendall(f"hello {self._rank} {token}\n".encode())
                self._add(0, peer)
        except (OSError, ValueError, DistError) as e:
            missing = sorted(set(range(1, self._world_size)) - {peer.rank for peer in self._peers})
            who = f"ranks {missing} did not connect" if self._rank == 0 else "rank 0 did not answer"
            raise RunError(
                f"rank {self._rank} of {self._world_size}: {who} within {MEET_S:g} s ({e}); "
                "start all ranks with one torchrun command"
            ) from e

    def _accept(self, listener: socket.socket, token: int, end: float) -> None:
        """Accept a connection from every other rank, and close connections that do not send the token."""
        while len(self._peers) < self._world_size - 1:
            listener.settimeout(_left(end))
            peer, _ = listener.accept()
            peer.settimeout(2.0)  # a foreign connection that sends nothing must not delay the ranks
            with contextlib.suppress(OSError, ValueError, UnicodeError):
                line, rest = _read_line(peer)
                word, rank, given = line.split()
                if word == "hello" and int(given) == token:
                    self._add(int(rank), peer, rest)
                    continue
            peer.close()

    def _add(self, rank: int, peer: socket.socket, rest: bytes = b"") -> None:
        """Watch a connection, of which `rest` was read already."""
        peer.setblocking(False)
        # Every line leaves at once: a farewell that waits for an acknowledgement is lost when the connection
        # ends.
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        entry = _Peer(rank, peer, time.monotonic(), rest)
        self._peers.append(entry)
        self._selector.register(peer, selectors.EVENT_READ, entry)

    def _run(self) -> None:
        last_beat = 0.0
        before = time.monotonic()
        while not self._done.is_set():
            if self._peers:
                ready = self._selector.select(PERIOD_S)
            else:
                ready = []
                self._done.wait(PERIOD_S)
            now = time.monotonic()
            if now - before > PERIOD_S + SUSPENDED_S:
                for peer in self._peers:
                    peer.seen = now
            before = now
            self._beat()
            if now - last_beat >= BEAT_S:
                last_beat = now
                self._tell(".")
            for key, _ in ready:
                self._read(key.data, now)
            self._judge(now)
        self._part()

    def _read(self, peer: _Peer, now: float) -> None:
        """Read what a peer wrote; if its connection ends without a farewell, the rank is lost."""
        try:
            data = peer.socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(peer.socket)
            peer.socket.close()
            if not peer.left:
                peer.left = True
                self._lose(f"rank {peer.rank} ended without a message (killed?)")
            return
        peer.seen = now
        *lines, peer.buffer = (peer.buffer + data).split(b"\n")
        for line in lines:
            word, _, text = line.decode(errors="replace").partition(" ")
            if word == "lost":
                self._lose(text)
            elif word == "bye":
                peer.left = True
                if text:
                    self._lose(f"rank {peer.rank} failed: {text}")

    def _judge(self, now: float) -> None:
        for peer in self._peers:
            if not peer.left and now - peer.seen > self._timeout_s:
                peer.left = True
                self._lose(
                    f"rank {peer.rank} has given no sign of life for {self._timeout_s:g} s "
                    "(stopped, or its host cannot be reached)"
                )

    def _lose(self, text: str) -> None:
        """Tell all ranks, then call `on_lost` unless the main thread ends the process by itself."""
        if self._lost is not None or self._done.is_set():
            return
        self._lost = text
        self._tell(f"lost {text}")
        self._heard.set()
        if not self._done.wait(GRACE_S):
            self._on_lost(text)

    def _tell(self, line: str) -> None:
        """Write a line to every peer; failures are ignored, because the peer's silence will be noticed."""
        for peer in self._peers:
            if not peer.left:
                with contextlib.suppress(OSError):
                    peer.socket.send(line.encode() + b"\n")

    def _part(self) -> None:
        self._tell(f"bye {self._farewell or ''}".rstrip())
        for peer in self._peers:
            with contextlib.suppress(OSError):
                # A socket that is closed with unread data resets the connection instead of ending it.
                while peer.socket.recv(65536):
                    pass
            with contextlib.suppress(OSError):
                peer.socket.close()
        self._selector.close()


def before(end: float, work: Callable[[], Result], late: str) -> Result:
    """Do `work` in a thread and return its result; it must be there when the clock says `end`.

    For calls into torch that can wait for ever: a client of its store has no time limit for the answer of a
    server whose process is stopped. The thread that hangs ends with the process.

    Raises:
        RunError: it is not there in time, with the text `late`. Or what `work` raised.
    """
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as e:
            outcome.set_exception(e)

    threading.Thread(target=run, name="pgolf-meet", daemon=True).start()
    try:
        return outcome.result(_left(end))
    except (TimeoutError, FutureTimeout):
        if outcome.done():
            raise
        raise RunError(late) from None


def _left(end: float) -> float:
    """Return the seconds until `end`, at least 0.01, because a timeout of 0 would mean not to wait."""
    return max(0.01, end - time.monotonic())


def _exit(reason: str) -> None:
    sys.stderr.write(f"pgolf: {reason}\n")
    sys.stderr.flush()
    os._exit(2)


def _read_line(peer: socket.socket) -> tuple[str, bytes]:
    """Return the first line, of at most 64 bytes, and what came with it: a rank may have gone on to beats."""
    data = b""
    while b"\n" not in data and len(data) < 64:
        got = peer.recv(64 - len(data))
        if not got:
            break
        data += got
    line, _, rest = data.partition(b"\n")
    return line.decode(), rest
