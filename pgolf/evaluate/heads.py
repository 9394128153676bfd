"""The distributions that a model gives: its output projection and soft cap, with the adapters of documents.

Legend: `R` rows, `D` width, `V` vocab.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.model.heads import unrounded_logits
from pgolf.model.lora import Adapters
from pgolf.ops import linear_softcap_ce, softcap_ce


class Head(NamedTuple):
    """Distributions of a model as it is."""

    hidden: Tensor
    """`(R, D)` from `GPT.hidden`, with model.logit_scale."""
    weight: Tensor
    """`(V, D)` of the output projection."""
    cap: float
    """Soft cap of the logits: they become cap * tanh(z / cap)."""

    def nats(self, targets: Tensor) -> Tensor:
        """Return the losses of targets, see `Distributions`."""
        return linear_softcap_ce(self.hidden, self.weight, targets, self.cap, reduction="none")

    def log_probabilities(self, rows: Tensor) -> Tensor:
        """Return the logarithms of all probabilities, see `Distributions`."""
        logits = unrounded_logits(self.hidden[rows], self.weight.to(self.hidden.dtype))
        return F.log_softmax(self.cap * torch.tanh(logits / self.cap), dim=-1)


class AdaptedHead(NamedTuple):
    """Distributions of a model with adapters, or with a cap that has two sides.

    The loss that is fused with the product cannot be used, because the adapters add to the logits.
    """

    hidden: Tensor
    """`(R, D)` from `GPT.hidden`, with model.logit_scale."""
    table: Tensor
    """`(V, D)` in the dtype of `hidden`."""
    cap: float
    caps: Tensor | None = None
    """`(2,)` float32, a cap for logits above 0 and one for those below, instead of `cap`."""
    adapters: Adapters | None = None

    def nats(self, targets: Tensor) -> Tensor:
        """Return the losses of targets, see `Distributions`."""
        logits, cap = self._logits()
        return softcap_ce(logits, targets, cap, reduction="none")

    def log_probabilities(self, rows: Tensor) -> Tensor:
        """Return the logarithms of all probabilities, see `Distributions`."""
        logits, cap = self._logits()
        logits = logits[rows]
        return F.log_softmax(logits if cap is None else cap * torch.tanh(logits / cap), dim=-1)

    def _logits(self) -> tuple[Tensor, float | None]:
        """Return the logits, and the cap that they have not yet."""
        extra = None if self.adapters is None else self.adapters.head(self.hidden)
        logits = unrounded_logits(self.hidden, self.table, extra)
        if self.caps is None:
            return logits, self.cap
        cap = torch.where(logits > 0, self.caps[0], self.caps[1])
        return cap * torch.tanh(logits / cap), None
