"""The plan of an ablation: a JSON file of arms, seeds and a fixed length, checked before anything runs.

    {"name": "polar", "base": "pr1855", "data": "shards", "out": "ablations/polar", "steps": 1000,
     "overrides": {"data.batch_tokens": 98304}, "baseline": "express",
     "arms": {"express": {}, "jordan": {"optim.muon.coefficients": "jordan"}}, "seeds": [1, 2, 3]}

A plan may have a trunk, `"trunk": {"steps": 3000, "overrides": {"optim.warmdown": 0.0}}`: with every seed,
the baseline, changed like this, is trained for so many steps first, and all arms of that seed start from its
raw weights, with a fresh optimizer and the whole schedule. From random weights each run takes the fast fall
of the loss some steps earlier or later, which scatters the differences of the pairs. With
`"trunk": {"steps": 1200, "until": 0.15}` the trunk is the first 15 % of every schedule, and the arms of its
seed continue from its snapshot, with its optimizer's state and in its text, through the rest. Settings that
an arm changes then change in the middle of a training.

`"costs"` (`costs.py`) says at which size the milliseconds and bytes of the arms are found, and `"rates"` what
one percent of either is worth, bits per byte. `"ladders"` (`ladder_plan.py`) compares arms at their own best
learning rates.

Overrides are settings of config.json with dots between the levels. An override that changes nothing is
allowed, with a warning: a published submission of the challenge (PR #1769) claimed a gain from one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pgolf.ablate.costs import Costs, Rates, read_costs, read_rates
from pgolf.ablate.ladder_plan import Ladders, read_ladders
from pgolf.ablate.overrides import override, read_overrides
from pgolf.config import Config, config_hash, from_dict, read_json
from pgolf.errors import UserError, UserTypeError
from pgolf.model.neutral import additions
from pgolf.optim.polar import coefficients

Metric = Literal["raw", "ema", "quantized"]

TRUNK = "trunk"
"""Name of the trunks' cells."""
TRUNK_SEEDS = 1_000_000
"""The trunk of seed s is trained with seed s + this, so that its arms do not read the same batches again."""


@dataclass(frozen=True, kw_only=True)
class _File:
    """The keys of a plan file; `object` where the shape is checked by hand."""

    name: str = ""
    comment: str = ""
    base: str = ""
    data: Path | None = None
    out: Path | None = None
    steps: int = 0
    seconds: float = 0.0
    overrides: object = None
    trunk: object = None
    baseline: str = ""
    arms: object = None
    seeds: object = None
    costs: object = None
    rates: object = None
    ladders: object = None
    metric: Metric = "quantized"
    effect: float = 0.0005


@dataclass(frozen=True, kw_only=True)
class _TrunkFile:
    """The keys of a plan's trunk."""

    steps: int = 0
    until: float = 0.0
    overrides: object = None


@dataclass(frozen=True)
class Cell:
    """One run of the plan: an arm with a seed, or the trunk of a seed."""

    arm: str
    seed: int
    config: Config
    """Everything the run does; train.out is the cell's folder."""
    trunk: Cell | None = None
    """What it starts from; train.start or train.init of `config` is set when that is there."""

    @property
    def folder(self) -> Path:
        """Folder of the cell; each attempt makes a run folder in it."""
        return self.config.train.out

    @property
    def key(self) -> str:
        """Hash of the configuration without the names of run and folder, so that results may be moved."""
        return run_key(self.config)


