"""The optimizer of a run: one call reduces, clips, applies AdamW and Muon, averages and zeroes the gradients.

Gradients are in two flat float32 buffers, of which each `Parameter.grad` is a view: one for the banks, one
for embedding and scalars, which need a single all-reduce. Backward passes add to them; nothing is allocated
again. The norm is that of the gradient averaged over the ranks, the same on every rank. The clip is a factor
on the device, which AdamW and Muon apply as they read the gradients. If the norm is not finite, neither is
the factor, and the device skips the whole step. The host is never synchronized.

The numbers that a schedule changes are in one small tensor on the device, so a single process on CUDA
replays the step as a CUDA graph; it has ten kernels on Hopper GPUs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from pgolf.config import OptimConfig
from pgolf.dist import Dist
from pgolf.graphs import Recorder, Work, first_error
from pgolf.ops import clip_scale, square_sums
from pgolf.ops.adam_step import CLIP_STATE, NORM, SKIPPED
from pgolf.ops.muon_step import HYPER
from pgolf.optim.adam import AdamW
from pgolf.optim.bank_muon import BankMuon, Shard
from pgolf.optim.ema import Ema
from pgolf.optim.ema_nesterov import EmaNesterov
from pgolf.optim.flat import flat_views
from pgolf.optim.groups import head_blocks, split_parameters
from pgolf.optim.schedule import ema_nesterov_shift, lr_multipliers, muon_momentum, slow_decay


class Optimizer:
    """Muon on the banks and AdamW on embedding and scalars, with a common clip, schedule and average.

    Ranks that start equal stay equal bit for bit, because every rank applies the same gathered updates and
    reduced gradients with the same `frac`.

    Attributes:
        grad_norm: `()` float32 on the device; norm of the last step's averaged gradient before clipping. It
            is not finite if an element is not, or if the norm exceeds about 1e19, so that its square
            overflows float32.
        skipped: `()` float32 on the device; number of steps since the start or `reset` whose norm was not
            finite. Such a step zeroes the gradients and changes nothing else: parameters, momentum, moments
            and averages keep their values.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        dist: Dist,
        *,
        ema: Ema | None = None,
        capture: bool = True,
    ) -> None:
        """Allocate the gradients of `model`, which must already be on `dist.device`.

        Args:
            ema: averages of all trained parameters of `model`, which `step` moves; None if there are none.
            capture: replay the step as a CUDA graph if there is one process and it uses CUDA; the first call
                of `step` captures the graph.

        Raises:
            ValueError, TypeError: as in `split_parameters` and `head_blocks`.
            ValueError: a parameter is on another device or has no average in `ema`, or the coefficient table
                is unknown.
        """
        groups = split_parameters(model)
        banks, replicated = groups.banks, {**groups.embed, **groups.scalars, **groups.mudd}
        self._config, self._dist, self._ema = config, dist, ema
        self._params: dict[str, Tensor] = {**banks, **replicated}
        _check_placed(self._params, dist.device, ema)
        self._bank_grad, bank_grads = _gradients(banks, dist.device)
        self._rest_grad, rest_grads = _gradients(replicated, dist.device)
        self._grads = {**bank_grads, **rest_grads}
        for name, p in self._params.items():
            p.grad = self._grads[name]
        averages = None if ema is None else ema.tensors
        blocks = head_blocks(model, config.muon.head_pairs)
        self._nesterov = ahead = EmaNesterov(self._params) if config.ema_nesterov else None
        self._muon = BankMuon(
            banks,
            self._bank_grad,
            bank_grads,
            config.muon,
            dist,
            averages=averages,
            ahead=ahead,
            blocks=blocks,
        )
        adam = config.adam
        # In the order in which `_set` sends their learning rates; few models have the last group.
        self._adam = {
            name: AdamW(group, rest_grads, adam, weight_decay=decay, averages=averages, ahead=ahead)
            for name, group, decay in (
                ("embed", groups.embed, adam.embed_weight_decay),
                ("scalars", groups.scalars, adam.scalar_weight_decay),
                ("mudd", groups.mudd, adam.scalar_weight_decay),
            )
            if group or name != "mudd"
        }
        # The hyperparameters of a step, the learning rates of `_adam`, Muon's slow decay.
        self._hyper = torch.zeros(HYPER + 4, device=dist.device)
        self._corrections = torch.zeros(2, device=dist.device)
        self._counts = torch.zeros(CLIP_STATE, device=dist.device)
        self.grad_norm, self.skipped = self._counts[NORM], self._counts[SKIPPED]
        self._replay: Work | None = None
        self._capture_next = capture and dist.device.type == "cuda" and dist.world_size == 1

    @torch.no_grad()
    def step(self, frac: float, *, ema_decay: float | None = None, delta: float | None = None) -> None:
        """Apply and zero the accumulated gradients, with the schedules at `frac` of the run.

        Every rank must call it with the same arguments. If a gradient is not finite, the device skips the
        step and adds 1 to `skipped`.

        Args:
            frac: fraction of the run, 0 to 1.
            ema_decay: decay of the averages in this step, as in `Ema.update`; None does not move them.
            delta: fraction of the run that the step before took, for EMA-Nesterov's velocity, which None does
                not move, and for momentum_age and slow_age.

        Raises:
            RuntimeError: a `Parameter.grad` was replaced (by `zero_grad(set_to_none=True)`, for example), so
                that its gradients would be lost.
            ValueError: `ema_decay` is outside [0, 1], or was given without `ema`.
        """
        self._check_attached()
        self._set(frac, ema_decay, delta)
        if self._replay is not None:
            self._replay()
        else:
            self._launch()
            if self._capture_next:
                self._capture()

    def _set(self, frac: float, ema_decay: float | None, delta: float | None = None) -> None:
        """Send this step's numbers to the device.

        The source is unpinned memory, which CUDA copies before it returns, so it may be freed at once.
        """
        if ema_decay is not None:
            if self._ema is None:
                raise ValueError("ema_decay needs averages; pass ema=Ema(...) to Optimizer")
            self._ema.check_update(ema_decay)
        config, factors = self._config, lr_multipliers(frac, self._config)
        muon, adam = config.muon, config.adam
        numbers = [
            factors.muon * muon.lr,
            muon_momentum(frac, muon, delta),
            muon.weight_decay,
            1.0,  # grad_scale, which `_clip` computes on the device
            0.0 if ema_decay is None else 1 - ema_decay,
            0.0 if delta is None else 1 - math.exp(-delta / config.ema_nesterov_horizon),
            ema_nesterov_shift(frac, config),
            factors.embed * adam.embed_lr,
            factors.scalar * adam.scalar_lr,
            factors.scalar * adam.mudd_lr,
            slow_decay(muon, delta),
        ]
        self._hyper.copy_(torch.tensor(numbers), non_blocking=True)

    def _launch(self) -> None:
        """Queue the work of a step, which reads the numbers that `_set` sent."""
        # The all-reduce comes first, so that it overlaps the copies with which `reduce` begins.
        waiting = [self._dist.all_reduce_avg(self._rest_grad), *self._muon.reduce()]
        for pending in waiting:
            pending.wait()
        self._clip()
        self._muon.step(self._hyper[:HYPER], self._hyper[-1], meanwhile=self._launch_rest)

    def _launch_rest(self) -> None:
        """Queue the part of a step that neither reads nor writes the weights of the banks."""
        hyper, rates = self._hyper[:HYPER], self._hyper[HYPER:]
        for rate, group in zip(rates, self._adam.values(), strict=False):
            group.step(rate, hyper, self._corrections)
        self._bank_grad.zero_()

    def _clip(self) -> None:
        """Measure the averaged gradient, write the clip factor into the hyperparameters, count the step."""
        shard, rest = self._muon.shard, self._rest_grad
        if shard.dtype == rest.dtype:
            sums = square_sums([shard, rest])
        else:
            sums = torch.cat([square_sums([shard]), square_sums([rest])])
        self._dist.all_reduce(sums[:1])
        clip_scale(
            sums,
            self._counts,
            self._hyper[:HYPER],
            self._corrections,
            clip=self._config.grad_clip,
            beta1=self._config.adam.beta1,
            beta2=self._config.adam.beta2,
        )

    def _capture(self) -> None:
        """Record a step as a CUDA graph, without running it; the following calls replay the graph."""
        self._capture_next = False
        try:
            self._replay = Recorder(self._hyper.device).record(self._launch)
        except RuntimeError as e:
            warnings.warn(
                "the optimizer step could not be captured as a CUDA graph, so its kernels are launched: "
                f"{first_error(e)}",
                stacklevel=3,
            )

    def zero_grad(self) -> None:
        """Zero the gradients in place."""
        self._bank_grad.zero_()
        self._rest_grad.zero_()

    def reset(self) -> None:
        """Set momentum, moments, counts and gradients to zero; used after the warm-up."""
        self._muon.reset()
        for group in self._adam.values():
            group.reset()
        self.zero_grad()
        self._counts.zero_()
        if self._nesterov is not None:
            self._nesterov.reset()

    def settle(self) -> None:
        """Put the weights themselves into the parameters, which EMA-Nesterov holds ahead of them."""
        if self._nesterov is not None:
            self._nesterov.settle()

    def at_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the parameters are the weights themselves, as after `settle`."""
        return nullcontext() if self._nesterov is None else self._nesterov.at_base()

    def weights(self) -> dict[str, Tensor]:
        """Return the live weights by name: the parameters, or what EMA-Nesterov holds them ahead of."""
        return dict(self._params if self._nesterov is None else self._nesterov.base)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of all state as a flat dict of tensors, the same on every rank and at any world size.

        The keys are `muon.momentum.<bank>` `(matrices, rows, cols)`, `embed.mean.<name>`,
        `embed.square.<name>`, the same two with `scalars.` (and `mudd.`, if the model has MUDD connections),
        and `counts` `(3,)`, the state of `clip_scale`; with EMA-Nesterov `nesterov.base.<name>` and
        `nesterov.velocity.<name>` in addition; with NorMuon `muon.square.<bank>` `(matrices, longer side)`;
        with slow_age `muon.slow.<bank>`, as the momentum.
        This is a collective, because Muon's state is gathered: every rank must call it, and one may save it.
        """
        state = {f"muon.{key}": t for key, t in self._muon.state().items()}
        state.update({key: t.clone() for key, t in self._replicated_state().items()})
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state that `state_dict` returned, with any number of ranks; this is not a collective.

        Raises:
            ValueError: names or shapes are not those of this model.
        """
        own = self._replicated_state()
        expected = {key: t.shape for key, t in own.items()}
        expected.update({f"muon.{key}": shape for key, shape in self._muon.shapes().items()})
        if expected.keys() != state.keys():
            raise ValueError(
                f"the optimizer state does not belong to this model: missing "
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

    def live_state(self) -> tuple[dict[str, Tensor], dict[str, Shard]]:
        """Return the live tensors of `state_dict`: those that every rank holds, and this rank's shards.

        A checkpoint reads them, each rank its own part. Nothing is copied or communicated. The names are
        those of `state_dict`.
        """
        return self._replicated_state(), {f"muon.{k}": shard for k, shard in self._muon.shards().items()}

    def _replicated_state(self) -> dict[str, Tensor]:
        groups = self._adam.items()
        state = {f"{prefix}.{key}": t for prefix, adam in groups for key, t in adam.state().items()}
        if self._nesterov is not None:
            state |= {f"nesterov.{key}": t for key, t in self._nesterov.state().items()}
        return state | {"counts": self._counts}

    def _check_attached(self) -> None:
        for name, p in self._params.items():
            if p.grad is not self._grads[name]:
                raise RuntimeError(
                    f"the gradient of {name} was replaced; step() zeroes gradients itself, so do not call "
                    "model.zero_grad() or assign .grad"
                )


def _check_placed(params: Mapping[str, Tensor], device: torch.device, ema: Ema | None) -> None:
    for name, p in params.items():
        if p.device.type != device.type:
            raise ValueError(f"parameter {name} must be on {device}, got {p.device}; move the model first")
        if ema is not None and name not in ema.tensors:
            raise ValueError(f"parameter {name} has no average; create the Ema from all trained parameters")


def _gradients(params: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    return flat_views(
        {name: tuple(p.shape) for name, p in params.items()}, dtype=torch.float32, device=device
    )
