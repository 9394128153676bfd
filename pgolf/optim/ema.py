"""Exponential moving average of the weights, in float32.

The decay comes from `schedule.ema_decay`, which ties the horizon to the length of the run; there is no bias
correction: the average starts at the initial weights, and by the end nothing is left of them.
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
        """Start the averages as copies of `tensors`, which are watched in place from now on."""
        self._live = {name: t.detach() for name, t in tensors.items()}
        self._average = {name: t.to(torch.float32, copy=True) for name, t in self._live.items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move the averages towards the tensors; a few launches for all of them, no synchronization.

        Raises:
            ValueError: decay is outside [0, 1].
        """
        self.check_update(decay)
        if self._average:
            live = [t.float() for t in self._live.values()]
            torch._foreach_lerp_(list(self._average.values()), live, 1 - decay)

    def check_update(self, decay: float) -> None:
        """Raise what `update` raises; for an optimizer that moves the averages itself."""
        if not 0 <= decay <= 1:
            raise ValueError(f"ema: decay must be in [0, 1], got {decay}")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The averages themselves (not copies) by name, float32."""
        return dict(self._average)

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the present values of the tensors, as after warm-up."""
        for name, average in self._average.items():
            average.copy_(self._live[name])

    @torch.no_grad()
    def copy_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the averages into `tensors` (the same names; cast to their dtype).

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
        """Take over averages by name.

        Raises:
            ValueError: names or shapes differ.
        """
        _check_like(self._average, state, "ema: load_state_dict")
        for name, average in self._average.items():
            average.copy_(state[name])


def _check_like(own: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str) -> None:
    if own.keys() != other.keys():
        raise ValueError(
            f"{what}: names differ; missing {sorted(own.keys() - other.keys())}, "
            f"unknown {sorted(other.keys() - own.keys())}"
        )
    for name, tensor in own.items():
        if tensor.shape != other[name].shape:
            raise ValueError(
                f"{what}: {name} must have shape {tuple(tensor.shape)}, got {tuple(other[name].shape)}"
            )
