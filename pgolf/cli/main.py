"""`pgolf VERB ...`: dispatch to one file per verb.

An error that the user can mend becomes one line and exit status 2; any other keeps its traceback.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import os
import signal
import sys
from typing import TextIO

import pgolf
from pgolf.env import commit_name, follow_parent, settle_threads
from pgolf.errors import Checked, brief, is_checked, lacks_memory, whole_traceback

VERBS = {
    "train": "train a preset (or a saved config.json) on a folder of shards",
    "config": "show what a preset would do, every setting with its value",
    "size": "bytes of an artifact by section: what a run wrote, a checkpoint will take, a preset should",
    "artifact": "look into an artifact, export its weights to safetensors",
    "data": "make a tokenizer, make shards, inspect shards",
    "evaluate": "score an artifact on a validation set",
    "generate": "let a trained model continue a prompt",
    "ablate": "run arms x seeds of a plan and say which arm is better, if any can be told",
    "report": "the report page of a run, finished or not, or of several runs laid over each other",
    "submit": "write the submission folder of finished runs, one per seed",
    "quantize": "quantize a saved checkpoint again, with other settings",
    "demo": "the whole way on the bundled sample text, on this machine",
    "polar": "solve, print, compare and plot coefficients of the polar iteration",
    "info": "versions, GPUs, which operator has which kernel, and what is missing",
}
OLD_VERBS = {"record": "submit"}
"""Names that verbs had before; they work, with a notice, until version 0.3."""
HELP = ("-h", "--help", "help")
VERSION = ("-V", "--version", "version")
DEBUG = "--debug"
REPORT = "please report it with the lines above, the command and what `pgolf info` prints"
BROKEN_PIPE = 141
"""Exit code of a program whose reader went away, as the shell reports SIGPIPE."""


def usage() -> str:
    """Return the top-level help."""
    rows = "\n".join(f"  {verb:<10}{text}" for verb, text in VERBS.items())
    return (
        f"usage: pgolf VERB [options]\n\n{rows}\n\n`pgolf VERB --help` explains a verb; `pgolf --version`.\n"
        "`pgolf VERB ... --debug` shows where in the program an error arose, also one that takes one line."
    )


def version_line() -> str:
    """Return the versions of the package, its sources and torch."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "missing"
    return f"pgolf {pgolf.__version__}, commit {commit_name(12) or 'unknown'}, torch {torch}"


def main(argv: list[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    args = sys.argv[1:] if argv is None else argv
    settle_threads()
    if argv is None:
        follow_parent()
        _open_closed_streams()
    _speak_any_letter(sys.stdout)
    _speak_any_letter(sys.stderr)
    try:
        code = _run(args)
    except BrokenPipeError:
        code = BROKEN_PIPE
    except SystemExit as e:  # help, or words that do not parse: what was printed may still be in the buffer
        if isinstance(e.code, str):
            raise
        raise SystemExit(_flush(e.code or 0, logs_itself=False)) from None
    return _flush(code, logs_itself=args[:1] == ["train"])


def explain(verb: str, error: Exception, *, debug: bool = False) -> str:
    """Return what a failed verb tells its user: a line, or a traceback where a line would hide a fault."""
    if isinstance(error, OverflowError):
        # The C library's error has a number before its words.
        text = f"pgolf {verb}: a number is too large ({error.args[-1] if error.args else ''}); ask for less"
    elif is_checked(error):
        # A checked error says by itself what to do.
        advice = "; ask for less" if lacks_memory(error) and not isinstance(error, Checked) else ""
        text = f"pgolf {verb}: {brief(error)}{advice}"
    else:
        what = f"pgolf {verb}: {type(error).__name__}: {error}"
        fault = f"This is a fault of pgolf, not of the command: {REPORT}"
        return f"{whole_traceback(error)}\n{what}\n{fault}"
    return f"{whole_traceback(error)}\n{text}" if debug else text


def _run(args: list[str]) -> int:
    debug = DEBUG in args
    args = [a for a in args if a != DEBUG]
    try:
        return _verb(args)
    except BrokenPipeError:
        raise
    except Exception as e:
        _complain(explain(args[0] if args else "", e, debug=debug))
        return 2
    except KeyboardInterrupt as e:
        _complain(str(e) or "interrupted")
        return 128 + int(getattr(e, "signum", signal.SIGINT))


def _verb(args: list[str]) -> int:
    if not args or args[0] in HELP:
        print(usage())
        return 0
    if args[0] in VERSION:
        print(version_line())
        return 0
    if args[0] in OLD_VERBS:
        new = OLD_VERBS[args[0]]
        _complain(f"pgolf {args[0]} is now called pgolf {new}; the old name works until version 0.3")
        args = [new, *args[1:]]
    if args[0] not in VERBS:
        _complain(f"pgolf: unknown verb {args[0]!r}\n\n{usage()}")
        return 2
    return int(importlib.import_module(f"pgolf.cli.{args[0]}").main(args[1:]))


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def _open_closed_streams() -> None:
    """Give a standard stream that was closed at the start an end that swallows everything.

    Otherwise the next file that is opened gets its number, and what native code prints goes into that file.
    """
    closed = []
    for number, name in enumerate(("input", "output", "error")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
            closed.append(name)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for good
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if "output" in closed:
        _complain("pgolf: standard output is closed; what would be printed is lost")


def _speak_any_letter(stream: TextIO) -> None:
    """Escape letters that the stream's encoding lacks instead of failing."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
        stream.reconfigure(errors="backslashreplace")


def _flush(code: int, *, logs_itself: bool) -> int:
    """Hand the output to the system and return the exit code; a reader that went away is no error.

    Where it cannot be written otherwise (a full disk), the code is 2, unless the verb has a log of its own.
    """
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError as e:
            if not isinstance(e, BrokenPipeError) and number == 1 and not logs_itself:
                _complain(f"pgolf: cannot write to standard output: {e.strerror}")
                code = code or 2
            with contextlib.suppress(OSError, ValueError):  # or Python tries again at its end, and complains
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except ValueError:
            continue  # closed by somebody else
    return code
