"""How many steps a variant of the optimizer buys inside the time limit, and what they are worth.

A step takes micro-steps x forward+backward + optimizer. In the limit minus the reserve for quantization, T,
    steps = T (f / off + (1 - f) / on)
fit, where f is the fraction of the run before depth recurrence is switched on, and `off` and `on` are the
milliseconds per step before and after that. Each part is measured by another bench and read from the
committed result files, or given here:

- forward+backward: the newest `ms_fwd_bwd` of bench `step`, in whatever file;
- Muon: `pgolf` of the newest bench `optimizer` file, for the share of one rank of `world` (as a graph with
  one rank; as launched with several ranks, whose collectives are not captured);
- the rest of the tail (clip, AdamW, average, zero): bench `tail` of one GPU minus Muon of one GPU;
- communication: bench `tail` of that many GPUs minus the two above, where it was measured (torchrun). Else a
  model: the bytes that cross the wires, at the bandwidth of the largest such measurement (or --bandwidth).

A fraction more steps is worth that fraction of d bpb / d ln(steps). That slope comes from runs of different
lengths of one configuration (--runs), or is given (--bpb-per-100-steps), else it is the slope of the loss
inside one run near its end, times its steps. The last one is an upper bound, because most of that fall comes
from the learning rate and does not depend on the number of steps. Errors are standard errors, in quadrature.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from bench.common import RESULTS, Recorder, Sample
from pgolf.peers import find_peer
from pgolf.presets import pr1855
from pgolf.report.summary import SUMMARY, Summary

IQR = 1.349  # interquartile range of a normal distribution, in standard deviations
BANKS = ((22, 512 * 512), (22, 256 * 512), (11, 2048 * 512), (11, 512 * 2048))  # matrices, elements of each
REST_BYTES = 4 * (8192 * 512 + 31_947)  # float32 gradients of embedding and scalars


@dataclass(frozen=True)
class Value:
    """A number and its standard error."""

    value: float
    error: float = 0.0

    def __add__(self, other: Value) -> Value:
        return Value(self.value + other.value, math.hypot(self.error, other.error))

    def __sub__(self, other: Value) -> Value:
        return Value(self.value - other.value, math.hypot(self.error, other.error))

    def scaled(self, factor: float) -> Value:
        """Return `factor` times this."""
        return Value(factor * self.value, abs(factor) * self.error)

    def times(self, other: Value) -> Value:
        """Return the product with an independent number."""
        error = math.hypot(self.error * other.value, self.value * other.error)
        return Value(self.value * other.value, error)

    def __str__(self) -> str:
        return f"{self.value:.4g} +- {self.error:.2g}"


@dataclass(frozen=True)
class Slope:
    """What more steps change."""

    bpb: Value
    """d bpb / d ln(steps); negative is better."""
    source: str
    """Where it comes from, and in which direction it errs."""


def newest(folder: Path, bench: str) -> list[dict[str, Any]]:
    """Return the lines of the newest result file of a bench.

    Raises:
        FileNotFoundError: there is none; says which command writes one.
    """
    # <day>_<device>_<bench>.jsonl, where <bench> is not only the end of another name.
    found = sorted(p for p in folder.glob(f"*_{bench}.jsonl") if p.stem.split("_", 2)[2:] == [bench])
    if not found:
        raise FileNotFoundError(
            f"no result of bench {bench!r} in {folder}; run `python -m bench.{bench}` on the GPU, "
            "or give the times on the command line"
        )
    return [json.loads(line) for line in found[-1].read_text().splitlines()]


def measured(line: dict[str, Any]) -> Value:
    """Return the median of a result line with its standard error."""
    return Value(line["value"], line["spread"] / IQR / math.sqrt(max(line["n"], 1)))


def pick(lines: Sequence[dict[str, Any]], case: str, metric: str, impl: str) -> Value | None:
    """Return the measurement of a case, or None."""
    for line in lines:
        if (line["case"], line["metric"]) == (case, metric) and line["impl"].startswith(impl):
            return measured(line)
    return None


def wire_ms(world: int, bandwidth: float) -> Value:
    """Return a model of one step's communication: ring collectives at `bandwidth` GB/s, error 1/3."""
    if world == 1:
        return Value(0.0)
    # In bfloat16. Every rank sends and receives as many matrices of a bank as the rank with the most has.
    padded = 2 * sum(math.ceil(count / world) * world * size for count, size in BANKS)
    moved = (world - 1) / world * (2 * padded + 2 * REST_BYTES)
    return Value(moved / bandwidth * 1e-6, moved / bandwidth * 1e-6 / 3)


