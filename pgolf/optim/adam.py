"""AdamW on one group of parameters with one learning rate, in one pass with their averages.

State that this class owns: allocated once, zeroed in place, and named, so that it can be saved without
pickle. What changes from step to step is on the device, so the step fits into a CUDA graph. Replicated:
every rank holds all of it and takes the same step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pgolf.config import AdamConfig
from pgolf.ops import AdamRule, AdamTensor, adam_step


class AdamW:
    """AdamW with decoupled weight decay.

    p <- p (1 - lr wd);  m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;
    p <- p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
    Equals `torch.optim.AdamW(params, lr, (beta1, beta2), eps, weight_decay).step()`.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        config: AdamConfig,
        *,
        weight_decay: float,
        averages: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take parameters, their gradients and averages (float32), all read and written in place."""
        self._rule = AdamRule(weight_decay, config.beta1, config.beta2, config.eps)
        self._tensors = {
            name: AdamTensor(
                param=p.detach(),
                grad=grads[name],
                mean=torch.zeros_like(p),
                square=torch.zeros_like(p),
                average=None if averages is None else averages[name],
            )
            for name, p in params.items()
        }

    @torch.no_grad()
    def step(self, lr: Tensor, hyper: Tensor, corrections: Tensor) -> None:
        """Apply and zero the gradients, move the averages; does not synchronize.

        Args: see `pgolf.ops.adam_step`; corrections of the bias from `clip_scale`.
        """
        adam_step(list(self._tensors.values()), lr, hyper, corrections, self._rule)

    def reset(self) -> None:
        """Zero both moments, in place."""
        for tensor in self.state().values():
            tensor.zero_()

    def state(self) -> dict[str, Tensor]:
        """Return the live `mean.<name>` and `square.<name>`, like the parameter."""
        state = {f"mean.{name}": t.mean for name, t in self._tensors.items()}
        return state | {f"square.{name}": t.square for name, t in self._tensors.items()}
