"""How a measurement is taken and written down; every result line in bench/results comes from here.

Owns timing (as launched, and as a CUDA graph) and the result lines. One measurement is one JSON line with the
keys bench, case, impl, metric, value, unit, spread, n, device, commit, dirty, versions, time; `impl` is
`pgolf` for ours, and the name and version of the peer otherwise. Values are medians; spread is the
interquartile range in the same unit. All contenders of a case are timed in turns, so that a drift of the
device's clock affects all of them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypeVar

import torch

import pgolf
from pgolf.env import source_commit
from pgolf.files import atomic_file
from pgolf.peers import describe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Sample:
    """Median and spread of repeated measurements."""

    value: float
    """Median."""
    spread: float
    """Interquartile range; 0 for a single measurement."""
    n: int
    """Number of measurements."""

    @staticmethod
    def of(values: list[float], *, scale: float = 1.0) -> Sample:
        """Summarize `values * scale`."""
        scaled = sorted(v * scale for v in values)
        low, _, high = quantiles(scaled, n=4, method="inclusive") if len(scaled) > 1 else (0.0, 0.0, 0.0)
        return Sample(median(scaled), high - low, len(scaled))


def device_name(device: torch.device) -> str:
    """Return the device's name as results carry it, e.g. `NVIDIA H100 80GB HBM3`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()} x{torch.get_num_threads()}"
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions that a number depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "pgolf": pgolf.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    triton = sys.modules.get("triton")
    if triton is not None:
        found["triton"] = str(triton.__version__)
    return found


SLOW_START = 3.0
"""First calls that take longer than this many seconds are reported."""


@dataclass
class Recorder:
    """Collects the measurements of one bench run and writes them as one file."""

    bench: str
    """Name of the bench, as the lines have it."""
    device: torch.device
    out: Path | None = None
    """Folder of the result file; None writes nothing."""
    lines: list[dict[str, object]] = field(default_factory=list)
    file: str = ""
    """Name of the bench in the name of the result file; when empty, `bench`."""
    measured: dict[str, Any] = field(default_factory=dict)
    """What the lines say of device, commit and versions, where another process measured."""
    _commit: tuple[str, bool] = field(default_factory=source_commit)

    def add(self, case: str, impl: str, metric: str, sample: Sample, unit: str) -> None:
        """Keep one measurement and print it."""
        self.lines.append(
            {
                "bench": self.bench,
                "case": case,
                "impl": impl,
                "metric": metric,
                "value": float(f"{sample.value:.12g}"),
                "unit": unit,
                "spread": float(f"{sample.spread:.6g}"),
                "n": sample.n,
                "device": device_name(self.device),
                "commit": self._commit[0],
                "dirty": self._commit[1],
                "versions": versions(),
                **self.measured,
                "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            }
        )
        print(
            f"{self.bench:<16} {case:<18} {impl:<28} {metric:<12} "
            f"{sample.value:10.4f} +- {sample.spread:.4f} {unit}",
            flush=True,
        )
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            with self._part(self.out).open("w" if len(self.lines) == 1 else "a") as file:
                file.write(json.dumps(self.lines[-1]) + "\n")

    def first_calls(self, case: str) -> Callable[[str, float], None]:
        """Return what records the seconds of an implementation's first call, which compiles and tunes."""
        return lambda impl, seconds: self.add(case, impl, "s_first_call", Sample(seconds, 0.0, 1), "s")

    def _part(self, folder: Path) -> Path:
        """Return the file that holds the lines until all are there, in case the bench is stopped before."""
        return folder / f"{self.file or self.bench}.jsonl.part"

    def write(self) -> Path | None:
        """Write `<yyyymmdd>_<device>_<bench>.jsonl` into `out` atomically, in place of one of the same name.

        Returns:
            The file; None without `out`.
        Raises:
            ValueError: nothing was measured.
        """
        if not self.lines:
            raise ValueError(f"{self.bench}: no measurement to write; check --cases")
        if self.out is None:
            return None
        day = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d")
        device = self.measured.get("device", device_name(self.device))
        device = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        path = self.out / f"{day}_{device}_{self.file or self.bench}.jsonl"
        with atomic_file(path) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in self.lines)
        self._part(self.out).unlink(missing_ok=True)
        print(f"wrote {len(self.lines)} measurements to {path}")
        return path