def slope_inside(folder: Path, last: float = 0.3, blocks: int = 10) -> Slope:
    """Return the slope of the loss over the last part of one run times its steps, as bits per byte.

    The error is that of the mean of the slopes between neighbouring blocks.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    score = Summary.load(folder / SUMMARY).scores["raw"]
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    tail = losses[int((1 - last) * len(losses)) :]
    size = len(tail) // blocks
    if size < 2:
        raise ValueError(f"{folder}: {len(losses)} steps are too few for a slope; pass --bpb-per-100-steps")
    means = [mean(tail[i * size : (i + 1) * size]) for i in range(blocks)]
    falls = [(b - a) / size for a, b in itertools.pairwise(means)]
    total = (means[-1] - means[0]) / (size * (blocks - 1))
    bits = score.bpb / score.loss  # bits per byte of a nat per token, on this text
    error = stdev(falls) / math.sqrt(len(falls))
    return Slope(
        Value(total, error).scaled(bits * len(losses)), f"upper bound: inside {folder.name}, last {last:.0%}"
    )


def slope_between(folders: Sequence[Path]) -> Slope:
    """Return the slope between the two longest of several runs of one configuration.

    Runs of one length are averaged, and their spread is the error.
    """
    by_steps: dict[int, list[float]] = {}
    batches = set()
    for folder in folders:
        summary = Summary.load(folder / SUMMARY)
        train, scores = summary.trained, summary.scores
        by_steps.setdefault(train.steps, []).append((scores["ema"] if "ema" in scores else scores["raw"]).bpb)
        batches.add(round(train.tokens / train.steps))
    if len(by_steps) < 2 or len(batches) > 1:
        raise ValueError(
            "--runs needs at least two lengths at one batch size, got "
            f"{len(by_steps)} lengths and {sorted(batches)} tokens per step"
        )
    short, long = sorted(by_steps)[-2:]
    ends = []
    for steps in (short, long):
        values = by_steps[steps]
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        ends.append(Value(mean(values), error))
    per_log = (ends[1] - ends[0]).scaled(1 / math.log(long / short))
    return Slope(per_log, f"between runs of {short} and {long} steps")


@dataclass(frozen=True)
class Setting:
    """What all variants share."""

    seconds: float
    recurrence_at: float
    world: int
    micro_steps: float
    forward_backward: tuple[Value, Value]
    """ms of one micro-step, loop off and on."""

    def steps(self, tail: Value) -> Value:
        """Return the steps that fit, for `tail` ms of optimizer and communication per step."""
        total = Value(0.0)
        for share, pass_ms in zip(
            (self.recurrence_at, 1 - self.recurrence_at), self.forward_backward, strict=True
        ):
            step = pass_ms.scaled(self.micro_steps) + tail
            count = 1000 * self.seconds * share / step.value
            total = total + Value(count, count * step.error / step.value)
        return total

    def gained(self, muon: Value, baseline: Value, other: Value) -> Value:
        """Return the steps that `muon` buys over `baseline`; `other` adds to both, and its error cancels."""
        tail = baseline.value + other.value
        per_ms = self.steps(Value(tail - 0.5)).value - self.steps(Value(tail + 0.5)).value
        return (baseline - muon).scaled(per_ms)


@dataclass(frozen=True)
class Row:
    """One line of the answer."""

    variant: str
    world: int
    muon_ms: Value
    steps: Value
    gained: Value
    worth: Value

    def __str__(self) -> str:
        cells = (self.muon_ms, self.steps, self.gained, self.worth)
        return f"{self.variant:<32}" + "".join(f"{value!s:>22}" for value in cells)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    p.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4, 8])
    p.add_argument("--baseline", default="polar_express_golf5")
    p.add_argument("--impl", default="pgolf", help="contender of bench `step`")
    p.add_argument("--batch-tokens", type=int, default=pr1855().data.batch_tokens)
    p.add_argument("--micro-tokens", type=int, default=pr1855().data.micro_tokens)
    p.add_argument("--seconds", type=float, default=pr1855().train.seconds)
    p.add_argument("--reserve", type=float, default=7.0, help="seconds of the limit kept for quantization")
    p.add_argument(
        "--bandwidth",
        type=float,
        help="GB/s of collectives, for the model; else that of the largest measured world",
    )
    p.add_argument("--forward-backward-ms", nargs=2, type=float, metavar=("OFF", "ON"))
    p.add_argument("--optimizer-ms", nargs="+", metavar="VARIANT=MS", help="Muon, at every world size")
    p.add_argument("--rest-ms", type=float, help="clip, AdamW, average, zero")
    p.add_argument("--communication-ms", nargs="+", metavar="WORLD=MS")
    p.add_argument("--runs", nargs="+", type=Path, help="run folders of different lengths")
    p.add_argument("--run", type=Path, help="one run folder, for the slope inside it")
    p.add_argument("--bpb-per-100-steps", nargs=3, type=float, metavar=("VALUE", "ERROR", "AT_STEPS"))
    p.add_argument(
        "--out", type=Path, help="folder of the result file and the plot; nothing is written without"
    )
    return p.parse_args()


def passes(args: argparse.Namespace) -> tuple[Value, Value]:
    """Return forward+backward of a micro-step, loop off and on, ms."""
    if args.forward_backward_ms:
        return Value(args.forward_backward_ms[0]), Value(args.forward_backward_ms[1])
    off, on = (newest_pass(args.results, f"record_real_{mode}", args.impl) for mode in ("off", "on"))
    return off, on


def newest_pass(folder: Path, case: str, impl: str) -> Value:
    """Return the newest forward+backward of a case in any file of bench `step`, ms.

    Raises:
        ValueError: there is none; says which contenders there are.
    """
    lines = [
        line
        for path in folder.glob("*_step*.jsonl")
        for line in map(json.loads, path.read_text().splitlines())
        if (line["bench"], line["case"], line["metric"]) == ("step", case, "ms_fwd_bwd")
    ]
    own = [line for line in lines if line["impl"] == impl]
    if not own:
        known = (
            ", ".join(sorted({line["impl"] for line in lines}))
            or "none; run `python -m bench.step` on the GPU"
        )
        raise ValueError(f"no {case} of {impl!r} in {folder}; choose another --impl: {known}")
    return measured(max(own, key=lambda line: line["time"]))


def muon_times(args: argparse.Namespace) -> dict[int, dict[str, Value]]:
    """Return ms of Muon for each world size and variant."""
    if args.optimizer_ms:
        given = {name: Value(float(ms)) for name, ms in (item.split("=") for item in args.optimizer_ms)}
        return {world: given for world in args.worlds}
    times: dict[int, dict[str, Value]] = {}
    for line in newest(args.results, "optimizer"):
        variant, world = line["case"].rsplit("_w", 1)
        metric = "ms_graph" if world == "1" else "ms_launched"
        if line["impl"] == "pgolf" and line["metric"] == metric and int(world) in args.worlds:
            times.setdefault(int(world), {})[variant] = measured(line)
    return times


def other_times(args: argparse.Namespace, muon: dict[int, dict[str, Value]]) -> dict[int, tuple[Value, str]]:
    """Return ms of everything except Muon and the passes, for each world size, and where it comes from."""
    given = dict(item.split("=") for item in args.communication_ms or ())
    lines = [] if args.rest_ms is not None else newest(args.results, "tail")
    whole = pick(lines, "record_1gpu", "ms_graph", "pgolf")
    if args.rest_ms is not None:
        rest = Value(args.rest_ms)
    elif whole is not None and 1 in muon and args.baseline in muon[1]:
        rest = whole - muon[1][args.baseline]
    else:
        raise ValueError(
            "no tail of one GPU for the Muon of one GPU: run `python -m bench.optimizer` or pass --rest-ms"
        )
    communication = {
        world: tail - times[args.baseline] - rest
        for world, times in muon.items()
        if world > 1 and args.baseline in times
        if (tail := pick(lines, f"record_{world}gpu", "ms_launched", "pgolf")) is not None
    }
    bandwidth = args.bandwidth or effective_bandwidth(communication)
    found: dict[int, tuple[Value, str]] = {}
    for world in args.worlds:
        if str(world) in given:
            found[world] = rest + Value(float(given[str(world)])), "communication given"
        elif world in communication:
            found[world] = rest + communication[world], "measured"
        else:
            source = "measured" if world == 1 else f"communication modelled at {bandwidth:.0f} GB/s"
            found[world] = rest + wire_ms(world, bandwidth), source
    return found


def effective_bandwidth(communication: Mapping[int, Value]) -> float:
    """Return GB/s of the largest measured world; without any 300, which large messages reach over NVLink."""
    if not communication:
        return 300.0
    world = max(communication)
    if communication[world].value <= 0:
        raise ValueError(
            f"the tail on {world} GPUs took no longer than its parts on one; measure both again, or pass "
            "--bandwidth"
        )
    return wire_ms(world, 1.0).value / communication[world].value


def find_slope(args: argparse.Namespace) -> Slope:
    """Return what steps are worth, from the best source that there is."""
    if args.bpb_per_100_steps:
        value, error, at = args.bpb_per_100_steps
        return Slope(Value(value, error).scaled(at / 100), f"given, at {at:g} steps")
    if args.runs:
        return slope_between(args.runs)
    folders = sorted(
        (p.parent for p in args.results.glob("*_600s_*/metrics.jsonl")),
        key=lambda folder: Summary.load(folder / SUMMARY).started,
    )
    if args.run is None and not folders:
        raise FileNotFoundError(
            f"no committed 600 s run in {args.results}; pass --run, --runs or --bpb-per-100-steps"
        )
    return slope_inside(args.run or folders[-1])


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw the steps gained by variant and world size; nothing without matplotlib."""
    peer = find_peer("matplotlib", "matplotlib.pyplot")
    if not peer.usable:
        print(f"no plot: matplotlib is {peer.problem} (pip install pgolf[plot])")
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for world in sorted({row.world for row in rows}):
        own = [row for row in rows if row.world == world]
        label = f"{world} GPU" + ("s" if world > 1 else "")
        gained = [row.gained for row in own]
        names = [row.variant for row in own]
        axes.errorbar(names, [g.value for g in gained], [g.error for g in gained], fmt="o", label=label)
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_ylabel("steps gained in the time limit")
    axes.tick_params(axis="x", rotation=60)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def answer(setting: Setting, muon: dict[str, Value], other: Value, slope: Slope, base: str) -> list[Row]:
    """Return a row for each variant at one world size, the fastest first."""
    rows = []
    for variant, ms in sorted(muon.items(), key=lambda item: item[1].value):
        gained = Value(0.0) if variant == base else setting.gained(ms, muon[base], other)
        steps = setting.steps(ms + other)
        worth = gained.scaled(1 / steps.value).times(slope.bpb)
        rows.append(Row(variant, setting.world, ms, steps, gained, worth))
    return rows


