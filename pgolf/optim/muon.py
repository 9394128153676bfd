"""Muon as a `torch.optim.Optimizer`: one changed line in a program that uses `torch.optim.Muon`.

Owns the optimizer for other people's models. The trainer's own, on banks and flat buffers, is
`pgolf.optim.bank_muon.BankMuon`; the iteration is `pgolf.ops.newton_schulz`, the tables `pgolf.optim.polar`.
Differs from torch's: matrices of one shape are iterated in one call, coefficients per iteration, row
normalization, stacks, convolutions and fused projections, AdamW groups, and matrices shared out over ranks.

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
from pgolf.optim.polar import JORDAN, Coefficients, check_converges, coefficients
from pgolf.optim.ranks import Comparison, Fact, compare_facts, host_group

ADJUST = (None, "original", "match_rms_adamw")
ADAM_EPS = 1e-8  # torch.optim.AdamW's; Muon's own eps, 1e-7, guards a norm instead
MAX_STEPS = 10  # what newton_schulz takes
SETTINGS = {
    "lr",
    "weight_decay",
    "momentum",
    "nesterov",
    "ns_coefficients",
    "eps",
    "ns_steps",
    "adjust_lr_fn",
    "row_normalize",
    "use_muon",
    "split_sizes",
    "betas",
}


class Muon(Optimizer):
    """Muon on matrices, AdamW on the rest; takes all that `torch.optim.Muon` takes.

        buf <- mu buf + (1 - mu) g
        u = mu buf + (1 - mu) g (nesterov) or buf
        O = newton_schulz(u)
        r = sqrt(max(1, m / n)) or 0.2 sqrt(max(m, n)) (match_rms_adamw)
        p <- p (1 - lr wd) - lr r O

    Equals `torch.optim.Muon` with the same arguments up to the rounding of the iteration (bfloat16 there;
    here bfloat16 on CUDA, float32 on CPU) and up to eps, added to the norm here, a lower bound of it there.
    Its state_dict loads here, and one of 2-D parameters with a coefficient triple loads there.

    Shapes: 2-D is a matrix; 3-D `(b, m, n)` is a stack of b matrices (so a Conv1d weight is not for a Muon
    group); 4-D and 5-D, convolutions, count as `(out, the rest)`. A group may set every argument that is not
    marked, and:

    - `use_muon`: False makes it an AdamW group for embeddings, heads, gains and biases, with `lr`,
      `weight_decay`, `betas` and `eps` (default 1e-8), equal to `torch.optim.AdamW`, whose `capturable`
      and `fused` it takes. Its state is AdamW's, so the states of such groups are interchangeable.
    - `split_sizes`: rows of the matrices that are fused in each parameter of the group, as `(d, k, k)` for
      QKV; each is iterated by itself.

    `lr`, `weight_decay`, `momentum` are read from the groups at each step, so schedulers work. A zero
    direction has a zero update; an empty parameter is passed over. A gradient that is not finite spoils its
    own matrix and momentum, as in torch.optim: skip the step where `clip_grad_norm_` returns such a norm.
    """

    # What a copied or unpickled optimizer falls back to: a process group cannot be copied.
    _sharded = False
    _process_group: td.ProcessGroup | None = None
    _host_group: td.ProcessGroup | None = None
    # Whether the ranks' parameters and state were compared since they were last set.
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
        """Take parameters or groups; the order of the arguments is that of `torch.optim.Muon`.

        Args:
            ns_coefficients: (a, b, c) for every iteration, one triple for each of `ns_steps` iterations, or
                the name of a table in `pgolf.optim.polar`, for example "polar_express_golf".
            ns_steps: iterations, 1 to 10.
            adjust_lr_fn: None or "original", or "match_rms_adamw".
            row_normalize: divide each row of u by its norm first (MuonEq-R, arXiv 2603.28254).
            betas: of AdamW groups.
            maximize: must be False.
            sharded: (not in a group) each rank of `process_group` iterates its share of the matrices,
                balanced by cost, and the updates are gathered. Gradients must be the same on every rank and
                present for the same parameters (DDP sees to both), else `step` raises on each of them, see
                `pgolf.optim.ranks`; ranks that start equal stay equal bit for bit. Momentum is kept whole on
                each rank, so checkpoints move between world sizes. Without torch.distributed it changes
                nothing.
            process_group: (not in a group) the ranks that share; None is all of them.

        Raises:
            ValueError: a number, name or shape that does not fit.
            TypeError: a parameter that is no plain real tensor, a setting that is no number.
        """
        if params is None or isinstance(params, str | int | float):
            raise TypeError(
                f"Muon: params must be parameters or groups of them, got {params!r}; pass model.parameters()"
            )
        _check_numbers({"lr": lr, "weight_decay": weight_decay, "eps": eps})
        if maximize:
            raise ValueError("Muon: maximize is not supported; negate the loss")
        self._sharded, self._process_group = sharded, process_group
        # Not among the defaults: where those have betas, OneCycleLR and CyclicLR leave the momentum alone.
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
        """Return what a copied or pickled optimizer keeps."""
        return {**super().__getstate__(), "_betas": self._betas}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in `torch.optim.Optimizer`, and check it.

        Raises:
            ValueError, TypeError: see the constructor; the group is then not added.
        """
        if not param_group.get("use_muon", True):
            param_group = {"eps": ADAM_EPS, "betas": self._betas, **param_group}
        super().add_param_group(param_group)
        self._compared = False
        try:
            _check_group(self.param_groups[-1])
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state_dict of this class or `torch.optim.Muon`; of `torch.optim.AdamW` in AdamW groups.

        What the saved groups say holds; options that they do not know stay as they are here.

        Raises:
            ValueError: see `pgolf.optim.foreign.check_saved`, and the constructor for the settings; then
                nothing is loaded.
            TypeError: settings that are no numbers.
        """
        check_saved(state_dict, self.param_groups)
        saved = [
            {**{k: v for k, v in own.items() if k not in ("params", "param_names")}, **group}
            for own, group in zip(self.param_groups, state_dict["param_groups"], strict=True)
        ]
        for own, group in zip(self.param_groups, saved, strict=True):
            _check_group({**group, "params": own["params"]})
        super().load_state_dict({**state_dict, "param_groups": saved})
        self._compared = False
        for group in self.param_groups:
            for p in group["params"]:
                if isinstance(self.state.get(p, {}).get("step"), int | float):  # of torch before 1.12
                    self.state[p]["step"] = _step_of(p, group) + self.state[p]["step"]

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Apply the gradients; return what `closure`, called first with gradients enabled, returned.

        Raises:
            RuntimeError: a sparse gradient, shared-out parameters on several devices, or ranks of a sharded
                optimizer that differ: on CPU before anything changes, on CUDA after the step was queued.
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
        """Raise where ranks of a sharded optimizer differ; return the part that is still on the device."""
        if not self._sharded or not td.is_initialized() or td.get_world_size(self._process_group) == 1:
            return None
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None  # a graph can wait for nobody
        self._host_group = self._host_group or host_group(self._process_group)
        # Matrices first: theirs is the device that the ranks exchange on.
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
        """Return what every rank must have alike and the host knows."""
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
        """Update the momentum; return what to iterate, matrices of one shape together."""
        grads = [p.grad for p in params if p.grad is not None]
        buffers = []
        for p, grad in zip(params, grads, strict=True):
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(grad)
            buffers.append(self.state[p]["momentum_buffer"])
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        nesterov = group["nesterov"]
        directions = torch._foreach_lerp(grads, buffers, group["momentum"]) if nesterov else buffers
        table = _table(group["ns_coefficients"], group["ns_steps"])
        found: dict[tuple[object, ...], _Bucket] = {}
        for p, direction in zip(params, directions, strict=True):
            pieces = (_matrices(t, group["split_sizes"]) for t in (p.detach(), direction))
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
    """Matrices of one shape, dtype and device in one group."""

    group: dict[str, Any]
    table: tuple[Coefficients, ...]
    targets: list[Tensor] = field(default_factory=list)  # views of parameters, m * n elements each
    directions: list[Tensor] = field(default_factory=list)  # (m, n) what the polar iteration gets

    @property
    def cost(self) -> int:
        """Multiply-adds to iterate one matrix: per step two products of the Gram matrix, one square."""
        short, long = sorted(self.directions[0].shape)
        return len(self.table) * short * short * (2 * long + short)


def _step_of(p: Tensor, group: dict[str, Any]) -> Tensor:
    """Return the number of steps of a parameter without any, where `torch.optim.AdamW` keeps it."""
    wide = torch.get_default_dtype() == torch.float64 and not group.get("fused")
    device = p.device if group.get("fused") or group.get("capturable") else None
    return torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=device)


def _matrices(tensor: Tensor, split_sizes: Sequence[int] | None) -> list[Tensor]:
    """Return views of the matrices in a parameter; those of convolutions keep their dimensions."""
    stack = tensor.unbind() if tensor.dim() == 3 else (tensor,)
    if split_sizes is None:
        return list(stack)
    return [piece for matrix in stack for piece in torch.split(matrix, list(split_sizes))]


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
    """Return which rank iterates each matrix: the costliest first, each to the rank with the least so far.

    The same on every rank. The largest sum is at most 4/3 of the best possible one (Graham 1969).
    """
    loads = [(0, rank) for rank in range(ranks)]
    chosen = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, chosen[i] = loads[0]
        heapq.heapreplace(loads, (load + costs[i], chosen[i]))
    return tuple(chosen)


def _shared_out(buckets: list[_Bucket], process_group: td.ProcessGroup | None) -> list[list[Tensor]]:
    """Iterate this rank's matrices and gather everyone's; the same bits on every rank."""
    devices = {bucket.targets[0].device for bucket in buckets}
    if len(devices) > 1:
        raise RuntimeError(
            f"Muon: sharded=True needs all matrices of a rank on one device, got "
            f"{sorted(map(str, devices))}; use sharded=False or one optimizer a device"
        )
    rank, world = td.get_rank(process_group), td.get_world_size(process_group)
    remaining = iter(owners(tuple(b.cost for b in buckets for _ in b.targets), world))
    chosen = [[next(remaining) for _ in bucket.targets] for bucket in buckets]
    sizes = [bucket.directions[0].numel() for bucket in buckets]
    loads = [sum(n * ranks.count(r) for n, ranks in zip(sizes, chosen, strict=True)) for r in range(world)]
    # Every rank sends its updates bucket by bucket, and zeros up to the longest row.
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
    """Return what updates are iterated and sent in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _table(ns_coefficients: Any, steps: int) -> tuple[Coefficients, ...]:
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"Muon: ns_steps must be in [1, {MAX_STEPS}], got {steps}")
    if isinstance(ns_coefficients, str):
        return coefficients(ns_coefficients, steps)
    rows = list(ns_coefficients)
    if len(rows) == 3 and not any(isinstance(row, Sequence) for row in rows):
        rows = [rows] * steps
    if any(not isinstance(row, Sequence) or len(row) != 3 for row in rows):
        raise ValueError(
            "Muon: ns_coefficients must be a triple (a, b, c), a list of triples or a table's name, "
            f"got {ns_coefficients}"
        )
    if len(rows) != steps:
        raise ValueError(
            f"Muon: ns_coefficients has {len(rows)} triples for ns_steps={steps}; pass ns_steps={len(rows)}"
        )
    table = tuple((float(a), float(b), float(c)) for a, b, c in rows)
    check_converges(table)
    return table


