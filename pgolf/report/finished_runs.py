"""Finished runs, as a submission needs them: read from their folders, checked, and fit to stand in one table.

Owns what makes runs "the same configuration with another seed". Reads files only; nothing is computed again.
What a summary must look like is in `summary.py`; here is what its figures must be to each other and to the
other files of the run, because a submission is published and an edited figure would be believed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pgolf.artifact.code import CODE_NAME, code_name, counted_code
from pgolf.artifact.code_rule import FORMER_NAME, TRAIN_NAME
from pgolf.artifact.export import describe
from pgolf.artifact.size import Ledger
from pgolf.config import Config, config_hash, flat, from_dict, read_json, run_hash, to_dict
from pgolf.data.challenge import PART, known_text
from pgolf.errors import UserError
from pgolf.report.summary import SUMMARY, Summary, Training

FREE = (
    "train.seed",
    "train.out",
    "train.checkpoint_every",
    "train.rank_timeout",
    "train.track",
    "data.dir",
    "data.verify",
)
"""Settings that may differ between the runs of one submission."""
CLOCK_SLACK_S = 1.0
"""Seconds that training may seem to take beyond the clock: a resumed run reads two clocks."""


@dataclass(frozen=True)
class FinishedRun:
    """One run's folder, read and checked by `read_runs`."""

    folder: Path
    config: Config
    """config.json."""
    summary: Summary
    """summary.json."""
    code: bytes
    """The counted code, `pgolf.artifact.code.code_program` of the tree that ran."""
    tokenizer_sha256: str
    """Hex, from the artifact."""
    code_name: str = CODE_NAME
    """Name of the code's file. That of an older run, `FORMER_NAME`, needs the compiled extension."""

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.train.seed

    # A run that is not finished lacks these; `read_runs` has refused it.

    @property
    def ledger(self) -> Ledger:
        """What the artifact weighs."""
        assert self.summary.ledger is not None
        return self.summary.ledger

    @property
    def train(self) -> Training:
        """What the training loop measured."""
        assert self.summary.train is not None
        return self.summary.train

    @property
    def clock(self) -> float:
        """Seconds on the clock when it stopped."""
        assert self.summary.clock is not None
        return self.summary.clock


def read_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """Return the runs by rising seed, checked one by one and against each other.

    Raises:
        FileNotFoundError: no such folder, or a file of the run is missing.
        UserError: no folder given; a run is not finished, its files do not belong together, its scores
            contradict themselves or are of a part of the challenge's text, its artifact is above the limit or
            its clock above its budget, it started from a checkpoint or made no artifact; two runs of one
            seed, or configurations that differ.
    """
    if not folders:
        raise UserError("expected at least one run folder, got none; `pgolf train` makes them")
    runs = sorted((_read_run(folder) for folder in folders), key=lambda run: run.seed)
    for run in runs:
        known = known_text(run.tokenizer_sha256, run.summary.scores["quantized"].tokens)
        if known.startswith(PART):
            raise UserError(f"{run.folder} scored {known}; fetch the whole text with `pgolf data fetch`")
    for one, other in itertools.pairwise(runs):
        if one.seed == other.seed:
            raise UserError(
                f"seed {one.seed} twice, in {one.folder} and {other.folder}; give one run per seed"
            )
    for other in runs[1:]:
        _check_same(runs[0], other)
    return runs


def _read_run(folder: Path) -> FinishedRun:
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder at {folder}; `pgolf train` makes one below --train.out")
    if not (folder / SUMMARY).is_file():
        raise UserError(f"{folder} holds no {SUMMARY}: the run is not finished, or this is no run folder")
    _check_there(folder, "config.json", "log.txt")
    saved, summary = _json(folder / "config.json"), _json(folder / SUMMARY)
    config = from_dict(Config, saved, where=str(folder / "config.json"))
    if not config.train.quantize:
        raise UserError(
            f"{folder}: the run made no artifact, train.quantize is off; submit a run that quantizes inside "
            "its clock"
        )
    _check_there(folder, "model.pgolf")
    run = FinishedRun(folder, config, Summary.from_dict(summary, str(folder / SUMMARY)), b"", "")
    _check_finished(run)
    # A run until version 0.1 wrote the hash of all its settings.
    return _checked(run, (run_hash(saved), config_hash(saved)))


