"""Muon as a `torch.optim.Optimizer`, for any model; it replaces `torch.optim.Muon` by changing one line.

The trainer of this package uses another class, `pgolf.optim.bank_muon.BankMuon`, which works on banks and
flat buffers. The iteration is `pgolf.ops.newton_schulz`; coefficient tables are in `pgolf.optim.polar`.
Compared with `torch.optim.Muon`, this class iterates all matrices of one shape in one call, and adds one
coefficient triple per iteration, row normalization, stacks of matrices, convolutions, fused projections,
AdamW groups, and a division of the matrices among ranks.

Legend: `m` rows (output features as stored), `n` columns of one matrix.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
import torch.distributed as td
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer, ParamsT

from pgolf.ops import newton_schulz
from pgolf.optim.bank_muon import lr_scale, row_normalize_
from pgolf.optim.foreign import check_saved
from pgolf.optim.muon_settings import ADAM_EPS, SETTINGS, check_group, check_numbers, matrices, table_of
from pgolf.optim.polar import JORDAN, Coefficients
from pgolf.optim.ranks import Comparison, Fact, compare_facts, host_group


class Muon(Optimizer):
    """Muon on matrices and AdamW on other parameters, with the arguments of `torch.optim.Muon`.

        buf <- mu buf + (1 - mu) g
        u = mu buf + (1 - mu) g (nesterov) or buf
        O = newton_schulz(u)
        r = sqrt(max(1, m / n)) or 0.2 sqrt(max(m, n)) (match_rms_adamw)
        p <- p (1 - lr wd) - lr r O

    Equals `torch.optim.Muon` with the same arguments except for two roundings: torch iterates in bfloat16,
    this class in bfloat16 on CUDA and in float32 on the CPU; and torch takes eps as the smallest norm, where
    this class adds eps to the norm. The class loads a state_dict of `torch.optim.Muon`; torch loads one of
    this class if all parameters are 2-D and the coefficients are one triple.

    Shapes: 2-D is a matrix. 3-D `(b, m, n)` is a stack of b matrices, so the weight of a Conv1d does not
    belong in a Muon group. 4-D and 5-D, convolutions, are matrices `(out, product of the other sizes)`. A
    group may set every argument except for those marked "not in a group", and in addition:

    - `use_muon`: False makes it an AdamW group, for embeddings, heads, gains and biases, with the settings
      `lr`, `weight_decay`, `betas`, `eps` (default 1e-8), `capturable` and `fused`. It equals
      `torch.optim.AdamW` and has the same state, so states can be exchanged in both directions.
    - `split_sizes`: numbers of rows of the matrices that are fused in each parameter of the group, for
      example `(d, k, k)` for QKV; each of these matrices is iterated separately.

    `lr`, `weight_decay` and `momentum` are read from the groups at each step, so schedulers work. The update
    of a zero direction is zero, and an empty parameter is skipped. A gradient that is not finite makes its
    own matrix and momentum non-finite, as in torch.optim: skip the step if `clip_grad_norm_` returns a norm
    that is not finite.
    """

    # The values that a copied or unpickled optimizer has, because a process group cannot be copied.
    _sharded = False
    _process_group: td.ProcessGroup | None = None
    _host_group: td.ProcessGroup | None = None
    # Whether parameters and state were compared between ranks since they were last loaded.
    _compared = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Sequence[float] | Sequence[Coefficients] = JORDAN,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        row_normalize: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        maximize: bool = False,
        sharded: bool = False,
        process_group: td.ProcessGroup | None = None,
    ) -> None:
        """Take parameters or groups; the arguments have the order of `torch.optim.Muon`.

        Args:
            params: parameters, named parameters or groups of them, as in `torch.optim.Optimizer`.
            lr: learning rate, >= 0.
            weight_decay: decoupled weight decay, multiplied by lr.
            momentum: mu, in [0, 1].
            nesterov: whether u is mu buf + (1 - mu) g or buf.
            ns_coefficients: one triple (a, b, c) for all iterations, a list of `ns_steps` triples, or the
                name of a table in `pgolf.optim.polar`, for example "polar_express_golf".
            eps: added to the norm of each matrix.
            ns_steps: number of iterations, 1 to 10.
            adjust_lr_fn: how r is computed: None or "original" for sqrt(max(1, m / n)), or "match_rms_adamw".
            row_normalize: divide each row of u by its norm before the iteration (MuonEq-R, arXiv 2603.28254).
            betas: decays of the two moments in AdamW groups.
            maximize: must be False.
            sharded: (not in a group) each rank of `process_group` iterates a part of the matrices, chosen so
                that the cost is balanced, and the updates are gathered. Every rank must hold the same
                gradients for the same parameters, as with DDP; otherwise `step` raises on each rank (see
                `pgolf.optim.ranks`). Ranks that start equal stay equal bit for bit. Every rank keeps the
                whole momentum, so a checkpoint can be loaded at another world size. Without torch.distributed
                the option has no effect.
            process_group: (not in a group) the ranks that share the matrices; None means all ranks.

        Raises:
            ValueError: a number, name or shape does not fit.
            TypeError: a parameter is complex or a DTensor, or a setting is not a number.
        """
        if params is None or isinstance(params, str | int | float):
            raise TypeError(
                f"Muon: params must be parameters or groups of them, got {params!r}; pass model.parameters()"
            )
        check_numbers({"lr": lr, "weight_decay": weight_decay, "eps": eps})
        if maximize:
            raise ValueError("Muon: maximize is not supported; negate the loss")
        self._sharded, self._process_group = sharded, process_group
        # Not among the defaults: if those contain betas, OneCycleLR and CyclicLR do not set the momentum.
        self._betas = betas
        defaults: dict[str, Any] = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "row_normalize": row_normalize,
            "use_muon": True,
            "split_sizes": None,
        }
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copied or pickled optimizer."""
        return {**super().__getstate__(), "_betas": self._betas}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in `torch.optim.Optimizer`, and check it.

        Raises:
            ValueError, TypeError: as in the constructor; the group is then not added.
        """
        if not param_group.get("use_muon", True):
            param_group = {"eps": ADAM_EPS, "betas": self._betas, **param_group}
        super().add_param_group(param_group)
        self._compared = False
        try:
            check_group(self.param_groups[-1])
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class, of `torch.optim.Muon`, or of `torch.optim.AdamW` (AdamW groups).

        The settings of the saved groups replace those of this optimizer; settings that are missing in the
        saved groups stay as they are.

        Raises:
            ValueError: the state does not fit (see `pgolf.optim.foreign.check_saved`), or a saved setting is
                out of range as in the constructor; nothing is loaded then.
            TypeError: a saved setting is not a number.
        """
        check_saved(state_dict, self.param_groups)
        saved = [
            {**{k: v for k, v in own.items() if k not in ("params", "param_names")}, **group}
            for own, group in zip(self.param_groups, state_dict["param_groups"], strict=True)
        ]
        for own, group in zip(self.param_groups, saved, strict=True):
            check_group({**group, "params": own["params"]})
        super().load_state_dict({**state_dict, "param_groups": saved})
        self._compared = False
        for group in self.param_groups:
            for p in group["params"]:
                if isinstance(self.state.get(p, {}).get("step"), int | float):  # saved by torch before 1.12
                    self.state[p]["step"] = _step_of(p, group) + self.state[p]["step"]

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Apply the gradients, and return the value of `closure` if there is one.

        Args:
            closure: called before the step, with gradients enabled; returns the loss.

        Raises:
            RuntimeError: a gradient is sparse, the matrices of a sharded optimizer are on several devices, or
                its ranks hold different gradients, parameters or settings. The last of these is raised before
                anything changes on the CPU, and after the step was queued on CUDA.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        comparison = self._compare_ranks()
        buckets: list[_Bucket] = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError("Muon: sparse gradients are not supported; use nn.Embedding(sparse=False)")
            if params and group["use_muon"]:
                buckets += self._momentum(group, params)
            elif params:
                self._adamw(group, params)
        if self._sharded and buckets and td.is_initialized():
            updates = _shared_out(buckets, self._process_group)
        else:
            updates = [list(_iterate(bucket, range(len(bucket.targets))).unbind()) for bucket in buckets]
        for bucket, update in zip(buckets, updates, strict=True):
            _apply(bucket, update)
        if comparison is not None:
            comparison.finish()
        return loss

    def _compare_ranks(self) -> Comparison | None:
        """Raise if the ranks of a sharded optimizer differ; on CUDA, return the comparison under way."""
        if not self._sharded or not td.is_initialized() or td.get_world_size(self._process_group) == 1:
            return None
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None  # a captured graph cannot wait for the host
        self._host_group = self._host_group or host_group(self._process_group)
        # Matrices first: the ranks exchange on the device of the first tensor.
        groups = sorted(enumerate(self.param_groups), key=lambda group: not group[1]["use_muon"])
        named = [
            (f"parameter {name}" if "param_names" in group else f"parameter {name} of group {i}", p)
            for i, group in groups
            for name, p in zip(group.get("param_names") or itertools.count(), group["params"], strict=False)
        ]
        fresh = compare_facts(self._facts(named), not self._compared, self._host_group)
        self._compared = True
        tensors = [(f"the gradient of {name}", p.grad) for name, p in named if p.grad is not None]
        if fresh:
            tensors += named
            tensors += [
                (f"{key} of {name}", t)
                for name, p in named
                for key, t in sorted(self.state.get(p, {}).items())
            ]
        tensors = [(name, t.detach()) for name, t in tensors if t.numel() and not t.is_sparse]
        if not tensors:
            return None
        names, values = [name for name, _ in tensors], [t for _, t in tensors]
        comparison = Comparison(names, values, self._process_group)
        if values[0].is_cuda:
            return comparison
        comparison.finish()
        return None

    def _facts(self, named: list[tuple[str, Tensor]]) -> list[Fact]:
        """Return the facts that must be the same on every rank and that the host knows."""
        facts = []
        for name, p in named:
            kind = (
                "none"
                if p.grad is None
                else f"sparse {p.grad.dtype}"
                if p.grad.is_sparse
                else f"{p.grad.dtype}"
            )
            facts.append(Fact(f"the gradient of {name}", kind))
            facts.append(Fact(name, (tuple(p.shape), str(p.dtype), sorted(self.state.get(p, {})))))
        for i, group in enumerate(self.param_groups):
            for key in sorted(SETTINGS & group.keys()):
                value = group[key]
                facts.append(
                    Fact(f"{key} of group {i}", float(value) if isinstance(value, Tensor) else value)
                )
        return facts

    def _momentum(self, group: dict[str, Any], params: list[Tensor]) -> list[_Bucket]:
        """Update the momentum and return the directions to iterate, matrices of one shape in one bucket."""
        grads = [p.grad for p in params if p.grad is not None]
        buffers = []
        for p, grad in zip(params, grads, strict=True):
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(grad)
            buffers.append(self.state[p]["momentum_buffer"])
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        nesterov = group["nesterov"]
        directions = torch._foreach_lerp(grads, buffers, group["momentum"]) if nesterov else buffers
        table = table_of(group["ns_coefficients"], group["ns_steps"])
        found: dict[tuple[object, ...], _Bucket] = {}
        for p, direction in zip(params, directions, strict=True):
            pieces = (matrices(t, group["split_sizes"]) for t in (p.detach(), direction))
            for target, piece in zip(*pieces, strict=True):
                matrix = piece.flatten(1)
                key = (matrix.shape, p.dtype, p.device)
                bucket = found.setdefault(key, _Bucket(group, table))
                bucket.targets.append(target)
                bucket.directions.append(matrix)
        return list(found.values())

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if "step" not in self.state[p]:
                self.state[p]["step"] = _step_of(p, group)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [self.state[p]["step"] for p in params],
            foreach=not group.get("fused"),
            fused=bool(group.get("fused")),
            capturable=bool(group.get("capturable")),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


