"""What `train_gpt.py` does: a run without an installed pgolf, or, with `--evaluate`, a score.

`pgolf.artifact.code` puts this module, and all that it needs, into one file.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

from pgolf import env
from pgolf.config import Config, from_dict, read_json
from pgolf.errors import brief, is_checked
from pgolf.report import alone
from pgolf.train.run import train_run


def main(argv: list[str], program: Path) -> int:
    """Train, quantize, write and score; or score only.

    Args:
        argv: the arguments. program: the file that is counted with the artifact.
    Returns:
        0; 2 after an error, which is printed; 3 if the clock was overrun.
    """
    if argv[:1] == ["--evaluate"]:
        return alone.main(argv[1:], program)
    parser = argparse.ArgumentParser(
        program.name,
        description="Train a model, quantize it, write and score its file; with --evaluate FILE as the first "
        "argument score a model file.",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of shards and tokenizer")
    parser.add_argument(
        "--config", type=Path, help="settings as in a run's config.json; else those of pr1855"
    )
    parser.add_argument("--out", type=Path, help="folder for the run's folder")
    parser.add_argument("--seed", type=int, help="train.seed")
    args = parser.parse_args(argv)
    try:
        return 3 if train_run(_config(args)).overrun else 0
    except Exception as e:
        alone_rank = env.launch().world_size == 1
        if alone_rank and not is_checked(e):
            raise
        sys.stderr.write(f"{program.name}: {brief(e)}\n" if is_checked(e) else traceback.format_exc())
        if not alone_rank:
            sys.stderr.flush()
            os._exit(2)  # libraries would wait at the interpreter's end for ranks that are gone
        return 2


def _config(args: argparse.Namespace) -> Config:
    config = Config() if args.config is None else from_dict(Config, read_json(args.config))
    given = {key: value for key, value in (("out", args.out), ("seed", args.seed)) if value is not None}
    return replace(config, data=replace(config.data, dir=args.data), train=replace(config.train, **given))
