"""`pgolf artifact inspect FILE [--json]`, `export FILE OUT.safetensors` and `code FOLDER`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from pgolf.cli.evaluate import check_kind
from pgolf.config import Coder
from pgolf.errors import UserError


@dataclass(frozen=True)
class Inspect:
    """Check the lengths and the checksum of an artifact, and print its parameters and sections."""

    file: tyro.conf.Positional[Path]
    """A file written by `pgolf train` or `pgolf quantize`."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class Export:
    """Write the weights of an artifact, dequantized to float32, to a file that other tools can read."""

    file: tyro.conf.Positional[Path]
    """A file written by `pgolf train` or `pgolf quantize`."""
    out: tyro.conf.Positional[Path]
    """The .safetensors file to write."""


@dataclass(frozen=True)
class Code:
    """Write evaluate_gpt.py, the counted program, which scores an artifact without pgolf.

    Its modules, which the program unpacks when it runs, are written next to it for reading.
    """

    out: tyro.conf.Positional[Path]
    """Folder to create; it must not exist yet."""
    train: bool = False
    """Write train_gpt.py instead, which trains, quantizes and writes as well, with every coder."""
    coder: Coder = "range"
    """artifact.coder of the file that evaluate_gpt.py is to read. For all but range the program has no range
    coder and needs no C++ compiler."""


def main(argv: list[str]) -> int:
    """Run `pgolf artifact VERB ...`."""
    job: Inspect | Export | Code = tyro.extras.subcommand_cli_from_dict(
        {"inspect": Inspect, "export": Export, "code": Code},
        prog="pgolf artifact",
        description="Inspect an artifact, export its weights, or write the code that is counted with it.",
        args=argv,
    )
    if isinstance(job, Code):
        from pgolf.artifact.code import TRAIN, code_program, code_text, evaluate, unpack_code

        if job.out.exists():
            raise UserError(f"{job.out} exists already; give a folder that does not exist")
        program = TRAIN if job.train else evaluate(job.coder)
        files, content = len(unpack_code(code_text(program), job.out)), code_program(program)
        path = job.out / program.name
        path.write_bytes(content)
        print(f"{path}: {len(content):,} bytes counted; what it unpacks: {files} files beside it")
        return 0
    from pgolf.artifact.export import describe, description_text, export_artifact

    check_kind(job.file)
    if isinstance(job, Export):
        if job.out.suffix != ".safetensors":
            raise UserError(f"expected a file name that ends in .safetensors, got {job.out}")
        print(f"{job.out}: {export_artifact(job.file, job.out):,} bytes, float32")
    else:
        facts = describe(job.file)
        print(json.dumps(facts, indent=2) if job.json else description_text(facts))
    return 0
