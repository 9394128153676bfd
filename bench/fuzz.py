"""Read millions of damaged artifacts under ASan and UBSan, with the decoder alone and with the whole reader.

`make fuzz` runs this program and writes bench/results/*_fuzz.jsonl: number of inputs, outcomes, seconds. The
reader's processes import a special build of the extension, with g++'s sanitizers in every C++ file. The
program stops with an error at any sanitizer report, unexpected exception, hang or excessive use of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.common import ROOT, Recorder, Sample, parser

CASES = ["decoder", "reader"]
SOURCES = ["csrc/fuzz/fuzz_range_coder.cpp", "csrc/kernels/range_coder_cpu.cpp"]
SANITIZERS = "-fsanitize=address,undefined"
SANITIZE = ["-fno-sanitize-recover=all", "-std=c++20", "-O2", "-g", "-I", "csrc"]
FUZZER = "-fsanitize=fuzzer,address,undefined"
LONGEST_INPUT = 256
"""Largest input of the decoder, in bytes; its matrices have at most 192 codes."""


def find_clang() -> str | None:
    """Return a clang++ that can link libFuzzer, if there is one."""
    names = ["clang++", *(f"clang++-{version}" for version in range(22, 13, -1))]
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cpp"
        probe.write_text('extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }\n')
        for name in filter(shutil.which, names):
            build = [
                name,
                "-fsanitize=fuzzer,address,undefined",
                str(probe),
                "-o",
                str(probe.with_suffix("")),
            ]
            if subprocess.run(build, capture_output=True, check=False).returncode == 0:
                return name
    return None


def fuzz_decoder(count: int, workers: int, folder: Path) -> tuple[str, int, float]:
    """Build the decoder's fuzzer and run `count` inputs; return the engine, the inputs and the seconds."""
    clang, program = find_clang(), folder / "fuzz"
    if clang is not None:
        engine, build = "libFuzzer", [clang, FUZZER]
        words = [f"-runs={count // workers}", f"-max_len={LONGEST_INPUT}"]
        commands = [
            [*words, f"-seed={seed}", str(folder / f"corpus{seed}")] for seed in range(1, workers + 1)
        ]
    else:
        engine, build = "own mutator", ["g++", SANITIZERS, "-DPGOLF_FUZZ_MAIN"]
        commands = [[str(count // workers), str(seed)] for seed in range(1, workers + 1)]
    subprocess.run([*build, *SANITIZE, *SOURCES, "-o", str(program)], cwd=ROOT, check=True)
    began = time.perf_counter()
    for seed in range(1, workers + 1):
        (folder / f"corpus{seed}").mkdir()
    outputs = run_all([[str(program), *words] for words in commands], dict(os.environ))
    done = sum(int(m) for text in outputs for m in re.findall(r"Done (\d+) runs", text))
    return engine, done, time.perf_counter() - began


def sanitized_package(folder: Path) -> dict[str, str]:
    """Build the extension with the sanitizers into a package in `folder`; return how to run Python with it.

    Raises:
        RuntimeError: there is no normal build of the extension, from which the settings are taken.
    """
    tree = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}"
    if not (tree / "CMakeCache.txt").is_file():
        raise RuntimeError(f"no build in {tree}; run: pip install --no-build-isolation -e .")
    package = folder / "package" / "pgolf"
    package.mkdir(parents=True)
    kept = r"^(PGOLF_(?:TORCH|PYTHON|PYBIND11|MODULE|LIBSTDCXX)\w*|CMAKE_MAKE_PROGRAM):\w+=(.*)$"
    facts = [
        f"-D{key}={value}"
        for key, value in re.findall(kept, (tree / "CMakeCache.txt").read_text(), flags=re.M)
    ]
    flags = f"-DCMAKE_CXX_FLAGS={SANITIZERS} -fno-sanitize-recover=all -g1"
    choices = ["-DPGOLF_BUILD_MODULE=ON", "-DPGOLF_CUDA=OFF", "-DPGOLF_WERROR=OFF", flags]
    quiet = {"cwd": ROOT, "check": True, "stdout": subprocess.DEVNULL}
    subprocess.run(["cmake", "-S", ".", "-B", str(folder / "tree"), "-G", "Ninja", *choices, *facts], **quiet)
    subprocess.run(["cmake", "--build", str(folder / "tree"), "--target", "pgolf_all"], **quiet)
    parts = [p for p in (ROOT / "pgolf").iterdir() if not p.name.startswith("_C")]
    for part in (*parts, *(folder / "tree").glob("_C*.so")):
        (package / part.name).symlink_to(part)
    # The sanitizer must be loaded first, and it finds __cxa_throw only if libstdc++ is loaded right after it.
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    return os.environ | {
        "PYTHONPATH": str(package.parent),
        "LD_PRELOAD": " ".join(library.strip() for library in libraries),
        # Python does not free all memory at exit; and freed memory in the quarantine would count as growth.
        "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=16",
    }


def run_all(commands: list[list[str]], environment: dict[str, str]) -> list[str]:
    """Run commands at the same time and return the output of each.

    Raises:
        RuntimeError: a command failed; the message has the end of its output.
    """
    started = [
        subprocess.Popen(
            c, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for c in commands
    ]
    outputs = [process.communicate()[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"fuzzing found something (exit {process.returncode}):\n{output[-6000:]}")
    return outputs


def measure(recorder: Recorder, args: argparse.Namespace) -> None:
    """Run both fuzzers and record their results."""
    if "decoder" in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            engine, done, seconds = fuzz_decoder(args.decoder, args.workers, Path(folder))
        recorder.add("decoder", f"{engine}, ASan, UBSan", "inputs", Sample(done, 0, 1), "inputs")
        recorder.add("decoder", f"{engine}, ASan, UBSan", "seconds", Sample(seconds, 0, 1), "s")
    if "reader" in args.cases:
        program, share = "tests/artifact/fuzz_reader.py", args.reader // args.workers
        words, seeds = [sys.executable, program, "--count", str(share), "--seed"], range(1, args.workers + 1)
        with tempfile.TemporaryDirectory() as folder:
            environment = sanitized_package(Path(folder))
            rows = [json.loads(text) for text in run_all([[*words, str(n)] for n in seeds], environment)]
        for metric in ("count", "refused", "read"):
            total = sum(row[metric] for row in rows)
            recorder.add("reader", "own mutator, ASan, UBSan", metric, Sample(total, 0, 1), "files")
        for metric, unit in (("seconds", "s"), ("slowest", "s"), ("grown", "bytes"), ("bound", "bytes")):
            most = Sample(max(r[metric] for r in rows), 0, 1)
            recorder.add("reader", "own mutator, ASan, UBSan", metric, most, unit)


def main() -> None:
    """Parse arguments, run, write."""
    arguments = parser(__doc__ or "", CASES)
    arguments.add_argument("--decoder", type=int, default=1_000_000, help="inputs of the compiled decoder")
    arguments.add_argument("--reader", type=int, default=1_000_000, help="files of the reader")
    arguments.add_argument("--workers", type=int, default=2, help="processes side by side")
    arguments.set_defaults(device="cpu")
    args = arguments.parse_args()
    if args.quick:
        args.decoder, args.reader = 4000, 400
    recorder = Recorder("fuzz", torch.device("cpu"), None if args.quick else args.out)
    measure(recorder, args)
    recorder.write()


if __name__ == "__main__":
    main()
