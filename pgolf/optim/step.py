"""The optimizer of a run: reduce, clip, AdamW, Muon, zero - one call, no host synchronization.

Gradients live in two flat float32 buffers that `Parameter.grad` points into: the banks, and everything that
is replicated (embedding and scalars, reduced in one all-reduce). Backward passes accumulate into them;
nothing is reallocated. The norm is taken of the averaged gradient, the same on every rank, and every element
counts once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pgolf.config import OptimConfig
from pgolf.dist import Dist
from pgolf.ops import newton_schulz
from pgolf.optim.adam import AdamW
from pgolf.optim.flat import flat_views
from pgolf.optim.groups import split_parameters
from pgolf.optim.muon import BankMuon, Polar, by_size
from pgolf.optim.schedule import lr_multiplier, muon_momentum


class Optimizer:
    """Muon on the banks, AdamW on embedding and scalars, with one clip and one schedule.

    Replicas that start equal stay equal bit for bit: every rank applies the same gathered updates and reduced
    gradients with the same `frac`.

    Attributes:
        grad_norm: `()` float32 on the device; norm of the last step's averaged gradient before clipping.
    """

    def __init__(
        self, model: nn.Module, config: OptimConfig, dist: Dist, *, polar: Polar = newton_schulz
    ) -> None:
        """Take over the gradients of `model`, which must already be on `dist.device`.

        Raises:
            ValueError, TypeError: see `split_parameters`. ValueError: a parameter is on another device, or an
                unknown coefficient table.
        """
        groups = split_parameters(model)
        banks, replicated = by_size(groups.banks), {**groups.embed, **groups.scalars}
        self._config, self._dist = config, dist
        self._params: dict[str, Tensor] = {**banks, **replicated}
        for name, p in self._params.items():
            if p.device.type != dist.device.type:
                raise ValueError(
                    f"parameter {name} must be on {dist.device}, got {p.device}; move the model first"
                )
        self._bank_grad, bank_grads = _gradients(banks, dist.device)
        self._rest_grad, rest_grads = _gradients(replicated, dist.device)
        self._grads = {**bank_grads, **rest_grads}
        for name, p in self._params.items():
            p.grad = self._grads[name]
        self._muon = BankMuon(banks, self._bank_grad, bank_grads, config.muon, dist, polar=polar)
        adam = config.adam
        self._embed = AdamW(groups.embed, rest_grads, adam, weight_decay=adam.embed_weight_decay)
        self._scalars = AdamW(groups.scalars, rest_grads, adam, weight_decay=adam.scalar_weight_decay)
        self.grad_norm = torch.zeros((), device=dist.device)

    @torch.no_grad()
    def step(self, frac: float) -> None:
        """Apply and zero the accumulated gradients, with the schedules at `frac` of the run.

        Every rank calls it with the same `frac`. A gradient that is not finite makes the weights not finite;
        look at the loss or at `grad_norm`.

        Raises:
            RuntimeError: a `Parameter.grad` was replaced (by `zero_grad(set_to_none=True)`, for example), so
                gradients would be lost.
        """
        self._check_attached()
        waiting = [*self._muon.reduce(), self._dist.all_reduce_avg(self._rest_grad)]
        for pending in waiting:
            pending.wait()
        self._clip()
        config = self._config
        factor = lr_multiplier(frac, config)
        self._embed.step(factor * config.adam.embed_lr)
        self._scalars.step(factor * config.adam.scalar_lr)
        self._muon.step(factor * config.muon.lr, momentum=muon_momentum(frac, config.muon))
        self.zero_grad()

    def _clip(self) -> None:
        """Scale all reduced gradients by min(1, clip / (norm + 1e-6)), on the device."""
        norms = [
            torch.linalg.vector_norm(g, dtype=torch.float32) for g in (self._muon.shard, self._rest_grad)
        ]
        sharded = self._dist.all_reduce(norms[0].square())
        self.grad_norm = (sharded + norms[1].square()).sqrt()
        if self._config.grad_clip > 0:
            factor = (self._config.grad_clip / (self.grad_norm + 1e-6)).clamp(max=1.0)
            self._muon.shard.mul_(factor)
            self._rest_grad.mul_(factor)

    def zero_grad(self) -> None:
        """Zero the gradients in place."""
        self._bank_grad.zero_()
        self._rest_grad.zero_()

    def reset(self) -> None:
        """Forget everything, as after warm-up: momentum, moments, step counts and gradients become zero."""
        self._muon.reset()
        self._embed.reset()
        self._scalars.reset()
        self.zero_grad()
        self.grad_norm = torch.zeros_like(self.grad_norm)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of all state as a flat dict of tensors, the same on every rank and at any world size.

        Keys: `muon.momentum.<bank>` `(matrices, rows, cols)`, `embed.` and `scalars.` with `mean.<name>`,
        `square.<name>`, `steps`. A collective (the momentum is gathered): every rank calls it, one may save
        it.
        """
        state = {f"muon.{key}": t for key, t in self._muon.state().items()}
        state.update({key: t.clone() for key, t in self._replicated_state().items()})
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned, on any number of ranks; no collective.

        Raises:
            ValueError: names or shapes are not those of this model.
        """
        own = self._replicated_state()
        expected = {key: t.shape for key, t in own.items()}
        expected.update({f"muon.momentum.{name}": shape for name, shape in self._muon.shapes().items()})
        if expected.keys() != state.keys():
            raise ValueError(
                f"optimizer state has other names than this model: missing "
                f"{sorted(expected.keys() - state.keys())}, unknown {sorted(state.keys() - expected.keys())}"
            )
        for key, shape in expected.items():
            if state[key].shape != shape:
                raise ValueError(
                    f"optimizer state {key} must have shape {tuple(shape)}, got {tuple(state[key].shape)}"
                )
        for key, tensor in own.items():
            tensor.copy_(state[key])
        self._muon.load({k.removeprefix("muon."): t for k, t in state.items() if k.startswith("muon.")})

    def _replicated_state(self) -> dict[str, Tensor]:
        groups = {"embed": self._embed, "scalars": self._scalars}
        return {f"{prefix}.{key}": t for prefix, adam in groups.items() for key, t in adam.state().items()}

    def _check_attached(self) -> None:
        for name, p in self._params.items():
            if p.grad is not self._grads[name]:
                raise RuntimeError(
                    f"the gradient of {name} was replaced; step() zeroes gradients itself, so do not call "
                    "model.zero_grad() or assign .grad"
                )


def _gradients(params: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    return flat_views(
        {name: tuple(p.shape) for name, p in params.items()}, dtype=torch.float32, device=device
    )
