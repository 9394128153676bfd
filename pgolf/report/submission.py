"""What a submission says of its runs: `submission.json` and `README.md`, made from their summaries alone.

Nothing is measured or guessed here. What a summary does not hold is left out, and where phases do not add up
to the whole, the rest is shown as "not accounted for". The same runs give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from pgolf.artifact.code_rule import CODE_RULE, FORMER_NAME, FORMER_RULE, TRAIN_NAME
from pgolf.config import ArtifactConfig, TrainConfig
from pgolf.data.challenge import known_text
from pgolf.data.shards import TOKENIZER_NAME, Manifest, ShardInfo
from pgolf.errors import UserError
from pgolf.report.finished_runs import FinishedRun
from pgolf.report.summary import PHASES, SCORES, Summary, Where

BUDGET_S, LIMIT_BYTES = TrainConfig().seconds, ArtifactConfig().limit
"""The challenge's seconds for training, and as many again for evaluation, and its bytes for code and model:
the defaults of the settings."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the author of a submission adds to what the runs say."""

    author: str = ""
    """Name of the author; left out when empty, as the following ones are."""
    github_id: str = ""
    """The author's account on GitHub."""
    name: str = ""
    """Title of the submission; when empty, the configuration's name."""
    blurb: str = ""
    """One sentence; when empty, the sizes of model and machine."""
    date: str = ""
    """yyyy-mm-dd; when empty, the day of the last run."""
    prepare_seconds: float | None = None
    """Seconds that making tokenizer and shards took, before the runs."""

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

    val_loss (nats per token) and val_bpb are of the headline score (`Summary.headline`), means over the
    seeds; a standard deviation needs two seeds. val_text says whether it is known that they are of the whole
    validation text. `manifest` is the one that the runs rested on, where its file was found.
    """
    headline = runs[0].summary.headline
    results = {str(run.seed): _result(run) for run in runs}
    scores = {name: [run.summary.scores[name] for run in runs] for name in ("quantized", headline)}
    data: dict[str, Any] = {
        "author": entry.author,
        "github_id": entry.github_id,
        "name": title(runs, entry),
        "blurb": blurb(runs, entry),
        "date": day(runs, entry),
        "track": "10min_16mb" if all(map(_in_track, runs)) else "",
        "headline_score": headline,
        "val_loss": mean(x.loss for x in scores[headline]),
        "val_bpb": mean(x.bpb for x in scores[headline]),
        "val_loss_std": _deviation([x.loss for x in scores[headline]]),
        "val_bpb_std": _deviation([x.bpb for x in scores[headline]]),
        "val_bpb_quantized": mean(x.bpb for x in scores["quantized"]),
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
        "attention": runs[0].summary.attention,
        **_versions(runs),
    }
    return {key: value for key, value in data.items() if value not in ("", None)}


def _result(run: FinishedRun) -> dict[str, Any]:
    summary = run.summary
    best = summary.scores[summary.headline]
    return {
        "val_loss": best.loss,
        "val_bpb": best.bpb,
        **{f"val_bpb_{name}": score.bpb for name, score in summary.scores.items()},
        "artifact_bytes": run.ledger.total,
        "steps": run.train.steps,
        "step_avg_ms": summary.step_ms,
        "train_time_s": run.clock,
        "eval_time_s": evaluation_seconds(run),
    }


def _versions(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """Return the versions that all runs share; the README names the others."""

    def of(run: FinishedRun) -> dict[str, Any]:
        found = run.summary.versions
        flash = found.get("flash-attn-4") if run.summary.attention == "fa4" else None
        names = {"pytorch_version": found.get("torch"), "cuda_version": found.get("cuda")}
        return names | {"flash_attn_version": flash, "commit": run.summary.commit}

    first, *rest = map(of, runs)
    return {key: value for key, value in first.items() if all(other[key] == value for other in rest)}


def evaluation_seconds(run: FinishedRun) -> float:
    """Return the seconds of reading the file and of the headline score."""
    summary = run.summary
    return summary.phases["read"].seconds + summary.scores[summary.headline].seconds


def challenge_lines(run: FinishedRun, manifest: Manifest | None) -> str:
    """Return a run's figures as the scripts of the challenge log them, for what reads logs (`check.py`)."""
    scores, ledger, steps = run.summary.scores, run.ledger, run.train.steps
    shards = [] if manifest is None else [i for i in manifest.files.values() if i.split == "train"]
    order = [name for name in scores if name != run.summary.headline] + [run.summary.headline]
    lines = [
        "",
        "The same figures in the form of the challenge's logs:",
        *([f"train_shards: {len(shards)}"] if shards else []),
        f"val_tokens: {scores['quantized'].tokens + 1}",
        f"stopping_early: the clock includes quantization train_time: {1e3 * run.clock:.0f}ms step: {steps}",
        f"Code size: {ledger.code} bytes",
        f"Total submission size: {ledger.total} bytes",
        *(f"{name} val_loss:{scores[name].loss:.8f} val_bpb:{scores[name].bpb:.8f}" for name in order),
        f"total_eval_time: {evaluation_seconds(run):.1f}s",
    ]
    return "\n".join(lines) + "\n"


