"""The weights of a run on disk: safetensors, with the configuration and facts of the run as JSON metadata.

They are written atomically, and reading them executes nothing.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pgolf.artifact.export import write_tensors
from pgolf.config import Config, from_dict, to_dict
from pgolf.config_versions import missing_note
from pgolf.errors import UserError
from pgolf.model.neutral import Added, additions

ARTIFACT = "model.pgolf"
RAW, AVERAGED = "raw.safetensors", "ema.safetensors"
"""Names of the artifact and of the raw and averaged weights in a run's folder."""


def save_weights(path: Path, tensors: dict[str, Tensor], config: Config, **facts: Any) -> None:
    """Write `tensors` with the resolved configuration and `facts` as metadata.

    Raises:
        OSError: the file could not be written (disk full, no permission); names the file. An older file of
            that name stays as it was.
    """
    # A safetensors file has strings only in its metadata, so every value is JSON.
    metadata = {"config": json.dumps(to_dict(config)), **{k: json.dumps(v) for k, v in facts.items()}}
    try:
        write_tensors(path, tensors, metadata)
    except OSError as e:
        raise OSError(f"{e}; free some space or choose another --train.out") from e


def load_weights(path: Path) -> tuple[dict[str, Tensor], Config, dict[str, Any]]:
    """Return the tensors, the configuration and the facts of a file written by `save_weights`.

    Where the configuration lacks settings, the fact `note` is the line that names what they got.

    Raises:
        FileNotFoundError: no such file.
        UserError: not a safetensors file of ours.
    """
    with _opened(path) as (file, config, facts):
        return {name: file.get_tensor(name) for name in file.keys()}, config, facts  # noqa: SIM118


def load_config(path: Path) -> Config:
    """Return the configuration alone; reads no tensor and raises as `load_weights` does."""
    with _opened(path) as (_, config, _facts):
        return config


def load_facts(path: Path) -> dict[str, Any]:
    """Return the facts alone; reads no tensor and raises as `load_weights` does."""
    with _opened(path) as (_, _config, facts):
        return facts


class Weights(NamedTuple):
    """What training leaves, by name; the raw weights twice where averaging is off."""

    raw: dict[str, Tensor]
    best: dict[str, Tensor]
    """The averaged weights, which are quantized."""


def save_pair(folder: Path, weights: Weights, config: Config, **facts: Any) -> None:
    """Write raw and averaged weights into a run's folder; raises as `save_weights` does."""
    # Each file is whole or not there, but a process may end between the two: the number says that both are
    # of the same moment.
    pair = secrets.token_hex(8)
    save_weights(folder / RAW, weights.raw, config, **facts, pair=pair)
    save_weights(folder / AVERAGED, weights.best, config, **facts, pair=pair)


def load_pair(folder: Path, names: Iterable[str], device: torch.device) -> Weights:
    """Return the raw and averaged weights of a run's folder on `device`; raises as `load_weights` does.

    In the order of `names`, which is the model's and so the artifact's; a safetensors file has its own.
    """
    names = list(names)
    files = (load_weights(folder / name)[0] for name in (RAW, AVERAGED))
    return Weights(*({name: file[name].to(device) for name in names} for file in files))


def pair_steps(folder: Path) -> int:
    """Return after how many steps the weights in a run's folder were written; 0 if they are no pair."""
    try:
        raw, averaged = (load_facts(folder / name) for name in (RAW, AVERAGED))
    except (OSError, ValueError):
        return 0
    pair = raw.get("pair")
    return int(raw.get("steps", 0)) if pair is not None and pair == averaged.get("pair") else 0


@torch.no_grad()
def load_initial(path: Path, model: torch.nn.Module, config: Config, *, tokenizer_sha256: str) -> Added:
    """Overwrite the parameters of `model`, made by `config`, with a checkpoint's (train.init).

    Parameters that the checkpoint lacks start so that the function is the same; they are returned.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint of ours, or of another model or tokenizer.
    """
    tensors, saved, facts = load_weights(path)
    # The settings before the tensors: a setting that differs (a soft cap, say) need not change any shape.
    added = additions(config.model, saved.model, where=f"train.init={path}")
    check_tokenizer(path, facts, tokenizer_sha256)
    own = dict(model.named_parameters())
    for name in added.names:
        tensors[name] = torch.zeros_like(own[name]) if name in added.zeros else own[name].detach().clone()
    for name, factor in added.factors.items():
        tensors[name] = factor * tensors[name]
    try:
        copy_parameters(model, tensors)
    except ValueError as e:
        raise UserError(f"train.init={path}: {e}; start from a checkpoint that this code wrote") from e
    return added


def check_left_out(config: Config, saved: Config, *, where: str) -> None:
    """Check that the documents that `config` fits the cap to are none that the run of `saved` trained on.

    Raises:
        UserError: some are.
    """
    asked, left_out = config.quant.cap_documents, saved.quant.cap_documents
    if asked > left_out:
        raise UserError(
            f"quant.cap_documents={asked}, but {where} is of a run that left out {left_out} documents, so it "
            "has trained on some of them, and the fit would take them for new text; pass "
            f"quant.cap_documents={left_out} or less, or train with the larger number"
        )


def check_tokenizer(path: Path, facts: dict[str, Any], tokenizer_sha256: str) -> None:
    """Check that the checkpoint at `path`, with these `facts`, was trained with this tokenizer.

    Raises:
        ValueError: it was not.
    """
    # Files from before the hash was kept cannot be checked, and pass.
    if facts.get("tokenizer_sha256", tokenizer_sha256) != tokenizer_sha256:
        raise UserError(
            f"{path} was trained with another tokenizer than the data folder holds; "
            "use the run's tokenizer.model"
        )


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Config, dict[str, Any]]]:
    """Yield an open file of weights with the configuration and the facts in its metadata."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; a run writes raw.safetensors and ema.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            yield file, *_parse(path, dict(file.metadata() or {}))
    except SafetensorError as e:
        raise UserError(f"{path} is not a readable safetensors file: {e}") from e


def _parse(path: Path, metadata: dict[str, str]) -> tuple[Config, dict[str, Any]]:
    if "config" not in metadata:
        raise UserError(f"{path} holds no pgolf configuration; expected a file written by `pgolf train`")
    try:
        facts = {k: json.loads(v) for k, v in metadata.items()}
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: its metadata is not JSON as `pgolf train` writes it: {e}") from e
    # Settings that the file lacks get the values that its writer used, and the note names them.
    saved = facts.pop("config")
    config = from_dict(Config, saved, where=f"{path}: config")
    note = missing_note(saved, to_dict(config), f"{path}: config")
    return config, {**facts, "note": note} if note else facts


def clone_parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return detached copies of all parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def copy_parameters(model: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Overwrite the parameters of `model` in place with `tensors` (same names and shapes).

    Raises:
        ValueError: names or shapes differ.
    """
    own = dict(model.named_parameters())
    if own.keys() != tensors.keys():
        different = sorted(own.keys() ^ tensors.keys())
        raise UserError(f"the weights do not fit the model: {', '.join(different)} on one side only")
    shapes = [
        f"{name} must be {tuple(p.shape)}, got {tuple(tensors[name].shape)}"
        for name, p in own.items()
        if p.shape != tensors[name].shape
    ]
    if shapes:
        raise UserError(f"the weights do not fit the model: {', '.join(shapes)}")
    # In place, because the optimizer, the average and compiled code hold on to these very tensors.
    for name, p in own.items():
        p.copy_(tensors[name])
