"""What the arms of a plan cost: milliseconds per step and bytes of the file, and what one percent is worth.

    "costs": {"steps": 20, "rounds": 3, "overrides": {"data.batch_tokens": 196608}},
    "rates": {"time": 0.0004, "bytes": 0.0004}

Scores are found at equal steps, often with a small model and several runs on a GPU. Neither says what an arm
costs at full size. So a plan with `costs` has its arms timed afterwards, one at a time on an idle GPU, with
the overrides here in place of the plan's common ones. Arms that differ from the baseline in numbers alone
(rates, schedules) compute the same and are not timed. Bytes are those of the files where the plan quantizes,
else a prediction from the shapes at the same size.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf.ablate.overrides import override, read_overrides
from pgolf.config import AdamConfig, Config, config_hash, from_dict, read_json, to_dict
from pgolf.errors import UserError, UserTypeError
from pgolf.files import write_json

COSTS = "costs.json"
"""File with the measured milliseconds, in the folder of the results."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one percent is worth, bits per byte: of the seconds of a step, and of the bytes of the file."""

    time: float = 0.0004
    bytes: float = 0.0004


@dataclass(frozen=True, kw_only=True)
class _CostsFile:
    """The keys of a plan's costs."""

    steps: int = 20
    rounds: int = 3
    overrides: object = None


@dataclass(frozen=True)
class Costs:
    """How the costs of the arms are found."""

    steps: int
    """Steps in a row that are timed, without and with depth recurrence; 0: nothing is timed."""
    rounds: int
    """How often; the arms take turns."""
    overrides: dict[str, Any]
    """What replaces the plan's common overrides, as written."""
    arms: dict[str, Config]
    """Every arm at this size."""


@dataclass(frozen=True)
class StepTime:
    """Milliseconds per step of an arm, and of what the time is the sum."""

    off: float
    """Without depth recurrence."""
    on: float | None
    """With it; None: the network has none."""
    share: float
    """Of a run's steps that have it."""

    @property
    def ms(self) -> float:
        """Mean over a run."""
        return self.off if self.on is None else (1 - self.share) * self.off + self.share * self.on


def read_costs(
    value: object,
    base: Config,
    common: dict[str, Any],
    arms: Mapping[str, dict[str, Any]],
    where: str,
) -> Costs:
    """Return how a plan file wants the costs found; without that, at the plan's own size and nothing timed.

    Raises:
        UserError, UserTypeError: a key, a number or an override is wrong.
    """
    where = f"{where}: costs"
    if value is not None and not isinstance(value, dict):
        raise UserTypeError(f"{where}: expected an object of steps and overrides, got {type(value).__name__}")
    file = from_dict(_CostsFile, value or {}, where=where)
    if file.steps < 1 or file.rounds < 1:
        raise UserError(f"{where}: steps and rounds must be >= 1, got {file.steps} and {file.rounds}")
    changes = common
    if file.overrides is not None:
        changes = read_overrides(file.overrides, f"{where}: overrides")
    shared, _ = override(base, changes, where=f"{where}: overrides")
    at_size = {
        arm: override(shared, change, where=f"{where}: arm {arm!r}")[0] for arm, change in arms.items()
    }
    return Costs(file.steps if value is not None else 0, file.rounds, changes, at_size)


def read_rates(value: object, where: str) -> Rates:
    """Return the exchange rates of a plan file.

    Raises:
        UserError, UserTypeError: a key is unknown, or a number below 0.
    """
    if value is not None and not isinstance(value, dict):
        raise UserTypeError(f"{where}: rates: expected an object, got {type(value).__name__}")
    rates = from_dict(Rates, value or {}, where=f"{where}: rates")
    if not 0 <= min(rates.time, rates.bytes) <= max(rates.time, rates.bytes) < 1:
        raise UserError(f"{where}: rates are bits per byte for one percent, in [0, 1), got {rates}")
    return rates