def title(runs: Sequence[FinishedRun], entry: Entry) -> str:
    """Return the submission's name."""
    return entry.name or runs[0].config.name


def blurb(runs: Sequence[FinishedRun], entry: Entry) -> str:
    """Return the submission in one sentence."""
    run, model = runs[0], runs[0].config.model
    length = f"{run.config.train.seconds:g} s" if run.config.train.seconds else "a fixed number of steps"
    return entry.blurb or (
        f"{run.summary.parameters:,} parameters ({model.layers} layers x {model.width}, vocabulary "
        f"{model.vocab_size:,}), {length} on {hardware(run)}."
    )


def day(runs: Sequence[FinishedRun], entry: Entry) -> str:
    """Return yyyy-mm-dd: as given, of the last run's start, or of its folder's name; "" if none says."""
    # Summaries of earlier versions do not say when they began, but the names of their folders do.
    found = [run.summary.started[:10] for run in runs]
    for run in runs:
        stamp = re.match(r"(\d{4})(\d\d)(\d\d)-\d{6}-", run.folder.resolve().name)
        found += ["-".join(stamp.groups())] if stamp else []
    return entry.date or max(found)


def hardware(run: FinishedRun) -> str:
    """Return the devices that ran."""
    return f"{run.summary.world_size} x {run.summary.device}"


def _in_track(run: FinishedRun) -> bool:
    """Tell whether the run kept to the track's seconds, bytes and machine (or to fewer of its GPUs)."""
    # The track gives eight H100; a run on fewer of them kept to it all the more.
    seconds, s = run.config.train.seconds, run.summary
    within = not run.config.model.illegal and 0 < seconds <= BUDGET_S and run.ledger.total <= LIMIT_BYTES
    within = within and evaluation_seconds(run) <= BUDGET_S
    return within and s.world_size <= 8 and "H100" in s.device


