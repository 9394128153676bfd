"""Errors that are meant to be read by the person at the command line, who can do something about them.

The command line prints a `Checked` error in one line. Every other exception is a fault of the program and
keeps its traceback.
"""

from __future__ import annotations

import traceback


class Checked(Exception):
    """An error whose message says what was wrong, what was expected and what to do."""


class UserError(Checked, ValueError):
    """A setting, a file or a text that the user gave is not as it must be."""


class UserTypeError(Checked, TypeError):
    """A value that the user gave has another type than it must have."""


class RunError(Checked, RuntimeError):
    """The machine, another process or another rank does not allow what was asked for."""


class RanksFailed(RunError):
    """A failure that every rank knows: all of them raise it with the same text, so that one can tell it.

    On the rank where it happened, `__cause__` is the error itself.
    """


def is_checked(error: BaseException) -> bool:
    """Tell whether the message of `error` says all that there is to say.

    True for `Checked` errors, for those of the file system, which name the file, and where memory is short.
    """
    if isinstance(error, RanksFailed) and error.__cause__ is not None:
        return is_checked(error.__cause__)
    return isinstance(error, Checked | OSError | MemoryError)


def brief(error: BaseException) -> str:
    """Return a sentence for the log: the message of a checked error; else its type and place, too."""
    if is_checked(error):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def told(error: BaseException) -> str:
    """Return what a developer needs: the message of a checked error, the whole traceback of another one."""
    if is_checked(error):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()