def _time_once(function: Callable[[], object], device: torch.device, calls: int) -> float:
    """Milliseconds per call, from an idle device until it is idle again."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - began) * 1e3 / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def time_launched(
    contenders: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    repeats: int,
    calls: int = 1,
    warm_up: int = 3,
) -> dict[str, Sample]:
    """Time each contender as it is launched, in turns; milliseconds per call.

    CUDA events stand around `calls` calls on an idle stream, so the time that the host needs to launch is
    seen where it exceeds the device's. The caches are warm. First calls that compile for long are reported.
    """
    for name, function in contenders.items():
        began = time.perf_counter()
        for _ in range(warm_up):
            function()
        seconds = time.perf_counter() - began
        if seconds > SLOW_START:
            print(f"{name}: first calls took {seconds:.0f} s", file=sys.stderr, flush=True)
    # One measurement of each, then again: whatever changes meanwhile changes for all.
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, function in contenders.items():
            times[name].append(_time_once(function, device, calls))
    return {name: Sample.of(values) for name, values in times.items()}


def capture(function: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Record `function` into a CUDA graph and return what replays it."""
    # Some calls on another stream first, as torch wants it before a capture: they compile and allocate.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def time_graph(
    contenders: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int, calls: int = 10
) -> dict[str, Sample]:
    """Time each contender as a CUDA graph, in turns; milliseconds per replay. Empty without CUDA.

    A contender that cannot be captured is left out, with a line that says so.
    """
    if device.type != "cuda":
        return {}
    graphs: dict[str, Callable[[], object]] = {}
    for name, function in contenders.items():
        try:
            graphs[name] = capture(function, device)
        except Exception as e:
            # A peer that cannot be captured is left out; of ours only what the capture itself refuses is.
            if name.startswith("pgolf") and not isinstance(e, RuntimeError):
                raise
            print(f"{name}: not captured: {describe(e)}")
    return time_launched(graphs, device, repeats=repeats, calls=calls)


def peak_mib(function: Callable[[], object], device: torch.device) -> Sample | None:
    """Return the memory that a call takes beyond what is allocated before it, MiB; None without CUDA."""
    if device.type != "cuda":
        return None
    function()  # what the first call allocates for good is not counted
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return Sample((torch.cuda.max_memory_allocated(device) - before) / 2**20, 0.0, 1)


def torch_name(what: str) -> str:
    """Return a peer's name with torch's version, as `impl` carries it."""
    return f"torch.{what} {torch.__version__}"


Call = TypeVar("Call")


def only(found: Mapping[str, Call], parts: list[str]) -> dict[str, Call]:
    """Return pgolf's contenders and those whose name holds one of `parts`; all of them if it is empty."""
    return {n: f for n, f in found.items() if not parts or any(part in n for part in ("pgolf", *parts))}


def parser(description: str, cases: list[str]) -> argparse.ArgumentParser:
    """Return the arguments that every bench takes: device, cases, repeats, quick, output folder."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found = "cuda" if torch.cuda.is_available() else "cpu"
    result.add_argument("--device", default=found, choices=("cpu", "cuda"), help="where to measure")
    result.add_argument("--cases", nargs="+", default=cases, choices=cases, help="what to measure")
    result.add_argument("--repeats", type=int, default=20, help="measurements per contender")
    result.add_argument(
        "--quick", action="store_true", help="3 measurements of the smallest case, nothing written"
    )
    result.add_argument(
        "--only",
        nargs="+",
        default=[],
        help="peers to run, by parts of names (newton_schulz, losses)",
    )
    result.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    return result