@dataclass(frozen=True)
class Trunk:
    """What is trained with every seed before its arms, which start from it."""

    config: Config
    """Resolved, before seed and folder."""
    overrides: dict[str, Any]
    """What it changes in the baseline, as written."""

    @property
    def continues(self) -> bool:
        """Whether the arms continue from its snapshot, and do not start anew from its raw weights."""
        return is_continued(self.config)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked plan: every arm resolved to a configuration."""

    name: str
    comment: str
    base: str
    length: str
    """What is held fixed, in words: "1,000 steps" or "120 s"."""
    fixed_steps: bool
    """Steps are held fixed, not seconds."""
    out: Path
    baseline: str
    arms: dict[str, Config]
    """Resolved configuration of every arm, in the file's order, before seed and folder."""
    common: dict[str, Any]
    """What all arms change in the base, as written."""
    overrides: dict[str, dict[str, Any]]
    """What each arm changes in addition, as written."""
    seeds: tuple[int, ...]
    metric: Metric
    """The weights whose bits per byte decide: chosen before the runs."""
    effect: float
    """Smallest difference worth seeing, bits per byte; the power figure is for it."""
    warnings: tuple[str, ...]
    trunk: Trunk | None = None
    costs: Costs
    rates: Rates
    ladders: Ladders | None = None

    def trunks(self) -> dict[int, Cell]:
        """Return the trunk of every seed; empty in a plan without trunks."""
        if self.trunk is None:
            return {}
        config = self.trunk.config
        # Arms that continue go on in the trunk's text. The others begin at its beginning again, in which they
        # would read the trunk's batches a second time.
        shift = 0 if self.trunk.continues else TRUNK_SEEDS
        return {s: self._cell(TRUNK, s, config, seed_of_run=s + shift) for s in self.seeds}

    def _cell(
        self, arm: str, seed: int, config: Config, *, seed_of_run: int, trunk: Cell | None = None
    ) -> Cell:
        folder = self.out / "cells" / arm / f"seed{seed}"
        train = replace(config.train, seed=seed_of_run, out=folder)
        return Cell(arm, seed, replace(config, name=arm, train=train), trunk)

    def cells(self) -> list[Cell]:
        """Return the arms' runs in order: all arms of the first seed, then of the second, and so on.

        A drift of the machine then affects all arms equally. Each seed starts one arm further on, so that no
        arm is always first, nor always on the same GPU.
        """
        names, trunks = list(self.arms), self.trunks()
        cells = []
        for i, seed in enumerate(self.seeds):
            shift = i % len(names)
            for arm in names[shift:] + names[:shift]:
                config = self.arms[arm]
                cells.append(self._cell(arm, seed, config, seed_of_run=seed, trunk=trunks.get(seed)))
        return cells


def run_key(config: Config) -> str:
    """Return the hash of what `config` computes: without the names of the run and of its folder, and without
    the settings that only decide how the run is kept and watched.

    A checkpoint that it starts from counts by its own and its run folder's name (which holds the time of the
    run), so that results and checkpoints may be moved.
    """
    init = config.train.init and Path(*config.train.init.parts[-2:])
    start = config.train.start and Path(*config.train.start.parts[-3:])  # RUN/snapshots/0.75
    train = replace(config.train, out=Path(), init=init, start=start)
    train = replace(train, checkpoint_every=0.0, rank_timeout=30.0, track="none")
    data = replace(config.data, verify=False)
    return config_hash(replace(config, name="run", train=train, data=data))


def is_continued(trunk: Config) -> bool:
    """Return whether the arms of this trunk continue from its snapshot."""
    return trunk.train.until < 1