def _deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def readme(
    runs: Sequence[FinishedRun], entry: Entry, files: dict[str, str], manifest: Manifest | None
) -> str:
    """Return `README.md`.

    Args:
        files: what lies in the folder, name -> description, in order.
        manifest: of the shards, where they were found.
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
        _code_rule(runs[0]),
        "## What was done under which rule",
        "\n".join(f"- {fact}" for fact in rules(runs, files, manifest)),
        "## Again",
        _commands(runs, files),
        "## Files",
        "\n".join(f"- `{name}`: {what}" for name, what in files.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _code_rule(run: FinishedRun) -> str:
    rule = FORMER_RULE if run.code_name == FORMER_NAME else CODE_RULE
    return rule.replace("\n", " ").replace("code: ", "Counted code: ", 1) + "."


def _opening(runs: Sequence[FinishedRun]) -> str:
    headline = runs[0].summary.headline
    bpb = [run.summary.scores[headline].bpb for run in runs]
    spread = (
        "one seed" if len(runs) == 1 else f"mean of {len(runs)} seeds, standard deviation {stdev(bpb):.5f}"
    )
    most, limit = max(run.ledger.total for run in runs), runs[0].config.artifact.limit
    text = (
        f"**{mean(bpb):.5f} bits per byte** ({SCORES[headline]}; {spread}), {most:,} bytes of {limit:,} "
        f"with the code, {hardware(runs[0])}."
    )
    if headline != "quantized":
        plain = mean(run.summary.scores["quantized"].bpb for run in runs)
        text += f" The same file without adaptation: {plain:.5f}."
    return text


def results_table(runs: Sequence[FinishedRun]) -> str:
    """Return the figures of every seed, with mean and standard deviation where there are several."""

    def bpb(name: str) -> Callable[[FinishedRun], float | None]:
        return lambda run: run.summary.scores[name].bpb if name in run.summary.scores else None

    lines: list[tuple[str, str, Callable[[FinishedRun], float | None]]] = [
        *((f"bits per byte, {words}", ".5f", bpb(name)) for name, words in SCORES.items()),
        ("nats per token, headline", ".5f", lambda run: run.summary.scores[run.summary.headline].loss),
        ("bytes, file and code", ",.0f", lambda run: run.ledger.total),
        ("steps", ",.0f", lambda run: run.train.steps),
        ("training tokens", ",.0f", lambda run: run.train.tokens),
        ("ms per step, loop off", ".2f", lambda run: run.train.ms_loop_off),
        ("ms per step, loop on", ".2f", lambda run: run.train.ms_loop_on),
        ("of them ms optimizer and exposed communication", ".3f", lambda run: run.train.ms_optimizer),
        ("training tokens/s", ",.0f", lambda run: run.train.tokens_per_s),
        ("peak memory of rank 0, MiB", ",.0f", lambda run: run.summary.peak_mib or None),
    ]
    several = len(runs) > 1
    head = ["", *_seeds(runs), *(("mean", "standard deviation") if several else ())]
    rows = []
    for words, form, value in lines:
        values = [value(run) for run in runs]
        known = [v for v in values if v is not None]
        if not known:
            continue
        # A mean over some of the seeds would not be comparable with the means above and below it.
        whole = several and len(known) == len(values)
        ends = [format(mean(known), form), format(stdev(known), form)] if whole else ["-"] * 2 * several
        rows.append([words, *_cells(values, form), *ends])
    return _table(head, rows)


def _results_notes(runs: Sequence[FinishedRun]) -> str:
    run = runs[0]
    versions = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in r.summary.versions.items())
        or "versions not recorded"
        for r in runs
    )
    commits = dict.fromkeys(r.summary.commit or "unknown" for r in runs)
    lines = [
        f"The headline is the score of the {SCORES[run.summary.headline]}, read back from disk. Times of "
        "steps are medians; that of the optimizer, measured on rank 0's device, holds with several ranks the "
        "averaging of gradients and the wait for the slowest rank.",
        f"{hardware(run)}, attention {run.summary.attention}; {' and '.join(versions)}; sources at "
        f"commit {', '.join(commits)}.",
    ]
    if len(runs) == 1:
        lines.append("One seed: there is no standard deviation.")
    return "\n".join(lines)


def seconds_table(runs: Sequence[FinishedRun]) -> str:
    """Return every phase of every run, by where it lies to the clock, with what is not accounted for."""
    limits = [run.config.train.seconds for run in runs]
    inside = [run.clock - run.summary.spent("inside") for run in runs]
    totals = [run.summary.total for run in runs]
    rows = [
        *_phases(runs, "before"),
        *_phases(runs, "inside"),
        ["inside the clock", "not accounted for", *_cells(inside, ".2f")],
        ["", "**the clock**", *_cells([run.clock for run in runs], ".2f")],
        *([["", "its limit", *_cells(limits, ".2f")]] if limits[0] else []),
        *_phases(runs, "after"),
        ["", "not accounted for", *_cells([outside_all(run.summary) for run in runs], ".2f")],
        ["", "**the process, start to summary**", *_cells(totals, ".2f")],
    ]
    known = [row for row in rows if set(row[2:]) != {"-"}]
    return _table(["where", "phase, seconds", *_seeds(runs)], known)


def _phases(runs: Sequence[FinishedRun], where: Where) -> list[list[str]]:
    """Return a row for each phase that any of the runs has there."""
    names = [name for name, kind in PHASES.items() if kind.where == where]
    # A newer version may have measured phases that this one has no words for.
    names += [p.name for p in runs[0].summary.phases.values() if p.where == where and p.name not in PHASES]
    rows = []
    for name in names:
        found = [run.summary.phases.get(name) for run in runs]
        seconds = [None if phase is None else phase.seconds for phase in found]
        words = f"{name}: {PHASES[name].words}" if name in PHASES else name
        rows.append([f"{where} the clock", words, *_cells(seconds, ".2f")])
    return rows


def outside_all(summary: Summary) -> float | None:
    """Return the seconds of the process that no phase holds; None where it was not timed."""
    if summary.total is None or summary.clock is None:
        return None
    return summary.total - summary.clock - summary.spent("before") - summary.spent("after")


def _seconds_notes(runs: Sequence[FinishedRun], entry: Entry) -> str:
    limit = runs[0].config.train.seconds
    clocks = ", ".join(f"{run.clock:.2f}" for run in runs)
    if limit:
        reserves = ", ".join(f"{run.summary.reserve or 0.0:.2f}" for run in runs)
        text = f"The clock stopped at {clocks} s of {limit:g} s; {reserves} s of them were kept for what "
        text += "comes after training."
    else:
        text = f"No clock limited these runs ({clocks} s): they trained a fixed number of steps."
    text += "".join(map(_interruptions, runs))
    if any(run.summary.total is None for run in runs):
        text += " The process as a whole was not timed."
    if entry.prepare_seconds is not None:
        text += f" Making tokenizer and shards, before, took {entry.prepare_seconds:,.0f} s."
    return text


def _interruptions(run: FinishedRun) -> str:
    """Say in how many processes a run was made, what is on its clock and what is not; "" if in one."""
    sessions = run.summary.sessions
    if len(sessions) < 2:
        return ""
    lost = sum(entry.lost_seconds for entry in sessions)
    ends = ", ".join(f"{entry.end} after {entry.to_step} steps" for entry in sessions[:-1])
    return (
        f" The run of seed {run.seed} took {len(sessions)} processes ({ends}): {lost:.2f} s of work were "
        "lost and done again, both times on the clock; the time in which no process ran is not on it."
    )


def bytes_table(runs: Sequence[FinishedRun]) -> str:
    """Return the ledger of every run: sections of the file, code, total, limit, what is left."""
    ledgers = [run.ledger for run in runs]
    parts = [dict(ledger.parts) for ledger in ledgers]
    names = list(dict.fromkeys(name for found in parts for name in found))
    rows = [[name, *_cells([found.get(name) for found in parts], ",")] for name in names]
    rows += [
        ["the file", *_cells([ledger.model_bytes for ledger in ledgers], ",")],
        ["code", *_cells([ledger.code for ledger in ledgers], ",")],
        ["**total**", *_cells([ledger.total for ledger in ledgers], ",")],
        ["limit", *_cells([ledger.limit for ledger in ledgers], ",")],
        ["left", *_cells([ledger.limit - ledger.total for ledger in ledgers], ",")],
        ["factor on the scales", *_cells([ledger.clip_scale for ledger in ledgers], ".4f")],
    ]
    return _table(["section, bytes", *_seeds(runs)], rows)


def rules(runs: Sequence[FinishedRun], files: dict[str, str], manifest: Manifest | None) -> list[str]:
    """Return what was done, each with the figure or setting that says so, and what the challenge asks for."""
    run, config = runs[0], runs[0].config
    score, headline = run.summary.scores["quantized"], run.summary.headline
    whole, why = _certified(runs, manifest)
    over = "the whole validation text" if whole else "a validation text"
    text = f"Scored over {over}: {score.tokens:,} tokens, {score.bytes:,} bytes"
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
    facts += _way_rules(run)
    if remark := config.evaluate.remark(headline):
        facts.append(f"The headline score is {remark}.")
    tests = [f"`{name}`, {what}" for name, what in files.items() if name.startswith("legality_seed")]
    told = "; ".join(tests) or "not tested (`pgolf legality RUN` does it)"
    facts.append(f"Legality of the way to score: {told}.")
    if config.model.illegal:
        facts.append(f"{config.model.illegal[0].upper()}{config.model.illegal[1:]}.")
    where = "" if TOKENIZER_NAME in files else "; it was not found and is not in this folder"
    facts.append(f"Tokenizer: SHA-256 {run.tokenizer_sha256}, not counted{where}.")
    return facts


def _way_rules(run: FinishedRun) -> list[str]:
    """Return what the headline's way to score does."""
    config, headline = run.config, run.summary.headline
    facts = []
    if headline in ("ttt", "phased"):
        a = config.evaluate.phases.adapters if headline == "phased" else config.evaluate.adapters
        facts.append(
            f"Test-time training scores first: the loss of a chunk of {a.chunk} to {a.chunk_max} tokens is "
            f"fixed before adapters of rank {a.rank} learn from it; every document starts anew."
        )
        if a.members > 1:
            facts.append(
                f"Every document has {a.members} sets of adapters; the mean of their probabilities counts."
            )
    elif headline == "sgd":
        facts.append(
            f"The model learns after it scores: the losses of {config.evaluate.sgd.chunk_tokens:,} tokens "
            "are fixed before it learns from them."
        )
    elif headline in ("slot", "causal_slot"):
        s, causal = config.evaluate.slot, headline == "causal_slot"
        what = (
            "tokens that were scored before" if causal else "ALL its tokens, ALSO THOSE THAT IT THEN SCORES"
        )
        facts.append(
            f"SLOT: for each window a shift of the last states takes {s.steps} steps of AdamW on {what}; the "
            "model is the file and does not change."
        )
    else:
        facts.append("No test-time training: the model that scores is the file and does not change.")
    facts += _further_windows(run)
    if headline == "phased":
        p = config.evaluate.phases
        facts.append(f"The model learns from documents that were scored, in {p.count} phases.")
    if config.evaluate.tilt.on and headline != "quantized":
        t = config.evaluate.tilt
        facts.append(
            f"An n-gram tilt of order {t.order}, threshold {t.threshold:g} and boost {t.boost:g} is on top: "
            "it reads the earlier tokens of the text alone, other documents too, inside the time of scoring."
        )
    return facts


