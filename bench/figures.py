"""The figures of README and docs/, plotted from the committed result files: `python -m bench.figures`.

The figures are `docs/figures/kernels.png` (kernels compared with other implementations) and
`docs/figures/bpb_bytes.png` (bits per byte against bytes). Each panel reads the newest result file of its
bench for `DEVICE` that has its cases, because a newer file may have other cases. The same files and the same
matplotlib give the same bytes. Each picture stores the SHA-256 of the data as `Source`, so that a test finds
a picture that is older than the results. matplotlib is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bench.common import RESULTS, ROOT
from pgolf.config import ArtifactConfig
from pgolf.files import atomic_file

DEVICE = "nvidia-h200"
OUT = ROOT / "docs" / "figures"
OURS, THEIRS, INK, FAINT = "#1f5fa8", "#b4bac2", "#22262b", "#8a9199"
CUT = 4.2
"""A bar longer than this many of our best ends there, and its number tells how long it would be."""
LIMIT, CODE = ArtifactConfig().limit, 27_946
"""The challenge's limit and the counted code of the run whose weights `bpb_bytes` quantizes, bytes."""


@dataclass(frozen=True)
class Panel:
    """One bar chart: a case of a bench, with all implementations that were timed on it."""

    title: str
    bench: str
    cases: dict[str, str]
    """By case of the result file: the text that is added to the name of a bar."""
    metric: str
    skip: tuple[str, ...] = ()
    """Parts of the names of contenders that are left out, because they do something else."""


PANELS = (
    Panel(
        "newton_schulz: 66 matrices,\nfive iterations, CUDA graph",
        "newton_schulz",
        {"bank66_steps5": ""},
        "ms_graph",
        skip=("pgolf gram",),
    ),
    Panel(
        "muon_step: momentum, iteration and update\nof the 66 matrices, CUDA graph",
        "optimizer",
        {"polar_express_golf5_w1": ""},
        "ms_graph",
        skip=("iteration only", "AOL", "pgolf gram"),
    ),
    Panel(
        "all that follows the backward pass: clip, Muon,\nAdamW, average, zeroing; CUDA graph",
        "tail",
        {"record_1gpu": ""},
        "ms_graph",
    ),
    Panel(
        "softcap_ce: loss and gradient of\n98,304 x 8,192 logits, launched",
        "softcap_ce",
        {"n98304_v8192": ""},
        "ms_fwd_bwd",
        skip=("pgolf none",),
    ),
    Panel(
        "linear_softcap_ce: the same from hidden\nstates of width 512, launched",
        "linear_softcap_ce",
        {"n98304_v8192_d512_fast": "fast", "n98304_v8192_d512_memory": "low"},
        "ms_fwd_bwd",
    ),
    Panel(
        "linear_softcap_ce: 8,192 tokens,\nvocabulary of 131,072, width 4,096, launched",
        "linear_softcap_ce",
        {"n8192_v131072_d4096_fast": "fast", "n8192_v131072_d4096_memory": "low"},
        "ms_fwd_bwd",
    ),
    Panel(
        "doc_attention: 98,304 tokens in documents,\n8 heads of 64, CUDA graph",
        "doc_attention",
        {"model": ""},
        "ms_fwd",
    ),
    Panel(
        "doc_attention_backward:\nthe same, CUDA graph",
        "doc_attention",
        {"model": ""},
        "ms_bwd",
    ),
)

NAMES = (
    ("pgolf inplace", "pgolf, in place"),
    ("torch.fused", "fused torch.optim, compiled Muon"),
    ("torch.compile, 4 chunks", "torch.compile, 4 chunks"),
    ("torch.compile", "torch.compile"),
    ("torch.baddbmm", "torch.baddbmm"),
    ("torch.eager", "torch, eager"),
    ("torch.optim.Muon", "torch.optim.Muon"),
    ("gram-newton-schulz 0.1.6, quack 0.5.0, compiled", "gram-newton-schulz, compiled"),
    ("gram-newton-schulz", "gram-newton-schulz"),
    ("speedrun form", "Triton, as in modded-nanogpt"),
    ("record form", "Triton, as in the baseline script"),
    ("torch.varlen", "torch, varlen_attn"),
    ("flash-attn-4", "flash-attn-4"),
    ("liger SM90 scaled", "Liger, Hopper, scaled (has no cap)"),
    ("liger SM90", "Liger, Hopper (has no cap)"),
    ("liger", "Liger"),
    ("quack, no cap, all logits", "quack, all logits (has no cap)"),
    ("quack", "quack (has no cap)"),
    ("cut_cross_entropy", "Cut Cross-Entropy"),
)
"""By beginning of a name in the result files: the name in a figure; the first entry that matches is used."""

