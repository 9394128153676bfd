"""Snapshots: checkpoints that stay, from which other runs continue (train.snapshots, train.start).

    RUN/snapshots/0.75/shard-00-of-01.safetensors
                       index.json

A snapshot is a checkpoint (`pgolf.train.checkpoint`) whose index says more: the configuration, tokenizer and
text of its run, and the exact fraction of the schedules. The run that continues may have other settings.
Weights, average, momentum, moments and the place in the text are taken over. What the snapshot lacks starts
like this: parameters as `pgolf.model.neutral` says, so that the function stays the same; an average at the
weights; all other state of the optimizer at 0. State that the run has no use for is left out.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf.config import Config, flat, from_dict, to_dict
from pgolf.data.shards import find_shards
from pgolf.errors import UserError
from pgolf.evaluate.validation import DataFolder
from pgolf.model.neutral import Added, additions
from pgolf.ops.adam_step import SKIPPED
from pgolf.train.checkpoint import INDEX, SNAPSHOTS, Checkpoint, Parts, read_checkpoint
from pgolf.train.origin import Origin
from pgolf.train.position import Position
from pgolf.train.weights import check_left_out, check_tokenizer

NOT_TOLD = ("name", "data.dir", "evaluate", "quant", "artifact", "train.out", "train.snapshots")
"""Settings whose difference from the snapshot's run says nothing about how training continues."""
RUN_OF_ITS_OWN = ("train.start", "train.steps", "train.seconds", "train.until")
"""Settings that say which part of the schedules a run covers."""

BASE = "nesterov.base."
"""Before the names of the optimizer's state that are the weights where the parameters are ahead of them."""


class Snapshots:
    """The snapshots that a run is to write, by the fraction of the schedules."""

    def __init__(self, config: Config, origin: Origin, data: DataFolder, *, written: Sequence[str]) -> None:
        """Plan all that are not `written` yet."""
        self._config, self._origin, self._data = config, origin, data
        self.left = [f for f in config.train.snapshot_fractions if snapshot_name(f) not in written]

    def due(self, frac: float) -> list[str]:
        """Return the names of the snapshots to write before a step at `frac`; each is returned once."""
        found = [f for f in self.left if frac >= f]
        self.left = [f for f in self.left if f not in found]
        return [snapshot_name(f) for f in found]

    def facts(self, place: Position, frac: float) -> dict[str, Any]:
        """Return what the index of a snapshot of `place` says, from which `open_snapshot` reads."""
        train, origin = self._config.train, self._origin
        # A clock's fraction is what it is; that of steps is exact.
        exact = Fraction(frac)
        if not train.seconds:
            exact = origin.at(Fraction(place.steps, train.steps), train.until)
        now = Origin(
            steps=origin.steps + place.steps,
            tokens=origin.tokens + place.tokens,
            frac=exact,
            last=place.frac,
            taken=place.snapshots,
            snapshot="here",  # the reader knows the path
        )
        about = {
            "origin": now.to_dict(),
            "config": to_dict(self._config),
            "tokenizer_sha256": self._data.sha256,
            "text": text_facts(self._data),
        }
        return {**place.to_facts(), "snapshot": about}


def snapshot_name(fraction: float) -> str:
    """Return the folder's name of a snapshot at a fraction."""
    return str(fraction)


def text_facts(data: DataFolder) -> dict[str, Any]:
    """Return what tells one training text from another without reading it: names and sizes, and manifest."""
    files = [(path.name, path.stat().st_size) for path in find_shards(data.folder, "train")]
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return {"files": digest, "manifest": data.facts()["manifest"]}


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that a run is to continue from, checked against the run's settings."""

    checkpoint: Checkpoint
    origin: Origin
    added: Added
    differs: tuple[str, ...]
    """Settings of training that differ from the snapshot's run, in words."""

    @property
    def notes(self) -> list[str]:
        """What the log says of the differences from the snapshot's run."""
        found = [str(self.added)] if self.added.names else []
        if self.differs:
            found.append(f"differs from the snapshot's run: {', '.join(self.differs)}")
        if any(text.startswith("train.seed ") for text in self.differs):
            found.append("the seed is another one, so the text goes on in another order, and may come twice")
        return found

    def state(self, parts: Parts) -> tuple[dict[str, Tensor], list[str]]:
        """Return the tensors for `parts`, the live state of the run, and notes on those that are new.

        Raises:
            UserError: a file is damaged, or a tensor has another shape than the run's.
        """
        tensors = _multiplied(self.checkpoint.load(), self.added.factors)
        if "optim.counts" in tensors:
            tensors["optim.counts"][SKIPPED] = 0  # steps that the run itself skips are counted
        return _completed(tensors, parts, self.added.zeros)


