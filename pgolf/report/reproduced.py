"""Whether the counted program alone gives the score: it runs on a sample, in a folder with nothing else.

The program and the artifact are copied into a new folder, with the settings. Python starts isolated (no
variables of Python, no user packages) and finds the installed packages without pgolf: a folder of links that
leaves it out. So a program that needs a file of the run, the installed package or its extension fails, and a
program that prints another number than the package finds is caught. Not prevented: a program that opens a
file by its absolute path, or the network.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pgolf.artifact.code_rule import CODE_NAME, TRAIN_NAME
from pgolf.artifact.read import load_model
from pgolf.config import Config, Method, from_dict, read_json, to_dict
from pgolf.data.loader import ValidationText
from pgolf.data.shards import TOKENIZER_NAME, sidecar_path, write_shard
from pgolf.dist import Dist
from pgolf.env import compiler
from pgolf.evaluate.legality import Tested
from pgolf.evaluate.validation import PLAIN, DataFolder, score_as

PACKAGES = ("torch", "numpy", "brotli", "sentencepiece", "flash_attn")
"""Of whose folders the program finds the packages."""
ON_GPU = 5e-4
"""Bits per byte by which the sample's score may differ where it is computed in bfloat16: an error of 0.02
nats per token, over 2,048 tokens."""
DIGITS = 1e-6
"""The same of the CPU, on top of rounding: the program has other forms of some operators."""
SECONDS = 1800
KEPT = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CXX", "TMPDIR", "OMP_NUM_THREADS")
"""Variables that stay: where the compiler and the GPU are, and how many threads."""
START = """import sys, runpy
libraries, program, *rest = sys.argv[1:]
sys.path.append(libraries)
sys.argv = [program, *rest]
runpy.run_path(program, run_name="__main__")
"""


def find_program(artifact: Path) -> Path | None:
    """Return the counted program next to an artifact, None if there is none that stands alone."""
    names = (CODE_NAME, TRAIN_NAME)
    return next((path for path in map(artifact.with_name, names) if path.is_file()), None)


def check_code(
    artifact: Path,
    text: ValidationText,
    *,
    way: Method,
    folder: DataFolder,
    config: Config,
    dist: Dist,
    limit: float,
) -> Tested:
    """Run the counted program next to an artifact on a sample, and compare its score with the package's.

    Args:
        artifact: the model file; the program is looked for next to it.
        text: the sample.
        way: the way to score.
        folder: the data folder, for its tokenizer.
        config: the settings.
        dist: the device; one rank.
        limit: nats per token by which losses may differ from rounding, on a CPU.
    """
    program = find_program(artifact)
    if program is None:
        what = f"no {CODE_NAME} or {TRAIN_NAME} next to {artifact}"
        return Tested("C1", "code", "untested", what)
    cuda = dist.device.type == "cuda"
    model = load_model(artifact, dist.device)
    # With any attention that runs here: that of the run may need another GPU, and only the rounding differs.
    model.prepare(dist.device, compile="blocks" if cuda else "off")
    settings = PLAIN if way == "plain" else config.evaluate
    ours = score_as(
        way, model, folder, text, dist, batch_tokens=config.data.micro_tokens, settings=settings
    ).bpb
    with TemporaryDirectory() as place:
        found, said = _run(Path(place), program, artifact, text, way, folder, config, dist)
    if found is None:
        return Tested("C1", "code", "fails", f"{program.name} alone does not score: {said}")
    per_byte = (text.tokens.size - 1) / math.log(2) / int(text.bytes[1:].sum())
    allowed = ON_GPU if cuda else limit * per_byte + DIGITS
    said = f"{program.name} alone gives {found:.7f} bpb on the sample, pgolf {ours:.7f} (limit {allowed:.1g})"
    return Tested("C1", "code", "ok" if abs(found - ours) <= allowed else "fails", said)


def _run(
    place: Path,
    program: Path,
    artifact: Path,
    text: ValidationText,
    way: Method,
    folder: DataFolder,
    config: Config,
    dist: Dist,
) -> tuple[float | None, str]:
    """Return the score that the program prints; or None, and what it said."""
    alone, data = place / "alone", place / "data"
    alone.mkdir()
    data.mkdir()
    shutil.copyfile(program, alone / program.name)
    shutil.copyfile(artifact, alone / "model.pgolf")
    shutil.copyfile(folder.tokenizer.path, data / TOKENIZER_NAME)
    shard = data / "sample_val_000000.bin"
    write_shard(shard, text.tokens)
    write_shard(sidecar_path(shard), text.bytes.astype(np.int64))
    (alone / "config.json").write_text(json.dumps(_settings(artifact, config, dist)), encoding="utf-8")
    words = ["--evaluate"] if program.name == TRAIN_NAME else []
    words += ["model.pgolf", "--data", str(data), "--mode", way]
    libraries = str(libraries_without_pgolf(place / "libraries"))
    command = [sys.executable, "-I", "-S", "-c", START, libraries, program.name, *words]
    environment = {key: value for key, value in compiler()[1].items() if key in KEPT}
    try:
        done = subprocess.run(
            command, cwd=alone, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"it did not end within {SECONDS} s"
    number = re.match(r"(\d+\.\d+) bpb\b", done.stdout)
    if done.returncode or number is None:
        last = (done.stderr.strip() or done.stdout.strip() or "nothing was printed").splitlines()[-1]
        return None, f"exit status {done.returncode}, {last:.300}"
    return float(number[1]), ""


def _settings(artifact: Path, config: Config, dist: Dist) -> dict[str, Any]:
    """Return what the program gets as config.json: that of the run, because it may be older, on this device.

    Without a GPU the attention is "auto", because that of the run may need one.
    """
    saved = artifact.with_name("config.json")
    settings: dict[str, Any] = to_dict(config)
    if saved.is_file():
        run = read_json(saved)
        same = from_dict(Config, run, where=str(saved)).evaluate == config.evaluate
        settings = run if same else {**run, "evaluate": settings["evaluate"]}
    here = {"device": dist.device.type, **({} if dist.device.type == "cuda" else {"attention": "auto"})}
    return {**settings, "train": {**settings["train"], **here}}


def libraries_without_pgolf(folder: Path) -> Path:
    """Make a folder of links to all installed packages except for pgolf, and return it."""
    folder.mkdir()
    found = [importlib.util.find_spec(name) for name in PACKAGES]
    origins = [Path(spec.origin) for spec in found if spec is not None and spec.origin]
    places = dict.fromkeys(o.parent.parent if o.name == "__init__.py" else o.parent for o in origins)
    for place in places:
        for entry in place.iterdir():
            ours = re.match(r"_*(editable_+)?_*pgolf", entry.name, flags=re.IGNORECASE)
            if not ours and entry.suffix != ".pth" and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder
