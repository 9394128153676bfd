"""What a run found: `summary.json` as typed objects, and the table that a run ends with.

A run fills a `Summary` while it works and saves it; reports, submissions, ablations and benches load it. The
names in the file are older than the types: `seconds` holds every phase by its name, and among them three
entries that are no phases (`NOT_PHASES`); `bytes` is the ledger. Files of earlier versions load: what they
lack has the default of its field.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from pgolf.artifact.fit import fill_note
from pgolf.artifact.size import Ledger
from pgolf.config import ADAPTIVE, ILLEGAL, LOOSE, read_json
from pgolf.data.manifest import NO_MANIFEST
from pgolf.data.shards import ShardInfo
from pgolf.errors import UserError
from pgolf.evaluate.bpb import Score
from pgolf.files import write_json

SUMMARY = "summary.json"
"""Name of the file in a run's folder."""
PACKAGES = ("torch", "numpy", "brotli", "sentencepiece", "triton", "flash-attn-4")
"""What a run's speed, or reading its artifact, depends on."""
SCORES = {
    "raw": "raw weights",
    "ema": "averaged weights",
    "quantized": "quantized file",
    "sliding": "quantized file, sliding window",
    "local": "quantized file, local attention",
    "ttt": "quantized file, test-time training",
    "sgd": "quantized file, sliding window and score-first SGD",
    "phased": "quantized file, test-time training with phases",
    "causal_slot": "quantized file, SLOT from scored tokens",
    "slot": "quantized file, SLOT (not allowed)",
}
"""Every score that a run can have, with what was scored."""

Where = Literal["before", "inside", "after"]
"""Whether a phase comes before the clock starts, inside the clock, or after the clock has stopped."""


class Kind(NamedTuple):
    """What is known of a phase before it is measured."""

    where: Where
    words: str


PHASES = {
    "start": Kind("before", "the process until its set-up: Python, imports, the ranks"),
    "set_up": Kind("before", "data checked, model and optimizer made"),
    "warm_up": Kind("before", "compilation and untimed steps; all state restored"),
    "rehearse": Kind("before", "quantization tried, to know how much of the clock to keep for it"),
    "train": Kind("inside", "training"),
    "save": Kind("inside", "raw and averaged weights to disk"),
    "calibrate": Kind("inside", "Hessians and gradients of training text"),
    "quantize": Kind("inside", "codes of all matrices"),
    "fit_cap": Kind("inside", "soft cap and scale of the logits, fitted to documents left out"),
    "write": Kind("after", "codes searched that fill the limit, coded, written"),
    "read": Kind("after", "the artifact, back from disk"),
    **{f"score_{name}": Kind("after", f"score of the {words}") for name, words in SCORES.items()},
    "plot": Kind("after", "the plot of the loss"),
}
"""Every phase of a run, in order."""
NOT_PHASES = ("reserve", "clock", "total")
"""Entries of `seconds` that are no phases: a part of the clock that was kept, and two sums."""


@dataclass(frozen=True)
class Phase:
    """A named part of a run and how long it took, over all processes of the run."""

    name: str
    where: Where
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the training loop measured."""

    steps: int
    tokens: int
    loop_step: int | None
    """First step with depth recurrence on; None: there was none."""
    last_loss: float | None
    """Loss of the last step, nats per token."""
    skipped_steps: int = 0
    """Steps that changed nothing, because their gradient was not finite."""
    ms_loop_off: float | None
    """Median milliseconds per step without depth recurrence, and with it below; None: no such step."""
    ms_loop_on: float | None
    ms_optimizer: float | None = None
    """Median milliseconds per step that rank 0's device spent on the optimizer, waits for other ranks too."""
    tokens_per_s: float


