"""The time of the optimizer: variants of Muon and other implementations, and the whole tail of a step.

A variant is a coefficient table and a number of iterations, for example `polar_express_golf5`. For each
variant, and for the share of preset pr1855's 66 matrices that one of `world` ranks owns, the bench measures
the milliseconds of `muon_step` (momentum, row normalization, iteration, weight decay, float32 update), as
launched and as a CUDA graph, and how orthogonal the updates of random gradients are: extreme singular values,
and RMS deviation of the singular values from 1. `pgolf` is algorithm "auto", `pgolf gram` the Hopper kernel
that iterates all banks at once; `a call a bank` makes one call per bank, which would let the gather of a bank
overlap the next iteration. The other implementations do the same step with torch operators (baddbmm, eager,
compiled), torch.optim.Muon, and, if installed, dion's Muon, also as the CUDA graph that it captures, and the
iterations of `bench.polar_peers` (the iteration only). AOL (the row scaling of Turbo-Muon, four iterations,
another polar factor) is compiled torch code.

The tail is reduce, clip, AdamW, Muon, average and zeroing on pr1855's model, also with EMA-Nesterov, compared
with torch's fused kernels; under torchrun it includes the communication of that many ranks. On the CPU all
shapes are small.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bench.ce_peers import working
from bench.common import Recorder, Sample, parser, time_graph, time_launched, torch_name
from bench.ops.bench_muon_step import (
    CASES as BANKS,
)
from bench.ops.bench_muon_step import (
    LR,
    MOMENTUM,
    WEIGHT_DECAY,
    Shapes,
    banked_step,
    banks,
    capturable,
    dion_muon,
    torch_muon,
)
from bench.polar_peers import Table, each, others
from pgolf.config import OptimConfig
from pgolf.dist import Dist
from pgolf.model.gpt import GPT
from pgolf.ops import MuonBank, MuonRule, muon_step
from pgolf.optim.ema import Ema
from pgolf.optim.polar import coefficients
from pgolf.optim.step import Optimizer
from pgolf.optim.update_rules import lr_scale
from pgolf.presets import pr1855, tiny

# By name: table and number of iterations. The fixed quintic, the tables that are solved for their number of
# iterations, the published list cut short, and the lists of five.
VARIANTS = {f"{name}{n}": (name, n) for name in ("jordan", "polar_express_golf") for n in (3, 4, 5, 6)}
VARIANTS |= {"polar_express_refit5": ("polar_express_refit", 5), "polar_express5": ("polar_express", 5)}
VARIANTS |= {f"polar_express_golf_truncated{n}": ("polar_express_golf_truncated", n) for n in (3, 4)}
VARIANTS |= {"cans5": ("cans", 5), "you5": ("you", 5)}
BASELINE = "polar_express_golf5"
TAIL = "tail"
AOL_NAME = torch_name("compile, AOL, 4 steps")


def share(shapes: Shapes, world: int) -> Shapes:
    """Return the part of each bank that one of `world` ranks owns: whole matrices, rounded up."""
    return [(-(-b // world), m, n) for b, m, n in shapes]


def orthogonality(updates: list[Tensor]) -> dict[str, float]:
    """Return sv_min, sv_max and sv_rms over the first matrix of each update."""
    values = torch.cat([torch.linalg.svdvals(u[0].float()) for u in updates])
    return {
        "sv_min": values.min().item(),
        "sv_max": values.max().item(),
        "sv_rms": math.sqrt((values - 1).square().mean().item()),
    }


def baddbmm_step(param: Tensor, grad: Tensor, momentum: Tensor, table: Table) -> None:
    """The step with three cuBLAS calls per iteration, with the scaling fused into the products."""
    momentum.mul_(MOMENTUM).add_(grad)
    u = torch.add(grad.to(momentum.dtype), momentum, alpha=MOMENTUM)
    u = u / torch.linalg.vector_norm(u, dim=-1, keepdim=True, dtype=torch.float32).clamp(min=1e-7)
    tall = u.shape[-2] > u.shape[-1]
    x = u.mT if tall else u
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(momentum.dtype)
    for a, b, c in table:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    param.mul_(1 - LR * WEIGHT_DECAY).add_(x.mT if tall else x, alpha=-LR * lr_scale(*param.shape[-2:]))


# Turbo-Muon's table for inputs that AOL has scaled (flash-newton-schulz, arXiv 2512.04632).
AOL: Table = (
    (4.6051, -9.6552, 5.6769),
    (4.7505, -6.0861, 2.1790),
    (2.7763, -2.3190, 0.5523),
    (2.4231, -2.2861, 0.8193),
)


def aol_polar(x: Tensor, table: Table) -> Tensor:
    """Iterate on D X with D_ii = (sum_j |X X^T|_ij)^(-1/2), whose singular values are at most 1."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    gram = x @ x.mT
    scale = gram.float().abs().sum(-1, keepdim=True).clamp(min=1e-12).rsqrt().to(x.dtype)
    x, gram = scale * x, scale * gram * scale.mT
    for i, (a, b, c) in enumerate(table):
        gram = x @ x.mT if i else gram
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def aol_step(param: Tensor, grad: Tensor, momentum: Tensor, table: Table = AOL) -> Tensor:
    """The step with AOL instead of row normalization; returns the polar factor."""
    momentum.mul_(MOMENTUM).add_(grad)
    u = torch.add(grad.to(momentum.dtype), momentum, alpha=MOMENTUM)
    x = aol_polar(u / (u.norm(dim=(-2, -1), keepdim=True) + 1e-7), table)
    param.mul_(1 - LR * WEIGHT_DECAY).add_(x, alpha=-LR * lr_scale(*param.shape[-2:]))
    return x


