"""`pgolf train PRESET --data DIR [--section.key VALUE ...]`, alone or under torchrun."""

from __future__ import annotations

from pgolf.cli.overrides import base_note, parse_config


def main(argv: list[str]) -> int:
    """Train, quantize, write and score one run."""
    config = parse_config("train", argv)
    from pgolf.train.run import train_run

    train_run(config, notes=(base_note(argv[0]),))
    return 0
