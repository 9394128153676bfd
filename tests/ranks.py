"""Runs a program on several ranks of one machine: `python tests/ranks.py WORLD PROGRAM ARGUMENTS...`.

The program's modules are loaded once and the ranks are forked then, because loading torch takes longer than
most of these programs. So the program must do its work below `if __name__ == "__main__"`. Ranks that use CUDA
cannot be forked where CUDA was looked for before; torchrun starts those.
"""

import contextlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

from tests import forks


def run_ranks(
    world: int, program: Path, *arguments: str, device: str = "cpu", timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `program` on `world` ranks until all have ended, or one has failed."""
    if device == "cpu":
        return forks.run([__file__, str(world), str(program), *arguments], timeout=timeout)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    return subprocess.run(
        [sys.executable, *torchrun, str(program), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


HELD: list[socket.socket] = []
"""Sockets that keep the ports of this process's ranks from all others; they take no connections."""


def meeting_place(world: int) -> dict[str, str]:
    """Return the environment with which `world` ranks meet, at a port that no other program is given."""
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so that rank 0 can listen there
    probe.bind(("", 0))
    HELD.append(probe)
    port = str(probe.getsockname()[1])
    return {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(world)}


def main(world: int, program: str, arguments: list[str]) -> int:
    """Fork the ranks; return 0 if all succeeded, else the exit status of the first that did not."""
    sys.argv = [program, *arguments]
    sys.path[0] = str(Path(program).parent)
    runpy.run_path(program, run_name="loaded")
    os.environ.update(meeting_place(world), LOCAL_WORLD_SIZE=str(world))
    ranks = [fork(rank, program) for rank in range(world)]
    while ranks:
        ended, status = os.wait()
        ranks.remove(ended)
        if status:
            for rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)
            return abs(os.waitstatus_to_exitcode(status))
    return 0


def fork(rank: int, program: str) -> int:
    """Return the number of a process that runs the program as one rank."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        runpy.run_path(program, run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