@dataclass
class SessionEntry:
    """One process of a run: where it began, where it ended, and how."""

    started: str
    """UTC."""
    world_size: int
    from_step: int
    clock_from: float
    """Seconds on the run's clock when the process began."""
    lost_seconds: float
    """Seconds of work of the process before it that this one did again."""
    device: str = ""
    commit: str = ""
    ended: str | None = None
    """UTC; None: the process is under way, or was killed."""
    end: str | None = None
    """`finished`, `killed`, a signal's name, or `failed: ` and the reason; None: under way."""
    to_step: int | None = None
    clock_to: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as plain JSON data; what is not known is left out."""
        return {key: value for key, value in vars(self).items() if value is not None}

    @classmethod
    def from_dict(cls, data: Any, where: str) -> SessionEntry:
        """Return the entry that `to_dict` gave; raises as `Summary.from_dict` does."""
        return _flat(cls, data, where)


@dataclass
class Summary:
    """What a run found."""

    name: str
    config_hash: str
    device: str
    world_size: int
    attention: str
    parameters: int
    scores: dict[str, Score] = field(default_factory=dict)
    """By name, see `SCORES`."""
    phases: dict[str, Phase] = field(default_factory=dict)
    """By name, in the order in which they came; `phase`, `add` and `put` count one. `start` is missing where
    the system does not say when a process began."""
    reserve: float | None = None
    """Seconds of the clock that were kept for what follows training: planned, not measured."""
    clock: float | None = None
    """Seconds on the clock when it stopped, at the last code of the last matrix."""
    total: float | None = None
    """Seconds of the process from its start to this summary; None where nothing says when it began, or where
    several processes made the run."""
    train: Training | None = None
    """None until training has ended."""
    ledger: Ledger | None = None
    """None without an artifact."""
    peak_mib: float = 0.0
    """Most GPU memory that rank 0 had allocated, MiB; 0 on a CPU."""
    started: str = ""
    """When the run was set up, UTC."""
    commit: str = ""
    """Of the sources, with -dirty where files differ from it; empty where it is not known."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of Python and the packages that are installed; cuda is what torch was built for."""
    data: dict[str, Any] = field(default_factory=dict)
    """What was checked of the data, see `DataFolder.facts`."""
    origin: dict[str, Any] = field(default_factory=dict)
    """The snapshot that the run continued from, with its steps, tokens and fraction; empty: from none."""
    sessions: list[SessionEntry] = field(default_factory=list)
    """The processes that the run took, in order."""
    overrun: float | None = None
    """Seconds by which the clock was overrun; 0: it was kept; None: a version wrote this that did not say."""
    under_way: str = "set_up"
    """Name of the phase that began last; not saved."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block and count it as phase `name`, which is under way until another one begins.

        A block that raises counts nothing: whoever resumes the run does that phase from its beginning.
        """
        self.under_way = name
        began = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds of a phase, to which an earlier process of this run may have contributed."""
        self.put(name, seconds + (self.phases[name].seconds if name in self.phases else 0.0))

    def put(self, name: str, seconds: float) -> None:
        """Set the seconds of a phase, whatever was counted before."""
        self.phases[name] = _phase(name, seconds)

    def stop_clock(self, seconds: float, budget: float) -> None:
        """Note when the clock stopped, and by how much that is after the budget; 0: there was no budget."""
        self.clock = seconds
        self.overrun = max(0.0, seconds - budget) if budget else 0.0

    def spent(self, where: Where) -> float:
        """Return the seconds of all phases there."""
        return sum(p.seconds for p in self.phases.values() if p.where == where)

    def seconds(self) -> dict[str, float]:
        """Return the seconds by name as the file has them: phases in order, and `NOT_PHASES` among them."""
        # Each of the three stands behind the phases that it belongs to, as runs have always written it.
        after: dict[Where, tuple[str, float | None]] = {
            "before": ("reserve", self.reserve),
            "inside": ("clock", self.clock),
            "after": ("total", self.total),
        }
        found: dict[str, float] = {}
        for where, (name, value) in after.items():
            found |= {p.name: p.seconds for p in self.phases.values() if p.where == where}
            found |= {} if value is None else {name: value}
        return found

    @property
    def trained(self) -> Training:
        """What the training loop measured, of a run that has trained.

        Raises:
            UserError: it has not.
        """
        if self.train is None:
            raise UserError(f"run {self.name}: the summary holds no training; the run is not finished")
        return self.train

    @property
    def step_ms(self) -> float:
        """Milliseconds per step, mean over all of training."""
        return 1000 * self.phases["train"].seconds / max(1, self.trained.steps)

    @property
    def headline(self) -> str:
        """The score of the file that counts: the first of `ADAPTIVE` that was run, else `quantized`."""
        return next((name for name in ADAPTIVE if name in self.scores), "quantized")

    @property
    def manifest(self) -> str | None:
        """SHA-256 of the manifest that the data were checked against; None: there was none."""
        found: str | None = self.data.get("manifest")
        return found

    @property
    def validation(self) -> ShardInfo:
        """The manifest's counts of the validation text, of a run whose data had a manifest."""
        return ShardInfo("val", sha256="", **self.data["validation"])

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as plain JSON data, with the names that it has in the file."""
        kept = ("name", "config_hash", "device", "world_size", "attention", "parameters")
        told = ("peak_mib", "started", "commit", "versions", "data")
        return {
            **{key: getattr(self, key) for key in kept},
            "seconds": self.seconds(),
            "train": {} if self.train is None else vars(self.train),
            **{key: getattr(self, key) for key in told},
            **({"origin": self.origin} if self.origin else {}),
            "sessions": [entry.to_dict() for entry in self.sessions],
            "overrun": self.overrun,
            # A run keeps no sums, so nothing is scored before.
            "scores": {
                name: {key: value for key, value in vars(score).items() if key != "kept"}
                for name, score in self.scores.items()
            },
            "bytes": self.ledger and self.ledger.to_dict(),
        }

    def save(self, path: Path) -> None:
        """Write the summary as JSON, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> Summary:
        """Return the summary in a file that a run wrote.

        Raises:
            OSError: it cannot be read. UserError: it is not JSON, or not what a run writes; names the entry.
        """
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Summary:
        """Return the summary that `to_dict` gave; `where` is what an error calls it.

        Raises:
            UserError: an entry is missing or of another kind.
        """
        values = _simple(cls, _object(data, where), where)
        for key in ("scores", "seconds", "train", "bytes"):
            if key not in data:
                raise UserError(f"{where} has no {key!r}, which a run writes")
        scores = _object(data["scores"], f"{where}: scores")
        seconds = _object(data["seconds"], f"{where}: seconds")
        for name, value in seconds.items():
            _kind(value, "float", f"{where}: seconds of {name}")
        sessions = _kind(data.get("sessions", []), "list", f"{where}: sessions")
        versions = _object(data.get("versions", {}), f"{where}: versions")
        for name, version in versions.items():
            _kind(version, "str", f"{where}: version of {name}")
        text = _object(data.get("data", {}), f"{where}: data")
        _check_text(text, f"{where}: data")
        return cls(
            **values,
            scores={name: _flat(Score, s, f"{where}: score {name}") for name, s in scores.items()},
            phases={name: _phase(name, value) for name, value in seconds.items() if name not in NOT_PHASES},
            reserve=seconds.get("reserve"),
            clock=seconds.get("clock"),
            total=seconds.get("total"),
            train=_flat(Training, data["train"], f"{where}: train") if data["train"] != {} else None,
            ledger=None if data["bytes"] is None else _ledger(data["bytes"], f"{where}: bytes"),
            versions=versions,
            data=text,
            origin=_object(data.get("origin", {}), f"{where}: origin"),
            sessions=[SessionEntry.from_dict(s, f"{where}: each of sessions") for s in sessions],
        )