def read_plan(
    path: Path, load_base: Callable[[str], Config], *, out: Path | None = None, data: Path | None = None
) -> Plan:
    """Read and check a plan file.

    Args:
        path: the JSON file.
        load_base: from the name of a preset or the path of a config.json to its configuration.
        out: folder of the results instead of the plan's own (results that were moved).
        data: data folder instead of the plan's own.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, a key given twice, an unknown key or setting (with the nearest known one), a
            value out of range, a setting that belongs to the plan.
        TypeError: a value of the wrong type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no plan file {path}; bench/ablations/example.json is one to start from")
    try:
        content = read_json(path)
    except ValueError as e:
        why = str(e).replace(f"{path} ", "it ", 1).replace(f"{path}: ", "", 1)
        raise UserError(f"{path} is not a plan: {why}") from e
    if not isinstance(content, dict):
        raise UserTypeError(f"{path}: expected an object, got {type(content).__name__}")
    file = from_dict(_File, content, where=str(path))
    _check_file(file, path)
    if data is not None:
        file = replace(file, data=data)
    common = read_overrides(file.overrides or {}, f"{path}: overrides")
    changes = _arms(file.arms, path)
    if file.baseline not in changes:
        raise UserError(f"{path}: baseline must be one of the arms {list(changes)}, got {file.baseline!r}")
    base = _set_up(load_base(file.base), file)
    shared, warnings = override(base, common, where=f"{path}: overrides")
    arms = {}
    for arm, change in changes.items():
        arms[arm], idle = override(shared, change, where=f"{path}: arm {arm!r}")
        # Raises for a table that does not exist, which the configuration itself does not know.
        coefficients(arms[arm].optim.muon.coefficients, arms[arm].optim.muon.ns_steps)
        warnings += idle
    warnings += _twins(arms)
    trunk, idle = _trunk(file.trunk, arms[file.baseline], path)
    warnings += idle
    if trunk is not None:
        _check_trunk_conflicts(trunk, arms, path)
        _check_one_model(trunk, arms, path)
    _check_scores(arms | ({TRUNK: trunk.config} if trunk else {}), path)
    if file.metric == "quantized" and not all(config.train.quantize for config in arms.values()):
        raise UserError(f"{path}: metric quantized needs train.quantize in every arm; decide by raw or ema")
    return Plan(
        name=file.name,
        comment=file.comment,
        base=file.base,
        length=f"{file.steps:,} steps" if file.steps else f"{file.seconds:g} s",
        fixed_steps=file.steps > 0,
        out=out or file.out or Path("ablations") / file.name,
        baseline=file.baseline,
        arms=arms,
        common=common,
        overrides=changes,
        seeds=_seeds(file.seeds, path),
        metric=file.metric,
        effect=file.effect,
        warnings=tuple(warnings),
        trunk=trunk,
        costs=read_costs(file.costs, base, common, changes, str(path)),
        rates=read_rates(file.rates, str(path)),
        ladders=read_ladders(file.ladders, arms, str(path)),
    )


def _check_file(file: _File, path: Path) -> None:
    for key in ("name", "base", "baseline"):
        if not getattr(file, key):
            raise UserError(f"{path}: {key} is missing")
    _check_name(file.name, f"{path}: name")
    if (file.steps > 0) == (file.seconds > 0) or file.steps < 0 or file.seconds < 0:
        raise UserError(
            f"{path}: give either steps or seconds, above 0, as the length of every run; "
            f"got steps={file.steps}, seconds={file.seconds:g}"
        )
    if not 0 < file.effect < 1:
        raise UserError(f"{path}: effect is in bits per byte, in (0, 1), got {file.effect}")


def _check_name(name: str, where: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"{where} names a folder: letters, digits, '.', '_', '-' only, got {name!r}")


def _arms(value: object, path: Path) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict) or len(value) < 2:
        raise UserError(f"{path}: arms must be an object of at least two arms, the baseline one of them")
    # Each arm has a folder, and there are file systems on which `Base` and `base` are one.
    lower = [arm.lower() for arm in value]
    for arm in value:
        _check_name(arm, f"{path}: arm {arm!r}")
        if lower.count(arm.lower()) > 1:
            raise UserError(f"{path}: arm {arm!r} is named twice: folders may not tell capitals apart")
    return {arm: read_overrides(change, f"{path}: arm {arm!r}") for arm, change in value.items()}


def _trunk(value: object, baseline: Config, path: Path) -> tuple[Trunk | None, list[str]]:
    """Return the plan's trunk, if it has one, and the warnings of its overrides."""
    if value is None:
        return None, []
    where = f"{path}: trunk"
    if not isinstance(value, dict):
        raise UserTypeError(f"{where}: expected an object of steps and overrides, got {type(value).__name__}")
    file = from_dict(_TrunkFile, value, where=where)
    if file.steps < 1:
        raise UserError(f"{where}: steps must be >= 1, got {file.steps}")
    if not 0 <= file.until < 1:
        raise UserError(
            f"{where}: until is a fraction of the schedules below 1, at which the arms continue, got "
            f"{file.until:g}; leave it out for arms that start anew from the trunk's weights"
        )
    changes = read_overrides(file.overrides or {}, f"{where}: overrides")
    for key in {"train.until", "train.snapshots"} & set(changes):
        raise UserError(f"{where}: {key} is given by the trunk's until; take it out of the overrides")
    train = replace(baseline.train, steps=file.steps, seconds=0.0)
    if file.until:
        train = replace(train, until=file.until, snapshots=str(file.until))
    config, idle = override(replace(baseline, train=train), changes, where=f"{where}: overrides")
    return Trunk(config, changes), idle


