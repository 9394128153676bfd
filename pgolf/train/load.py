"""A trained model with its tokenizer, ready to use: `pgolf.load`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from pgolf.artifact.read import build_model, read_artifact
from pgolf.config_io import read_json
from pgolf.data.shards import TOKENIZER_NAME
from pgolf.data.tokenizer import Tokenizer, find_tokenizer
from pgolf.dist import pick_device
from pgolf.errors import UserError
from pgolf.files import file_sha256
from pgolf.model.gpt import GPT
from pgolf.train.weights import ARTIFACT, AVERAGED, RAW, copy_parameters, load_weights


class Loaded(NamedTuple):
    """What `load` returns."""

    model: GPT
    tokenizer: Tokenizer


def load(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    device: Literal["auto", "cuda", "cpu"] = "auto",
) -> Loaded:
    """Return a model, in evaluation mode and not compiled, and the tokenizer that it was trained with.

    Args:
        path: an artifact (`model.pgolf`), a checkpoint of a run (`raw.safetensors`, `ema.safetensors`), or a
            run folder, of which the artifact is taken, else the averaged weights, else the raw ones.
        tokenizer: a `.model` file or a folder that holds one. None looks next to the model, then in the data
            folder that the run's configuration names.
        device: where the model is to run; "auto" is CUDA when it is there.
    Raises:
        FileNotFoundError: no model there, or its tokenizer is not found.
        ValueError: not a file of ours, a malformed one (`ArtifactError`), or a tokenizer whose SHA-256 is not
            the one that the model's file names. RuntimeError: no such device.
    """
    # The device first: loading a model takes a while, and a missing GPU is known at once.
    place = pick_device(device)
    file = _model_file(Path(path))
    if file.suffix == ".safetensors":
        model, sha256, data = _load_checkpoint(file, place)
    else:
        artifact = read_artifact(file)
        model, sha256 = build_model(artifact, place), artifact.header.tokenizer_sha256
        data = _data_folder(file.with_name("config.json"))
    found = _find(file, sha256, data) if tokenizer is None else _given(file, sha256, Path(tokenizer))
    # A file from before hashes of tokenizers were kept says nothing; the number of pieces must fit anyway.
    if found.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{found.path} has {found.vocab_size} pieces, {file} has a vocabulary of "
            f"{model.config.vocab_size}; give the tokenizer that the model was trained with"
        )
    return Loaded(model, found)


def _model_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(
                f"no model at {path}; give a run folder, its {ARTIFACT} or one of its checkpoints"
            )
        return path
    # The artifact is the run's result; without it, the averaged weights are what would have become one.
    for name in (ARTIFACT, AVERAGED, RAW):
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(
        f"{path} holds none of {ARTIFACT}, {AVERAGED} and {RAW}; give the folder of a run that has trained"
    )


def _load_checkpoint(file: Path, device: torch.device) -> tuple[GPT, str | None, Path | None]:
    """Return the model of a checkpoint, the SHA-256 of its tokenizer and its data folder, where known."""
    tensors, config, facts = load_weights(file)
    with torch.device("meta"):  # initialization would cost seconds and be overwritten
        model = GPT(config.model)
    model.to_empty(device="cpu")
    try:
        copy_parameters(model, tensors)
    except ValueError as e:
        raise UserError(f"{file}: {e}; give a checkpoint that this code wrote") from e
    return model.prepare(device).eval(), facts.get("tokenizer_sha256"), config.data.dir


def _data_folder(config: Path) -> Path | None:
    """Return the data folder that a run's config.json names, if there is such a file and it does."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return Path(read_json(config)["data"]["dir"])
    return None


def _candidates(folders: list[Path]) -> Iterator[Tokenizer]:
    # A folder without a tokenizer, or with a damaged one, is passed over: another one may have it.
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            yield find_tokenizer(folder)


def _find(file: Path, sha256: str | None, data: Path | None) -> Tokenizer:
    """Return the tokenizer of the model in `file`, from its folder or the run's data folder."""
    # Next to the model first: a run's folder may have been moved away from its data.
    folders = [folder for folder in (file.parent, data) if folder is not None]
    others = ""
    for tokenizer in _candidates(folders):
        if sha256 in (None, file_sha256(tokenizer.path)):
            return tokenizer
        others += f" ({tokenizer.path} is another one)"
    wanted = f" with SHA-256 {sha256[:16]}..., which {file} was trained with," if sha256 else f" for {file}"
    raise FileNotFoundError(
        f"no tokenizer{wanted} in {' or '.join(map(str, folders))}{others}; give its .model file, or the "
        "folder of shards that the model was trained on (--tokenizer, tokenizer=)"
    )


def _given(file: Path, sha256: str | None, where: Path) -> Tokenizer:
    """Return the tokenizer that was asked for, checked."""
    tokenizer = find_tokenizer(where) if where.is_dir() else Tokenizer(where)
    digest = file_sha256(tokenizer.path)
    if sha256 not in (None, digest):
        raise UserError(
            f"{tokenizer.path} has SHA-256 {digest[:16]}..., {file} was trained with {str(sha256)[:16]}...; "
            f"give that run's {TOKENIZER_NAME}"
        )
    return tokenizer
