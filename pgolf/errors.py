"""Errors that users can correct, as opposed to errors in the program.

The command line prints a `Checked` error as one line. Every other exception is an error in the program and is
printed with its traceback.
"""

from __future__ import annotations

import traceback


class Checked(Exception):
    """An error whose message says what was wrong, what was expected and how to correct it."""


class UserError(Checked, ValueError):
    """A setting, a file or a text that the user gave is not valid."""


class UserTypeError(Checked, TypeError):
    """A value that the user gave has a wrong type."""


class RunError(Checked, RuntimeError):
    """The machine, another process or another rank makes the requested work impossible."""


class RanksFailed(RunError):
    """A failure that all ranks raise with the same text, so that it needs to be reported only once.

    On the rank where the failure happened, `__cause__` is the original error.
    """


def is_checked(error: BaseException) -> bool:
    """Return whether the message of `error` is enough for a user, without a traceback.

    It is for `Checked` errors, for errors of the file system, which name the file, and for lack of memory.
    """
    if isinstance(error, RanksFailed) and error.__cause__ is not None:
        return is_checked(error.__cause__)
    return isinstance(error, Checked | OSError | MemoryError)


def brief(error: BaseException) -> str:
    """Return a sentence for the log: the message, and its type and place too if the error is not checked."""
    if is_checked(error):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def told(error: BaseException) -> str:
    """Return the message of a checked error, or the whole traceback of any other error."""
    if is_checked(error):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()
