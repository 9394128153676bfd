"""What a run found: the summary that it writes, and the table that it ends with."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass, field
from typing import Any

import torch

from pgolf.artifact.fit import fill_note
from pgolf.artifact.size import Ledger
from pgolf.data.manifest import NO_MANIFEST
from pgolf.evaluate.bpb import Score

PACKAGES = ("torch", "numpy", "brotli", "sentencepiece", "triton", "flash-attn-4")
"""What a run's speed, or reading its artifact, depends on."""


@dataclass
class Summary:
    """What a run found; written as summary.json."""

    name: str
    config_hash: str
    device: str
    world_size: int
    attention: str
    parameters: int
    scores: dict[str, Score] = field(default_factory=dict)
    """raw, ema, quantized, and what config.evaluate adds."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of every phase, in order: start is the process until set_up (Python, imports, the ranks);
    clock, from the start of training to the last code, holds four; total is the process until the summary.
    start and total are missing where the system does not say when a process began."""
    train: dict[str, Any] = field(default_factory=dict)
    ledger: Ledger | None = None
    peak_mib: float = 0.0
    started: str = ""
    """When the run was set up, UTC."""
    commit: str = ""
    """Of the sources, with -dirty where files differ from it; empty where nobody knows."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of Python and the packages that are installed; cuda is what torch was built for."""
    data: dict[str, Any] = field(default_factory=dict)
    """SHA-256 of the data folder's manifest and what it says of the validation text; see DataFolder.facts."""
    sessions: list[dict[str, Any]] = field(default_factory=list)
    """The processes that the run took, in order: `pgolf.train.progress.Progress` says what each holds."""
    overrun: float = 0.0
    """Seconds by which the clock was overrun; 0: it was kept."""


def summary_dict(s: Summary) -> dict[str, Any]:
    """Return the summary as plain JSON data."""
    plain = {k: v for k, v in vars(s).items() if k not in ("scores", "ledger")}
    scores = {k: {**vars(v), "loss": v.loss, "bpb": v.bpb} for k, v in s.scores.items()}
    return {**plain, "scores": scores, "bytes": s.ledger and s.ledger.to_dict()}


def format_table(s: Summary) -> str:
    """Return the closing table: bits per byte, bytes and seconds."""
    lines = ["", f"{'weights':<12}{'bpb':>9}{'nats/token':>12}{'tokens':>12}{'text bytes':>13}{'seconds':>9}"]
    for name, score in s.scores.items():
        lines.append(
            f"{name:<12}{score.bpb:>9.4f}{score.loss:>12.4f}{score.tokens:>12,}{score.bytes:>13,}{score.seconds:>9.1f}"
        )
    t, off, on = s.train, s.train["ms_loop_off"], s.train["ms_loop_on"]
    ms = f"{off:.1f} ms" if off is not None else "-"
    ms += f" loop off, {on:.1f} ms loop on" if on is not None else ""
    ms += f", of them {t['ms_optimizer']:.2f} ms optimizer" if t["ms_optimizer"] is not None else ""
    lines += [
        "",
        f"{t['steps']} steps, {t['tokens']:,} tokens, {t['tokens_per_s'] / 1e3:.1f} ktok/s; a step {ms}",
    ]
    if s.ledger is not None:
        lines.append(f"artifact {s.ledger.total:,} bytes of {s.ledger.limit:,} (code {s.ledger.code:,})")
        lines += filter(None, [fill_note(s.ledger)])
    if len(s.sessions) > 1:
        lost = sum(session["lost_seconds"] for session in s.sessions)
        lines.append(f"{len(s.sessions)} processes; {lost:.1f} s of lost work are on the clock")
    if s.overrun:
        lines.append(
            f"THE CLOCK WAS OVERRUN: it stopped at {s.seconds['clock']:.2f} s, {s.overrun:.2f} s too late; "
            "run again with a larger train.quantize_reserve"
        )
    lines.append("seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in s.seconds.items()))
    if s.data == {"manifest": None}:
        lines.append(NO_MANIFEST)
    if s.peak_mib:
        lines.append(f"peak GPU memory {s.peak_mib:,.0f} MiB")
    return "\n".join(lines)


def device_name(device: torch.device) -> str:
    """Return what a summary calls the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a run depends on."""
    found = {"python": platform.python_version()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