def _further_windows(run: FinishedRun) -> list[str]:
    """Return what the ways to score do that nothing learns in."""
    config, facts = run.config, []
    if "sliding" in run.summary.scores:
        facts.append(f"The sliding window scores each token once, {config.evaluate.stride} per window.")
    if "local" in run.summary.scores:
        reach = config.evaluate.context or config.model.max_context
        facts.append(f"Local attention reads each document once; a token sees the last {reach:,} tokens.")
    return facts


def text_differs(runs: Sequence[FinishedRun], text: ShardInfo) -> str:
    """Return how what the runs scored differs from a validation text, "" where it does not.

    A text of n tokens has n - 1 targets: the first token has none before it.
    """
    for run in runs:
        score = run.summary.scores["quantized"]
        for what, ours, whole in (
            ("tokens", score.tokens, text.tokens - 1),
            ("bytes", score.bytes, text.bytes),
        ):
            if ours != whole:
                return f"{run.folder} scored {ours:,} {what}, the manifest's text has {whole:,}"
    return ""


def _certified(runs: Sequence[FinishedRun], manifest: Manifest | None) -> tuple[bool, str]:
    """Return whether the runs are known to have scored a whole validation text, and what says so or not.

    What each run kept of the manifest that it checked says so. `manifest` is that one, where its file was
    found (`pgolf.report.submit` compares the hashes).
    """
    unknown = "not known to be the whole text"
    for run in runs:
        kept = run.summary.manifest
        if kept is None:
            known = known_text(run.tokenizer_sha256, run.summary.scores["quantized"].tokens)
            return False, f"{unknown}: the run rested on no manifest{known and f'; it scored {known}'}"
        if kept != runs[0].summary.manifest:
            return False, f"{unknown}: the runs rested on different manifests"
        whole = run.summary.validation if manifest is None else manifest.total("val")
        differs = text_differs([run], whole)
        if differs:
            return False, f"{unknown}: {differs}"
    agrees = "both counts agree with the manifest of the shards"
    return True, agrees if manifest is not None else f"{agrees} that the runs checked"


