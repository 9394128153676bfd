"""What saved settings meant to the code that wrote them: those that are missing, renamed or gone.

Every configuration that a run saves is complete, so a missing key is one that its writer did not know (then
the table says what that code did) or one that somebody took out (then it has the default of that version).
A setting that is new, has another default or another name, or is gone, is one more `Change` at the end of
`CHANGES`; the version is their number. Files older than the version field are placed by the newest setting
that they name.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from pgolf.errors import UserError


class Change(NamedTuple):
    """The changes from one version of the settings to the next."""

    commit: str
    """The commit that made them."""
    added: dict[str, Any]
    """New settings by dotted name, with the value that corresponds to the behaviour before."""
    defaults: dict[str, Any] = {}  # noqa: RUF012 - never written to
    """Dotted settings whose default changed, and the default before."""
    removed: dict[str, Any] = {}  # noqa: RUF012 - never written to
    """Dotted settings that are gone, each with the value at which it did what the code does now."""
    renamed: dict[str, str] = {}  # noqa: RUF012 - never written to
    """Dotted settings that have another name since: old name -> new name."""


CHANGES: tuple[Change, ...] = (
    Change("beac8df", {}, {"train.compile": "blocks"}),
    Change(
        "d4a3e3a",
        {
            "quant.act_order": True,
            "quant.row_steps": "spread",
            "quant.column_steps": False,
            "quant.mean_bits": 3.45,
            "quant.rate": 0.0,
            "quant.embed_gram": 1.0,
            "quant.matrix_gram": 0.0,
            "quant.row_floor": 0.02,
            "quant.gradient_batches": 8,
        },
    ),
    Change("dfbb790", {"quant.lqer": "off", "quant.lqer_rank": 4, "quant.lqer_top": 3}),
    Change("a6b5dec", {}, {"train.quantize_reserve": 7.0}),
    Change(
        "3f58952",
        {
            "evaluate.sliding": False,
            "evaluate.stride": 64,
            "evaluate.ttt": False,
            "evaluate.adapters.rank": 80,
            "evaluate.adapters.alpha": 144.0,
            "evaluate.adapters.lr": 1e-4,
            "evaluate.adapters.beta2": 0.99,
            "evaluate.adapters.eps": 1e-10,
            "evaluate.adapters.weight_decay": 0.5,
            "evaluate.adapters.chunk": 48,
            "evaluate.adapters.chunk_growth": 16,
            "evaluate.adapters.chunk_max": 256,
            "evaluate.adapters.batch_tokens": 65_536,
            "evaluate.adapters.batch_documents": 128,
            "evaluate.adapters.seed": 0,
        },
    ),
    Change("97105b9", {"quant.embed_floor": 0.02}),
    Change(
        "bc6b712",
        {},
        {
            "quant.matrix_bits": 6,
            "quant.embed_bits": 7,
            "quant.row_steps": "spread",
            "quant.column_steps": False,
        },
    ),
    Change("719f38a", {"quant.trellis": False}),
    Change("33998d9", {"train.quantize": True}),
    Change("aa477a9", {"train.init": None}),
    Change("5a2f7a1", {"optim.muon.algorithm": "auto"}),
    Change("feb67c9", {}, {"quant.rate": 0.0}),
    Change("764bc8d", {}),  # the version field itself
    Change(
        "ab95ec9",
        {
            "data.verify": False,
            "train.checkpoint_every": 0.0,
            "train.rank_timeout": 600.0,
            "evaluate.raw": True,
            "evaluate.ema": True,
            "evaluate.every": 0,
        },
    ),
    Change("8ab5e69", {}, {"name": "record"}),
    Change("98b7c24", {"train.track": "none"}),
    Change(
        "e8d26c6",
        {},
        removed={
            "quant.act_order": True,
            "quant.block": 128,
            "quant.embed_gram": 1.0,
            "quant.matrix_gram": 0.0,
        },
        renamed={
            "model.loop_start": "model.recurrence_start",
            "model.loop_end": "model.recurrence_end",
            "model.loops": "model.recurrence_repeats",
            "optim.loop_at": "optim.recurrence_at",
            "quant.row_steps": "quant.row_scales",
            "quant.column_steps": "quant.column_scales",
        },
    ),
    Change("63c4ef4", {"train.profile": False}),
    Change(
        "17b7e74",
        {
            "model.leaky_slope": 0.5,
            "model.parallel": "lanes",
            "model.smear_over_bos": False,
            "model.bigram_buckets": 0,
            "model.bigram_width": 128,
            "model.value_embed_layers": 0,
            "model.value_embed_width": 128,
            "train.fake_quant_from": 0.0,
            "train.context_stages": "",
            "optim.average": "ema",
            "optim.swa_from": 0.9,
            "optim.swa_every": 50,
        },
    ),
    Change(
        "de600eb",
        {
            "evaluate.adapters.on": "q,k,v,o,mlp,head",
            "evaluate.adapters.first_chunks": "",
            "evaluate.adapters.warm_a": False,
            "evaluate.method": "phased",
            "evaluate.published": False,
            "evaluate.context": 0,
            "evaluate.sgd.lr": 0.005,
            "evaluate.sgd.momentum": 0.9,
            "evaluate.sgd.epochs": 3,
            "evaluate.sgd.grad_clip": 1.0,
            "evaluate.sgd.chunk_tokens": 32_768,
            "evaluate.sgd.batch_tokens": 16_384,
            "evaluate.phases.documents": 2500,
            "evaluate.phases.count": 3,
            "evaluate.phases.lr": 0.001,
            "evaluate.phases.momentum": 0.9,
            "evaluate.phases.epochs": 1,
            "evaluate.phases.grad_clip": 1.0,
            "evaluate.phases.chunk_tokens": 32_768,
            "evaluate.phases.batch_tokens": 16_384,
            "evaluate.phases.two_caps": False,
            "evaluate.phases.adapters.on": "q,k,v,o,mlp,head",
            "evaluate.phases.adapters.rank": 80,
            "evaluate.phases.adapters.alpha": 144.0,
            "evaluate.phases.adapters.lr": 1e-4,
            "evaluate.phases.adapters.beta2": 0.99,
            "evaluate.phases.adapters.eps": 1e-10,
            "evaluate.phases.adapters.weight_decay": 0.5,
            "evaluate.phases.adapters.chunk": 48,
            "evaluate.phases.adapters.chunk_growth": 0,
            "evaluate.phases.adapters.chunk_max": 48,
            "evaluate.phases.adapters.first_chunks": "",
            "evaluate.phases.adapters.warm_a": True,
            "evaluate.phases.adapters.batch_tokens": 131_072,
            "evaluate.phases.adapters.batch_documents": 64,
            "evaluate.phases.adapters.seed": 0,
        },
    ),
    Change("97234a6", {"model.smear_kind": "token", "model.smear_window": 0}),
    Change("dbd4a8c", {"data.order": "documents"}),
    Change("8f943db", {"artifact.coder": "range"}),
    Change("9d4a786", {"train.start": None, "train.until": 1.0, "train.snapshots": ""}),
    Change(
        "8d97928",
        {
            "optim.adam.embed_warmup": 0.0,
            "optim.adam.embed_warmdown": -1.0,
            "optim.adam.scalar_warmdown": -1.0,
            "optim.ema_nesterov": 0.0,
            "optim.ema_nesterov_horizon": 0.032,
            "optim.ema_nesterov_from": 0.16,
            "optim.ema_nesterov_until": 0.76,
        },
    ),
    Change(
        "37f2c08",
        {
            "evaluate.slot.steps": 8,
            "evaluate.slot.lr": 0.005,
            "evaluate.tilt.on": False,
            "evaluate.tilt.order": 16,
            "evaluate.tilt.threshold": 0.8,
            "evaluate.tilt.boost": 2.625,
            "evaluate.tilt.seen": 1,
            "evaluate.adapters.members": 1,
            "evaluate.phases.adapters.members": 1,
        },
    ),
    Change(
        "8890361",
        {
            "optim.warmdown_power": 1.0,
            "optim.muon.momentum_end": 0.9,
            "optim.muon.momentum_cooldown": 0.0,
            "optim.muon.late_lr": 1.0,
            "optim.muon.late_from": 0.6,
        },
    ),
    Change(
        "76e24fd",
        {
            "optim.muon.normalize": 0.0,
            "optim.muon.cautious": False,
            "optim.muon.momentum_age": 0.0,
            "optim.muon.head_pairs": "off",
            "optim.muon.slow_age": 0.0,
            "optim.muon.slow_weight": 0.56,
        },
    ),
    Change(
        "505f894",
        {"evaluate.adapters.gradient": "window", "evaluate.phases.adapters.gradient": "window"},
    ),
    Change("d210193", {"quant.drift": 0.0, "quant.gains": False}),
    Change("cb92e33", {"model.mudd": 0, "model.xsa_strength": False, "optim.adam.mudd_lr": 0.002}),
    Change("5f3f432", {"train.capture": False}),
    Change("dc8e115", {"artifact.program": "evaluate"}),
    Change("b890c70", {"evaluate.local": False}),
    Change("a7854dd", {"model.logit_scale": 1.0, "quant.cap_documents": 0}),
)
"""From the first run on, in order, settings by the names of their time. Defaults that came and went between
two runs are not told apart."""
VERSION = len(CHANGES)
"""Of the settings, written into every saved configuration."""
REMOVED: dict[str, Any] = {key: value for change in CHANGES for key, value in change.removed.items()}
"""Dotted settings that are gone; a file that has one loads if it has this value."""
RENAMED: dict[str, str] = {old: new for change in CHANGES for old, new in change.renamed.items()}
"""Old dotted names of settings; files that have them load, and so do command lines until version 0.3."""
NAMED = 20
"""Largest number of settings that a note on missing settings names."""
WHOLE = ("name", "model", "data", "optim", "train", "quant", "artifact")
"""Keys that every saved configuration has; a file without one of them was written by hand."""


def completed(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a saved configuration with today's names, and with what was missing as its writer had it.

    It has no version. Settings that have the same meaning today are left to their defaults. A file written by
    hand (no version, not all sections) means today's.

    Raises:
        ValueError: the version is no whole number from 0 to `VERSION`, a setting is given under its old and
            its new name, or one that is gone asks for something else than what the code does now.
    """
    version = writer_version(data, where)
    result = {k: copy.deepcopy(v) for k, v in data.items() if k != "version"}
    for key, new in RENAMED.items():
        (node, last), (_, now) = _place(result, key), _place(result, new)
        if last in node:
            if now in node:
                raise UserError(f"{where}: {key} is the old name of {new}, which is given too; take one out")
            node[now] = node.pop(last)
    for key in REMOVED:
        node, last = _place(result, key)
        if last in node:
            check_removed(key, node.pop(last), where)
    if version is None:
        return result
    train = result.get("train")
    if version == 0 and isinstance(train, dict) and isinstance(train.get("compile"), bool):
        train["compile"] = "blocks" if train["compile"] else "off"  # it was a bool then
    for key, value in _meanings(version).items():
        node, last = _place(result, key)
        node.setdefault(last, value)
    return result


