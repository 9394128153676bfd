"""Finished runs, as a submission needs them: read from their folders, checked, and fit to stand in one table.

Owns what makes runs "the same configuration with another seed". Reads files only; nothing is computed again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pgolf.artifact.code import code_archive
from pgolf.artifact.export import describe
from pgolf.config import Config, config_hash, from_dict, read_json, run_hash, to_dict
from pgolf.errors import UserError

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

NEEDED = (
    "config_hash",
    "parameters",
    "device",
    "world_size",
    "attention",
    "peak_mib",
    "scores",
    "bytes",
    "seconds",
    "train",
)
"""Entries of summary.json that a submission needs; versions and commit, which are younger, may be missing."""


KINDS: dict[str, type | tuple[type, ...]] = {
    "config_hash": str,
    "parameters": int,
    "device": str,
    "world_size": int,
    "attention": str,
    "peak_mib": (int, float),
    "scores": dict,
    "bytes": dict,
    "seconds": dict,
    "train": dict,
    "data": dict,
    "sessions": list,
    "versions": dict,
    "commit": str,
    "started": str,
}
"""What every entry of summary.json must be, if it is there."""
NAMES_OF_KINDS = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    dict: "an object",
    list: "a list",
}
CLOCK_SLACK_S = 1.0
"""Seconds that training may seem to take beyond the clock: a resumed run reads two clocks."""


@dataclass(frozen=True)
class FinishedRun:
    """One run's folder, read."""

    folder: Path
    config: Config
    """config.json."""
    summary: dict[str, Any]
    """summary.json as it is."""
    code: bytes
    """The counted code, `pgolf.artifact.code.code_archive` of the tree that ran."""
    tokenizer_sha256: str
    """Hex, from the artifact."""

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.train.seed

    @property
    def headline(self) -> str:
        """The score that counts: `ttt` where it was run, else `quantized`; both are of the file on disk."""
        return "ttt" if "ttt" in self.summary["scores"] else "quantized"


