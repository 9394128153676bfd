"""The validation text of a data folder: checking it against a model, and scoring a model on all of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgolf.config import METHODS, EvaluateConfig, Method
from pgolf.data.challenge import known_text
from pgolf.data.loader import ValidationText, load_validation
from pgolf.data.manifest import NO_MANIFEST, verify_folder
from pgolf.data.shards import MANIFEST_NAME, Manifest, find_shards, shard_tokens
from pgolf.data.tokenizer import Tokenizer, find_tokenizer
from pgolf.dist import Dist
from pgolf.errors import UserError
from pgolf.evaluate.bpb import Score
from pgolf.evaluate.documents import first_documents
from pgolf.evaluate.local import local_pass
from pgolf.evaluate.phases import phased_pass
from pgolf.evaluate.predictor import Done, Pass, evaluating, read
from pgolf.evaluate.sgd import sgd_pass
from pgolf.evaluate.sliding import window_pass
from pgolf.evaluate.slot import slot_pass
from pgolf.evaluate.tilt import Tilted
from pgolf.evaluate.ttt import adapted_pass
from pgolf.files import file_sha256
from pgolf.model.gpt import GPT

if TYPE_CHECKING:
    from pgolf.evaluate.sums import Sums

PLAIN = EvaluateConfig()
"""Settings with the model's own context, for plain scores."""


@dataclass(frozen=True)
class DataFolder:
    """A data folder that was checked against its manifest and the model."""

    folder: Path
    tokenizer: Tokenizer
    sha256: str
    """SHA-256 of the tokenizer, hexadecimal."""
    manifest: Manifest | None = None
    """The manifest that the folder was checked against; None if another tool made the folder."""
    verified: bool = False
    """Whether the hashes of the training shards were checked too."""

    @classmethod
    def open(cls, folder: Path | None, *, vocab_size: int, verify: bool = False) -> DataFolder:
        """Check a data folder against its manifest and the model's vocabulary.

        Args:
            folder: folder with shards and a tokenizer.
            vocab_size: size of the model's vocabulary.
            verify: check the hashes of the training shards too (see `verify_folder`).

        Raises:
            FileNotFoundError: the folder, the tokenizer or a file of the manifest does not exist.
            ValueError: the build is unfinished, a file differs from the manifest or is not listed there, or
                the tokenizer's size is not the model's.
        """
        if folder is None:
            raise FileNotFoundError(
                "no data folder given; make one with `pgolf data shards` and pass --data DIR"
            )
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no data folder at {folder}; make one with `pgolf data shards` or pass another --data DIR"
            )
        manifest = verify_folder(folder, training=verify)
        tokenizer = find_tokenizer(folder)
        if tokenizer.vocab_size != vocab_size:
            raise UserError(
                f"{tokenizer.path} has {tokenizer.vocab_size} tokens, but model.vocab_size is "
                f"{vocab_size}; pass --model.vocab-size {tokenizer.vocab_size} or other data"
            )
        return cls(folder, tokenizer, file_sha256(tokenizer.path), manifest, verify)

    @property
    def checked(self) -> str:
        """A sentence that says what was checked of the data, for the results that use them."""
        if self.manifest is None:
            targets = sum(map(shard_tokens, find_shards(self.folder, "val"))) - 1
            known = known_text(self.sha256, targets)
            return f"{NO_MANIFEST}; {known}" if known else NO_MANIFEST
        total = self.manifest.total("val")
        rest = (
            "the bytes"
            if self.verified
            else "SHA-256, documents and bytes (data.verify checks the first two)"
        )
        return (
            f"{self.folder} is as its {MANIFEST_NAME} says: validation text of {total.documents:,} "
            f"documents, {total.tokens:,} tokens, {total.bytes:,} bytes; not checked: {rest} of the training "
            "text"
        )

    def facts(self) -> dict[str, Any]:
        """Return the entry of a summary: SHA-256 of the manifest, and its counts of the validation text.

        It is `{"manifest": None}` for a folder without a manifest.
        """
        if self.manifest is None:
            return {"manifest": None}
        total = self.manifest.total("val")
        counts = {key: getattr(total, key) for key in ("tokens", "documents", "bytes")}
        return {"manifest": file_sha256(self.folder / MANIFEST_NAME), "validation": counts}

    def validation(self, *, documents: int = 0) -> ValidationText:
        """Return the validation text, or only its first `documents` documents if that is not 0."""
        text = load_validation(self.folder, tokenizer=self.tokenizer, vocab_size=self.tokenizer.vocab_size)
        return first_documents(text, self.tokenizer.bos_id, documents) if documents else text