def _check_there(folder: Path, *names: str) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}, which a run writes; copy the whole folder")


def _checked(run: FinishedRun, hashes: tuple[str, ...]) -> FinishedRun:
    """Return the run with what its other files say, which must be what its summary says."""
    folder, summary = run.folder, run.summary
    if summary.config_hash not in hashes:
        raise UserError(
            f"{folder}: config.json has hash {hashes[0]}, {SUMMARY} says {summary.config_hash}; "
            "they are of different runs, or one was edited"
        )
    facts = describe(folder / "model.pgolf")
    for what, found, said in (
        ("bytes", facts["bytes"], run.ledger.model_bytes),
        ("config_hash", facts["config_hash"], summary.config_hash),
    ):
        if found != said:
            raise UserError(
                f"{folder}: model.pgolf has {what} {found}, {SUMMARY} says {said}; it is not this run's"
            )
    code, name = _counted_code(run)
    return replace(run, code=code, code_name=name, tokenizer_sha256=facts["tokenizer_sha256"])


def _check_finished(run: FinishedRun) -> None:
    folder, config, summary = run.folder, run.config, run.summary
    if config.train.init is not None:
        raise UserError(
            f"{folder}: the run started from {config.train.init}, whose training its clock does not hold; "
            "submit a run that starts from random weights"
        )
    asked = ["quantized", *config.evaluate.ways]
    missing = [f"score {name}" for name in asked if name not in summary.scores]
    missing += [f"seconds of {name}" for name in ("train", "read") if name not in summary.phases]
    missing += [name for name in ("ledger", "clock", "train") if getattr(summary, name) is None]
    if missing:
        raise UserError(
            f"{folder}: the run is not finished: {SUMMARY} has no {', no '.join(missing)}, which config.json "
            "asks for"
        )
    _check_scores(run)
    _check_clock(run)
    _check_sessions(run)
    if run.ledger.limit != config.artifact.limit:
        raise UserError(
            f"{folder}: {SUMMARY}, bytes: limit is {run.ledger.limit:,}, config.json says "
            f"artifact.limit={config.artifact.limit:,}; one of them was edited"
        )
    total, limit = run.ledger.total, config.artifact.limit
    if total > limit:
        raise UserError(
            f"{folder}: artifact is {total:_} bytes with its code, limit {limit:_}, {total - limit:_} too "
            "many; train with artifact.fit"
        )
    clock, budget = run.clock, config.train.seconds
    if budget and clock > budget:
        raise UserError(
            f"{folder}: the clock stopped at {clock:.2f} s, train.seconds={budget:g}, {clock - budget:.2f} s "
            "too late; run again with a larger train.quantize_reserve"
        )


def _check_scores(run: FinishedRun) -> None:
    """Raise if a score is not what its own sums give, or is of another text than the others."""
    scores = run.summary.scores
    for name, score in scores.items():
        where = f"{run.folder}: {SUMMARY}, score {name}"
        for key in ("nats", "tokens", "bytes", "bpb", "loss"):
            number = getattr(score, key)
            if not 0 < number < math.inf:
                raise UserError(f"{where}: {key} is {number!r}, expected a number above 0; it was edited")
        if not _is_time(score.seconds):
            raise UserError(f"{where} took {score.seconds!r} s, expected a number >= 0")
        for key, value in (
            ("bpb", score.nats / math.log(2) / score.bytes),
            ("loss", score.nats / score.tokens),
        ):
            if not math.isclose(getattr(score, key), value, rel_tol=1e-9):
                raise UserError(
                    f"{where}: {key} is {getattr(score, key)}, but its {score.nats} nats over "
                    f"{score.tokens:,} tokens and {score.bytes:,} bytes give {value}; one of them was "
                    "edited: use the summary that the run wrote"
                )
        for key in ("tokens", "bytes"):
            own, other = getattr(score, key), getattr(scores["quantized"], key)
            if own != other:
                raise UserError(
                    f"{where} is over {own:,} {key}, quantized over {other:,}; all scores of a run are of "
                    "one text"
                )


