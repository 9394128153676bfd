"""Configuration from the command line: `PRESET|config.json [--section.key value ...]`."""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path

import tyro

from pgolf.cli.table import align
from pgolf.config import Config, from_dict, read_json, to_dict
from pgolf.config_versions import REMOVED, RENAMED, missing_note
from pgolf.env import launch
from pgolf.errors import UserError
from pgolf.presets import OLD_NAMES, PRESETS

OTHER_USES = {
    "config": "       pgolf config A --diff B   the settings in which two of them differ\n",
    "train": "       pgolf train --data DIR ...   the preset best_1gpu\n"
    "       pgolf train --resume RUN [--section.key VALUE ...]   go on from its newest checkpoint\n"
    "       pgolf train --finish RUN [--section.key VALUE ...]   train no further; quantize and score\n",
    "size": "       pgolf size RUN|WEIGHTS|ARTIFACT   the bytes of what a run saved\n"
    "       pgolf size RUN|ARTIFACT --coders   the bytes of the same codes in every coder\n",
}
"""What else the usage of a verb names, where the verb takes more than a configuration."""
SHORT = {
    "--data": "--data.dir",
    "--seconds": "--train.seconds",
    "--steps": "--train.steps",
    "--seed": "--train.seed",
    "--out": "--train.out",
    "--profile": "--train.profile",
}
"""Short names of the settings that most runs change."""


def present_name(name: str) -> str:
    """Return the current name of a preset; prints a note on stderr if `name` is an earlier name."""
    if name not in OLD_NAMES or Path(name).exists():
        return name
    say(f"the preset {name} is now called {OLD_NAMES[name]}; the old name works until version 0.3")
    return OLD_NAMES[name]


def is_preset(name: str) -> bool:
    """Return whether `name` is a preset, and not a file."""
    return (name in PRESETS or name in OLD_NAMES) and not Path(name).exists()


def preset_of(number: str) -> str:
    """Return the preset of a pull request, given as `1787` or `#1787`; empty if there is none."""
    name = f"pr{number.removeprefix('#')}"
    return name if name in PRESETS else ""


def preset_hint(name: str) -> str:
    """Return which presets have names like one that is unknown, and where all of them are listed."""
    near = difflib.get_close_matches(name, PRESETS, n=3)
    ask = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{ask}`pgolf presets` lists the presets"


def sets(words: list[str], setting: str) -> bool:
    """Return whether the words of a command line set the dotted name `setting`."""
    flags = {f"--{setting}", f"--{setting}".replace("_", "-")}
    return any(word.partition("=")[0] in flags for word in words)


def load_base(name: str) -> Config:
    """Return the preset called `name`, or the configuration saved in the file `name`.

    Raises:
        ValueError: it is neither a preset nor a configuration file that can be read.
    """
    name = present_name(name)
    if name in PRESETS:
        return PRESETS[name]()
    path = Path(name)
    if path.suffix != ".json" or not path.is_file():
        if preset_of(name):
            raise UserError(f"the preset of the pull request {name} is called {preset_of(name)}")
        if (path / "config.json").is_file():
            raise UserError(
                f"{name} is the folder of a run, expected a preset or settings; pass {path / 'config.json'}"
            )
        raise UserError(f"{name!r} is neither a preset nor a saved config.json; {preset_hint(name)}")
    return from_dict(Config, read_json(path), where=str(path))


def base_note(name: str) -> str:
    """Return a line on settings that are missing in the saved configuration `name`; empty if none is."""
    if name in PRESETS or name in OLD_NAMES:
        return ""
    data = read_json(Path(name))
    return missing_note(data, to_dict(from_dict(Config, data, where=name)), name)


def say(note: str) -> None:
    """Print a note on stderr, on rank 0 only; do nothing if it is empty."""
    if note and launch().rank == 0:
        print(f"note: {note}", file=sys.stderr)


def check_output(path: Path, option: str) -> None:
    """Check, before any work is done, that the file `path` can be written later.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: it cannot.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path} is a folder, expected a file to write")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} for {option} {path}; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write to {path.parent} for {option} {path}; choose another folder")


def usage(verb: str) -> str:
    """Return the help of a verb that takes a configuration."""
    names = "\n".join(align([(f"  {name}", str(make.__doc__)) for name, make in PRESETS.items()]))
    short = ", ".join(f"{k} = {v}" for k, v in SHORT.items())
    text = f"usage: pgolf {verb} PRESET|config.json [--section.key VALUE ...]\n{OTHER_USES.get(verb, '')}"
    text += f"\npresets (`pgolf presets NAME` says more):\n{names}\n\n"
    return f"{text}short names: {short}\nall settings: pgolf {verb} pr1855 --help"


def parse_config(verb: str, args: list[str]) -> Config:
    """Return the configuration that `args` describe; print help and exit on `--help`.

    Raises:
        ValueError: the first argument is not a preset or a file.
    """
    if not args or args[0].startswith("-"):
        text = usage(verb)
        if args and args[0] in ("-h", "--help"):
            print(text)
            raise SystemExit(0)
        other = ", or pass --data DIR to train best_1gpu" if verb == "train" else ""
        raise UserError(f"name a preset first{other}\n\n{text}")
    base = load_base(args[0])
    if verb != "train":  # `pgolf train` writes the note to its log
        say(base_note(args[0]))
    return override(verb, args[0], args[1:], base)


def present_words(words: list[str]) -> list[str]:
    """Return the words of a command line with today's names of settings; says so on stderr of old ones.

    Raises:
        ValueError: a setting that is gone.
    """
    result = []
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        section, _, last = name.rpartition(".")
        plain = f"{section}.{last.removeprefix('no_')}"  # --quant.no-trellis switches quant.trellis off
        if not flag.startswith("--") or (plain not in RENAMED and name not in REMOVED):
            result.append(word)
            continue
        if name in REMOVED:
            raise UserError(
                f"{flag} does not exist any more: what pgolf does now is what the value {REMOVED[name]!r} of "
                "that setting did; take it out of the command"
            )
        now = RENAMED[plain].rpartition(".")[2]
        now = f"--{section}.{'no-' if plain != name else ''}{now}".replace("_", "-")
        say(f"the setting {flag} is now called {now}; the old name works until version 0.3")
        result.append(now + equals + value)
    return result


def override(verb: str, name: str, words: list[str], base: Config) -> Config:
    """Return `base`, which the user called `name`, with the settings in `words` changed."""
    rest = []
    for word in present_words(words):
        flag, equals, value = word.partition("=")
        rest.append(SHORT.get(flag, flag) + equals + value)
    return tyro.cli(Config, prog=f"pgolf {verb} {name}", default=base, args=rest)