def score_model(model: GPT, data_folder: DataFolder, batch_tokens: int, dist: Dist) -> Score:
    """Return the plain score of `model` on the whole validation text of `data_folder`, with checked counts.

    Args:
        model: prepared on dist.device.
        data_folder: opened with the size of the model's vocabulary.
        batch_tokens: tokens per forward pass (at least one segment); it changes speed and memory, not the
            score.
        dist: ranks that share the work.
    """
    text = data_folder.validation()
    return score_as("plain", model, data_folder, text, dist, batch_tokens=batch_tokens)


def score_as(
    way: Method,
    model: GPT,
    data_folder: DataFolder,
    text: ValidationText,
    dist: Dist,
    *,
    batch_tokens: int,
    settings: EvaluateConfig = PLAIN,
    sums: Sums | None = None,
    compiled: bool | None = None,
) -> Score:
    """Return the score of `model` on `text`, with checked counts.

    Args:
        way: "plain" cuts documents into segments, "sliding" moves a window over each document, "local" reads
            each document once with attention that reaches back so far, "ttt" lets adapters learn each
            document, "sgd" lets the model learn each chunk of the text, "phased" lets
            adapters learn each document and the model learn scored documents, "slot" and "causal_slot" fit
            a shift of the states to each window, the former to what it then scores, which is not allowed.
        model: prepared on dist.device.
        text: from `data_folder.validation`.
        dist: ranks that share the work.
        batch_tokens: tokens per forward pass of plain and sliding windows.
        settings: stride, context, and the settings of each way.
        sums: keeps sums on disk, and has those of an interrupted evaluation, see `sums.py`.
        compiled: as in `adapted_pass`, for "ttt" and "phased".
    """
    bos_id = data_folder.tokenizer.bos_id
    more: dict[str, Any] = {"batch_tokens": batch_tokens, "settings": settings, "done": sums and sums.done}
    more["compiled"] = compiled
    with evaluating(model), widened(model, settings.context):
        run = start_pass(way, model, text, dist, bos_id=bos_id, **more)
        return read(run, text, dist, bos_id=bos_id, sums=sums)


def start_pass(
    way: Method,
    model: GPT,
    text: ValidationText,
    dist: Dist,
    *,
    bos_id: int,
    batch_tokens: int,
    settings: EvaluateConfig,
    whole: int = 0,
    done: Done | None = None,
    compiled: bool | None = None,
) -> Pass:
    """Return what `predictor.read` needs to score `text`.

    Args:
        way, model, text, dist, batch_tokens, settings: as in `score_as`.
        bos_id: the id that starts a document.
        whole: see `sgd_pass`.
        done: see `Done`.
        compiled: as in `adapted_pass`, for "ttt" and "phased".

    Raises:
        ValueError: the text has no BOS, or a setting does not fit.
    """
    if way not in METHODS:
        raise UserError(f"a way to score must be one of {METHODS}, got {way!r}")
    context = settings.context or model.config.max_context
    where: dict[str, Any] = {"bos_id": bos_id, "context": context, "done": done}
    windows: dict[str, Any] = {
        "batch_tokens": batch_tokens,
        "stride": context if way == "plain" else settings.stride,
    }
    if way == "local":
        run = local_pass(model, text, dist, batch_tokens=batch_tokens, **where)
    elif way == "ttt":
        run = adapted_pass(model, text, dist, config=settings.adapters, compiled=compiled, **where)
    elif way == "phased":
        run = phased_pass(model, text, dist, phases=settings.phases, compiled=compiled, **where)
    elif way == "sgd":
        run = sgd_pass(model, text, dist, config=settings.sgd, whole=whole, **where, **windows)
    elif way in ("slot", "causal_slot"):
        causal = way == "causal_slot"
        run = slot_pass(model, text, dist, config=settings.slot, causal=causal, **where, **windows)
    else:
        run = window_pass(model, text, dist, **where, **windows)
    if not settings.tilt.on:
        return run
    tilted = Tilted(run.predictor, text, settings.tilt, dist.device)
    return run._replace(predictor=tilted, label=f"{run.label} with tilt")


@contextmanager
def widened(model: GPT, context: int) -> Iterator[None]:
    """Let a model take segments of `context` tokens for a while, if that is more than it was made for."""
    config = model.config
    if context > config.max_context:  # else it stays the same object, which compiled blocks may depend on
        model.config = replace(config, max_context=context)
    try:
        yield
    finally:
        model.config = config