def _check_clock(run: FinishedRun) -> None:
    """Raise if seconds, steps and tokens contradict each other."""
    where, summary, train = f"{run.folder}: {SUMMARY}", run.summary, run.train
    for name, value in summary.seconds().items():
        if not _is_time(value):
            raise UserError(f"{where}: seconds of {name} are {value!r}, expected a number >= 0")
    batch = run.config.data.batch_tokens
    if train.steps < 0 or train.steps * batch != train.tokens:
        raise UserError(
            f"{where}: {train.tokens:,} training tokens, but {train.steps:,} steps of data.batch_tokens="
            f"{batch:,} are {train.steps * batch:,}; one of them was edited"
        )
    clock, budget, training = run.clock, run.config.train.seconds, summary.phases["train"].seconds
    if training > clock + CLOCK_SLACK_S:
        raise UserError(
            f"{where}: training took {training:.2f} s of a clock of {clock:.2f} s; one was edited"
        )
    over = max(0.0, clock - budget) if budget else 0.0
    said = over if summary.overrun is None else summary.overrun
    if not math.isclose(said, over, rel_tol=1e-9, abs_tol=1e-6):
        raise UserError(
            f"{where}: overrun is {said!r}, but a clock of {clock:.2f} s is {over:.2f} s above "
            f"train.seconds={budget:g}; one of them was edited"
        )


def _check_sessions(run: FinishedRun) -> None:
    """Raise if a process of the run does not say how it ended; the last may still have been under way."""
    sessions = run.summary.sessions
    for entry in sessions:
        ended = entry is sessions[-1] or (entry.end is not None and entry.to_step is not None)
        if not (ended and _is_time(entry.lost_seconds)):
            raise UserError(
                f"{run.folder}: {SUMMARY}: a session is {entry.to_dict()!r:.200}, which no run writes"
            )


def _is_time(value: float) -> bool:
    """Tell whether it is a finite number of 0 or more."""
    return 0 <= value < math.inf


def _counted_code(run: FinishedRun) -> tuple[bytes, str]:
    """Return the run's code and its name; for runs that kept none this tree's code, if it has their size."""
    folder, counted, commit = run.folder, run.ledger.code, run.summary.commit
    kept = [folder / name for name in (CODE_NAME, TRAIN_NAME, FORMER_NAME) if (folder / name).is_file()]
    program = run.config.artifact.program
    ours = counted_code(run.config.artifact.coder, program), code_name(program)
    code, name = (kept[0].read_bytes(), kept[0].name) if kept else ours
    if len(code) != counted:
        where = kept[0] if kept else "the code of this tree (the run kept none)"
        raise UserError(
            f"{folder}: the run counted {counted:_} bytes of code, {where} has {len(code):_}; use the tree "
            f"that ran it{f', commit {commit}' if commit else ''}"
        )
    return code, name


def _check_same(one: FinishedRun, other: FinishedRun) -> None:
    """Raise, with every key, if the runs differ in more than seed and folders."""
    first, second = _identity(one), _identity(other)
    different = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    if different:
        told = ", ".join(f"{k} ({first.get(k, 'unset')} and {second.get(k, 'unset')})" for k in different)
        raise UserError(
            f"{one.folder} and {other.folder} differ in more than the seed: {told}; submit them separately"
        )


def _identity(run: FinishedRun) -> dict[str, Any]:
    """Return everything that must be equal among the runs of a submission, by name."""
    settings = {key: value for key, value in flat(to_dict(run.config)).items() if key not in FREE}
    score = run.summary.scores["quantized"]
    return settings | {
        **{key: getattr(run.summary, key) for key in ("device", "world_size", "attention")},
        "tokenizer SHA-256": run.tokenizer_sha256[:16],
        "tokens of the validation text": score.tokens,
        "bytes of the validation text": score.bytes,
        "counted code": f"{len(run.code)} bytes, hash {config_hash(run.code.hex())}",
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        data = read_json(path)
    except ValueError as e:
        raise UserError(f"{e}; copy the run folder again") from e
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected an object, got {type(data).__name__}")
    return data