def write(rows: list[Row], folder: Path) -> None:
    """Write the rows as a result file, and the plot next to it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recorder = Recorder("steps_bought", device, folder)
    for row in rows:
        for metric, value, unit in (
            ("ms_optimizer", row.muon_ms, "ms"),
            ("steps_600s", row.steps, "steps"),
            ("steps_gained", row.gained, "steps"),
            ("bpb_worth", row.worth, "bits/byte"),
        ):
            sample = Sample(value.value, value.error * IQR, 1)
            recorder.add(f"{row.variant}_w{row.world}", "pgolf", metric, sample, unit)
    path = recorder.write()
    assert path is not None
    plot(path.with_suffix(".png"), rows)


def main() -> None:
    """Read the parts, print the table, write it where asked."""
    args = arguments()
    muon = muon_times(args)
    others, slope, pass_ms = other_times(args, muon), find_slope(args), passes(args)
    print(f"1 % more steps are worth {slope.bpb.scaled(0.01)} bpb ({slope.source})")
    print(
        f"forward+backward of {args.micro_tokens:,} tokens: {pass_ms[0]} ms loop off, {pass_ms[1]} ms loop on"
    )
    rows: list[Row] = []
    for world in args.worlds:
        if args.baseline not in muon.get(world, {}):
            print(f"world {world}: {args.baseline} was not measured; left out")
            continue
        setting = Setting(
            seconds=args.seconds - args.reserve,
            recurrence_at=pr1855().optim.recurrence_at,
            world=world,
            micro_steps=args.batch_tokens / args.micro_tokens / world,
            forward_backward=pass_ms,
        )
        other, source = others[world]
        off = pass_ms[0].value * setting.micro_steps + muon[world][args.baseline].value + other.value
        print(
            f"\nworld {world}: {off:.1f} ms per step, loop off; without passes and Muon {other} ms ({source})"
        )
        print(f"{'variant':<32}{'Muon ms':>22}{'steps':>22}{'gained':>22}{'worth, bpb':>22}")
        found = answer(setting, muon[world], other, slope, args.baseline)
        print(*found, sep="\n")
        rows += found
    if args.out is not None and rows:
        write(rows, args.out)


if __name__ == "__main__":
    main()