def _check_trunk_conflicts(trunk: Trunk, arms: dict[str, Config], path: Path) -> None:
    """Refuse an arm that would share the trunk's folder, and settings that the trunk gives the arms."""
    if TRUNK in (arm.lower() for arm in arms):
        raise UserError(f"{path}: arm {TRUNK!r} would share its folder with the plan's trunk; rename the arm")
    until = trunk.config.train.until
    for arm, config in arms.items():
        train = config.train
        # They may come from the base as well, and would fail only when the trunk is trained.
        given = {"init": train.init is not None, "start": train.start is not None, "until": train.until < 1}
        for key in (key for key, is_given in given.items() if is_given):
            raise UserError(
                f"{path}: train.{key} of the arms is given by the plan's trunk; take it out of the overrides "
                "or the base, or the trunk out of the plan"
            )
        early = [f for f in train.snapshot_fractions if trunk.continues and f <= until]
        if early:
            raise UserError(
                f"{path}: arm {arm!r}: train.snapshots={early[0]:g} is not after the trunk's end, {until:g}"
            )


def _check_one_model(trunk: Trunk, arms: dict[str, Config], path: Path) -> None:
    for arm, config in arms.items():
        try:
            additions(config.model, trunk.config.model, where="the trunk")
        except UserError as e:
            raise UserError(
                f"{path}: arm {arm!r} cannot start from the trunk: {e}. Other model settings belong into the "
                "plan's overrides, which hold for the trunk too"
            ) from e


def _check_scores(runs: dict[str, Config], path: Path) -> None:
    """Refuse runs without the scores that every plan reports; each would be run and could not be read."""
    for name, config in runs.items():
        wanted = {"evaluate.raw": config.evaluate.raw}
        # A trunk is reported by its raw weights alone, and without an average there is nothing to score.
        if name != TRUNK and config.optim.averages:
            wanted["evaluate.ema"] = config.evaluate.ema
        for key in (key for key, is_scored in wanted.items() if not is_scored):
            what = "the trunk" if name == TRUNK else f"arm {name!r}"
            raise UserError(
                f"{path}: {key} is false in {what}, but a plan reports the scores of raw and averaged "
                f"weights of every run, so it must be true; take {key} out of the overrides or the base"
            )


def _seeds(value: object, path: Path) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{path}: seeds must be a list of at least one whole number, got {value!r}")
    bad = [s for s in value if not isinstance(s, int) or isinstance(s, bool) or not 0 <= s < 2**31]
    if bad:
        raise UserError(f"{path}: seeds must be whole numbers in [0, 2^31), got {bad}")
    twice = sorted({s for s in value if value.count(s) > 1})
    if twice:
        raise UserError(f"{path}: seeds {twice} are given twice; a repeated seed is not another sample")
    return tuple(value)


def _set_up(base: Config, file: _File) -> Config:
    """Give the base the plan's data and length."""
    folder = file.data if file.data is not None else base.data.dir
    train = replace(base.train, seconds=file.seconds, steps=file.steps)
    return replace(base, data=replace(base.data, dir=folder), train=train)


def _twins(arms: dict[str, Config]) -> list[str]:
    """Warn of arms that are the same run."""
    first: dict[str, str] = {}
    found = []
    for arm, config in arms.items():
        other = first.setdefault(run_key(config), arm)
        if other != arm:
            found.append(f"arms {other!r} and {arm!r} are the same run: their difference is noise only")
    return found
