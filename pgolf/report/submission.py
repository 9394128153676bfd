"""What a submission says of its runs: `submission.json` and `README.md`, made from their summaries alone.

Nothing is measured, guessed or rounded away here: what a summary does not hold is left out, and sums that do
not add up show the rest as "not accounted for". The same runs give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from pgolf.artifact.code import CODE_RULE
from pgolf.data.shards import TOKENIZER_NAME, Manifest, ShardInfo
from pgolf.report.finished_runs import FinishedRun
from pgolf.errors import UserError

BUDGET_S = 600.0
"""The challenge's seconds for training, and as many again for evaluation."""
LIMIT_BYTES = 16_000_000
"""The challenge's bytes for code and model."""
INSIDE = ("train", "save", "calibrate", "quantize")
"""Phases inside the clock, in order."""
BEFORE = ("start", "set_up", "warm_up", "rehearse")
"""Phases before it."""
NOT_PHASES = ("reserve", "clock", "total")
"""Entries of a summary's seconds that hold others, or were only planned."""
PHASES = {
    "start": "the process until its set-up: Python, imports, the ranks",
    "set_up": "data checked, model and optimizer made",
    "warm_up": "compilation and untimed steps; all state restored",
    "rehearse": "quantization tried, to know how much of the clock to keep for it",
    "train": "training",
    "save": "raw and averaged weights to disk",
    "calibrate": "Hessians and gradients of training text",
    "quantize": "codes of all matrices",
    "write": "codes searched that fill the limit, coded, written",
    "read": "the artifact, back from disk",
    "plot": "the plot of the loss",
}
SCORES = {
    "raw": "raw weights",
    "ema": "averaged weights",
    "quantized": "quantized file",
    "sliding": "quantized file, sliding window",
    "ttt": "quantized file, test-time training",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the runs cannot say of themselves."""

    author: str = ""
    """Who submits; left out when empty, as the others."""
    github_id: str = ""
    """The author's account."""
    name: str = ""
    """Title of the submission; when empty, the configuration's name."""
    blurb: str = ""
    """One sentence; when empty, the sizes of model and machine."""
    date: str = ""
    """yyyy-mm-dd; when empty, the day of the last run."""
    prepare_seconds: float | None = None
    """Seconds of making tokenizer and shards, before the runs."""

    def __post_init__(self) -> None:
        for key in ("author", "github_id", "name", "blurb", "date"):
            try:
                getattr(self, key).encode()
            except UnicodeEncodeError as e:
                raise UserError(
                    f"{key} is not Unicode text: {getattr(self, key)!r}; set LC_ALL=C.UTF-8 and give it again"
                ) from e
        if self.prepare_seconds is not None and not 0 <= self.prepare_seconds < float("inf"):
            raise UserError(f"prepare_seconds must be a number >= 0, got {self.prepare_seconds}")


def submission(runs: Sequence[FinishedRun], entry: Entry, manifest: Manifest | None = None) -> dict[str, Any]:
    """Return `submission.json`: the keys of PR #1855, those that the summaries can fill.

    val_loss (nats a token) and val_bpb are of the headline score (`FinishedRun.headline`), means over the
    seeds; their standard deviations need two. val_text says whether it is known that they are of the whole
    validation text; `manifest` is the one that the runs rested on, where it is at hand.
    """
    s, headline = runs[0].summary, runs[0].headline
    results = {str(run.seed): _result(run) for run in runs}
    scores = {name: [run.summary["scores"][name] for run in runs] for name in ("quantized", headline)}
    data: dict[str, Any] = {
        "author": entry.author,
        "github_id": entry.github_id,
        "name": title(runs, entry),
        "blurb": blurb(runs, entry),
        "date": day(runs, entry),
        "track": "10min_16mb" if all(map(_in_track, runs)) else "",
        "headline_score": headline,
        "val_loss": mean(x["loss"] for x in scores[headline]),
        "val_bpb": mean(x["bpb"] for x in scores[headline]),
        "val_loss_std": _deviation([x["loss"] for x in scores[headline]]),
        "val_bpb_std": _deviation([x["bpb"] for x in scores[headline]]),
        "val_bpb_quantized": mean(x["bpb"] for x in scores["quantized"]),
        "val_text": _certified(runs, manifest)[1],
        "seeds": [run.seed for run in runs],
        "seed_results": results,
        "artifact_bytes_mean": mean(r["artifact_bytes"] for r in results.values()),
        "artifact_bytes_max": max(r["artifact_bytes"] for r in results.values()),
        "bytes_total": max(r["artifact_bytes"] for r in results.values()),
        "bytes_code": len(runs[0].code),
        "train_steps_mean": mean(r["steps"] for r in results.values()),
        "step_avg_ms_mean": mean(r["step_avg_ms"] for r in results.values()),
        "hardware": hardware(runs[0]),
        "attention": s["attention"],
        **_versions(runs),
    }
    return {key: value for key, value in data.items() if value not in ("", None)}


def _result(run: FinishedRun) -> dict[str, Any]:
    s, best = run.summary, run.summary["scores"][run.headline]
    return {
        "val_loss": best["loss"],
        "val_bpb": best["bpb"],
        **{f"val_bpb_{name}": score["bpb"] for name, score in s["scores"].items()},
        "artifact_bytes": s["bytes"]["total"],
        "steps": s["train"]["steps"],
        "step_avg_ms": 1000 * s["seconds"]["train"] / max(1, s["train"]["steps"]),
        "train_time_s": s["seconds"]["clock"],
        "eval_time_s": evaluation_seconds(run),
    }


def _versions(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """Return what all runs have alike; the README names the rest."""

    def of(run: FinishedRun) -> dict[str, Any]:
        found = run.summary.get("versions", {})
        flash = found.get("flash-attn-4") if run.summary["attention"] == "fa4" else None
        names = {"pytorch_version": found.get("torch"), "cuda_version": found.get("cuda")}
        return names | {"flash_attn_version": flash, "commit": run.summary.get("commit")}

    first, *rest = map(of, runs)
    return {key: value for key, value in first.items() if all(other[key] == value for other in rest)}


def evaluation_seconds(run: FinishedRun) -> float:
    """Return the seconds of reading the file and of the headline score."""
    read: float = run.summary["seconds"]["read"]
    score: float = run.summary["scores"][run.headline]["seconds"]
    return read + score


def title(runs: Sequence[FinishedRun], entry: Entry) -> str:
    """Return the submission's name."""
    return entry.name or runs[0].config.name


def blurb(runs: Sequence[FinishedRun], entry: Entry) -> str:
    """Return the submission in one sentence."""
    run, model = runs[0], runs[0].config.model
    length = f"{run.config.train.seconds:g} s" if run.config.train.seconds else "a fixed number of steps"
    return entry.blurb or (
        f"{run.summary['parameters']:,} parameters ({model.layers} layers x {model.width}, vocabulary "
        f"{model.vocab_size:,}), {length} on {hardware(run)}."
    )


def day(runs: Sequence[FinishedRun], entry: Entry) -> str:
    """Return yyyy-mm-dd: as given, of the last run's start, or of its folder's name; "" if none says."""
    found = [run.summary.get("started", "")[:10] for run in runs]
    for run in runs:
        stamp = re.match(r"(\d{4})(\d\d)(\d\d)-\d{6}-", run.folder.resolve().name)
        found += ["-".join(stamp.groups())] if stamp else []
    return entry.date or max(found)


def hardware(run: FinishedRun) -> str:
    """Return the devices that ran."""
    return f"{run.summary['world_size']} x {run.summary['device']}"


def _in_track(run: FinishedRun) -> bool:
    """Tell whether the run kept to the track's seconds, bytes and machine (or to fewer of its GPUs)."""
    seconds, s = run.config.train.seconds, run.summary
    within = 0 < seconds <= BUDGET_S and s["bytes"]["total"] <= LIMIT_BYTES
    within = within and evaluation_seconds(run) <= BUDGET_S
    return within and s["world_size"] <= 8 and "H100" in s["device"]


def _deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def readme(
    runs: Sequence[FinishedRun], entry: Entry, files: dict[str, str], manifest: Manifest | None
) -> str:
    """Return `README.md`.

    Args:
        files: what lies in the folder, name -> description, in order.
        manifest: of the shards, where they are at hand.
    """
    parts = [
        f"# {title(runs, entry)}",
        blurb(runs, entry),
        _opening(runs),
        "## Results",
        results_table(runs),
        _results_notes(runs),
        "## Every second",
        seconds_table(runs),
        _seconds_notes(runs, entry),
        "## Every byte",
        bytes_table(runs),
        CODE_RULE.replace("\n", " ").replace("code: ", "Counted code: ", 1) + ".",
        "## What was done under which rule",
        "\n".join(f"- {fact}" for fact in rules(runs, files, manifest)),
        "## Again",
        _commands(runs, files),
        "## Files",
        "\n".join(f"- `{name}`: {what}" for name, what in files.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _opening(runs: Sequence[FinishedRun]) -> str:
    headline = runs[0].headline
    bpb = [run.summary["scores"][headline]["bpb"] for run in runs]
    spread = (
        "one seed" if len(runs) == 1 else f"mean of {len(runs)} seeds, standard deviation {stdev(bpb):.5f}"
    )
    most, limit = max(run.summary["bytes"]["total"] for run in runs), runs[0].config.artifact.limit
    text = (
        f"**{mean(bpb):.5f} bits per byte** ({SCORES[headline]}; {spread}), {most:,} bytes of {limit:,} "
        f"with the code, {hardware(runs[0])}."
    )
    if headline != "quantized":
        plain = mean(run.summary["scores"]["quantized"]["bpb"] for run in runs)
        text += f" The same file without adaptation: {plain:.5f}."
    return text


def results_table(runs: Sequence[FinishedRun]) -> str:
    """Return the figures of every seed, with mean and standard deviation where there are several."""

    def train(key: str) -> Callable[[FinishedRun], float | None]:
        return lambda run: run.summary["train"].get(key)

    def bpb(name: str) -> Callable[[FinishedRun], float | None]:
        return lambda run: run.summary["scores"].get(name, {}).get("bpb")

    lines: list[tuple[str, str, Callable[[FinishedRun], float | None]]] = [
        *((f"bits per byte, {words}", ".5f", bpb(name)) for name, words in SCORES.items()),
        ("nats a token, headline", ".5f", lambda run: run.summary["scores"][run.headline]["loss"]),
        ("bytes, file and code", ",.0f", lambda run: run.summary["bytes"]["total"]),
        ("steps", ",.0f", train("steps")),
        ("training tokens", ",.0f", train("tokens")),
        ("ms a step, loop off", ".2f", train("ms_loop_off")),
        ("ms a step, loop on", ".2f", train("ms_loop_on")),
        ("of them ms optimizer and exposed communication", ".3f", train("ms_optimizer")),
        ("training tokens/s", ",.0f", train("tokens_per_s")),
        ("peak memory of rank 0, MiB", ",.0f", lambda run: run.summary["peak_mib"] or None),
    ]
    several = len(runs) > 1
    head = ["", *_seeds(runs), *(("mean", "standard deviation") if several else ())]
    rows = []
    for words, form, value in lines:
        values = [value(run) for run in runs]
        known = [v for v in values if v is not None]
        if not known:
            continue
        whole = several and len(known) == len(values)
        ends = [format(mean(known), form), format(stdev(known), form)] if whole else ["-"] * 2 * several
        rows.append([words, *_cells(values, form), *ends])
    return _table(head, rows)


def _results_notes(runs: Sequence[FinishedRun]) -> str:
    run, s = runs[0], runs[0].summary
    versions = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in r.summary.get("versions", {}).items())
        or "versions not recorded"
        for r in runs
    )
    commits = dict.fromkeys(r.summary.get("commit") or "unknown" for r in runs)
    lines = [
        f"The headline is the score of the {SCORES[run.headline]}, read back from disk. Times of steps are "
        "medians; that of the optimizer, measured on rank 0's device, holds with several ranks the averaging "
        "of gradients and the wait for the slowest rank.",
        f"{hardware(run)}, attention {s['attention']}; {' and '.join(versions)}; sources at "
        f"commit {', '.join(commits)}.",
    ]
    if len(runs) == 1:
        lines.append("One seed: there is no standard deviation.")
    return "\n".join(lines)


def seconds_table(runs: Sequence[FinishedRun]) -> str:
    """Return every phase of every run, by where it lies to the clock, with what is not accounted for."""
    after = [
        name for name in runs[0].summary["seconds"] if name not in (*BEFORE, *INSIDE, *NOT_PHASES)
    ]  # the summary's order is that of the run

    def line(words: str, value: Callable[[dict[str, float]], float | None]) -> list[str]:
        return [words, *_cells([value(run.summary["seconds"]) for run in runs], ".2f")]

    def phase(name: str, where: str) -> list[str]:
        words = PHASES.get(name) or f"score of the {SCORES.get(name.removeprefix('score_'), name)}"
        return [where, *line(f"{name}: {words}", lambda s: s.get(name))]

    rows = [phase(name, "before the clock") for name in BEFORE]
    rows += [phase(name, "inside the clock") for name in INSIDE]
    rows.append(["inside the clock", *line("not accounted for", lambda s: s["clock"] - _sum(s, INSIDE))])
    rows.append(["", *line("**the clock**", lambda s: s["clock"])])
    if runs[0].config.train.seconds:
        rows.append(["", "its limit", *_cells([run.config.train.seconds for run in runs], ".2f")])
    rows += [phase(name, "after the clock") for name in after]
    if any("total" in run.summary["seconds"] for run in runs):
        rows.append(["", *line("not accounted for", outside_all)])
        rows.append(["", *line("**the process, start to summary**", lambda s: s.get("total"))])
    known = [row for row in rows if set(row[2:]) != {"-"}]
    return _table(["where", "phase, seconds", *_seeds(runs)], known)


def outside_all(seconds: dict[str, float]) -> float | None:
    """Return the seconds of the process that no phase holds; None where it was not timed."""
    if "total" not in seconds:
        return None
    phases = [name for name in seconds if name not in (*NOT_PHASES, *INSIDE)]
    return seconds["total"] - seconds["clock"] - _sum(seconds, phases)


def _sum(seconds: dict[str, float], names: Sequence[str]) -> float:
    return sum(seconds.get(name, 0.0) for name in names)


def _seconds_notes(runs: Sequence[FinishedRun], entry: Entry) -> str:
    limit = runs[0].config.train.seconds
    clocks = ", ".join(f"{run.summary['seconds']['clock']:.2f}" for run in runs)
    if limit:
        reserves = ", ".join(f"{run.summary['seconds'].get('reserve', 0.0):.2f}" for run in runs)
        text = f"The clock stopped at {clocks} s of {limit:g} s; {reserves} s of them were kept for what "
        text += "comes after training."
    else:
        text = f"No clock limited these runs ({clocks} s): they trained a fixed number of steps."
    text += "".join(map(_interruptions, runs))
    if not all("total" in run.summary["seconds"] for run in runs):
        text += " The process as a whole was not timed."
    if entry.prepare_seconds is not None:
        text += f" Making tokenizer and shards, before, took {entry.prepare_seconds:,.0f} s."
    return text


def _interruptions(run: FinishedRun) -> str:
    """Say in how many processes a run was made, what is on its clock and what is not; "" if in one."""
    sessions = run.summary.get("sessions", [])
    if len(sessions) < 2:
        return ""
    lost = sum(session["lost_seconds"] for session in sessions)
    ends = ", ".join(f"{s['end']} after {s['to_step']} steps" for s in sessions[:-1])
    return (
        f" The run of seed {run.seed} took {len(sessions)} processes ({ends}): {lost:.2f} s of work were "
        "lost and done again, both times on the clock; the time in which no process ran is not on it."
    )


def bytes_table(runs: Sequence[FinishedRun]) -> str:
    """Return the ledger of every run: sections of the file, code, total, limit, what is left."""
    ledgers = [run.summary["bytes"] for run in runs]
    names = list(dict.fromkeys(name for ledger in ledgers for name in ledger["parts"]))
    rows = [[name, *_cells([ledger["parts"].get(name) for ledger in ledgers], ",")] for name in names]
    for words, key in (("the file", "model"), ("code", "code"), ("**total**", "total"), ("limit", "limit")):
        rows.append([words, *_cells([ledger[key] for ledger in ledgers], ",")])
    rows.append(["left", *_cells([ledger["limit"] - ledger["total"] for ledger in ledgers], ",")])
    rows.append(["factor on the steps", *_cells([ledger["clip_scale"] for ledger in ledgers], ".4f")])
    return _table(["section, bytes", *_seeds(runs)], rows)


def rules(runs: Sequence[FinishedRun], files: dict[str, str], manifest: Manifest | None) -> list[str]:
    """Return what was done, each with the figure or setting that says so, and what the challenge asks for."""
    run, config = runs[0], runs[0].config
    score, headline = run.summary["scores"]["quantized"], run.headline
    whole, why = _certified(runs, manifest)
    over = "the whole validation text" if whole else "a validation text"
    text = f"Scored over {over}: {score['tokens']:,} tokens, {score['bytes']:,} bytes"
    if manifest is not None:
        total = manifest.total("val")
        lossless = "gives back" if manifest.lossless else "does NOT give back"
        text += f", {total.documents:,} documents; decoding their ids {lossless} every byte"
    facts = [f"{text}. Every score asserts both counts against the shards; {why}."]
    facts += [_training_rule(runs), _bytes_rule(runs), _evaluation_rule(runs)]
    calibrated = (
        f"Calibrated on training text: {config.quant.calibration_batches} micro-batches of "
        f"{config.data.micro_tokens:,} tokens of the training shards, inside the clock."
    )
    if config.artifact.fit:
        calibrated += " The search for the factor that fills the limit repeats the rounding, from the same "
        calibrated += "Hessians, after it."
    facts.append(calibrated)
    if headline == "ttt":
        a = config.evaluate.adapters
        facts.append(
            f"Test-time training scores first: the loss of a chunk of {a.chunk} to {a.chunk_max} tokens is "
            f"fixed before adapters of rank {a.rank} learn from it; every document starts anew."
        )
    else:
        facts.append("No test-time training: the model that scores is the file and does not change.")
    if "sliding" in run.summary["scores"]:
        facts.append(f"The sliding window scores each token once, {config.evaluate.stride} a window.")
    where = "" if TOKENIZER_NAME in files else "; it was not at hand and is not in this folder"
    facts.append(f"Tokenizer: SHA-256 {run.tokenizer_sha256}, not counted{where}.")
    return facts


def text_differs(runs: Sequence[FinishedRun], text: ShardInfo) -> str:
    """Return how what the runs scored differs from a validation text, "" where it does not.

    A text of n tokens has n - 1 targets: the first token has none before it.
    """
    for run in runs:
        score = run.summary["scores"]["quantized"]
        for key, whole in (("tokens", text.tokens - 1), ("bytes", text.bytes)):
            if score[key] != whole:
                return f"{run.folder} scored {score[key]:,} {key}, the manifest's text has {whole:,}"
    return ""


def _certified(runs: Sequence[FinishedRun], manifest: Manifest | None) -> tuple[bool, str]:
    """Return whether the runs are known to have scored a whole validation text, and what says so or not.

    What each run kept of the manifest that it checked says so; `manifest` is that very one, where it is at
    hand (`pgolf.report.submit` compares the hashes).
    """
    unknown = "not known to be the whole text"
    for run in runs:
        kept = manifest_of(run)
        if kept is None:
            return False, f"{unknown}: the run rested on no manifest"
        if kept != manifest_of(runs[0]):
            return False, f"{unknown}: the runs rested on different manifests"
        whole = ShardInfo("val", sha256="", **run.summary["data"]["validation"])
        differs = text_differs([run], whole if manifest is None else manifest.total("val"))
        if differs:
            return False, f"{unknown}: {differs}"
    agrees = "both counts agree with the manifest of the shards"
    return True, agrees if manifest is not None else f"{agrees} that the runs checked"


def manifest_of(run: FinishedRun) -> str | None:
    """Return the SHA-256 of the manifest that the run's data were checked against; None if there was none."""
    found: str | None = (run.summary.get("data") or {}).get("manifest")
    return found


def _training_rule(runs: Sequence[FinishedRun]) -> str:
    longest = max(run.summary["seconds"]["clock"] for run in runs)
    word = "within" if longest <= BUDGET_S else "NOT within"
    text = f"Training, calibration and quantization: {longest:.2f} s at most, {word} {BUDGET_S:g} s"
    machine = hardware(runs[0])
    if runs[0].summary["world_size"] != 8 or "H100" not in machine:
        text += f", on {machine}; the challenge's machine is 8 x H100"
    return text + "."


def _bytes_rule(runs: Sequence[FinishedRun]) -> str:
    most = max(run.summary["bytes"]["total"] for run in runs)
    word = "within" if most <= LIMIT_BYTES else "ABOVE"
    return f"File and counted code: {most:,} bytes at most, {word} {LIMIT_BYTES:,}."


def _evaluation_rule(runs: Sequence[FinishedRun]) -> str:
    longest = max(evaluation_seconds(run) for run in runs)
    word = "within" if longest <= BUDGET_S else "NOT within"
    what = "Evaluation, reading the file and the headline score"
    return f"{what}: {longest:.2f} s at most, {word} {BUDGET_S:g} s."


def _commands(runs: Sequence[FinishedRun], files: dict[str, str]) -> str:
    run, ranks = runs[0], runs[0].summary["world_size"]
    several = f"torchrun --standalone --nproc_per_node={ranks} "
    commit = run.summary.get("commit", "")
    tokenizer = TOKENIZER_NAME if TOKENIZER_NAME in files else "TOKENIZER"
    train, score = (several + "-m pgolf", several) if ranks > 1 else ("python -m pgolf", "python ")
    lines = [
        f"git checkout {commit.removesuffix('-dirty')}" if commit else "",
        "pip install -r requirements.txt",
        "pip install --no-build-isolation .     # in pgolf's sources",
        f"pgolf data shards --train TEXT ... --val TEXT --tokenizer {tokenizer} --out SHARDS",
        *(f"{train} train config.json --data SHARDS --seed {run.seed}" for run in runs),
        *(f"{score}score.py model_seed{run.seed}.pgolf --data SHARDS" for run in runs),
    ]
    if run.headline == "ttt":
        lines += [f"{score}score.py model_seed{run.seed}.pgolf --data SHARDS --ttt" for run in runs]
    text = "```\n" + "\n".join(line for line in lines if line) + "\n```"
    if commit.endswith("-dirty"):
        text += "\n\nThe sources differed from that commit when the runs were started."
    return text


def _seeds(runs: Sequence[FinishedRun]) -> list[str]:
    return [f"seed {run.seed}" + (" (one seed)" if len(runs) == 1 else "") for run in runs]


def _cells(values: Sequence[float | None], form: str) -> list[str]:
    return ["-" if value is None else format(value, form) for value in values]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
