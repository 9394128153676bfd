"""Starts Python programs from one process that has loaded PyTorch, because loading it takes longer than most
programs of the tests.

A server loads modules once. For each `Forked` it forks a process, which gets the environment, arguments and
pipes of the caller and runs a module or file as Python would; it differs from a new process in that modules
are there already. What tests the start itself, or a program that torchrun starts, uses `subprocess`.

As a program this file is the server (SOCKET MODULE...), which imports nothing of pgolf by itself, or asks a
server for a process (--ask SOCKET ARGUMENTS...).
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

PACKAGE = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch._dynamo",  # which torch's optimizers load at their first step
    "pgolf.cli.main",
    "pgolf.train.run",
    "pgolf.artifact.code:code_bytes",
)
"""What processes of pgolf begin with: modules, and after a colon a function whose result is kept."""
NEW = (sys.executable, __file__)
ASK = "--ask"
ROOT = Path(__file__).resolve().parents[1]


@cache
def server(start: tuple[str, ...], modules: tuple[str, ...]) -> str:
    """Start a server, once per process and kind, and return the path of its socket."""
    path = str(Path(tempfile.mkdtemp(prefix="forks")) / "socket")
    # Not the path of the test that happens to be the first; each process gets its own.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE  # of its input this process has the only end, so the server ends with it
    process = subprocess.Popen([*start, path, *modules], stdin=pipe, stdout=pipe, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    atexit.register(process.communicate)
    return path


class Forked:
    """A process with the methods of `subprocess.Popen` that the tests use; it writes text to pipes.

    Args:
        command: `-m MODULE`, `-c PROGRAM` or `FILE`, and its arguments.
        env, cwd: its environment (with one OpenMP thread) and folder.
        output: a file that takes all that it writes, in place of the pipes.
        start, modules: of the server. Each pair has a server of its own.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        output: Path | None = None,
        start: Sequence[str] = NEW,
        modules: Sequence[str] = PACKAGE,
    ) -> None:
        self.args, self.returncode = list(command), None
        environment = dict(os.environ if env is None else env)
        pipes = [os.pipe(), os.pipe()]
        self.stdout, self.stderr = (os.fdopen(read, errors="replace") for read, _ in pipes)
        if output is not None:
            for _, write in pipes:
                file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(file, write)
                os.close(file)
        path = server(tuple(start), tuple(modules))
        self._socket = _ask(path, self.args, environment, cwd or Path.cwd(), [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)
        self._replies = self._socket.makefile()
        self.pid = int(self._replies.readline())

    def poll(self) -> int | None:
        """Return the exit status, -N after signal N; None while it runs."""
        if self.returncode is None and select.select([self._socket], [], [], 0)[0]:
            self.returncode = int(self._replies.readline())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit status."""
        if self.returncode is None and not select.select([self._socket], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        status = self.poll()
        assert status is not None
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return what it writes until it ends; kill it when the time is over."""
        said: dict[int, str] = {}

        def read(number: int) -> None:
            said[number] = (self.stdout, self.stderr)[number].read()

        readers = [threading.Thread(target=read, args=(number,), daemon=True) for number in (0, 1)]
        for reader in readers:
            reader.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        for reader in readers:
            reader.join(timeout)
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended; its end may not have been told yet."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.stderr.close()
        self.wait()


def run(command: Sequence[str], *, timeout: float = 240, **place: object) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as `subprocess.run` does with captured output."""
    process = Forked(command, **place)  # type: ignore[arg-type]
    said = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.wait(), *said)


def interpreter(folder: Path) -> Path:
    """Write a program into `folder` that takes Python's arguments, for scripts that are given a Python."""
    path = folder / "python"
    ask = shlex.join([sys.executable, "-I", "-S", __file__, ASK, server(NEW, PACKAGE)])
    path.write_text(f'#!/bin/sh\nexec {ask} "$@"\n')
    path.chmod(0o755)
    return path


def _ask(
    path: str, command: list[str], environment: dict[str, str], folder: Path, pipes: list[int]
) -> socket.socket:
    """Ask the server at `path` for a process; return the connection, which will say its number and end."""
    request = json.dumps([command, environment | {"OMP_NUM_THREADS": "1"}, str(folder)]).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    socket.send_fds(connection, [len(request).to_bytes(4, "big")], pipes)
    connection.sendall(request)
    return connection


def _stand_in(path: str, command: list[str]) -> int:
    """Run a command in a forked process with the output of this one, and return its exit status."""
    environment = {key: value for key, value in os.environ.items() if key != "PGOLF_PARENT"}
    with _ask(path, command, environment, Path.cwd(), [1, 2]).makefile() as replies:
        _, status = replies
    return int(status) if int(status) >= 0 else 128 - int(status)


def serve(path: str, modules: Sequence[str]) -> None:
    """Load the modules, then fork a process for each connection."""
    for name in modules:
        module, _, function = name.partition(":")
        loaded = importlib.import_module(module)
        if function:
            getattr(loaded, function)()
    gc.freeze()  # so that a collection in a process does not copy what was loaded here
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        os.write(1, b"ready\n")
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _watch(connection)
            connection.close()
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
    with suppress(ChildProcessError):
        while os.wait():
            pass
    shutil.rmtree(Path(path).parent)


def _watch(connection: socket.socket) -> None:
    """Fork the program of one connection, wait for it, and reply its number and its exit status."""
    size, pipes, _, _ = socket.recv_fds(connection, 4, 2)
    with connection.makefile("rb") as file:
        command, environment, folder = json.loads(file.read(int.from_bytes(size, "big")))
    if (child := os.fork()) == 0:
        connection.close()
        _become(command, environment, folder, pipes)
    for pipe in pipes:
        os.close(pipe)
    connection.sendall(f"{child}\n".encode())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    connection.sendall(f"{status}\n".encode())
    os._exit(0)


def _become(command: list[str], environment: dict[str, str], folder: str, pipes: list[int]) -> None:
    """Run the program and end with its status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((nothing, *pipes)):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    kind, *_ = command
    if not sys.flags.ignore_environment:
        first = folder if kind in ("-m", "-c") else str(Path(kind).parent)
        others = [p for p in sys.path[1:] if p != str(ROOT)]
        sys.path[:] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *others]
    importlib.invalidate_caches()
    sys.argv = command if kind not in ("-m", "-c") else [kind, *command[2:]]
    status = 1
    try:
        if kind == "-m":
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            exec(command[1], {"__name__": "__main__"})
        else:
            runpy.run_path(kind, run_name="__main__")
        status = 0
    except SystemExit as e:
        if isinstance(e.code, str):
            sys.stderr.write(f"{e.code}\n")
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        # As at the end of a process: threads are waited for, exit handlers run.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == ASK:
        sys.exit(_stand_in(sys.argv[2], sys.argv[3:]))
    serve(sys.argv[1], sys.argv[2:])
