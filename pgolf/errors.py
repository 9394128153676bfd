"""Errors that the person at the command line can do something about, and what is said of all others.

The command line prints a `Checked` error in one line, and so the errors of the file system and those for want
of memory. Every other exception is a fault of the program and keeps its traceback.
"""

from __future__ import annotations

import re
import traceback
from types import TracebackType


class Checked(Exception):
    """An error whose message says what was wrong, what was expected and how to correct it."""


class UserError(Checked, ValueError):
    """A setting, a file or a text that the user gave is not valid."""


class UserTypeError(Checked, TypeError):
    """A value that the user gave has a wrong type."""


class RunError(Checked, RuntimeError):
    """The machine, another process or another rank makes the requested work impossible."""


class RanksFailed(RunError):
    """A failure that every rank knows: all of them raise it with the same text, and one of them prints it.

    On the rank where the failure happened, `__cause__` is the original error.
    """


class OutOfMemory(RunError):
    """Memory ran out; the message says which setting takes less."""


class MemoryAdvice:
    """Turns errors for want of memory inside a `with` block into `OutOfMemory`, which ends with `advice`."""

    def __init__(self, advice: str) -> None:
        """Let `advice` say, as the end of a sentence, what takes less memory."""
        self._advice = advice

    def __enter__(self) -> None:
        """Begin the block."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raise `OutOfMemory` from an error for want of memory; let everything else pass."""
        if error is not None and lacks_memory(error) and not isinstance(error, Checked):
            raise OutOfMemory(f"{memory_note(error)}; {self._advice}") from error


def lacks_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, on the host or on a GPU."""
    # By name and text, so that nothing loads torch for it: torch.OutOfMemoryError is for GPUs, and torch's
    # allocator on the host raises a plain RuntimeError.
    on_gpu = "OutOfMemoryError" in [kind.__name__ for kind in type(error).__mro__]
    return on_gpu or isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


_NO_MEMORY = re.compile(r"CPUAllocator: (can't allocate|not enough) memory|CUDA error: out of memory")


def memory_note(error: BaseException) -> str:
    """Return the sentence on an error for want of memory, with what was asked for where it says that."""
    said = (str(error).splitlines() or [""])[0]
    # torch goes on for a paragraph about its allocator; the first two sentences have what and how much.
    detail = ". ".join(said.split(". ")[:2]).rstrip(".")
    return "there is not enough memory for it" + (f" ({detail})" if detail else "")


def is_checked(error: BaseException) -> bool:
    """Return whether the message of `error` is enough for a user, without a traceback.

    It is for `Checked` errors, for errors of the file system, which name the file, and for lack of memory.
    """
    if isinstance(error, RanksFailed) and error.__cause__ is not None:
        return is_checked(error.__cause__)
    return isinstance(error, Checked | OSError) or lacks_memory(error)


def brief(error: BaseException) -> str:
    """Return a sentence for the log: the message of a checked error; else its type and place, too."""
    if isinstance(error, Checked):
        return str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        # Without the number of the error, which `str` puts first.
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if is_checked(error):
        return memory_note(error) if lacks_memory(error) else str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def told(error: BaseException) -> str:
    """Return what a developer needs: the message of a checked error, the whole traceback of another one."""
    return brief(error) if is_checked(error) else whole_traceback(error)


def whole_traceback(error: BaseException) -> str:
    """Return the traceback of an error and of those that caused it."""
    return "".join(traceback.format_exception(error)).rstrip()
