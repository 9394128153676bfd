"""AdamW on one group of parameters with one learning rate; the same pass moves their averages.

The class owns its state: tensors that are allocated once and zeroed in place, each with a name, so that they
can be saved without pickle. The numbers that change from step to step are on the device, so a CUDA graph can
replay the step. Every rank holds the whole state and takes the same step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pgolf.config import AdamConfig
from pgolf.ops import AdamRule, AdamTensor, adam_step
from pgolf.optim.ema_nesterov import EmaNesterov


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
        ahead: EmaNesterov | None = None,
    ) -> None:
        """Take parameters, their gradients and averages by name, float32; `step` works on them in place.

        With `ahead` each step keeps them ahead of their weights.
        """
        self._rule = AdamRule(weight_decay, config.beta1, config.beta2, config.eps)
        self._tensors = {
            name: AdamTensor(
                param=p.detach(),
                grad=grads[name],
                mean=torch.zeros_like(p),
                square=torch.zeros_like(p),
                average=None if averages is None else averages[name],
                base=None if ahead is None else ahead.base[name],
                velocity=None if ahead is None else ahead.velocity[name],
            )
            for name, p in params.items()
        }

    @torch.no_grad()
    def step(self, lr: Tensor, hyper: Tensor, corrections: Tensor) -> None:
        """Apply and zero the gradients and move the averages, without synchronization.

        Args:
            lr, hyper: as in `pgolf.ops.adam_step`.
            corrections: of the bias of both moments, from `pgolf.ops.clip_scale`.
        """
        adam_step(list(self._tensors.values()), lr, hyper, corrections, self._rule)

    def reset(self) -> None:
        """Zero both moments, in place."""
        for tensor in self.state().values():
            tensor.zero_()

    def state(self) -> dict[str, Tensor]:
        """Return the live moments `mean.<name>` and `square.<name>`, of the shapes of the parameters."""
        state = {f"mean.{name}": t.mean for name, t in self._tensors.items()}
        return state | {f"square.{name}": t.square for name, t in self._tensors.items()}