@dataclass(frozen=True)
class _Bucket:
    """The matrices of one group that have the same shape, dtype and device."""

    group: dict[str, Any]
    table: tuple[Coefficients, ...]
    targets: list[Tensor] = field(default_factory=list)  # views of parameters, m * n elements each
    directions: list[Tensor] = field(default_factory=list)  # (m, n), input of the polar iteration

    @property
    def cost(self) -> int:
        """Multiply-adds to iterate one matrix; each iteration computes X X^T, A^2 and a product with X."""
        short, long = sorted(self.directions[0].shape)
        return len(self.table) * short * short * (2 * long + short)


def _step_of(p: Tensor, group: dict[str, Any]) -> Tensor:
    """Return a step count of 0 in the dtype and on the device that `torch.optim.AdamW` would use."""
    wide = torch.get_default_dtype() == torch.float64 and not group.get("fused")
    device = p.device if group.get("fused") or group.get("capturable") else None
    return torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=device)


def _iterate(bucket: _Bucket, indices: Iterable[int]) -> Tensor:
    """Return the orthogonalized directions `(number of indices, m, n)`, bfloat16 on CUDA, float32 on CPU."""
    directions = [bucket.directions[i] for i in indices]
    x = torch.stack(directions).to(_dtype(directions[0].device))
    if bucket.group["row_normalize"]:
        row_normalize_(x)
    return newton_schulz(x, bucket.table, eps=bucket.group["eps"])