def _check_numbers(settings: dict[str, Any]) -> None:
    """Raise unless each is one finite number that is not negative, or a tensor of one."""
    for name, value in settings.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Muon: a tensor {name} must have one element, got shape {tuple(value.shape)}")
        complex_ = isinstance(value, Tensor) and value.is_complex()
        if isinstance(value, bool | str | bytes | complex) or complex_ or not hasattr(value, "__float__"):
            raise TypeError(f"Muon: {name} must be a number >= 0, got {value!r}")
        if not 0 <= float(value) < math.inf:
            raise ValueError(f"Muon: {name} must be >= 0, got {value}")


def _check_group(group: dict[str, Any]) -> None:
    """Raise for settings or parameters that a step could not use."""
    _check_numbers({name: group[name] for name in ("lr", "weight_decay", "eps")})
    if group.get("maximize"):
        raise ValueError("Muon: maximize is not supported; negate the loss")
    if not group["use_muon"]:
        betas = group["betas"]
        if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
            raise ValueError(f"Muon: betas must be two numbers in [0, 1), got {betas}")
        return
    _check_numbers({"momentum": group["momentum"]})
    if not 0 <= group["momentum"] <= 1:
        raise ValueError(f"Muon: momentum must be in [0, 1], got {group['momentum']}")
    if group["adjust_lr_fn"] not in ADJUST:
        raise ValueError(f"Muon: adjust_lr_fn must be one of {ADJUST}, got {group['adjust_lr_fn']!r}")
    _table(group["ns_coefficients"], group["ns_steps"])
    names = group.get("param_names") or range(len(group["params"]))
    for name, p in zip(names, group["params"], strict=True):
        _check_matrix(f"Muon: parameter {name} of shape {tuple(p.shape)}", p, group["split_sizes"])


def _check_matrix(what: str, p: Tensor, split_sizes: Sequence[int] | None) -> None:
    if p.is_complex():
        raise TypeError(f"{what} is {p.dtype}; put it in a group with use_muon=False")
    if hasattr(p, "device_mesh"):
        raise TypeError(f"{what} is a DTensor, of which a rank holds no whole matrices; use DDP, not FSDP2")
    if not 2 <= p.dim() <= 5:
        raise ValueError(
            f"{what} is no matrix: Muon takes 2-D (m, n), 3-D stacks (b, m, n) and 4-D or 5-D convolutions; "
            "put it in a group with use_muon=False"
        )
    rows = p.shape[1] if p.dim() == 3 else p.shape[0]
    if split_sizes is not None and (sum(split_sizes) != rows or min(split_sizes) < 1):
        raise ValueError(f"{what} has {rows} rows, which split_sizes={list(split_sizes)} must add up to")
