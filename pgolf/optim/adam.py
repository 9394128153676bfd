"""AdamW on one group of parameters with one learning rate, in one pass.

torch's own fused kernels on state that this class owns: allocated once, zeroed in place, and named, so that
it can be saved without pickle. What changes from step to step can be tensors on the device, so the step fits
into a CUDA graph. Replicated: every rank holds all of it and takes the same step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from pgolf.config import AdamConfig


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
    ) -> None:
        """Take parameters and their gradients (float32), both read in place at each step."""
        self._names = list(params)
        self._params = [params[name].detach() for name in self._names]
        self._grads = [grads[name] for name in self._names]
        self._config = config
        self._weight_decay = weight_decay
        self._mean = [torch.zeros_like(p) for p in self._params]
        self._square = [torch.zeros_like(p) for p in self._params]
        device = self._params[0].device if self._params else None
        # One counter a parameter, as the kernels want it, in one tensor, so that it is reset and saved as
        # one.
        self._steps = torch.zeros(len(self._names), dtype=torch.float32, device=device)
        self._step_views = list(self._steps.unbind())

    @torch.no_grad()
    def step(
        self, lr: float | Tensor, *, grad_divisor: Tensor | None = None, skip: Tensor | None = None
    ) -> None:
        """Apply the gradients with learning rate `lr`; does not zero them, does not synchronize.

        Args:
            lr: a number, or `()` float32 on the device.
            grad_divisor: `()` float32 on the device; the gradients are divided by it first, in place.
            skip: `()` float32 on the device; 1 leaves parameters, moments and counts as they are, 0 does not.
        """
        if not self._params:
            return
        adamw(
            self._params,
            self._grads,
            self._mean,
            self._square,
            [],
            self._step_views,
            foreach=False,
            fused=True,
            capturable=False,
            differentiable=False,
            grad_scale=grad_divisor,
            found_inf=skip,
            amsgrad=False,
            beta1=self._config.beta1,
            beta2=self._config.beta2,
            lr=lr,
            weight_decay=self._weight_decay,
            eps=self._config.eps,
            maximize=False,
        )

    def reset(self) -> None:
        """Zero both moments and the step counts, in place."""
        for tensor in self.state().values():
            tensor.zero_()

    def state(self) -> dict[str, Tensor]:
        """Return the live `mean.<name>` and `square.<name>`, like the parameter, and `steps`."""
        state = {f"mean.{name}": t for name, t in zip(self._names, self._mean, strict=True)}
        state.update({f"square.{name}": t for name, t in zip(self._names, self._square, strict=True)})
        state["steps"] = self._steps
        return state