def read_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """Return the runs by rising seed, checked one by one and against each other.

    Raises:
        FileNotFoundError: no such folder, or a file of the run is missing.
        ValueError: no folder given; a run is not finished, its files do not belong together, its scores
            contradict themselves, its artifact is above the limit or its clock above its budget, it started
            from a checkpoint or made no artifact; a seed twice, or configurations that differ.
    """
    if not folders:
        raise UserError("expected at least one run folder, got none; `pgolf train` makes them")
    runs = sorted((_read_run(folder) for folder in folders), key=lambda run: run.seed)
    for one, other in itertools.pairwise(runs):
        if one.seed == other.seed:
            raise UserError(
                f"seed {one.seed} twice, in {one.folder} and {other.folder}; a submission has one run a seed"
            )
    for other in runs[1:]:
        _check_same(runs[0], other)
    return runs


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name."""

    def walk(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(inner, f"{name}.{key}" if name else key)
        else:
            yield name, value

    return dict(walk(settings, prefix))


def _read_run(folder: Path) -> FinishedRun:
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder at {folder}; `pgolf train` makes one below --train.out")
    if not (folder / "summary.json").is_file():
        raise UserError(f"{folder} holds no summary.json: the run is not finished, or this is no run folder")
    _check_there(folder, "config.json", "log.txt")
    saved, summary = _json(folder / "config.json"), _json(folder / "summary.json")
    config = from_dict(Config, saved, where=str(folder / "config.json"))
    if not config.train.quantize:
        raise UserError(
            f"{folder}: the run made no artifact, train.quantize is off; submit a run that quantizes inside "
            "its clock"
        )
    _check_there(folder, "model.pgolf")
    _check_types(folder, summary)
    try:
        _check_finished(folder, config, summary)
        hashes = (run_hash(saved), config_hash(saved))  # runs until 0.1 wrote that of all settings
        return _checked(FinishedRun(folder, config, summary, b"", ""), hashes)
    except KeyError as e:
        raise UserError(f"{folder}: summary.json has no {e}, which a finished run writes") from e


def _check_there(folder: Path, *names: str) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}, which a run writes; copy the whole folder")


def _checked(run: FinishedRun, hashes: tuple[str, ...]) -> FinishedRun:
    """Return the run with what its other files say, which must be what its summary says."""
    folder, summary = run.folder, run.summary
    if summary["config_hash"] not in hashes:
        raise UserError(
            f"{folder}: config.json has hash {hashes[0]}, summary.json says {summary['config_hash']}; "
            "they are of different runs, or one was edited"
        )
    facts = describe(folder / "model.pgolf")
    for what, found, said in (
        ("bytes", facts["bytes"], summary["bytes"]["model"]),
        ("config_hash", facts["config_hash"], summary["config_hash"]),
    ):
        if found != said:
            raise UserError(
                f"{folder}: model.pgolf has {what} {found}, summary.json says {said}; it is not this run's"
            )
    code = _counted_code(folder, summary["bytes"]["code"], summary.get("commit"))
    return replace(run, code=code, tokenizer_sha256=facts["tokenizer_sha256"])


def _check_finished(folder: Path, config: Config, summary: dict[str, Any]) -> None:
    for key in NEEDED:
        summary[key]
    if config.train.init is not None:
        raise UserError(
            f"{folder}: the run started from {config.train.init}, whose training its clock does not hold; "
            "submit a run that starts from random weights"
        )
    scores, ledger = summary["scores"], summary["bytes"]
    asked = {"quantized": True, "sliding": config.evaluate.sliding, "ttt": config.evaluate.ttt}
    missing = [name for name, wanted in asked.items() if wanted and name not in scores]
    if missing or ledger is None:
        raise UserError(
            f"{folder}: the run is not finished: summary.json has no score {', '.join(missing) or 'ledger'}, "
            "which config.json asks for"
        )
    _check_scores(folder, scores)
    _check_ledger(folder, ledger, config.artifact.limit)
    _check_clock(folder, config, summary)
    total, limit = ledger["total"], config.artifact.limit
    if total > limit:
        raise UserError(
            f"{folder}: artifact is {total:_} bytes with its code, limit {limit:_}, {total - limit:_} too "
            "many; train with artifact.fit"
        )
    clock, budget = summary["seconds"]["clock"], config.train.seconds
    if budget and clock > budget:
        raise UserError(
            f"{folder}: the clock stopped at {clock:.2f} s, train.seconds={budget:g}, {clock - budget:.2f} s "
            "too late; run again with a larger train.quantize_reserve"
        )


def _check_scores(folder: Path, scores: dict[str, dict[str, Any]]) -> None:
    """Raise if a score is not what its own sums give, or is of another text than the others."""
    for name, score in scores.items():
        where, sums = f"{folder}: summary.json, score {name}", ("nats", "tokens", "bytes")
        for key in (*sums, "bpb", "loss"):
            number = score[key]
            if type(number) not in (int, float) or not 0 < number < math.inf:
                raise UserError(f"{where}: {key} is {number!r}, expected a number above 0; it was edited")
        nats, tokens, size = (score[key] for key in sums)
        for key, value in (("bpb", nats / math.log(2) / size), ("loss", nats / tokens)):
            if not math.isclose(score[key], value, rel_tol=1e-9):
                raise UserError(
                    f"{where}: {key} is {score[key]}, but its {nats} nats over {tokens:,} tokens and "
                    f"{size:,} bytes give {value}; one of them was edited: use the summary that the run wrote"
                )
        for key in ("tokens", "bytes"):
            if score[key] != scores["quantized"][key]:
                raise UserError(
                    f"{where} is over {score[key]:,} {key}, quantized over {scores['quantized'][key]:,}; all "
                    "scores of a run are of one text"
                )


def _check_ledger(folder: Path, ledger: dict[str, Any], limit: int) -> None:
    """Raise if the ledger of the artifact does not add up, or is of another limit."""
    where, parts = f"{folder}: summary.json, bytes", ledger["parts"]
    sizes = {**parts, **{key: ledger[key] for key in ("model", "code", "total", "limit")}}
    for name, size in sizes.items():
        if type(size) is not int or size < 0:
            raise UserError(f"{where}: {name} is {size!r}, expected a whole number of bytes; it was edited")
    if not _is_number(ledger["clip_scale"]):
        raise UserError(f"{where}: clip_scale is {ledger['clip_scale']!r}, expected a number; it was edited")
    for what, said, value in (
        ("model", ledger["model"], sum(parts.values())),
        ("total", ledger["total"], ledger["model"] + ledger["code"]),
    ):
        if said != value:
            raise UserError(
                f"{where}: {what} is {said:,}, but its parts sum to {value:,}; one was edited: use the "
                "summary that the run wrote"
            )
    if ledger["limit"] != limit:
        raise UserError(
            f"{where}: limit is {ledger['limit']:,}, config.json says artifact.limit={limit:,}; one of them "
            "was edited"
        )


def _check_clock(folder: Path, config: Config, summary: dict[str, Any]) -> None:
    """Raise if seconds, steps and tokens are no numbers or contradict each other."""
    where, seconds, train = f"{folder}: summary.json", summary["seconds"], summary["train"]
    for name, value in seconds.items():
        if not _is_number(value):
            raise UserError(f"{where}: seconds of {name} are {value!r}, expected a number >= 0")
    for name, score in summary["scores"].items():
        if not _is_number(score["seconds"]):
            raise UserError(f"{where}: score {name} took {score['seconds']!r} s, expected a number >= 0")
    for key in ("steps", "tokens"):
        if type(train[key]) is not int or train[key] < 0:
            raise UserError(f"{where}: {key} is {train[key]!r}, expected a whole number; it was edited")
    steps, tokens, batch = train["steps"], train["tokens"], config.data.batch_tokens
    if steps * batch != tokens:
        raise UserError(
            f"{where}: {tokens:,} training tokens, but {steps:,} steps of data.batch_tokens={batch:,} are "
            f"{steps * batch:,}; one of them was edited"
        )
    clock, budget = seconds["clock"], config.train.seconds
    if seconds["train"] > clock + CLOCK_SLACK_S:
        raise UserError(
            f"{where}: training took {seconds['train']:.2f} s of a clock of {clock:.2f} s; one was edited"
        )
    over = max(0.0, clock - budget) if budget else 0.0
    said = summary.get("overrun", over)
    if not _is_number(said) or not math.isclose(said, over, rel_tol=1e-9, abs_tol=1e-6):
        raise UserError(
            f"{where}: overrun is {said!r}, but a clock of {clock:.2f} s is {over:.2f} s above "
            f"train.seconds={budget:g}; one of them was edited"
        )


def _is_number(value: Any) -> bool:
    """Tell whether it is a finite number of 0 or more."""
    return type(value) in (int, float) and 0 <= value < math.inf


def _check_types(folder: Path, summary: dict[str, Any]) -> None:
    """Raise where an entry of the summary is of another kind than what a run writes."""
    for key, kind in KINDS.items():
        if key not in summary or (key == "bytes" and summary[key] is None):
            continue
        _check_kind(folder, key, summary[key], kind)
    for name, score in summary.get("scores", {}).items():
        _check_kind(folder, f"scores, {name}", score, dict)
    if isinstance(summary.get("bytes"), dict):
        _check_kind(folder, "bytes, parts", summary["bytes"].get("parts"), dict)
    sessions = summary.get("sessions", [])
    for session in sessions:
        _check_kind(folder, "each of sessions", session, dict)
        wrong = not _is_number(session.get("lost_seconds"))
        if session is not sessions[-1]:  # the last may still have been under way
            wrong |= not isinstance(session.get("end"), str) or type(session.get("to_step")) is not int
        if wrong:
            raise UserError(f"{folder}: summary.json: a session is {session!r:.200}, which no run writes")
    for name, version in summary.get("versions", {}).items():
        _check_kind(folder, f"versions, {name}", version, str)
    _check_data(folder, summary.get("data", {}))


def _check_data(folder: Path, data: dict[str, Any]) -> None:
    """Raise if what a summary keeps of the manifest is not what `DataFolder.facts` gives."""
    if data.get("manifest") is None:
        return
    _check_kind(folder, "data, manifest", data["manifest"], str)
    counts: Any = data.get("validation")
    _check_kind(folder, "data, validation", counts, dict)
    if set(counts) != {"tokens", "documents", "bytes"} or any(type(v) is not int for v in counts.values()):
        raise UserError(
            f"{folder}: summary.json: data, validation is {counts!r}, expected whole numbers of tokens, "
            "documents and bytes; it was edited"
        )


def _check_kind(folder: Path, key: str, value: Any, kind: type | tuple[type, ...]) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(NAMES_OF_KINDS[k] for k in kinds)
        raise UserError(
            f"{folder}: summary.json: {key} is {value!r:.60}, expected {names}, as a run writes it; use the "
            "summary that the run wrote"
        )


def _counted_code(folder: Path, counted: int, commit: str | None) -> bytes:
    """Return the run's code.br; for runs older than that file this tree's code, if it has their size."""
    path = folder / "code.br"
    code = path.read_bytes() if path.is_file() else code_archive()
    if len(code) != counted:
        where = path if path.is_file() else "the code of this tree (the run kept none)"
        raise UserError(
            f"{folder}: the run counted {counted:_} bytes of code, {where} has {len(code):_}; use the tree "
            f"that ran it{f', commit {commit}' if commit else ''}"
        )
    return code


def _check_same(one: FinishedRun, other: FinishedRun) -> None:
    """Raise, with every key, if the runs differ in more than seed and folders."""
    first, second = _identity(one), _identity(other)
    different = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    if different:
        told = ", ".join(f"{k} ({first.get(k, 'unset')} and {second.get(k, 'unset')})" for k in different)
        raise UserError(
            f"{one.folder} and {other.folder} differ in more than the seed: {told}; submit them apart"
        )


def _identity(run: FinishedRun) -> dict[str, Any]:
    """Return everything that must be equal among the runs of a submission, by name."""
    settings = {key: value for key, value in flat(to_dict(run.config)).items() if key not in FREE}
    score = run.summary["scores"]["quantized"]
    return settings | {
        **{key: run.summary[key] for key in ("device", "world_size", "attention")},
        "tokenizer SHA-256": run.tokenizer_sha256[:16],
        "tokens of the validation text": score["tokens"],
        "bytes of the validation text": score["bytes"],
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
