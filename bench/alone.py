"""train_gpt.py alone: it trains, quantizes, writes and scores in an empty folder; then the package checks.

    python -m bench.alone pr1855 --data SHARDS --out out --train.seconds 30 --data.micro-tokens 32768

The program is the one that a submission counts. It runs in an isolated Python that has the installed
libraries, but neither pgolf nor its compiled extension, and must end by itself. Then two things are compared:

- the weights that the program's own modules decode from the file with those that the package decodes; they
  must be equal bit for bit;
- the score that the program prints for its file with that of `pgolf evaluate`, which must be equal within
  1e-6 bits per byte on a CPU and 1e-5 on a GPU.

The exit status is 1 if one of them fails. `seconds` is the whole command's, `seconds_...` are those of the
run's phases, from its summary.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.common import Recorder, Sample
from pgolf.artifact.code import TRAIN, code_program, code_text, unpack_code
from pgolf.artifact.read import read_artifact
from pgolf.cli.overrides import parse_config
from pgolf.config import Config, to_dict
from pgolf.errors import UserError
from pgolf.report.summary import SUMMARY, Summary
from pgolf.train.weights import ARTIFACT

LIBRARIES = ("torch", "numpy", "sentencepiece", "brotli", "safetensors")
LIMITS = {"cpu": 1e-6, "cuda": 1e-5}
"""Most bits per byte between the program's score and the package's."""
PROGRAM = """
import importlib.util, runpy
assert importlib.util.find_spec("pgolf") is None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
DECODE = """
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import pgolf, torch
from pgolf.artifact.read import read_artifact
assert Path(pgolf.__file__).is_relative_to(sys.argv[2])
torch.save(read_artifact(Path(sys.argv[1])).state, sys.argv[3])
"""


def library_folders() -> list[str]:
    """Return the folders in which the libraries are.

    Raises:
        UserError: a library is missing, or pgolf is installed in one of the folders.
    """
    found: list[str] = []
    for name in LIBRARIES:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise UserError(f"train_gpt.py needs {name}, which is not installed here: pip install {name}")
        file = Path(spec.origin)
        folder = file.parents[1] if spec.submodule_search_locations else file.parent
        if (folder / "pgolf").is_dir():
            raise UserError(
                f"pgolf is installed in {folder}, where the program would find it; use pip install -e ."
            )
        if str(folder) not in found:
            found.append(str(folder))
    return found


def isolated(*arguments: str, cwd: Path, code: str = "") -> str:
    """Run Python without the start-up files of site-packages, where pgolf is not found; return its output.

    The output is also printed as it comes.

    Args:
        arguments: of `code`, or the program and its arguments.
        code: what to run instead of a program.

    Raises:
        RuntimeError: it failed.
    """
    start = f"import sys; sys.path += {library_folders()!r}\n" + (code or PROGRAM)
    command = [sys.executable, "-I", "-S", "-u", "-c", start, *arguments]
    lines = []
    with subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode not in (0, 3):  # 3: the clock was overrun
        raise RuntimeError(f"{' '.join(arguments) or 'the code'} ended with status {process.returncode}")
    return "".join(lines)


def train(config: Config, data: Path, folder: Path) -> Path:
    """Run the program in an empty folder; return the folder of its run."""
    folder.mkdir(parents=True)
    (folder / TRAIN.name).write_bytes(code_program(TRAIN))
    settings = folder.with_suffix(".json")
    settings.write_text(json.dumps(to_dict(config), indent=2))
    isolated(TRAIN.name, "--data", str(data), "--config", str(settings), "--out", "runs", cwd=folder)
    (run,) = (folder / "runs").iterdir()
    return run


def unequal_weights(artifact: Path, folder: Path) -> list[str]:
    """Return the names of the tensors that program and package decode differently."""
    modules, saved = folder / "modules", folder / "weights.pt"
    unpack_code(code_text(TRAIN), modules)
    isolated(str(artifact), str(modules), str(saved), cwd=folder, code=DECODE)
    theirs, ours = torch.load(saved, weights_only=True), read_artifact(artifact).state
    names = sorted(theirs.keys() | ours.keys())
    same = {
        n
        for n in theirs.keys() & ours.keys()
        if theirs[n].dtype == ours[n].dtype and theirs[n].equal(ours[n])
    }
    return [name for name in names if name not in same]


def scores(run: Path, data: Path, folder: Path) -> tuple[float, float]:
    """Return the bits per byte of the file by the program and by the package."""
    words = [str(run / ARTIFACT), "--data", str(data), "--mode", "plain"]
    settings = ("--config", str(run / "config.json"))
    printed = isolated(str(folder / TRAIN.name), "--evaluate", *words, *settings, cwd=folder)
    alone = next(float(line.split()[0]) for line in printed.splitlines() if " bpb, " in line)
    report = folder.parent / "package.json"
    # Without the run's settings, whose `evaluate.context` the program does not use when it scores plainly.
    command = [sys.executable, "-m", "pgolf", "evaluate", *words, "--json", str(report)]
    subprocess.run(command, check=True)
    return alone, json.loads(report.read_text())["scores"]["plain"]["bpb"]


def main(argv: list[str] | None = None) -> int:
    """Run and compare; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", help="preset or config.json; settings as of pgolf train may follow")
    parser.add_argument("--data", type=Path, required=True, help="folder of shards and tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the run and the result file")
    args, settings = parser.parse_known_args(argv)
    config = parse_config("train", [args.preset, *settings])
    if args.out.exists():
        parser.error(f"--out {args.out} exists; name a new folder")
    out, data = args.out.resolve(), args.data.resolve()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder, began = out / "alone", time.perf_counter()
    run = train(config, data, folder)
    seconds = time.perf_counter() - began
    wrong = unequal_weights(run / ARTIFACT, out)
    alone, package = scores(run, data, folder)
    summary = Summary.load(run / SUMMARY)
    recorder = Recorder("alone", device, out)
    values = {
        "seconds": (seconds, "s"),
        "bpb_program": (alone, "bits/byte"),
        "bpb_package": (package, "bits/byte"),
    }
    values |= {"bytes_code": (len(code_program(TRAIN)), "bytes"), "unequal_tensors": (len(wrong), "1")}
    values |= {f"seconds_{name}": (value, "s") for name, value in summary.seconds().items()}
    for metric, (value, unit) in values.items():
        recorder.add(config.name, TRAIN.name, metric, Sample(float(value), 0.0, 1), unit)
    recorder.write()
    good = not wrong and abs(alone - package) <= LIMITS[device.type]
    weights = f"not equal: {', '.join(wrong)}" if wrong else "equal"
    print(f"weights: {weights}; scores: program minus package {alone - package:+.1e} bits per byte")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
