"""`pgolf artifact inspect FILE [--json]` and `pgolf artifact export FILE OUT.safetensors`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Inspect:
    """Check an artifact's lengths and checksum and print its parameters and sections."""

    file: tyro.conf.Positional[Path]
    """A file written by `pgolf train` or `pgolf quantize`."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class Export:
    """Write an artifact's weights, dequantized to float32, for other tools."""

    file: tyro.conf.Positional[Path]
    """A file written by `pgolf train` or `pgolf quantize`."""
    out: tyro.conf.Positional[Path]
    """The .safetensors file to write."""


def main(argv: list[str]) -> int:
    """Run `pgolf artifact VERB ...`."""
    job: Inspect | Export = tyro.extras.subcommand_cli_from_dict(
        {"inspect": Inspect, "export": Export},
        prog="pgolf artifact",
        description="Look into an artifact, or take its weights out.",
        args=argv,
    )
    from pgolf.artifact.export import describe, description_text, export_artifact

    if isinstance(job, Export):
        if job.out.suffix != ".safetensors":
            raise ValueError(f"expected a file name that ends in .safetensors, got {job.out}")
        print(f"{job.out}: {export_artifact(job.file, job.out):,} bytes, float32")
    else:
        facts = describe(job.file)
        print(json.dumps(facts, indent=2) if job.json else description_text(facts))
    return 0