def open_snapshot(path: Path, config: Config, data: DataFolder) -> Snapshot:
    """Return the snapshot in the folder `path`, for a run of `config` on `data`; executes nothing.

    Raises:
        FileNotFoundError: no snapshot there; says which there are.
        UserError: it is damaged, of another network, tokenizer or text, or leaves nothing to train.
    """
    if not (path / INDEX).is_file():
        raise FileNotFoundError(_missing(path))
    checkpoint, where = read_checkpoint(path), f"train.start={path}"
    about = checkpoint.facts.get("snapshot")
    if not isinstance(about, dict):
        raise UserError(
            f"{where} is a checkpoint of an unfinished run; continue that one with `pgolf train --resume`, "
            "or start from a snapshot, which train.snapshots writes"
        )
    try:
        saved = from_dict(Config, about["config"], where=f"{path}: config")
        origin = Origin.from_dict({**about["origin"], "snapshot": str(path)})
        check_tokenizer(path, {"tokenizer_sha256": about["tokenizer_sha256"]}, data.sha256)
        text = about["text"]
    except KeyError as e:
        raise UserError(f"{path / INDEX} has no {e} in its snapshot; use one that `pgolf train` wrote") from e
    added = additions(config.model, saved.model, where=where)
    if text != text_facts(data):
        raise UserError(
            f"{where} was trained on other text than is in {data.folder}: its training shards have other "
            "names, sizes or another manifest; pass --data with the folder of that text"
        )
    check_left_out(config, saved, where=where)
    if origin.frac >= Fraction(str(config.train.until)):
        raise UserError(
            f"{where} is at {float(origin.frac):g} of the schedules, so nothing is left of a run that ends "
            f"at train.until={config.train.until:g}; start from an earlier one"
        )
    early = [f for f in config.train.snapshot_fractions if Fraction(str(f)) <= origin.frac]
    if early:
        raise UserError(
            f"train.snapshots={early[0]:g} is not after {where}, which is at {float(origin.frac):g} of the "
            "schedules; take it out"
        )
    return Snapshot(checkpoint, origin, added, tuple(_differences(config, saved)))


def _missing(path: Path) -> str:
    folder = path if path.name == SNAPSHOTS else path / SNAPSHOTS
    there = sorted(str(index.parent) for index in folder.glob(f"*/{INDEX}"))
    if there:
        return f"{path} is not a snapshot; name one of {', '.join(there)}"
    return (
        f"no snapshot at {path}: it has no {INDEX}; a run with --train.snapshots=0.75 writes RUN/"
        f"{SNAPSHOTS}/0.75"
    )


def _differences(config: Config, saved: Config) -> list[str]:
    ours, theirs = flat(to_dict(config)), flat(to_dict(saved))
    return [
        f"{key} {ours[key]} (was {theirs[key]})"
        for key in ours
        if ours[key] != theirs.get(key) and key != "version"
        if not key.startswith(("model.", *NOT_TOLD, *RUN_OF_ITS_OWN))
    ]


def _multiplied(tensors: dict[str, Tensor], factors: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the tensors with some parameters multiplied, and their moments as if they had always been."""
    # With p = factor * q the gradient of p is that of q divided by the factor.
    for name, factor in factors.items():
        for key in tensors:
            kind, _, rest = key.partition(".")
            if (rest == name and kind in ("weights", "ema")) or (
                "nesterov." in key and rest.endswith(f".{name}")
            ):
                tensors[key] = tensors[key] * factor
            elif key.endswith(f".mean.{name}"):
                tensors[key] = tensors[key] / factor
            elif key.endswith(f".square.{name}"):
                tensors[key] = tensors[key] / factor**2
    return tensors


def _completed(
    tensors: dict[str, Tensor], parts: Parts, zeros: Sequence[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return a tensor for everything in `parts`, and notes on what is new and what is left out."""
    shapes = {name: tuple(t.shape) for name, t in parts.whole.items()}
    shapes |= {name: (s.spans[-1][1], *s.tensor.shape[1:]) for name, s in parts.sharded.items()}
    found: dict[str, Tensor] = {}
    if not any(name.startswith(f"optim.{BASE}") for name in shapes):
        # The snapshot's parameters are ahead of its weights, and nothing here would take them back.
        for name in [n for n in tensors if n.startswith(f"optim.{BASE}")]:
            tensors[f"weights.{name.removeprefix(f'optim.{BASE}')}"] = tensors[name]
    # Weights first: an average that is new starts at them.
    for name in sorted(shapes, key=lambda n: (not n.startswith("weights."), n)):
        kind, _, rest = name.partition(".")
        if name in tensors:
            found[name] = tensors[name]
        elif kind == "ema":
            found[name] = found[f"weights.{rest}"].to(torch.float32)
        elif rest.startswith(BASE):
            found[name] = found[f"weights.{rest.removeprefix(BASE)}"].clone()
        elif kind == "weights" and rest not in zeros:
            found[name] = parts.whole[name].detach().cpu().clone()
        else:
            found[name] = torch.zeros(shapes[name])
    notes = []
    empty = [
        n for n in found if n not in tensors and n.startswith("optim.") and not n.startswith(f"optim.{BASE}")
    ]
    if empty:
        notes.append(f"new state of the optimizer, which starts at 0: {', '.join(empty)}")
    if not any(name.startswith("ema.") for name in tensors) and any(n.startswith("ema.") for n in found):
        notes.append("the snapshot has no average; it starts at the weights")
    unused = [name for name in tensors if name not in shapes and not name.startswith("ema.")]
    if unused:
        notes.append(f"state that this run has no use for: {', '.join(unused)}")
    return found, notes


def discard_later(run: Path, steps: int) -> None:
    """Remove the run's own snapshots of later steps than `steps`, which the run will reach again."""
    for folder in (run / SNAPSHOTS).glob("*"):
        try:
            late = read_checkpoint(folder).step > steps
        except (OSError, ValueError):
            late = True  # never completed
        if late:
            (folder / INDEX).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