def present(changes: dict[str, Any], where: str) -> dict[str, Any]:
    """Return dotted settings under today's names, without those that are gone and asked for what is done now.

    Raises:
        ValueError: one that is gone asks for something else; a setting is given under both its names.
    """
    result: dict[str, Any] = {}
    for key, value in changes.items():
        if key in REMOVED:
            check_removed(key, value, where)
            continue
        name = RENAMED.get(key, key)
        if name in result or (name != key and name in changes):
            raise UserError(f"{where}: {key} is the old name of {name}, which is given too; take one out")
        result[name] = value
    return result


def check_removed(key: str, value: Any, where: str) -> None:
    """Refuse a setting that is gone, unless its value asked for what the code does now.

    Raises:
        ValueError: it asks for something else.
    """
    if value != REMOVED[key]:
        raise UserError(
            f"{where}: the setting {key} does not exist any more, and this version cannot do what its value "
            f"{value!r} asks for, only what {REMOVED[key]!r} did; take the setting out to go on with that"
        )


def missing_note(data: Any, complete: dict[str, Any], where: str) -> str:
    """Return a line that names the settings which are missing in a saved configuration; empty if none is.

    Args:
        data: contents of the saved file.
        complete: `to_dict` of the configuration that was made from it.
        where: name of the file, with which the line begins.
    """
    if not isinstance(data, dict):
        return ""
    before, now = {RENAMED.get(key, key) for key in _leaves(data)}, _leaves(complete)
    missing = [f"{key}={value}" for key, value in now.items() if key not in before and key != "version"]
    if not missing:
        return ""
    version = writer_version(data, where)
    whose = f"the defaults of version {VERSION if version is None else version} (pr1855's)"
    whose += ", today's" if version is None else ", which wrote it"
    what = f"{len(missing)} of the settings of version {VERSION}; they have {whose}"
    more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
    return f"{where} lacks {what}: {', '.join(missing[:NAMED])}{more}"


