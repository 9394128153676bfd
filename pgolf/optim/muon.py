"""Muon as a `torch.optim.Optimizer`, for any model; it replaces `torch.optim.Muon` by changing one line.

The trainer of this package uses another class, `pgolf.optim.bank_muon.BankMuon`, which works on banks and
flat buffers. The iteration is `pgolf.ops.newton_schulz`; coefficient tables are in `pgolf.optim.polar`.
Compared with `torch.optim.Muon`, this class iterates all matrices of one shape in one call, and adds one
coefficient triple per iteration, row normalization, stacks of matrices, convolutions, fused projections,
AdamW groups, and a division of the matrices among ranks, also of those that FSDP2 or tensor parallelism has
spread over ranks (`pgolf.optim.mesh`).

Legend: `m` rows (output features as stored), `n` columns of one matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
import torch.distributed as td
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer, ParamsT

from pgolf.ops import newton_schulz
from pgolf.optim.foreign import check_saved, fit_moments, restore_exact, zero_step
from pgolf.optim.mesh import (
    Exchange,
    MeshRanks,
    Part,
    local,
    local_gradient,
    mesh_of,
    place_like,
)
from pgolf.optim.momentum import fit_momentum, update_momentum
from pgolf.optim.muon_buckets import Bucket, apply_updates, normalized
from pgolf.optim.muon_settings import (
    ADAM_EPS,
    FORMS,
    SETTINGS,
    SQUARE,
    boxes,
    check_dtensors,
    check_group,
    check_numbers,
    check_options,
    check_squares,
    fill_missing,
    matrices,
    square_sizes,
    table_of,
)
from pgolf.optim.owners import owners
from pgolf.optim.polar import JORDAN, Coefficients
from pgolf.optim.ranks import Comparison, Fact, compare_facts, host_group
from pgolf.optim.split_weights import REST, is_split, join_all, rest_of, split_all
from pgolf.optim.update_rules import row_normalize_


class Muon(Optimizer):
    """Muon on matrices and AdamW on other parameters, with the arguments of `torch.optim.Muon`.

        buf <- mu buf + (1 - mu) g
        u = mu buf + (1 - mu) g (nesterov) or buf
        O = newton_schulz(u)
        r = sqrt(max(1, m / n)) or 0.2 sqrt(max(m, n)) (match_rms_adamw)
        p <- p (1 - lr wd) - lr r O

    With `normalize`, O is divided by the roots of its mean squares over time before (NorMuon); with
    `cautious`, only weights that O moves towards 0 decay; with `update_floor`, rows of O that are short next
    to their weights are lengthened. See `pgolf.optim.update_rules` for all three.

    Equals `torch.optim.Muon` with the same arguments except for two roundings: torch iterates in bfloat16,
    this class in float16 on CUDA (on Hopper GPUs with `algorithm="gram"` of `newton_schulz`) and in float32
    on the CPU; and torch takes eps as the smallest norm, where this class adds eps to the norm. The class
    loads a state_dict of `torch.optim.Muon`; torch loads one of
    this class if all parameters are 2-D and the coefficients are one triple.

    Shapes: 2-D is a matrix. 3-D `(b, m, n)` is a stack of b matrices, so the weight of a Conv1d does not
    belong in a Muon group. 4-D and 5-D, convolutions, are matrices `(out, product of the other sizes)`. A
    group may set every argument except for those marked "not in a group", and in addition:

    - `use_muon`: False makes it an AdamW group, for embeddings, heads, gains and biases, with the settings
      `lr`, `weight_decay`, `betas`, `eps` (default 1e-8), `master_weights`, `capturable` and `fused`. It
      equals `torch.optim.AdamW` and has the same state, so states can be exchanged in both directions.
    - `split_sizes`: numbers of rows of the matrices that are fused in each parameter of the group, for
      example `(d, k, k)` for QKV; each of these matrices is iterated separately.
    - `num_heads`: number of attention heads in each parameter of the group, which are iterated separately,
      for example n + 2 k for a fused QKV weight with n query and k key heads. The heads are equal blocks of
      rows, or with `heads_along="columns"`, for the output projection, of columns. If `split_sizes` is set,
      it divides the rows of each head, for layouts in which the parts of each head lie together.

    A parameter may be a DTensor: of FSDP2 (`fully_shard`, also with replicas), of tensor parallelism, or of
    both; other parameters may be plain. Each matrix is gathered to one rank of its mesh, chosen so that the
    cost is balanced, iterated there, and its update is sent to all ranks with a part of it. The momentum is
    placed like the parameter, and every rank keeps the mean squares of `normalize` whole; a state is loaded
    placed in the same way, whole, or through `torch.distributed.checkpoint`, also with another number of
    ranks. The result is that of one process with the same gradients, on the CPU bit for bit. All ranks of the
    mesh must call `step`. It cannot be captured in a CUDA graph.

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
    # The ranks of each device mesh that had parameters of this optimizer in a step; None: there was none.
    _meshes: dict[Any, MeshRanks] | None = None

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
        normalize: float = 0.0,
        cautious: bool = False,
        update_floor: float = 0.0,
        momentum_bits: int | None = None,
        master_weights: str | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
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
            normalize: decay per step of the mean squares of NorMuon (arXiv 2510.05491), in [0, 1); 0 = off.
            cautious: cautious weight decay (arXiv 2510.12402). It costs several more passes over weights.
            update_floor: smallest norm of each row of r O, as a part of the norm of the row of weights, >= 0;
                0 = off (`pgolf.optim.update_rules.floor_update_`). A DTensor must consist of whole rows then.
            momentum_bits: 8 keeps the momentum of Muon groups as 8-bit codes, with a scale for at most 256
                elements of a row (`pgolf.optim.momentum`). A DTensor must consist of whole rows then. None
                keeps the momentum in the dtype of the gradient.
            master_weights: "split" trains bfloat16 parameters as if they were float32, with 2 more bytes per
                weight (`pgolf.optim.split_weights`). Their momentum (with `momentum_bits=None`) and moments
                are float32 then. Float32 and float64 parameters stay as they are. None is off.
            betas: decays of the two moments in AdamW groups.
            maximize: must be False.
            foreach: whether AdamW groups use multi-tensor operators; None means unless `fused`. Muon groups
                always use them.
            fused: whether AdamW groups use torch's fused operator. It changes nothing in Muon groups.
            capturable: as in torch.optim.AdamW for AdamW groups; and a learning rate that is a tensor is not
                read by the host, so a captured graph or compiled code follows its value.
            differentiable: must be False.
            sharded: (not in a group) each rank of `process_group` iterates a part of the matrices, chosen so
                that the cost is balanced, and the updates are gathered. Every rank must hold the same
                gradients for the same parameters, as with DDP; otherwise `step` raises on each rank (see
                `pgolf.optim.ranks`). Ranks that start equal stay equal bit for bit. Every rank keeps the
                whole momentum, so a checkpoint can be loaded at another world size. Without torch.distributed
                and for DTensors, which are always shared out, the option has no effect.
            process_group: (not in a group) the ranks that share the matrices; None means all ranks.

        Raises:
            ValueError: a number, name or shape does not fit, or the parts of a DTensor are no blocks.
            TypeError: a parameter is complex, or a setting is not a number.
        """
        check_numbers({"lr": lr, "weight_decay": weight_decay, "eps": eps})
        if params is None or isinstance(params, str | int | float):
            raise TypeError(
                f"Muon: params must be parameters or groups of them, got {params!r}; pass model.parameters()"
            )
        check_options({"maximize": maximize, "differentiable": differentiable})
        self._sharded, self._process_group = sharded, process_group
        self._counts = {"orthogonalized": 0}  # compiled code sets no attributes of an optimizer
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
            "normalize": normalize,
            "cautious": cautious,
            "update_floor": update_floor,
            "momentum_bits": momentum_bits,
            "master_weights": master_weights,
            "use_muon": True,
            "split_sizes": None,
            "num_heads": None,
            "heads_along": "rows",
        }
        options = {"foreach": foreach, "fused": fused, "capturable": capturable or None}
        defaults |= {name: value for name, value in options.items() if value is not None}
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copied or pickled optimizer."""
        return {**super().__getstate__(), "_betas": self._betas, "_counts": self._counts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take such a state; settings that the class did not have when it was pickled are off."""
        super().__setstate__(state)
        fill_missing(self.defaults, self.param_groups)

    @property
    def orthogonalized(self) -> int:
        """Number of matrices that the last step iterated, on all ranks together."""
        return self._counts["orthogonalized"]

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
        saved groups stay as they are, and so do `momentum_bits` and `master_weights`: the state is converted
        to the form that this optimizer has. Without `master_weights`, saved rests of weights are dropped.

        Raises:
            ValueError: the state does not fit (see `pgolf.optim.foreign.check_saved`), or a saved setting is
                out of range as in the constructor; nothing is loaded then.
            TypeError: a saved setting is not a number.
        """
        check_saved(state_dict, self.param_groups)
        # What is stored in which form is a matter of this optimizer, and the state is converted to it.
        saved = [
            {
                **{k: v for k, v in own.items() if k not in ("params", "param_names")},
                **group,
                **{k: own[k] for k in FORMS},
            }
            for own, group in zip(self.param_groups, state_dict["param_groups"], strict=True)
        ]
        for own, group in zip(self.param_groups, saved, strict=True):
            check_group({**group, "params": own["params"]})
        super().load_state_dict({**state_dict, "param_groups": saved})
        self._compared = False
        restore_exact(self.state, self.param_groups, state_dict)
        for group in self.param_groups:
            for p in group["params"]:
                if not (state := self.state.get(p, {})):
                    continue
                if isinstance(state.get("step"), int | float):  # saved by torch before 1.12
                    state["step"] = zero_step(p, group) + state["step"]
                whole = state.keys() - {"step", SQUARE}
                state.update({name: place_like(state[name], p) for name in whole})
                if group["use_muon"]:
                    fit_momentum(state, p, group, p)
                else:
                    fit_moments(state, p, group)

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
            ValueError: the matrices of a group with normalize are others than those of its state, because
                `num_heads`, for example, was changed, or a group has DTensors now that an option is not for.
            RuntimeError: a gradient is sparse, the gradient of a DTensor is a plain tensor, a step on
                DTensors is being captured, the matrices of a sharded optimizer are on several devices, its
                ranks hold different gradients, parameters or settings, or the ranks of a device mesh have
                gradients for different parameters, or other settings. Differences between ranks are found
                before anything changes; but on CUDA, different values are found after the step was queued.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        comparison = self._compare_ranks()
        # Asked in every step: fully_shard and its users may replace the parameters in the groups.
        if any(mesh_of(p) is not None for group in self.param_groups for p in group["params"]):
            self._compare_meshes()
        check_squares(self.param_groups, self.state)
        buckets: list[Bucket] = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError("Muon: sparse gradients are not supported; use nn.Embedding(sparse=False)")
            if params and group["use_muon"]:
                buckets += self._momentum(group, params)
            elif params:
                self._adamw(group, params)
        exchanges = self._gather([bucket for bucket in buckets if bucket.ranks is not None])
        plain = [bucket for bucket in buckets if bucket.ranks is None]
        if self._sharded and plain and td.is_initialized():
            updates = _shared_out(plain, self._process_group)
        else:
            updates = [list(_iterate(bucket, range(len(bucket.targets))).unbind()) for bucket in plain]
        for bucket, update in zip(plain, updates, strict=True):
            apply_updates(bucket, bucket.targets, bucket.rests, update)
        for bucket, exchange in exchanges:
            matrices = exchange.directions()
            if len(matrices):
                matrices = normalized(bucket, _polar(bucket, matrices), exchange.squares())
            exchange.scatter(matrices)
        for bucket, exchange in exchanges:
            apply_updates(bucket, *exchange.updates())
        self._counts["orthogonalized"] = sum(len(b.targets) + len(b.parts) for b in buckets)
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
        named = [(name, p) for name, p, _ in self._named() if mesh_of(p) is None]
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

    def _compare_meshes(self) -> None:
        """Raise if the ranks of a device mesh differ in what the host knows; learn what each one holds."""
        for group in self.param_groups:
            if group["use_muon"] and (group["momentum_bits"] or group["update_floor"]):
                check_dtensors(group)  # they may have come, or the option been set, after it was added
        named: dict[Any, list[tuple[str, Tensor, bool]]] = {}
        for name, p, muon in self._named():
            if (mesh := mesh_of(p)) is not None:
                named.setdefault(mesh, []).append((name, p, muon))
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("Muon: a step on DTensors cannot be captured: ranks compare on the host first")
        self._meshes = self._meshes or {}
        for mesh, found in named.items():
            if mesh not in self._meshes:
                self._meshes[mesh] = MeshRanks(mesh)
            matrices = [p for _, p, muon in found if muon]
            self._meshes[mesh].compare(self._facts([(name, p) for name, p, _ in found]), matrices)

    def _named(self) -> list[tuple[str, Tensor, bool]]:
        """Return the name in messages of each parameter, and whether it is in a Muon group."""
        # Matrices first: the ranks exchange on the device of the first tensor.
        groups = sorted(enumerate(self.param_groups), key=lambda group: not group[1]["use_muon"])
        return [
            (
                f"parameter {name}" if "param_names" in group else f"parameter {name} of group {i}",
                p,
                group["use_muon"],
            )
            for i, group in groups
            for name, p in zip(group.get("param_names") or itertools.count(), group["params"], strict=False)
        ]

    def _facts(self, named: list[tuple[str, Tensor]]) -> list[Fact]:
        """Return the facts that must be the same on every rank and that the host knows."""
        facts = []
        for name, p in named:
            kind = "none" if p.grad is None else f"{p.grad.dtype}"
            if p.grad is not None and p.grad.is_sparse:
                kind = f"sparse {kind}"
            elif p.grad is not None and mesh_of(p) and not mesh_of(p.grad):
                kind = f"plain {kind}"
            facts.append(Fact(f"the gradient of {name}", kind))
            facts.append(Fact(name, (tuple(p.shape), str(p.dtype), sorted(self.state.get(p, {})))))
        for i, group in enumerate(self.param_groups):
            for key in sorted(SETTINGS & group.keys()):
                value = group[key]
                facts.append(
                    Fact(f"{key} of group {i}", float(value) if isinstance(value, Tensor) else value)
                )
        return facts

    def _momentum(self, group: dict[str, Any], params: list[Tensor]) -> list[Bucket]:
        """Update the momentum and return the directions to iterate, matrices of one shape in one bucket."""
        states = [self.state[p] for p in params]
        directions = update_momentum(group, params, states, self._gradients(params))
        table = table_of(group["ns_coefficients"], group["ns_steps"])
        found: dict[tuple[object, ...], Bucket] = {}
        key: tuple[object, ...]
        for p, direction in zip(params, directions, strict=True):
            rest = self._rest(p, group)
            if self._meshes and (ranks := self._ranks_of(p)):
                live = self._squares(p, group)
                for i, box in enumerate(boxes(p.shape, group)):
                    square = live[i] if live else None
                    key = (box.shape, p.dtype, p.device, ranks)
                    if (bucket := found.get(key)) is None:
                        bucket = found[key] = Bucket(group, table, box.shape, ranks)
                    # Not p.detach(), which DTensor dispatches in Python.
                    part = Part(ranks.layout(p), box, local(p).detach(), rest, direction, square)
                    bucket.parts.append(part)
                continue
            targets, pieces = matrices(p.detach(), group), matrices(direction, group)
            rests = [] if rest is None else matrices(rest, group)
            squares = self._squares(p, group)
            for i, (target, piece) in enumerate(zip(targets, pieces, strict=True)):
                matrix = piece.flatten(1)
                key = (matrix.shape, p.dtype, p.device)
                if (bucket := found.get(key)) is None:
                    bucket = found[key] = Bucket(group, table, (matrix.shape[0], matrix.shape[1]))
                bucket.targets.append(target)
                bucket.rests.extend(rests[i : i + 1])
                bucket.directions.append(matrix)
                bucket.squares.extend(squares[i : i + 1])
        return list(found.values())

    def _squares(self, p: Tensor, group: dict[str, Any]) -> list[Tensor]:
        """Return the live mean squares of each matrix of a parameter; none without NorMuon."""
        if not group["normalize"]:
            return []
        sizes = square_sizes(p.shape, group)
        if SQUARE not in self.state[p]:
            self.state[p][SQUARE] = torch.zeros(sum(sizes), device=p.device, dtype=torch.float32)
        return list(self.state[p][SQUARE].split(sizes))

    def _rest(self, p: Tensor, group: dict[str, Any]) -> Tensor | None:
        """Return this rank's part of the rest of a parameter, with split weights."""
        if not is_split(p, group):
            self.state[p].pop(REST, None)  # of settings that were changed
            return None
        return rest_of(self.state[p], p)

    def _locals(self, tensors: list[Tensor]) -> list[Tensor]:
        return [local(t) for t in tensors] if self._meshes else tensors

    def _gradients(self, params: list[Tensor]) -> list[Tensor]:
        if self._meshes:
            return [local_gradient(p) for p in params]
        return [p.grad for p in params if p.grad is not None]

    def _ranks_of(self, p: Tensor) -> MeshRanks | None:
        return (self._meshes or {}).get(mesh_of(p))

    def _gather(self, buckets: list[Bucket]) -> list[tuple[Bucket, Exchange]]:
        """Start to gather the matrices of distributed parameters to the ranks that iterate them."""
        by_ranks: dict[MeshRanks, list[Bucket]] = {}
        for bucket in buckets:
            if bucket.ranks is not None:
                by_ranks.setdefault(bucket.ranks, []).append(bucket)
        found = []
        for ranks, own in by_ranks.items():
            plans = ranks.plans([bucket.parts for bucket in own], [bucket.cost for bucket in own])
            for bucket, plan in zip(own, plans, strict=True):
                dtype = _dtype(bucket.parts[0].direction.device)
                found.append((bucket, Exchange(ranks, plan, bucket.parts, bucket.shape, dtype)))
        for _, exchange in found:
            exchange.gather()
        return found

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        kinds: dict[torch.device | None, list[Tensor]] = {}  # split weights are joined device by device
        for p in params:
            kinds.setdefault(p.device if is_split(p, group) else None, []).append(p)
        for device, same in kinds.items():
            self._adamw_of(group, same, split=device is not None)

    def _adamw_of(self, group: dict[str, Any], params: list[Tensor], split: bool) -> None:
        for p in params:
            fit_moments(self.state[p], p, group)
        weights, grads = self._locals(params), self._gradients(params)
        targets, rests = weights, [rest for p in params if (rest := self._rest(p, group)) is not None]
        if split:
            weights, grads = join_all(targets, rests), [grad.float() for grad in grads]
        adamw(
            weights,
            grads,
            self._locals([self.state[p]["exp_avg"] for p in params]),
            self._locals([self.state[p]["exp_avg_sq"] for p in params]),
            [],
            [self.state[p]["step"] for p in params],
            foreach=not group.get("fused") and group.get("foreach") is not False,
            fused=bool(group.get("fused")),
            capturable=bool(group.get("capturable")),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"] if group.get("capturable") else float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if split:
            split_all(weights, targets, rests)


def _iterate(bucket: Bucket, indices: Iterable[int]) -> Tensor:
    """Return the orthogonalized directions `(number of indices, m, n)`, bfloat16 on CUDA, float32 on CPU."""
    directions = [bucket.directions[i] for i in indices]
    return _polar(bucket, torch.stack(directions).to(_dtype(directions[0].device)))


def _polar(bucket: Bucket, x: Tensor) -> Tensor:
    if bucket.group["row_normalize"]:
        row_normalize_(x)
    return newton_schulz(x, bucket.table, eps=bucket.group["eps"])


def _shared_out(buckets: list[Bucket], process_group: td.ProcessGroup | None) -> list[list[Tensor]]:
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
