"""Exponential moving average of the weights, in float32.

`schedule.ema_decay` computes the decay from the length of the run. There is no bias correction: the average
starts as the initial weights, whose share in it is negligible by the end of a run.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Ema:
    """Float32 averages of named tensors.

    average <- decay * average + (1 - decay) * tensor
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Start the averages as copies of `tensors`; later updates read the same tensors again."""
        self._live = {name: t.detach() for name, t in tensors.items()}
        self._average = {name: t.to(torch.float32, copy=True) for name, t in self._live.items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move the averages towards the present values of the tensors, without synchronization.

        Raises:
            ValueError: decay is outside [0, 1].
        """
        self.check_update(decay)
        if self._average:
            live = [t.float() for t in self._live.values()]
            torch._foreach_lerp_(list(self._average.values()), live, 1 - decay)

    def check_update(self, decay: float) -> None:
        """Raise the errors of `update` without moving anything; for optimizers that move the averages."""
        if not 0 <= decay <= 1:
            raise ValueError(f"ema: decay must be in [0, 1], got {decay}")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The averages themselves (not copies) by name, float32."""
        return dict(self._average)

    @torch.no_grad()
    def restart(self) -> None:
        """Set the averages to the present values of the tensors; used after the warm-up."""
        for name, average in self._average.items():
            average.copy_(self._live[name])

    @torch.no_grad()
    def copy_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the averages into `tensors`, which have the same names, cast to the dtype of each tensor.

        Raises:
            ValueError: names or shapes differ.
        """
        _check_like(self._average, tensors, "ema: copy_to")
        for name, average in self._average.items():
            tensors[name].copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the averages by name, float32."""
        return {name: t.clone() for name, t in self._average.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load averages by name, in place.

        Raises:
            ValueError: names or shapes differ.
        """
        _check_like(self._average, state, "ema: load_state_dict")
        for name, average in self._average.items():
            average.copy_(state[name])


def _check_like(own: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str) -> None:
    if own.keys() != other.keys():
        raise ValueError(
            f"{what}: the tensors must have the names of the averages; missing "
            f"{sorted(own.keys() - other.keys())}, unknown {sorted(other.keys() - own.keys())}"
        )
    for name, tensor in own.items():
        if tensor.shape != other[name].shape:
            raise ValueError(
                f"{what}: {name} must have shape {tuple(tensor.shape)}, got {tuple(other[name].shape)}"
            )
