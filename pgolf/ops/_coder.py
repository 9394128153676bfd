"""The range coder of `pgolf._C` where there is no compiled pgolf: C++ that is compiled when it is needed.

range_coder.cpp next to this file is the coder's own source, with that of the trellis; csrc/alone/make.py
wrote it. It is compiled once per process, in a folder that does not stay. That takes three seconds and needs
a compiler of C++20: `g++` 10 or newer, or what the variable CXX names. A program that only reads has
range_decoder.cpp in its place. A stream is only read, never run.
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

FLAGS = ("-std=c++20", "-O3", "-shared", "-fPIC", "-pthread")
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
    codes, stream = bytearray(rows * cols), bytes(data)
    out = (ctypes.c_char * len(codes)).from_buffer(codes)
    problem = library().decode(stream, len(stream), pool, out, rows, cols, len(pool) // max(cols, 1))
    if problem is not None:
        raise ValueError(
            f"decode_codes: expected the codes of a {rows} x {cols} matrix, but in {len(stream)} bytes "
            f"{problem.decode()}"
        )
    return codes


def encode_codes(codes: bytes, rows: int, cols: int, pool: bytes, fast: bool) -> bytes:
    """Return the stream of a matrix; what `pgolf._C.encode_codes` does, without Python's lock.

    Args:
        codes: the matrix, row-major. rows, cols: its shape. pool: further rows, which it may lean on.
        fast: do not search for similar rows.
    Raises:
        ValueError: the codes or the pool have not this shape. MemoryError. UserError: as `decode_codes`.
    """
    if len(codes) != rows * cols or max(rows, cols, len(codes)) > 1 << 31 or len(pool) % max(cols, 1):
        raise ValueError(
            f"encode_codes: expected ({rows}, {cols}) codes and a pool of whole rows, got {len(codes)} and "
            f"{len(pool)} codes"
        )
    out = ctypes.create_string_buffer(len(codes) + 1)
    size = library().encode(codes, pool, out, rows, cols, len(pool) // max(cols, 1), fast)
    if size < 0:
        raise MemoryError(f"encode_codes: not enough memory for the codes of a {rows} x {cols} matrix")
    return out.raw[:size]


def library() -> Any:
    """Return the compiled coder; calls of its functions let other threads run."""
    with _LOCK:
        return _compiled()


@cache
def _compiled() -> Any:
    """Compile the coder, or the decoder where there is only that, and load it."""
    compiler, environment = env.compiler()
    names = ("range_coder.cpp", "range_decoder.cpp")
    source = next(p for name in names if (p := Path(__file__).with_name(name)).is_file())
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/coder.so"
        command = [*compiler.split(), *FLAGS, "-o", file, str(source)]
        try:
            done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        except OSError as e:
            raise UserError(
                f"no C++ compiler {compiler!r} found for the coder of the model file; install g++ 10 or "
                "newer, or set CXX to another compiler of C++20"
            ) from e
        if done.returncode != 0:
            raise UserError(
                f"{compiler!r} could not compile the coder of the model file, expected g++ 10 or newer; "
                f"set CXX to another compiler of C++20; it said: {' '.join(done.stderr.split())[:500]}"
            )
        coder = ctypes.CDLL(file)
    text, size = ctypes.c_char_p, ctypes.c_int64
    coder.decode.restype = text
    coder.decode.argtypes = (text, size, text, ctypes.c_void_p, size, size, size)
    if source.name == names[0]:
        coder.encode.restype = size
        coder.encode.argtypes = (text, text, text, size, size, size, ctypes.c_int)
        coder.trellis.restype = None
        coder.trellis.argtypes = (ctypes.c_void_p, ctypes.c_void_p, size, size, ctypes.c_int)
    return coder