WAYS = (
    ("gptq", "GPTQ, scales from the deviation of each row", 7),
    ("gptq lqer sym", "the same with low-rank corrections (LQER)", -7),
    ("rows+columns", "GPTQ, scales from what an error costs the loss", 2),
    ("trellis", "the same, codes chosen by a trellis", -9),
    ("trellis rate 1/12", "the trellis with rate-distortion rounding (the default)", 0),
)
"""Case of the quantize bench, its label, and the height of the label above its mark in points."""


def newest(bench: str, results: Path, cases: Iterable[str] = ()) -> Path:
    """Return the newest result file of a bench on `DEVICE` with all `cases`, or raise FileNotFoundError."""
    wanted = set(cases)
    for path in sorted(results.glob(f"*_{DEVICE}_{bench}.jsonl"), reverse=True):
        if wanted <= {line["case"] for line in read_lines(path)}:
            return path
    raise FileNotFoundError(
        f"no result of {bench} on {DEVICE} in {results} has the cases {sorted(wanted)}; "
        f"run bench/ops/bench_{bench}.py"
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the measurements of a result file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def shown_name(impl: str, added: str) -> str:
    """Return the name of a contender in a figure."""
    name = next((shown for start, shown in NAMES if impl.startswith(start)), impl)
    return f"{name}, {added}" if added and impl == "pgolf" else name


def bars(panel: Panel, results: Path) -> list[tuple[str, float, bool]]:
    """Return (name, milliseconds, whether it is pgolf's) of each bar of a panel, the fastest first."""
    rows = []
    for line in read_lines(newest(panel.bench, results, panel.cases)):
        if line["metric"] != panel.metric or line["case"] not in panel.cases:
            continue
        if not any(part in line["impl"] for part in panel.skip):
            name = shown_name(line["impl"], panel.cases[line["case"]])
            rows.append((name, float(line["value"]), line["impl"].startswith("pgolf")))
    return sorted(rows, key=lambda row: row[1])


def draw_bars(axes: Any, panel: Panel, rows: list[tuple[str, float, bool]], places: float) -> None:
    """Plot one panel with space for `places` bars, so that the bars in a row of panels are equally thick."""
    best = min(value for _, value, ours in rows if ours)
    end = CUT * best
    for y, (_, value, ours) in enumerate(rows):
        shown = min(value, end)
        axes.barh(y, shown, color=OURS if ours else THEIRS, height=0.72)
        text = f"{value:#.3g}".rstrip(".") + ("" if value <= end else " \N{RIGHTWARDS ARROW}")
        inside = shown > 0.8 * end
        axes.text(
            shown - 0.02 * end if inside else shown + 0.02 * end,
            y,
            text,
            va="center",
            ha="right" if inside else "left",
            fontsize=8.5,
            color="white" if inside and ours else INK,
            fontweight="bold" if ours else "normal",
        )
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=8.5)
    for label, (_, _, ours) in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if ours else "normal")
    axes.set_ylim(places - 0.4, -0.6)
    axes.set_xlim(0, end)
    axes.set_xticks([])
    axes.set_title(panel.title, fontsize=9.5, loc="left", color=INK)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def draw_kernels(results: Path) -> Any:
    """Return the figure that compares the kernels with other implementations."""
    rows = [bars(panel, results) for panel in PANELS]
    columns = 2
    tall = [max(len(r) for r in rows[i : i + columns]) + 1.2 for i in range(0, len(rows), columns)]
    figure, grid = plt.subplots(
        len(tall), columns, figsize=(11, 0.25 * sum(tall) + 1.0), height_ratios=tall, layout="constrained"
    )
    for i, (axes, panel) in enumerate(zip(grid.flat, PANELS, strict=True)):
        draw_bars(axes, panel, rows[i], places=tall[i // columns] - 1.2)
    figure.suptitle(
        "Milliseconds on one NVIDIA H200, median (less is better)", fontsize=12, x=0.01, ha="left"
    )
    return figure


def draw_bytes(results: Path) -> Any:
    """Return the figure of bits per byte against bytes, for one model quantized in several ways."""
    value: dict[str, dict[str, float]] = {}
    for line in read_lines(newest("quantize", results)):
        value.setdefault(line["case"], {})[line["metric"]] = float(line["value"])

    def place(case: str) -> tuple[float, float]:
        return (value[case]["bytes"] + CODE) / 1e6, value[case]["bpb"]

    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    curve = [place(case) for case in ("trellis -4 %", "trellis", "trellis +4 %")]
    axes.plot(*zip(*curve, strict=True), color=FAINT, linewidth=1.2, marker="o", markersize=4, zorder=1)
    axes.annotate(
        "the trellis alone at 4 % more\nand 4 % fewer bytes",
        curve[2],
        xytext=(0, 18),
        textcoords="offset points",
        ha="right",
        fontsize=8.5,
        color=FAINT,
    )
    for case, label, above in WAYS:
        default = case == "trellis rate 1/12"
        axes.plot(*place(case), marker="o", markersize=8, color=OURS if default else INK, zorder=2)
        axes.annotate(
            label,
            place(case),
            xytext=(-9, above),
            ha="right",
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            fontweight="bold" if default else "normal",
            color=OURS if default else INK,
        )
    axes.axhline(value["ema"]["bpb"], color=FAINT, linestyle="--", linewidth=1)
    axes.text(15.02, value["ema"]["bpb"] + 0.00012, "weights before quantization", fontsize=8.5, color=FAINT)
    axes.axvline(LIMIT / 1e6, color="#b03a2e", linewidth=1.2)
    axes.text(LIMIT / 1e6 - 0.01, 1.00235, "limit", fontsize=8.5, color="#b03a2e", ha="right")
    axes.set_xlim(15.0, 16.5)
    axes.set_ylim(1.0016, 1.0104)
    axes.set_xlabel("bytes of the quantized file and the code, millions")
    axes.set_ylabel("bits per byte (less is better)")
    axes.set_title("One model (two H200, 600 s), quantized in several ways", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


FIGURES: dict[str, tuple[Callable[[Path], Any], tuple[tuple[str, tuple[str, ...]], ...]]] = {
    "kernels.png": (draw_kernels, tuple((panel.bench, tuple(panel.cases)) for panel in PANELS)),
    "bpb_bytes.png": (draw_bytes, (("quantize", ()),)),
}
"""By file name: the function that plots the figure, and the benches and cases whose results it reads."""


def source(name: str, results: Path = RESULTS) -> str:
    """Return the SHA-256 of the result files that a figure reads and of the choice of data from them."""
    digest = hashlib.sha256(repr((PANELS, NAMES, WAYS)).encode())
    for path in dict.fromkeys(newest(bench, results, cases) for bench, cases in FIGURES[name][1]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write_figures(out: Path, results: Path = RESULTS) -> list[Path]:
    """Write all figures into the folder `out`; return the files."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "text.color": INK}):
        for name, (draw, _) in FIGURES.items():
            figure = draw(results)
            with atomic_file(out / name) as file:
                metadata = {"Software": None, "Source": source(name, results)}
                figure.savefig(file, format="png", dpi=130, metadata=metadata)
            plt.close(figure)
            written.append(out / name)
    return written


def main() -> None:
    """Write the figures and print their paths."""
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--out", type=Path, default=OUT, help="folder of the pictures (default: docs/figures)"
    )
    for path in write_figures(parser.parse_args().out):
        print(path)


if __name__ == "__main__":
    main()