def per_bank(step: Callable[..., None], own: list[MuonBank], table: Table) -> Callable[[], object]:
    """Return a call that makes one step per bank."""
    return lambda: [step(bank.param, bank.grad, bank.momentum, table) for bank in own]


def peers(shapes: Shapes, table: Table, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return the same step by other implementations, each with separate tensors."""
    compiled = torch.compile(banked_step, dynamic=False, fullgraph=True)
    found = {
        torch_name("eager"): per_bank(banked_step, banks(shapes, device), table),
        torch_name("baddbmm"): per_bank(baddbmm_step, banks(shapes, device), table),
        torch_name("compile"): per_bank(compiled, banks(shapes, device), table),
        torch_name("optim.Muon"): torch_muon(shapes, device),
        **dion_muon(shapes, device),
        AOL_NAME: per_bank(torch.compile(aol_step, dynamic=False), banks(shapes, device), AOL),
    }
    if device.type == "cuda":
        inputs = [bank.grad.bfloat16() for bank in banks(shapes, device)]
        for name, iterate in others(table).items():
            found[f"{name}, iteration only"] = each(iterate, inputs)
    return found


def takes(own: list[MuonBank], hyper: Tensor, rule: MuonRule) -> bool:
    """Return whether this device and this build can run the rule."""
    try:
        muon_step(own, hyper, rule)
    except RuntimeError as e:
        print(f"algorithm {rule.algorithm!r} left out: {str(e).splitlines()[0]}")
        return False
    return True


def measure_variant(recorder: Recorder, variant: str, world: int, repeats: int, *, with_peers: bool) -> None:
    """Time one variant on the share of one of `world` ranks, and record how orthogonal its updates are."""
    device = recorder.device
    name, steps = VARIANTS[variant]
    table = coefficients(name, steps)
    shapes = share(BANKS["bank66" if device.type == "cuda" else "tiny"], world)
    own = banks(shapes, device)
    hyper = torch.tensor([LR, MOMENTUM, WEIGHT_DECAY, 1.0, 0.0, 0.0, 0.0], device=device)
    rule = MuonRule(table, row_normalize=True)
    calls: dict[str, Callable[[], object]] = {"pgolf": lambda: muon_step(own, hyper, rule)}
    gram = rule._replace(algorithm="gram")
    if takes(own, hyper, gram):
        calls["pgolf gram"] = lambda: muon_step(own, hyper, gram)
    if world > 1:
        calls["pgolf, a call a bank"] = lambda: [muon_step([bank], hyper, rule) for bank in own]
    if with_peers:
        calls |= working(peers(shapes, table, device))
    case = f"{variant}_w{world}"
    for impl, sample in time_launched(calls, device, repeats=repeats).items():
        recorder.add(case, impl, "ms_launched", sample, "ms")
    for impl, sample in time_graph(capturable(calls), device, repeats=repeats).items():
        recorder.add(case, impl, "ms_graph", sample, "ms")
    for impl in ("pgolf", "pgolf gram"):
        if world == 1 and impl in calls:
            calls[impl]()
            for metric, value in orthogonality([bank.update for bank in own]).items():
                recorder.add(case, impl, metric, Sample(value, 0.0, 1), "1")
    if AOL_NAME in calls:
        factors = [
            aol_step(b.param, b.grad, b.momentum) for b in banks(shapes, device) if b.param is not None
        ]
        for metric, value in orthogonality(factors).items():
            recorder.add(case, AOL_NAME, metric, Sample(value, 0.0, 1), "1")


def torch_tail(model: GPT) -> Callable[[], object]:
    """Return clip, Muon, AdamW, average and zero by torch's fused kernels; Muon is compiled on CUDA."""
    config = pr1855().optim
    names = dict(model.named_parameters())
    own = {n: p.detach().clone().requires_grad_() for n, p in names.items()}
    for p in own.values():
        p.grad = torch.randn_like(p)
    state = torch.bfloat16 if next(iter(own.values())).is_cuda else torch.float32
    matrices = [own[n] for n in model.bank_names]
    momenta = [torch.zeros_like(p, dtype=state) for p in matrices]
    rest = [p for n, p in own.items() if n not in model.bank_names]
    cuda = rest[0].is_cuda
    adam = torch.optim.AdamW(rest, lr=config.adam.scalar_lr, betas=(0.9, 0.99), fused=True, capturable=cuda)
    averages = [p.detach().clone() for p in own.values()]
    table = coefficients(config.muon.coefficients, config.muon.ns_steps)
    step = banked_step if matrices[0].device.type == "cpu" else torch.compile(banked_step, dynamic=False)

    def tail() -> None:
        torch.nn.utils.clip_grad_norm_(list(own.values()), config.grad_clip, foreach=True)
        adam.step()
        with torch.no_grad():
            for p, momentum in zip(matrices, momenta, strict=True):
                assert p.grad is not None
                step(p.detach(), p.grad, momentum, table)
            torch._foreach_lerp_(averages, [p.detach() for p in own.values()], 0.01)
        torch._foreach_zero_([p.grad for p in own.values()])

    return tail


def measure_tail(device: torch.device, repeats: int, out: Path | None) -> Recorder:
    """Time the tail of a step, as launched and replayed, and the same work by torch's kernels.

    Ten replays are timed together, as for all graphs, so that the time of the host counts only if it is
    longer than the time of the device.
    """
    dist = Dist.start("cuda" if device.type == "cuda" else "cpu")
    recorder = Recorder("tail", device, out)
    config = pr1855() if device.type == "cuda" else tiny()
    # An optimizer owns the gradients of its model.
    model, ahead_model = (GPT(config.model).to(dist.device) for _ in range(2))
    ahead = replace(config.optim, ema_nesterov=0.6)
    case = f"record_{dist.world_size}gpu" if device.type == "cuda" else "tiny_cpu"
    peer = {torch_name("fused"): torch_tail(model)} if dist.world_size == 1 else {}

    def tail(model: GPT, optim: OptimConfig, *, capture: bool) -> Callable[[], object]:
        ema = Ema(dict(model.named_parameters()))
        optimizer = Optimizer(model, optim, dist, ema=ema, capture=capture)
        return lambda: optimizer.step(0.5, ema_decay=0.99, delta=1e-4)

    def ours(*, capture: bool) -> dict[str, Callable[[], object]]:
        return {
            "pgolf": tail(model, config.optim, capture=capture),
            "pgolf, EMA-Nesterov": tail(ahead_model, ahead, capture=capture),
        }

    for impl, sample in time_launched(ours(capture=False) | peer, device, repeats=repeats).items():
        recorder.add(case, impl, "ms_launched", sample, "ms")
    if device.type == "cuda" and dist.world_size == 1:
        replayed = time_launched(ours(capture=True), device, repeats=repeats, calls=10)
        for impl, sample in (replayed | time_graph(peer, device, repeats=repeats)).items():
            recorder.add(case, impl, "ms_graph", sample, "ms")
    dist.close()
    return recorder


def main() -> None:
    """Parse arguments, measure, write."""
    arguments = parser(__doc__ or "", [*VARIANTS, TAIL])
    arguments.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4, 8], help="shares to measure")
    arguments.add_argument("--peers", nargs="*", default=[BASELINE], help="variants with peers, at world 1")
    args = arguments.parse_args()
    device, repeats = torch.device(args.device), 3 if args.quick else args.repeats
    cases = [BASELINE, TAIL] if args.quick else args.cases
    out = None if args.quick or int(os.environ.get("RANK", "0")) else args.out
    written = []
    # One rank is enough to measure work without communication.
    variants = [c for c in cases if c != TAIL] if int(os.environ.get("WORLD_SIZE", "1")) == 1 else []
    recorder = Recorder("optimizer", device, out)
    with torch.no_grad():
        for variant in variants:
            for world in args.worlds[:1] if args.quick else args.worlds:
                torch.compiler.reset()
                with_peers = variant in args.peers and world == 1
                measure_variant(recorder, variant, world, repeats, with_peers=with_peers)
    if variants:
        written.append(recorder)
    if TAIL in cases:
        written.append(measure_tail(device, repeats, out))
    for found in written:
        found.write()


if __name__ == "__main__":
    main()
