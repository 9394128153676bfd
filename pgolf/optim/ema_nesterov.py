"""EMA-Nesterov: any optimizer, stepped ahead of the weights along an average of their displacements.

    x <- A(x + s v);    v <- gamma v + (1 - gamma) (x_new - x)

`A` is a whole step of the optimizer: gradients are taken at x + s v, and the step is made from there. A
displacement that stays the same, u per step, grows to u / (1 - s). Between steps the parameters hold x + s v;
`base` holds x. The passes that write the weights, `muon_apply` and `adam_step`, compute v and x + s v, too,
with s of the next step.
Source: arXiv 2605.25395. Differs: gamma is given by fractions of the run, exp(-delta / horizon), so that the
velocity has the same memory in runs of any length, and s follows the learning rate (`ema_nesterov_shift`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EmaNesterov:
    """Velocities and unshifted weights of named parameters, which the operators of a step move in place.

    Attributes:
        base: x by name, float32. velocity: v by name, float32.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        """Begin at the present values of `params` with velocities of 0."""
        self._params = {name: p.detach() for name, p in params.items()}
        self.base = {name: p.clone() for name, p in self._params.items()}
        self.velocity = {name: torch.zeros_like(p) for name, p in self._params.items()}

    @torch.no_grad()
    def reset(self) -> None:
        """Begin again at the present values of the parameters, with velocities of 0."""
        for name, p in self._params.items():
            self.base[name].copy_(p)
            self.velocity[name].zero_()

    @torch.no_grad()
    def settle(self) -> None:
        """Put x into the parameters, after the last step."""
        for name, p in self._params.items():
            p.copy_(self.base[name])

    @contextmanager
    def at_base(self) -> Iterator[None]:
        """Put x into the parameters for the block, and what they held back after it."""
        held = {name: p.clone() for name, p in self._params.items()}
        self.settle()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self._params.items():
                    p.copy_(held[name])

    def state(self) -> dict[str, Tensor]:
        """Return the live tensors `base.<name>` and `velocity.<name>`."""
        state = {f"base.{name}": t for name, t in self.base.items()}
        return state | {f"velocity.{name}": t for name, t in self.velocity.items()}
