"""`pgolf VERB ...`: dispatch to one file per verb; user errors become one line and exit code 2."""

from __future__ import annotations

import importlib
import sys

VERBS = {
    "train": "train a preset (or a saved config.json) on a folder of shards",
    "config": "show what a preset would do, every setting with its value",
    "size": "bytes of an artifact by section: predicted for a preset, measured for a checkpoint",
    "artifact": "look into an artifact, export its weights to safetensors",
    "data": "make a tokenizer, make shards, inspect shards",
    "evaluate": "score an artifact on a validation set",
    "ablate": "run arms x seeds of a plan and say which arm is better, if any can be told",
    "record": "write the submission folder of finished runs, one a seed",
    "quantize": "quantize a saved checkpoint again, with other settings",
    "demo": "the whole way on the bundled sample text, on this machine",
    "polar": "solve, print, compare and plot coefficients of the polar iteration",
    "info": "versions, GPUs, which operator has which kernel, and what is missing",
}
HELP = ("-h", "--help", "help")


def usage() -> str:
    """Return the top-level help."""
    rows = "\n".join(f"  {verb:<10}{text}" for verb, text in VERBS.items())
    return f"usage: pgolf VERB [options]\n\n{rows}\n\n`pgolf VERB --help` explains a verb."


def main(argv: list[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in HELP:
        print(usage())
        return 0
    if args[0] not in VERBS:
        print(f"pgolf: unknown verb {args[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        return int(importlib.import_module(f"pgolf.cli.{args[0]}").main(args[1:]))
    except (OSError, ValueError, TypeError, RuntimeError) as e:
        print(f"pgolf {args[0]}: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