def writer_version(data: dict[str, Any], where: str) -> int | None:
    """Return the version of the settings with which `data` was written; None if it was written by hand.

    Raises:
        ValueError: as in `completed`.
    """
    if "version" in data:
        version = data["version"]
        if not isinstance(version, int) or isinstance(version, bool) or version < 0:
            raise UserError(f"{where}: version must be a whole number from 0 to {VERSION}, got {version!r}")
        if version > VERSION:
            raise UserError(
                f"{where} was written by a newer pgolf (settings of version {version}; this one knows "
                f"{VERSION}); update pgolf"
            )
        return version
    if any(key not in data for key in WHOLE):
        return None
    known = [i + 1 for i, change in enumerate(CHANGES) if any(key in _leaves(data) for key in change.added)]
    if not known and isinstance(data["train"], dict) and isinstance(data["train"].get("compile"), str):
        return 1
    return max(known, default=0)


def _meanings(version: int) -> dict[str, Any]:
    """Return the values that `CHANGES` gives to settings which are missing in a file of `version`."""
    meanings: dict[str, Any] = {}
    for change in CHANGES[version:]:
        for key, value in {**change.added, **change.defaults}.items():
            if key not in REMOVED:
                meanings.setdefault(RENAMED.get(key, key), value)
    return meanings


def _place(data: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Return the section of a dotted setting, made if it is missing, and the setting's name in it.

    What stands in the place of a section and is none (the reader refuses it) is left as it is.
    """
    *sections, last = key.split(".")
    node = data
    for section in sections:
        inner = node.setdefault(section, {})
        node = inner if isinstance(inner, dict) else {}
    return node, last


def _leaves(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as a flat dict by dotted name."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            found.update(_leaves(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found
