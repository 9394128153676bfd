"""What can be checked of a submission folder of the challenge, anybody's, without running it.

The rules are those of the challenge's README and of its audits: one `train_gpt.py`, `submission.json` and a
log per seed; file and counted code within 16,000,000 bytes; 600 s for training and 600 s for scoring; the
whole validation text, which is not part of the training text; what the JSON says is what the logs say; and a
record improves on the one before by 0.005 nats per token with p < 0.01. Each rule gives a `Finding`; what a
folder does not say is "unknown", and nothing is taken from the folder's own claims of compliance.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from pgolf.data.challenge import SEQUENCE, VARIANTS
from pgolf.errors import UserError
from pgolf.stats import compare_paired, t_two_sided

LIMIT = 16_000_000
BUDGET_S = 600.0
ONE_STEP_S = 0.25
"""Seconds by which published scripts may exceed the budget: they stop after the step in which it ends."""
LEAST_SEEDS = 3
GAIN_NATS = 0.005
"""Nats per token by which a record improves on the one before."""
LEVEL = 0.01
"""Largest p with which it does."""
LEAKY_SHARDS = 1499
"""Training shards of CaseOps text that a published script makes with its default of 10,000 validation
documents: 40,000 of the challenge's 50,000 are then in the training text (issue #2127)."""
KEYS = {"val_bpb": ("val_bpb", "mean_val_bpb"), "name": ("name", "run_name"), "date": ("date",)}
"""What `submission.json` must say, and the names under which it may."""
BPB = re.compile(r"val_bpb[:=]\s*([0-9]+\.[0-9]+)")
FIGURES = {
    "train_ms": re.compile(r"stopping_early.*train_time:\s*([0-9.]+)ms"),
    "eval_s": re.compile(r"total_eval_time:\s*([0-9.]+)s"),
    "total_bytes": re.compile(r"Total submission size[^:]*:\s*([0-9]+) bytes"),
    "code_bytes": re.compile(r"Code size(?: \(compressed\))?:\s*([0-9]+) bytes"),
    "shards": re.compile(r"train_shards:\s*([0-9]+)"),
    "val_tokens": re.compile(r"val_tokens:\s*([0-9]+)"),
}
"""Lines of the logs of published scripts; the last match counts."""

Verdict = Literal["ok", "fails", "unknown"]


@dataclass(frozen=True)
class Finding:
    """What was found about one rule."""

    rule: str
    verdict: Verdict
    text: str


@dataclass(frozen=True)
class Log:
    """What one log says."""

    name: str
    text: str
    scores: tuple[float, ...]
    """Every val_bpb in it, in order."""
    figures: dict[str, float]


@dataclass(frozen=True)
class Folder:
    """A submission folder that was read."""

    path: Path
    claims: dict[str, Any]
    """submission.json."""
    logs: list[Log]

    @property
    def seeds(self) -> dict[str, dict[str, Any]]:
        """Seed -> what submission.json says of it; empty if it says nothing of seeds."""
        found = self.claims.get("seed_results")
        return {str(k): v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}

    def scores(self, key: str = "val_bpb") -> dict[str, float]:
        """Seed -> its score, as submission.json says."""
        return {seed: float(v[key]) for seed, v in self.seeds.items() if _number(v.get(key))}


def check_folder(path: Path, against: Path | None = None) -> list[Finding]:
    """Return what was found about every rule, with `against` also whether it improves on that folder.

    Raises:
        FileNotFoundError: no such folder, or it has no submission.json. UserError: that file is not JSON.
    """
    folder = read_folder(path)
    found = [*_files(folder), *_claims(folder), _bytes(folder), _seeds(folder), *_scores(folder)]
    found += [
        _time(folder, "training", "train_ms", "train_time_s"),
        _time(folder, "scoring", "eval_s", "eval_time_s"),
    ]
    found += [_text(folder), _overlap(folder)]
    if against is not None:
        found.append(_improvement(folder, read_folder(against)))
    return found


