"""A folder of shards as a test: checked against a model, and scored over the whole of its validation text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pgolf.config import TttConfig
from pgolf.data.loader import ValidationText, load_validation, validation_batches, validation_totals
from pgolf.data.shards import file_sha256
from pgolf.data.tokenizer import Tokenizer, find_tokenizer
from pgolf.dist import Dist
from pgolf.evaluate.bpb import Score, evaluate_bpb
from pgolf.evaluate.documents import first_documents
from pgolf.evaluate.sliding import score_sliding
from pgolf.evaluate.ttt import score_adapted
from pgolf.model.gpt import GPT


@dataclass(frozen=True)
class Corpus:
    """A data folder that has been checked against the model."""

    folder: Path
    tokenizer: Tokenizer
    sha256: str

    @classmethod
    def open(cls, folder: Path | None, *, vocab_size: int) -> Corpus:
        """Check a data folder against the model's vocabulary.

        Raises:
            FileNotFoundError: no folder, no tokenizer.
            ValueError: the tokenizer's size is not the model's.
        """
        if folder is None:
            raise FileNotFoundError(
                "no data folder given; make one with `pgolf data shards` and pass --data DIR"
            )
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no data folder at {folder}; make one with `pgolf data shards` or pass another --data DIR"
            )
        tokenizer = find_tokenizer(folder)
        if tokenizer.vocab_size != vocab_size:
            raise ValueError(
                f"{tokenizer.path} has {tokenizer.vocab_size} pieces, model.vocab_size is "
                f"{vocab_size}; pass --model.vocab-size {tokenizer.vocab_size} or other data"
            )
        return cls(folder, tokenizer, file_sha256(tokenizer.path))

    def validation(self, *, documents: int = 0) -> ValidationText:
        """Return the validation text, or only its first `documents` documents."""
        text = load_validation(self.folder, tokenizer=self.tokenizer, vocab_size=self.tokenizer.vocab_size)
        return first_documents(text, self.tokenizer.bos_id, documents) if documents else text


def score_model(model: GPT, corpus: Corpus, batch_tokens: int, dist: Dist) -> Score:
    """Return bits per byte of `model` over the whole validation text of `corpus`, counts asserted.

    Args:
        model: prepared on dist.device.
        corpus: opened with the model's vocabulary.
        batch_tokens: tokens of a forward pass (at least one segment); speed and memory, not the score.
        dist: ranks that share the work.
    """
    config = model.config
    tokens, size = validation_totals(corpus.folder, tokenizer=corpus.tokenizer)
    batches = validation_batches(
        corpus.folder,
        tokenizer=corpus.tokenizer,
        bos_id=corpus.tokenizer.bos_id,
        max_context=config.max_context,
        batch_tokens=max(batch_tokens, config.max_context),
        vocab_size=config.vocab_size,
        rank=dist.rank,
        world_size=dist.world_size,
        device=dist.device,
    )
    return evaluate_bpb(model, batches, dist, expected_tokens=tokens, expected_bytes=size)


def score_as(
    mode: Literal["plain", "sliding", "ttt"],
    model: GPT,
    corpus: Corpus,
    text: ValidationText,
    dist: Dist,
    *,
    batch_tokens: int,
    stride: int,
    ttt: TttConfig,
) -> Score:
    """Return bits per byte of `model` over `text`, counts asserted.

    plain cuts documents into segments of max_context (a window that moves on by its own length), sliding
    moves it by `stride`, ttt adapts to each document.

    Args:
        mode: which. model: prepared on dist.device. text: of `corpus.validation`. dist: ranks that share.
        batch_tokens: tokens of a forward pass of plain and sliding.
        stride: tokens that a window of sliding scores. ttt: settings of ttt.
    """
    bos_id, context = corpus.tokenizer.bos_id, model.config.max_context
    if mode == "ttt":
        return score_adapted(model, text, dist, bos_id=bos_id, config=ttt)
    return score_sliding(
        model,
        text,
        dist,
        bos_id=bos_id,
        context=context,
        stride=context if mode == "plain" else stride,
        batch_tokens=batch_tokens,
    )
