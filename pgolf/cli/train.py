"""`pgolf train PRESET --data DIR [--section.key VALUE ...]`, alone or under torchrun; `--resume RUN`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pgolf.cli.overrides import base_note, is_preset, load_base, override, parse_config, sets, usage
from pgolf.config import MAY_CHANGE, Config, flat, to_dict
from pgolf.errors import RanksFailed, UserError, is_checked

DEFAULT = "best_1gpu"
"""The preset that `pgolf train --data DIR` trains."""
OVERRUN = 3
"""Exit status of a run that is complete but used more seconds than its clock allows."""
USAGE = """
--resume and --finish are for runs that were stopped or killed, and also work on another number of GPUs (under
torchrun). The exit status is 0; 2 after an error; 3 if the clock was overrun; 128 + the number of the signal
(SIGTERM, SIGHUP, SIGINT) that stopped the run, after it was saved."""


def main(argv: list[str]) -> int:
    """Train, quantize, write and score one run; returns the exit status."""
    resume, train = None, True
    if argv and argv[0].partition("=")[0] in ("--resume", "--finish"):
        config, resume, train = parse_resume(argv)
    else:
        if argv and argv[0] in ("-h", "--help"):
            print(f"{usage('train')}\n{USAGE}")
            return 0
        if argv and argv[0].startswith("--"):
            argv = [DEFAULT, *argv]
        config = parse_config("train", argv)
    notes = [base_note(str(resume / "config.json") if resume is not None else argv[0])]
    from pgolf.cli.main import DEBUG, explain
    from pgolf.env import launch
    from pgolf.train.fitting import fit_to_gpus
    from pgolf.train.run import train_run
    from pgolf.train.signals import Stopped

    place = launch()
    if resume is None and is_preset(argv[0]):
        free = {name: not sets(argv, f"data.{name}") for name in ("batch_tokens", "micro_tokens")}
        per_gpu = load_base(argv[0]).data.micro_tokens if free["batch_tokens"] else None
        config, note = fit_to_gpus(config, place.world_size, per_gpu=per_gpu, micro=free["micro_tokens"])
        notes.append(note)
    try:
        summary = train_run(config, resume=resume, train=train, notes=notes)
        code = OVERRUN if summary.overrun else 0
    except Stopped as e:
        if place.world_size == 1:
            raise
        code = 128 + e.signum
    except Exception as e:
        if place.world_size == 1:
            raise
        # What every rank knows is told once, and where in the program it arose by the rank that knows.
        if place.rank == 0 or not isinstance(e, RanksFailed) or not is_checked(e):
            print(explain("train", e, debug=DEBUG in sys.argv), file=sys.stderr)
        code = 2
    if code not in (0, OVERRUN) and place.world_size > 1:
        # Not through the interpreter's end: libraries would wait there for ranks that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def parse_resume(argv: list[str]) -> tuple[Config, Path, bool]:
    """Return the settings of a stopped run, its folder, and whether to train on.

    Raises:
        FileNotFoundError: no such run. UserError: no folder named, or a setting that must stay was changed.
    """
    word, equals, name = argv[0].partition("=")
    rest = argv[1:] if equals else argv[2:]
    name = name if equals else (argv[1] if len(argv) > 1 else "")
    if not name or name.startswith("-"):
        raise UserError(f"{word} needs the folder of a run: pgolf train {word} runs/...")
    folder = Path(name)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no run at {folder}: it holds no config.json; `pgolf train` makes run folders"
        )
    saved = load_base(str(path))
    config = override("train", f"{word} {name}", rest, saved)
    ours, theirs = flat(to_dict(config)), flat(to_dict(saved))
    changed = [k for k in ours if ours[k] != theirs[k] and not k.startswith(MAY_CHANGE)]
    if changed:
        told = ", ".join(f"{k} is {theirs[k]} in the run" for k in changed)
        raise UserError(
            f"{word}: these settings must stay as they are: {told}; start a new run to change them"
        )
    return config, folder, word == "--resume"