def _phase(name: str, seconds: float) -> Phase:
    # A name that is not known comes from another version; inside the clock there is nothing else to measure.
    return Phase(name, PHASES[name].where if name in PHASES else "after", seconds)


T = TypeVar("T")

_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "str": (str, "a string"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "dict": (dict, "an object"),
    "list": (list, "a list"),
}
"""By the name that the annotation of a field has: what JSON gives for it, and the words for that."""


def _kind(value: Any, name: str, where: str) -> Any:
    """Return a value that is of the kind called `name`.

    Raises:
        UserError: it is not.
    """
    kind, words = _KINDS[name]
    # For Python true and false are whole numbers, too.
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(
            f"{where} is {value!r:.60}, expected {words}, as a run writes it; use the summary that the run "
            "wrote"
        )
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    found: dict[str, Any] = _kind(value, "dict", where)
    return found


def _simple(cls: type, data: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the values of those fields of a dataclass that are one string or number, from a JSON object.

    Entries that the class does not know are left out: a newer version may write more.
    """
    # Annotations are read as text ("float | None"): compiling them would import what they name.
    values = {}
    for known in dataclasses.fields(cls):
        name, _, rest = str(known.type).partition(" | ")
        if name not in _KINDS:
            continue
        if known.name in data:
            value = data[known.name]
            optional = rest == "None" and value is None
            values[known.name] = None if optional else _kind(value, name, f"{where}: {known.name}")
        elif known.default is dataclasses.MISSING:
            raise UserError(f"{where} has no {known.name!r}, which a run writes")
    return values


def _flat(cls: type[T], data: Any, where: str) -> T:
    """Return a dataclass of strings and numbers from a JSON object."""
    return cls(**_simple(cls, _object(data, where), where))


def _ledger(data: Any, where: str) -> Ledger:
    """Return the ledger; what it states of model and total must be the sums of its parts."""
    parts = _object(_object(data, where).get("parts"), f"{where}, parts")
    for key in ("model", "code", "total", "limit", "clip_scale"):
        if key not in data:
            raise UserError(f"{where} has no {key!r}, which a run writes")
    sizes = {**parts, **{key: data[key] for key in ("model", "code", "total", "limit")}}
    for name, size in sizes.items():
        if type(size) is not int or size < 0:
            raise UserError(f"{where}: {name} is {size!r}, expected a whole number of bytes; it was edited")
    _kind(data["clip_scale"], "float", f"{where}: clip_scale")
    found = Ledger.from_dict(data)
    for what, said, value in (
        ("model", data["model"], found.model_bytes),
        ("total", data["total"], data["model"] + found.code),
    ):
        if said != value:
            raise UserError(
                f"{where}: {what} is {said:,}, but its parts sum to {value:,}; one was edited: use the "
                "summary that the run wrote"
            )
    return found


def _check_text(data: dict[str, Any], where: str) -> None:
    """Raise if what a summary keeps of the manifest is not what `DataFolder.facts` gives."""
    if data.get("manifest") is None:
        return
    _kind(data["manifest"], "str", f"{where}, manifest")
    counts = _object(data.get("validation"), f"{where}, validation")
    if set(counts) != {"tokens", "documents", "bytes"} or any(type(v) is not int for v in counts.values()):
        raise UserError(
            f"{where}, validation is {counts!r}, expected whole numbers of tokens, documents and bytes; it "
            "was edited"
        )


def format_table(s: Summary) -> str:
    """Return the closing table: bits per byte, bytes and seconds."""
    lines = ["", f"{'weights':<12}{'bpb':>9}{'nats/token':>12}{'tokens':>12}{'text bytes':>13}{'seconds':>9}"]
    for name, score in s.scores.items():
        lines.append(
            f"{name:<12}{score.bpb:>9.4f}{score.loss:>12.4f}{score.tokens:>12,}{score.bytes:>13,}{score.seconds:>9.1f}"
        )
    lines += [f"phased: {LOOSE}"] if "phased" in s.scores else []
    lines += [f"slot: {ILLEGAL}"] if "slot" in s.scores else []
    t = s.trained
    ms = f"{t.ms_loop_off:.1f} ms" if t.ms_loop_off is not None else "-"
    ms += f" loop off, {t.ms_loop_on:.1f} ms loop on" if t.ms_loop_on is not None else ""
    ms += f", of them {t.ms_optimizer:.2f} ms optimizer" if t.ms_optimizer is not None else ""
    lines += ["", f"{t.steps} steps, {t.tokens:,} tokens, {t.tokens_per_s / 1e3:.1f} ktok/s; per step {ms}"]
    if s.ledger is not None:
        lines.append(f"artifact {s.ledger.total:,} bytes of {s.ledger.limit:,} (code {s.ledger.code:,})")
        lines += filter(None, [fill_note(s.ledger)])
    if len(s.sessions) > 1:
        lost = sum(entry.lost_seconds for entry in s.sessions)
        lines.append(f"{len(s.sessions)} processes; {lost:.1f} s of lost work are on the clock")
    if s.overrun:
        lines.append(
            f"THE CLOCK WAS OVERRUN: it stopped at {s.clock:.2f} s, {s.overrun:.2f} s too late; "
            "run again with a larger train.quantize_reserve"
        )
    lines.append("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in s.seconds().items()))
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
