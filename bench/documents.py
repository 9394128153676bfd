"""Scores of a text, and the loss of each of its documents, with which two scores are compared."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pgolf.config import EvaluateConfig, Method
from pgolf.data.loader import ValidationText
from pgolf.dist import Dist
from pgolf.evaluate.bpb import Score
from pgolf.evaluate.documents import document_bounds
from pgolf.evaluate.sums import open_sums
from pgolf.evaluate.validation import DataFolder, score_as
from pgolf.model.gpt import GPT
from pgolf.stats import Paired, compare_paired


@dataclass
class Documents:
    """A text that is scored in several ways, with the sums of its documents; on one rank."""

    folder: DataFolder
    text: ValidationText
    dist: Dist
    batch_tokens: int
    """Tokens per forward pass of windows."""
    bits: float = field(init=False)
    """Bytes of the text times ln 2: nats per this are bits per byte."""
    _starts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.bits = float(self.text.bytes[1:].sum()) * math.log(2)
        self._starts, _ = document_bounds(self.text, self.folder.tokenizer.bos_id)

    def score(
        self,
        model: GPT,
        way: Method = "plain",
        settings: EvaluateConfig | None = None,
        *,
        compiled: bool | None = None,
    ) -> tuple[Score, NDArray[np.float64]]:
        """Return the score of a model and the sum of the losses of each document, nats.

        Args:
            compiled: as in `score_as`.
        """
        facts = {"way": way}
        with tempfile.TemporaryDirectory() as folder:
            with open_sums(Path(folder), facts, self.dist) as sums:
                score = score_as(
                    way,
                    model,
                    self.folder,
                    self.text,
                    self.dist,
                    batch_tokens=self.batch_tokens,
                    settings=settings or EvaluateConfig(),
                    sums=sums,
                    compiled=compiled,
                )
            with open_sums(Path(folder), facts, self.dist) as sums:
                found = sums.before
        document = np.searchsorted(self._starts, found.first, side="right") - 1
        return score, np.bincount(document, weights=found.nats.numpy(), minlength=self._starts.size)

    def against(self, nats: NDArray[np.float64], base: NDArray[np.float64]) -> Paired:
        """Compare two scores document by document; the mean difference is that of the whole text in bpb."""
        unit = nats.size / self.bits
        return compare_paired(nats * unit, base * unit)
