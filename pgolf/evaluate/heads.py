"""The distributions that a model gives: its output projection and soft cap, with the adapters of documents.

Legend: `R` rows, `D` width, `V` vocab.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.data.loader import IGNORED_TARGET
from pgolf.model.lora import Adapters
from pgolf.ops import linear_softcap_ce


def unrounded_logits(hidden: Tensor, table: Tensor) -> Tensor:
    """Return hidden table^T, `(R, V)`, in float32, or in float64 for such input.

    Logits rounded to bfloat16 have errors of up to 0.03 at 10; about half the variance of the errors adds to
    the mean loss: 1e-4 nats. Products in float32 are slow, but this one is small next to the blocks'.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return F.linear(hidden.to(dtype), table.to(dtype))


class Head(NamedTuple):
    """Distributions of a model as it is."""

    hidden: Tensor
    """`(R, D)` normed states."""
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

    The fused loss cannot be used, because the adapters add to the logits. PyTorch operators are fast enough,
    as a chunk has few rows compared with its window.
    """

    hidden: Tensor
    """`(R, D)` normed states."""
    table: Tensor
    """`(V, D)` in the dtype of `hidden`."""
    cap: float
    caps: Tensor | None = None
    """`(2,)` float32, a cap for logits above 0 and one for those below, instead of `cap`."""
    adapters: Adapters | None = None

    def nats(self, targets: Tensor) -> Tensor:
        """Return the losses of targets, see `Distributions`."""
        return F.cross_entropy(self._logits(), targets, ignore_index=IGNORED_TARGET, reduction="none")

    def log_probabilities(self, rows: Tensor) -> Tensor:
        """Return the logarithms of all probabilities, see `Distributions`."""
        return F.log_softmax(self._logits()[rows], dim=-1)

    def _logits(self) -> Tensor:
        logits = unrounded_logits(self.hidden, self.table)
        extra = None if self.adapters is None else self.adapters.head(self.hidden)
        logits = logits if extra is None else logits + extra
        if self.caps is None:
            return self.cap * torch.tanh(logits / self.cap)
        cap = torch.where(logits > 0, self.caps[0], self.caps[1])
        return cap * torch.tanh(logits / cap)