def _training_rule(runs: Sequence[FinishedRun]) -> str:
    longest = max(run.clock for run in runs)
    word = "within" if longest <= BUDGET_S else "NOT within"
    text = f"Training, calibration and quantization: {longest:.2f} s at most, {word} {BUDGET_S:g} s"
    machine = hardware(runs[0])
    if runs[0].summary.world_size != 8 or "H100" not in machine:
        text += f", on {machine}; the challenge's machine is 8 x H100"
    return text + "."


def _bytes_rule(runs: Sequence[FinishedRun]) -> str:
    most = max(run.ledger.total for run in runs)
    word = "within" if most <= LIMIT_BYTES else "ABOVE"
    return f"File and counted code: {most:,} bytes at most, {word} {LIMIT_BYTES:,}."


def _evaluation_rule(runs: Sequence[FinishedRun]) -> str:
    longest = max(evaluation_seconds(run) for run in runs)
    word = "within" if longest <= BUDGET_S else "NOT within"
    what = "Evaluation, reading the file and the headline score"
    return f"{what}: {longest:.2f} s at most, {word} {BUDGET_S:g} s."


def _commands(runs: Sequence[FinishedRun], files: dict[str, str]) -> str:
    run, ranks = runs[0], runs[0].summary.world_size
    several = f"torchrun --standalone --nproc_per_node={ranks} "
    commit = run.summary.commit
    tokenizer = TOKENIZER_NAME if TOKENIZER_NAME in files else "TOKENIZER"
    train, score = (several + "-m pgolf", several) if ranks > 1 else ("python -m pgolf", "python ")
    score += "score.py" if run.code_name == FORMER_NAME else run.code_name
    score += " --evaluate" if run.code_name == TRAIN_NAME else ""
    lines = [
        f"git checkout {commit.removesuffix('-dirty')}" if commit else "",
        "pip install -r requirements.txt",
        "pip install --no-build-isolation .     # in pgolf's sources",
        f"pgolf data shards --train TEXT ... --val TEXT --tokenizer {tokenizer} --out SHARDS",
        *(f"{train} train config.json --data SHARDS --seed {run.seed}" for run in runs),
        *(f"{score} model_seed{run.seed}.pgolf --data SHARDS" for run in runs),
    ]
    if run.summary.headline != "quantized":
        mode = "--ttt" if run.summary.headline == "ttt" else f"--mode {run.summary.headline}"
        lines += [f"{score} model_seed{run.seed}.pgolf --data SHARDS {mode}" for run in runs]
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