def read_folder(path: Path) -> Folder:
    """Read a submission folder.

    Raises:
        FileNotFoundError, UserError: as `check_folder`.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}; name a submission folder, which holds submission.json")
    claims_path = path / "submission.json"
    if not claims_path.is_file():
        raise FileNotFoundError(f"{path} holds no submission.json, so it is no submission folder")
    try:
        claims = json.loads(claims_path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{claims_path} is not JSON: {e}") from e
    if not isinstance(claims, dict):
        raise UserError(f"{claims_path} must hold a JSON object, got {type(claims).__name__}")
    files = sorted(
        p for p in path.rglob("*") if p.suffix in (".log", ".txt") and "requirements" not in p.name
    )
    return Folder(path, claims, [log for p in files if (log := _read_log(p, path)).scores])


def _read_log(path: Path, folder: Path) -> Log:
    text = path.read_text(errors="replace")
    figures = {}
    for name, pattern in FIGURES.items():
        matches = pattern.findall(text)
        if matches:
            figures[name] = float(matches[-1])
    return Log(str(path.relative_to(folder)), text, tuple(map(float, BPB.findall(text))), figures)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _files(folder: Folder) -> Iterator[Finding]:
    there = (folder.path / "train_gpt.py").is_file()
    yield Finding("files", "ok" if there else "fails", f"train_gpt.py is {'there' if there else 'missing'}")
    names = ", ".join(log.name for log in folder.logs)
    yield Finding(
        "logs",
        "ok" if len(folder.logs) >= max(1, len(folder.seeds)) else "fails",
        f"{len(folder.logs)} logs with scores for {len(folder.seeds)} seeds{names and f': {names}'}",
    )


def _claims(folder: Folder) -> Iterator[Finding]:
    for what, names in KEYS.items():
        value = next((folder.claims[n] for n in names if n in folder.claims), None)
        good = _number(value) if what == "val_bpb" else isinstance(value, str) and bool(value)
        said = (
            f"submission.json says {what} {value!r}"
            if good
            else f"submission.json lacks {' or '.join(names)}"
        )
        yield Finding(what, "ok" if good else "fails", said)


def _bytes(folder: Folder) -> Finding:
    stated = [v["artifact_bytes"] for v in folder.seeds.values() if _number(v.get("artifact_bytes"))]
    names = ("bytes_total", "artifact_bytes_max", "artifact_bytes")
    stated += [folder.claims[n] for n in names if _number(folder.claims.get(n))]
    logged = [log.figures["total_bytes"] for log in folder.logs if "total_bytes" in log.figures]
    if not stated and not logged:
        return Finding("bytes", "unknown", "neither submission.json nor a log says how many bytes it has")
    most = int(max([*stated, *logged]))
    text = f"{most:,} of {LIMIT:,} bytes at most"
    if stated and logged and max(stated) < max(logged):
        text += f"; submission.json says {int(max(stated)):,}, a log {int(max(logged)):,}"
        return Finding("bytes", "fails" if most > LIMIT else "unknown", text)
    script = folder.path / "train_gpt.py"
    code = [log.figures["code_bytes"] for log in folder.logs if "code_bytes" in log.figures]
    if code and script.is_file() and script.stat().st_size > max(code) + 2:
        plain = script.stat().st_size
        more = most - int(max(code)) + plain
        text += f"; train_gpt.py here has {plain:,} bytes, and {int(max(code)):,} were counted"
        if more > LIMIT >= most:
            text += f"; it would be {more:,} unless the packed form is what is run"
            return Finding("bytes", "unknown", text)
    return Finding("bytes", "ok" if most <= LIMIT else "fails", text)


def _seeds(folder: Folder) -> Finding:
    count = len(folder.seeds)
    text = f"{count} seeds: {', '.join(folder.seeds) or 'none is named'}"
    verdict: Verdict = "ok" if count >= LEAST_SEEDS else "fails" if count else "unknown"
    return Finding("seeds", verdict, f"{text}; {LEAST_SEEDS} are the norm")


def _scores(folder: Folder) -> Iterator[Finding]:
    scores = folder.scores()
    logged = [score for log in folder.logs for score in log.scores]
    for seed, score in scores.items():
        digits = min(8, max(3, len(repr(score).partition(".")[2])))
        near = any(abs(score - other) < 0.6 * 10**-digits for other in logged)
        where = "a log has it" if near else "no log has it"
        yield Finding(f"seed {seed}", "ok" if near else "fails", f"{score} bits per byte; {where}")
    headline = next((folder.claims[n] for n in KEYS["val_bpb"] if _number(folder.claims.get(n))), None)
    if not scores or headline is None:
        yield Finding("mean", "unknown", "there are no scores of seeds to compare the headline with")
        return
    values = list(scores.values())
    good = abs(mean(values) - headline) < 6e-5
    text = f"the mean of the seeds is {mean(values):.5f}, the headline {headline}"
    if len(values) > 1:
        text += f"; standard deviation {stdev(values):.5f}"
        said = folder.claims.get("val_bpb_std")
        # Some authors divide by n and some by n - 1.
        spread = (stdev(values), stdev(values) * math.sqrt(1 - 1 / len(values)))
        if said is not None and _number(said) and min(abs(said - s) for s in spread) > 6e-5:
            good, text = False, f"{text}, and submission.json says {said}"
    yield Finding("mean", "ok" if good else "fails", text)


def _time(folder: Folder, what: str, figure: str, key: str) -> Finding:
    scale = 1e-3 if figure.endswith("_ms") else 1.0
    seconds = [scale * log.figures[figure] for log in folder.logs if figure in log.figures]
    seconds += [float(v[key]) for v in folder.seeds.values() if _number(v.get(key))]
    if not seconds:
        return Finding(what, "unknown", f"no log and no seed says how long {what} took")
    text = f"{max(seconds):.1f} s at most, of {BUDGET_S:.0f} s, by the script's own clock"
    return Finding(what, "ok" if max(seconds) <= BUDGET_S + ONE_STEP_S else "fails", text)


def _text(folder: Folder) -> Finding:
    found = {int(log.figures["val_tokens"]) for log in folder.logs if "val_tokens" in log.figures}
    if not found:
        return Finding("text", "unknown", "no log says how many validation tokens there were")
    known = {v.validation_tokens: name for name, v in VARIANTS.items() if v.validation_tokens is not None}
    told = ", ".join(f"{n:,}" for n in sorted(found))
    if len(found) > 1:
        return Finding("text", "fails", f"the logs have different numbers of validation tokens: {told}")
    (tokens,) = found
    name = known.get(tokens // SEQUENCE * SEQUENCE)
    if name is None:
        wholes = ", ".join(f"{n:,} ({of})" for n, of in known.items())
        return Finding("text", "unknown", f"{told} validation tokens; the whole text has {wholes}")
    return Finding("text", "ok", f"{told} validation tokens, the whole text with {name}")


def _overlap(folder: Folder) -> Finding:
    shards = {int(log.figures["shards"]) for log in folder.logs if "shards" in log.figures}
    if LEAKY_SHARDS in shards:
        return Finding(
            "overlap",
            "fails",
            f"{LEAKY_SHARDS} training shards: made with 10,000 validation documents, so 40,000 of the "
            "challenge's 50,000 are in the training text",
        )
    told = ", ".join(map(str, sorted(shards))) or "an unknown number of"
    return Finding(
        "overlap", "unknown", f"{told} training shards; only the shards themselves can show an overlap"
    )


def _improvement(folder: Folder, against: Folder) -> Finding:
    rule = "improves"
    ours, theirs = folder.scores("val_loss"), against.scores("val_loss")
    unit = "nats per token"
    if len(ours) < 2 or len(theirs) < 2:
        ours, theirs, unit = folder.scores(), against.scores(), "bits per byte"
    if len(ours) < 2 or len(theirs) < 2:
        return Finding(rule, "unknown", "it takes two scores of seeds on each side")
    a, b = list(ours.values()), list(theirs.values())
    gain = mean(b) - mean(a)
    t, df = welch(a, b)
    p = t_two_sided(t, df) / 2 if gain > 0 else 1 - t_two_sided(t, df) / 2
    text = f"on {against.path.name} by {gain:+.5f} {unit} ({len(a)} against {len(b)} seeds), "
    text += f"Welch's one-sided p {p:.3g}"
    common = sorted(ours.keys() & theirs.keys())
    if len(common) > 1:
        pairs = compare_paired([ours[s] for s in common], [theirs[s] for s in common])
        text += f"; the {pairs.n} seeds in common differ by {pairs.mean:+.5f} +- {pairs.se:.5f}"
        text += f", paired p {pairs.p_t:.3g}"
    if unit != "nats per token":
        return Finding(rule, "unknown", f"{text}; the rule is in nats, which a folder does not say")
    good = gain >= GAIN_NATS and p < LEVEL
    return Finding(rule, "ok" if good else "fails", f"{text}; a record needs {GAIN_NATS} and p < {LEVEL}")


def welch(a: list[float], b: list[float]) -> tuple[float, float]:
    """Return t and the degrees of freedom of Welch's test that two samples have one mean.

    Source: Welch 1947. Infinite t where both samples have no spread and their means differ.
    """
    first, second = stdev(a) ** 2 / len(a), stdev(b) ** 2 / len(b)
    total = first + second
    if not total:
        return (0.0 if mean(a) == mean(b) else math.inf), float(len(a) + len(b) - 2)
    df = total**2 / (first**2 / (len(a) - 1) + second**2 / (len(b) - 1))
    return abs(mean(a) - mean(b)) / math.sqrt(total), df