NUMBERS = {
    "optim": (
        *("grad_clip", "warmdown", "warmdown_power", "min_lr"),
        *("ema_horizon", "swa_from", "swa_every", "recurrence_at"),
        *("ema_nesterov", "ema_nesterov_horizon", "ema_nesterov_from", "ema_nesterov_until"),
    ),
    "optim.muon": (
        *("lr", "weight_decay", "late_lr", "late_from"),
        *("momentum", "momentum_age", "momentum_start", "momentum_warmup", "momentum_end"),
        *("momentum_cooldown", "normalize", "slow_age", "slow_weight"),
    ),
    "optim.adam": tuple(AdamConfig.__dataclass_fields__),
}
"""Settings that a step reads as numbers: what is computed, and how long it takes, does not depend on them.
Whether there is an average, a velocity, NorMuon or a slow average of gradients at all is told apart."""


def work_key(config: Config) -> str:
    """Return a hash of what a step computes: equal for configurations that differ in numbers alone."""
    data = to_dict(config)
    for part in ("version", "name", "train", "quant", "artifact", "evaluate"):
        del data[part]
    del data["data"]["dir"]
    optim = config.optim
    data["optim"] |= {"averages": optim.averages, "nesterov": optim.ema_nesterov > 0}
    data["optim"] |= {"normalized": optim.muon.normalize > 0, "slow": optim.muon.slow_age > 0}
    for section, names in NUMBERS.items():
        node = data
        for key in section.split("."):
            node = node[key]
        for name in names:
            del node[name]
    how = ("device", "compile", "attention", "fake_quant_from")
    return config_hash({**data, **{name: getattr(config.train, name) for name in how}})


def measured(folder: Path, costs: Costs) -> dict[str, StepTime]:
    """Return the times that are in the folder of the results; none if one of the arms is missing there."""
    try:
        kept = read_json(folder / COSTS)["ms"]
        found = {}
        for arm, config in costs.arms.items():
            off, on = map(_number, kept[work_key(config)])
            found[arm] = StepTime(off, on, 1 - config.optim.recurrence_at)
        return found
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _number(value: Any) -> Any:
    if value is not None and not isinstance(value, int | float):
        raise TypeError(f"expected milliseconds, got {value!r}")
    return value


def measure(folder: Path, costs: Costs, *, commit: str, say: Callable[[str], None]) -> None:
    """Time every arm on this process's device, and write what was found to `COSTS`, atomically.

    Raises:
        FileNotFoundError, UserError: an arm cannot be trained on the data, as in a run.
    """
    from pgolf.dist import Dist
    from pgolf.report.summary import device_name
    from pgolf.train.timed import Timed

    configs = {work_key(config): config for config in costs.arms.values()}
    dist = Dist.start(next(iter(configs.values())).train.device)
    say(f"timing {len(configs)} different computations of {len(costs.arms)} arms")
    found: dict[str, list[tuple[float, float | None]]] = {key: [] for key in configs}
    with contextlib.ExitStack() as opened:
        opened.callback(dist.close)
        timed = {key: Timed(config, dist, folder / "costs") for key, config in configs.items()}
        for each in timed.values():
            opened.callback(each.close)
        # In turns, so that a drift of the machine affects all of them.
        for _ in range(costs.rounds):
            for key, each in timed.items():
                found[key].append(each.milliseconds(costs.steps))
    ms = {key: [_median(rows, 0), _median(rows, 1)] for key, rows in found.items()}
    facts = {"device": device_name(dist.device), "commit": commit, "steps": costs.steps}
    write_json(folder / COSTS, {**facts, "rounds": costs.rounds, "ms": ms})


def _median(rows: list[tuple[float, float | None]], column: int) -> float | None:
    values = [row[column] for row in rows]
    return None if None in values else statistics.median(v for v in values if v is not None)


def file_bytes(costs: Costs, baseline: str) -> dict[str, int]:
    """Return the predicted bytes of every arm's file at equal bits, without `artifact.fit`.

    Arms with the baseline's network and bits have its bytes; if all have, nothing is predicted and all are 0.
    """
    from pgolf.artifact.predict import predict_ledger

    keys = {arm: (c.model, c.quant, c.artifact.coder) for arm, c in costs.arms.items()}
    if len(set(keys.values())) == 1:
        return dict.fromkeys(costs.arms, 0)
    limit = costs.arms[baseline].artifact.limit
    sizes = {
        key: predict_ledger(key[0], key[1], limit=limit, coder=key[2]).model_bytes
        for key in set(keys.values())
    }
    return {arm: sizes[key] for arm, key in keys.items()}
