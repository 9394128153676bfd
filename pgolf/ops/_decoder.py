"""`decode_codes` of `pgolf._C` where there is no compiled pgolf: C++ that is compiled when it is needed.

range_decoder.cpp next to this file is the range coder's own source; csrc/decoder/make.py wrote it. It is
compiled once per process, in a folder that does not stay. That takes about a second and needs a compiler of
C++20: `g++`, version 10 or newer, or what the variable CXX names. A stream is only read, never run.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from pgolf import env
from pgolf.errors import UserError

FLAGS = ("-std=c++20", "-O3", "-shared", "-fPIC")
_LOCK = Lock()


def decode_codes(data: bytes | memoryview, rows: int, cols: int, pool: bytes) -> bytearray:
    """Return the codes of a matrix, row-major; what `pgolf._C.decode_codes` does, without Python's lock.

    Args:
        data: the stream. rows, cols: shape of the matrix. pool: the codes of whole rows that it may lean on.
    Raises:
        ValueError: a stream that the coder cannot have written for this shape; an impossible shape or pool.
        UserError: no compiler, or one that cannot compile C++20.
    """
    if min(rows, cols) < 0 or max(rows, cols, rows * cols) > 1 << 31 or len(pool) % max(cols, 1):
        raise ValueError(
            f"decode_codes: expected a shape of at most 2^31 codes and a pool of whole rows, got ({rows}, "
            f"{cols}) and {len(pool)} codes"
        )
    with _LOCK:
        decode = _compiled()
    codes, stream = bytearray(rows * cols), bytes(data)
    out = (ctypes.c_char * len(codes)).from_buffer(codes)
    problem = decode(stream, len(stream), pool, out, rows, cols, len(pool) // max(cols, 1))
    if problem is not None:
        raise ValueError(
            f"decode_codes: expected the codes of a {rows} x {cols} matrix, but in {len(stream)} bytes "
            f"{problem.decode()}"
        )
    return codes


@cache
def _compiled() -> Any:
    """Return the function `decode` of range_decoder.cpp; calls of it let other threads run."""
    compiler, environment = env.compiler()
    source = Path(__file__).with_name("range_decoder.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/decoder.so"
        command = [*compiler.split(), *FLAGS, "-o", library, str(source)]
        try:
            done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        except OSError as e:
            raise UserError(
                f"no C++ compiler {compiler!r} found for the decoder of the model file; install g++ 10 or "
                "newer, or set CXX to another compiler of C++20"
            ) from e
        if done.returncode != 0:
            raise UserError(
                f"{compiler!r} could not compile the decoder of the model file, expected g++ 10 or newer; "
                f"set CXX to another compiler of C++20; it said: {' '.join(done.stderr.split())[:500]}"
            )
        decode = ctypes.CDLL(library).decode
    decode.restype = ctypes.c_char_p
    shape = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    decode.argtypes = (ctypes.c_char_p, ctypes.c_int64, ctypes.c_char_p, ctypes.c_void_p, *shape)
    return decode