def _apply(bucket: _Bucket, updates: Sequence[Tensor]) -> None:
    group, (rows, cols) = bucket.group, bucket.directions[0].shape
    lr = float(group["lr"])
    match = group["adjust_lr_fn"] == "match_rms_adamw"
    ratio = 0.2 * math.sqrt(max(rows, cols)) if match else lr_scale(rows, cols)
    torch._foreach_mul_(bucket.targets, 1 - lr * group["weight_decay"])
    shaped = [u.view(t.shape) for u, t in zip(updates, bucket.targets, strict=True)]
    torch._foreach_add_(bucket.targets, shaped, alpha=-lr * ratio)


@functools.lru_cache(maxsize=16)
def owners(costs: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """Return the rank that iterates each matrix, so that the ranks' costs are balanced.

    The most expensive matrix comes first, and each goes to the rank with the lowest cost so far. The largest
    cost of a rank is then at most 4/3 of the best possible one (Graham 1969). All ranks get the same result.
    """
    loads = [(0, rank) for rank in range(ranks)]
    chosen = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, chosen[i] = loads[0]
        heapq.heapreplace(loads, (load + costs[i], chosen[i]))
    return tuple(chosen)


def _shared_out(buckets: list[_Bucket], process_group: td.ProcessGroup | None) -> list[list[Tensor]]:
    """Iterate this rank's matrices and gather the updates of all ranks, the same bits on every rank."""
    devices = {bucket.targets[0].device for bucket in buckets}
    if len(devices) > 1:
        raise RuntimeError(
            f"Muon: sharded=True needs all matrices of a rank on one device, got "
            f"{sorted(map(str, devices))}; use sharded=False or one optimizer per device"
        )
    rank, world = td.get_rank(process_group), td.get_world_size(process_group)
    remaining = iter(owners(tuple(b.cost for b in buckets for _ in b.targets), world))
    chosen = [[next(remaining) for _ in bucket.targets] for bucket in buckets]
    sizes = [bucket.directions[0].numel() for bucket in buckets]
    loads = [sum(n * ranks.count(r) for n, ranks in zip(sizes, chosen, strict=True)) for r in range(world)]
    # Every rank sends its updates, bucket by bucket, and then zeros up to the length of the largest share.
    device = next(iter(devices))
    mine = torch.zeros(max(loads), dtype=_dtype(device), device=device)
    start = 0
    for bucket, ranks in zip(buckets, chosen, strict=True):
        if rank in ranks:
            done = _iterate(bucket, [i for i, r in enumerate(ranks) if r == rank]).flatten()
            mine[start : start + done.numel()] = done
            start += done.numel()
    rows = [torch.empty_like(mine) for _ in range(world)]
    td.all_gather(rows, mine, group=process_group)
    starts = [0] * world
    updates: list[list[Tensor]] = []
    for n, ranks in zip(sizes, chosen, strict=True):
        updates.append([])
        for r in ranks:
            updates[-1].append(rows[r][starts[r] : starts[r] + n])
            starts[r] += n
    return updates


def _dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which updates are iterated and sent."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
