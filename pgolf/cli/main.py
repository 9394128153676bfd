"""`pgolf VERB ...`: run a verb, each of which is a file in this folder.

An error that the user can correct is printed as one line; any other error is printed with its traceback. The
exit status is 2 in both cases.
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
    "presets": "list the presets, with what their pull requests report",
    "size": "show the bytes of an artifact by section, measured or predicted",
    "artifact": "inspect an artifact, export its weights, write the program that is counted with it",
    "data": "train a tokenizer; make, inspect, hold out or download shards",
    "evaluate": "score an artifact on the validation text",
    "legality": "test the conditions of a valid submission on an artifact and the way it is scored",
    "generate": "let a trained model continue a prompt",
    "ablate": "run all arms and seeds of a plan, and test which arm is better",
    "report": "write the report page of a run, finished or not, or of several runs",
    "submit": "write the submission folder of finished runs, one per seed",
    "quantize": "quantize a saved checkpoint again, with other settings",
    "demo": "do everything on the sample text of the package, in minutes on a CPU",
    "polar": "solve, print, compare and plot coefficients of the polar iteration",
    "info": "show versions, GPUs, the kernels of each operator, and what is missing",
}
OLD_VERBS = {"record": "submit"}
"""Earlier names of verbs; they work, with a note, until version 0.3."""
HELP = ("-h", "--help", "help")
VERSION = ("-V", "--version", "version")
DEBUG = "--debug"
REPORT = "please report it with the lines above, the command and the output of `pgolf info`"
BROKEN_PIPE = 141
"""Exit status if the reader of the output has ended, the same as the shell's for SIGPIPE."""


def usage() -> str:
    """Return the top-level help."""
    rows = "\n".join(f"  {verb:<10}{text}" for verb, text in VERBS.items())
    return (
        f"usage: pgolf VERB [options]\n\n{rows}\n\n`pgolf VERB --help` explains a verb; `pgolf --version`.\n"
        "`pgolf VERB ... --debug` prints the traceback of every error."
    )


def version_line() -> str:
    """Return the version of the package, the commit of its sources and the version of torch."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "missing"
    return f"pgolf {pgolf.__version__}, commit {commit_name(12) or 'unknown'}, torch {torch}"


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit status."""
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
    except SystemExit as e:  # help, or wrong arguments; the printed text may still be in the buffer
        if isinstance(e.code, str):
            raise
        raise SystemExit(_flush(e.code or 0, logs_itself=False)) from None
    return _flush(code, logs_itself=args[:1] == ["train"])


def explain(verb: str, error: Exception, *, debug: bool = False) -> str:
    """Return what a failed verb tells its user: a line, or a traceback where a line would hide a fault."""
    if isinstance(error, OverflowError):
        # The C library's error has a number before its words.
        detail = f" ({error.args[-1]})" if error.args else ""
        text = f"pgolf {verb}: a number is too large{detail}; use smaller settings"
    elif is_checked(error):
        # A checked error says by itself what to do.
        advice = "; use smaller settings" if lacks_memory(error) and not isinstance(error, Checked) else ""
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
    """Connect standard streams that were closed at the start to the null device.

    Otherwise the next file that is opened would get the number of such a stream, and the output of native
    code would go into that file.
    """
    closed = []
    for number, name in enumerate(("input", "output", "error")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
            closed.append(name)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - stays open
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if "output" in closed:
        _complain("pgolf: standard output is closed, so nothing will be printed")


def _speak_any_letter(stream: TextIO) -> None:
    """Make a stream escape characters that its encoding does not have, instead of raising an error."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
        stream.reconfigure(errors="backslashreplace")


def _flush(code: int, *, logs_itself: bool) -> int:
    """Write the buffered output and return the exit status.

    It is not an error if the reader of the output has ended. If the output cannot be written for another
    reason (a full disk), the status is 2, except for a verb that writes its own log.
    """
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError as e:
            if not isinstance(e, BrokenPipeError) and number == 1 and not logs_itself:
                _complain(f"pgolf: cannot write to standard output: {e.strerror}")
                code = code or 2
            with contextlib.suppress(OSError, ValueError):  # else Python tries again at exit, and warns
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except ValueError:
            continue  # the stream was closed elsewhere
    return code
