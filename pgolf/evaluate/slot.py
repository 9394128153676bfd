"""SLOT: a shift of the last states, fitted anew for every window; as published, and a form that is allowed.

A sliding window moves over each document as in `sliding.py`. The states h of a window are computed once, then
a shift d of the model's width, one for all tokens of the window, takes `steps` steps of AdamW (no decay) on
the mean loss of the distributions from h + d, and the window's last `stride` tokens are scored with h + d.

- `slot` fits d to all targets of the window, those that it then scores among them, as PR #1298 did. So a
  distribution depends on its own token and on later ones (C1 and C3 of the challenge's issue 1017): it is not
  allowed, and every output says so. It exists to repeat a published figure.
- `causal_slot` fits d to the targets before the first one that the window scores, which earlier windows have
  scored. The first window of a document has none of them, so its shift is 0. It meets all conditions.

Nothing is kept from one window to the next. Windows are padded to one length per batch, which changes no
score. PR #1298 took windows from the stream of all documents (here no window crosses the start of one) and
the mean loss over a batch of windows. A shift learns from its own window alone in both forms, and AdamW
depends on the scale of the loss by its eps (1e-8) alone.
Legend: `K` windows, `W` tokens of the longest one, `D` width.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgolf.config import SlotConfig
from pgolf.data.loader import IGNORED_TARGET, ValidationText
from pgolf.dist import Dist
from pgolf.evaluate.documents import document_bounds
from pgolf.evaluate.heads import Head
from pgolf.evaluate.predictor import Done, Inputs, Pass, Question, Turn
from pgolf.evaluate.sliding import Fixed, sliding_windows
from pgolf.model.gpt import GPT
from pgolf.model.uncompiled import uncompiled


class CausalSlot(Fixed):
    """A model whose last states are shifted by what was learned from the context of each window.

    Args:
        model: as for `Fixed`.
        config: settings.
    """

    def __init__(self, model: GPT, config: SlotConfig) -> None:
        super().__init__(model)
        self._config = config

    def predict(self, inputs: Inputs) -> Head:
        """Return the distributions in the last `asked` tokens of each window."""
        head, width = super().predict(inputs), inputs.width
        states = head.hidden.view(-1, width, head.hidden.shape[-1])
        weight = head.weight.detach()
        shift = self._fit(states, weight, head.cap, self._learned(inputs))
        last = (states[:, width - inputs.asked :] + shift.to(states.dtype)).flatten(0, 1)
        return Head(last, weight, head.cap)

    def _learned(self, inputs: Inputs) -> Tensor:
        """Return the targets `(K, W)` to learn from: those before the asked ones, else -100."""
        ids = inputs.ids.view(-1, inputs.width)
        targets = torch.full_like(ids, IGNORED_TARGET)
        known = inputs.width - inputs.asked
        targets[:, :known] = ids[:, 1 : known + 1]
        return targets

    def _fit(self, states: Tensor, weight: Tensor, cap: float, targets: Tensor) -> Tensor:
        """Return the shift `(K, 1, D)` float32 of each window; 0 where it has nothing to learn from."""
        shift = states.new_zeros((states.shape[0], 1, states.shape[-1]), dtype=torch.float32)
        counts = (targets != IGNORED_TARGET).sum(dim=1)
        if not int(counts.max()):
            return shift
        shift.requires_grad_()
        adam = torch.optim.AdamW([shift], lr=self._config.lr, weight_decay=0.0)
        for _ in range(self._config.steps):
            with torch.enable_grad():
                moved = (states + shift.to(states.dtype)).flatten(0, 1)
                nats = Head(moved, weight, cap).nats(targets.flatten()).view_as(targets)
                # A sum over windows, so that a shift does not depend on the other windows.
                loss = (nats.sum(dim=1) / counts.clamp_min(1)).sum()
                (shift.grad,) = torch.autograd.grad(loss, [shift])
            adam.step()
        return shift.detach()


class Slot(CausalSlot):
    """SLOT as published, which is not allowed: it learns from the targets that it is asked for, too.

    Args:
        model, config: as for `CausalSlot`.
        tokens: `(n,)` int64, the whole text, in which it looks up the targets.
    """

    def __init__(self, model: GPT, config: SlotConfig, tokens: Tensor) -> None:
        super().__init__(model, config)
        self._tokens = tokens

    def _learned(self, inputs: Inputs) -> Tensor:
        targets, at = super()._learned(inputs), inputs.positions
        asked = torch.where(at < 0, IGNORED_TARGET, self._tokens[at.clamp_min(0) + 1])
        targets[:, inputs.width - inputs.asked :] = asked.view(-1, inputs.asked)
        return targets


def slot_pass(
    model: GPT,
    text: ValidationText,
    dist: Dist,
    *,
    bos_id: int,
    context: int,
    stride: int,
    batch_tokens: int,
    config: SlotConfig,
    causal: bool,
    done: Done | None = None,
) -> Pass:
    """Return the pass of SLOT over a text.

    Args:
        model, text, dist, bos_id, context, stride, batch_tokens: as in `window_pass`.
        config: settings.
        causal: fit to scored targets only, which is allowed.
        done: see `Done`; such questions are left out.

    Raises:
        ValueError: as in `sliding_windows`.
    """
    windows = sliding_windows(*document_bounds(text, bos_id), context=context, stride=stride)
    questions = slot_questions(windows, context, stride, batch_tokens)
    turns = [Turn([question]) for question in questions if done is None or not done(question.windows)]
    turns = turns[dist.rank :: dist.world_size]
    plain = uncompiled(model, context=context)  # the number of tokens changes from batch to batch
    if causal:
        return Pass(CausalSlot(plain, config), turns, f"causal slot, stride {stride}")
    tokens = torch.from_numpy(text.tokens.astype(np.int64)).to(dist.device)
    return Pass(Slot(plain, config, tokens), turns, f"slot, stride {stride}")


def slot_questions(
    windows: NDArray[np.int64], context: int, stride: int, batch_tokens: int
) -> list[Question]:
    """Return windows in padded batches: first those that are scored as a whole, the longest first.

    Args:
        windows: `(K, 3)`, from `sliding_windows`.
        context, stride: of the windows.
        batch_tokens: largest number of tokens of a batch; one window may have more.
    """
    whole = windows[:, 0] == windows[:, 1]
    sizes = windows[:, 2] - windows[:, 0]
    order = np.argsort(-sizes[whole], kind="stable")
    questions: list[Question] = []
    for kind, before in ((windows[whole][order], 0), (windows[~whole], context - stride)):
        at = 0
        while at < len(kind):
            width = int((kind[at:, 2] - kind[at:, 0]).max())
            batch = kind[at : at + max(1, batch_tokens // width)]
            questions.append(Question(batch, width, asked=width - before))
            at += len(batch)
    return questions
