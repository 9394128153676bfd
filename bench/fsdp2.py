"""The time of an optimizer step on parameters that FSDP2 has sharded, next to the forward and backward pass.

    torchrun --standalone --nproc_per_node=2 -m bench.fsdp2

The model is a Llama of 341 M parameters: 24 blocks of width 1,024 with 16 heads, a SwiGLU of width 2,816 and
a tied embedding of 32,000 tokens. `fully_shard` splits each block and the rest over all ranks. Its 168
matrices (308 M parameters) belong to Muon, the embedding and the norms to AdamW. The weights are random and
not zero. One backward pass over random tokens, other ones on each rank, gives the gradients that every
optimizer steps on.

- `pgolf` is `pgolf.optim.Muon` with an AdamW group.
- `torch.optim.Muon` takes the DTensors as they are. That is right, but each iteration of each matrix has
  collectives of its own. AdamW is `torch.optim.AdamW(fused=True)`.
- `torch.optim.Muon, whole` is what a program can do about that: each rank gathers every gradient
  (`full_tensor()`), iterates all matrices on whole copies of the parameters, and keeps its own part.
- `dion.Muon` is https://github.com/microsoft/dion, with its own coefficients and its AdamW; on CUDA with its
  Triton kernels, also as its CUDA graph. It is left out if it cannot be imported.

All have five iterations, Nesterov momentum and the same learning rates. `ms_optimizer` is the wall time of a
step from idle devices to idle devices, the slowest rank's, so that it contains the host's work; a step of
each is measured in turns. `ms_fwd_bwd` is the same for the forward and backward pass of 8 x 1,024 tokens per
rank, in bfloat16 on CUDA. `collectives` counts those of a step. `distance` is that of the first update of all
matrices from pgolf's, divided by the norm of pgolf's: rounding to bfloat16 gives a few hundredths.

Without torchrun there is one rank. On the CPU pass --quick, or a
small model: --layers 2 --width 64 --hidden 176 --vocab 256.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from bench.ce_peers import find, working
from bench.common import Recorder, Sample, only, parser, torch_name
from pgolf.optim import Muon
from pgolf.optim.mesh import local
from pgolf.peers import describe

LR, WEIGHT_DECAY, MOMENTUM, BETAS, EPS = 1e-3, 0.1, 0.95, (0.9, 0.95), 1e-8
HEAD = 64
"""Width of an attention head."""
WARM_UP = 3
"""Steps before the time is measured, after one for the distance and one for the number of collectives."""


@dataclass(frozen=True)
class Shape:
    """The size of the model and of a micro-batch."""

    layers: int = 24
    width: int = 1024
    hidden: int = 2816
    vocab: int = 32_000
    rows: int = 8
    length: int = 1024

    def case(self, world: int, device: torch.device) -> str:
        """Return the case of the result lines."""
        model = "llama350m" if self == Shape() else f"llama_l{self.layers}_d{self.width}_v{self.vocab}"
        return f"{model}_{world}{'gpu' if device.type == 'cuda' else 'cpu'}"


SMALL = Shape(layers=2, width=64, hidden=176, vocab=256, rows=2, length=32)
"""The shape of --quick."""


class Block(nn.Module):
    """Attention with rotary positions, and SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(shape.width) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(shape.width, shape.width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(shape.width, shape.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """Map `(rows, length, width)`; `angles` is `(length, head / 2)`."""
        h = self.norms[0](x)
        q, k, v = (f(h).unflatten(-1, (-1, HEAD)).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(_rotate(q, angles), _rotate(k, angles), v, is_causal=True)
        x = x + self.o(h.transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)


class Llama(nn.Module):
    """Blocks between a tied embedding; no weight is zero."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of `(rows, length)` tokens."""
        places = torch.arange(ids.shape[1], device=ids.device)
        turns = 10_000.0 ** (-torch.arange(0, HEAD, 2, device=ids.device) / HEAD)
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, places[:, None] * turns)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())


def build(shape: Shape, device: torch.device, mesh: DeviceMesh | None) -> Llama:
    """Return the model with the same weights every time, sharded over `mesh` if there is one."""
    torch.manual_seed(0)
    with device:
        model = Llama(shape)
    if mesh is not None:
        half = torch.bfloat16 if device.type == "cuda" else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half and torch.float32)
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


def forward_backward(model: Llama, shape: Shape, seed: int) -> None:
    """Compute new gradients on random tokens."""
    device = next(model.parameters()).device
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(shape.vocab, (shape.rows, shape.length + 1), generator=rng).to(device)
    model.zero_grad()
    model(tokens[:, :-1], tokens[:, 1:]).backward()


def matrices(model: Llama) -> list[nn.Parameter]:
    """Return the parameters that belong to Muon."""
    return [p for p in model.blocks.parameters() if p.ndim == 2]


def others(model: Llama) -> list[nn.Parameter]:
    """Return the parameters that belong to AdamW: the embedding and the norms."""
    return [p for name, p in model.named_parameters() if p.ndim != 2 or not name.startswith("blocks")]


Step = Callable[[], object]
Maker = Callable[[Llama, "DeviceMesh | None"], Step]


def pgolf_muon(model: Llama, _mesh: DeviceMesh | None) -> Step:
    """Return the step of this package's Muon and AdamW."""
    adamw = {"params": others(model), "use_muon": False, "betas": BETAS, "fused": True, "eps": EPS}
    groups: list[dict[str, Any]] = [{"params": matrices(model)}, adamw]
    return Muon(groups, LR, WEIGHT_DECAY, MOMENTUM, adjust_lr_fn="match_rms_adamw").step


def _torch_pair(wholes: list[nn.Parameter], rest: list[nn.Parameter]) -> tuple[Step, Step]:
    muon = torch.optim.Muon(wholes, LR, WEIGHT_DECAY, MOMENTUM, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, LR, BETAS, EPS, WEIGHT_DECAY, fused=True)
    return muon.step, adamw.step


def torch_muon(model: Llama, _mesh: DeviceMesh | None) -> Step:
    """Return the step of torch's Muon on the parameters as they are, and of its AdamW."""
    steps = _torch_pair(matrices(model), others(model))
    return lambda: [step() for step in steps]


def torch_muon_whole(model: Llama, mesh: DeviceMesh | None) -> Step:
    """Return the step of torch's Muon on whole copies of the matrices on each rank, and of its AdamW."""
    parts = matrices(model)
    wholes = [nn.Parameter(_whole(p.detach())) for p in parts]
    steps = _torch_pair(wholes, others(model))

    @torch.no_grad()
    def step() -> None:
        for p, whole in zip(parts, wholes, strict=True):
            whole.grad = _whole(p.grad)
        for each in steps:
            each()
        for p, whole in zip(parts, wholes, strict=True):
            own = whole if mesh is None else distribute_tensor(whole, mesh, p.placements, src_data_rank=None)
            local(p).copy_(local(own))

    return step


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def dion_muon(make: Callable[..., torch.optim.Optimizer]) -> Maker:
    """Return what makes the step of dion's Muon and AdamW."""

    def maker(model: Llama, mesh: DeviceMesh | None) -> Step:
        params = [{"params": matrices(model)}, {"params": others(model), "algorithm": "adamw"}]
        settings = {"mu": MOMENTUM, "betas": BETAS, "weight_decay": WEIGHT_DECAY, "epsilon": EPS}
        triton = matrices(model)[0].is_cuda
        settings |= {"nesterov": True, "adjust_lr": "rms_norm", "use_triton": triton}
        return make(params, distributed_mesh=mesh, lr=LR, **settings).step

    return maker


def makers(device: torch.device) -> dict[str, Maker]:
    """Return what makes each optimizer's step, by name with version; print which cannot be imported."""
    found: dict[str, Maker] = {
        "pgolf": pgolf_muon,
        torch_name("optim.Muon"): torch_muon,
        torch_name("optim.Muon, whole"): torch_muon_whole,
    }
    if dion := find("dion.Muon", "dion", "dion", "Muon"):
        found[dion[0]] = dion_muon(dion[1])
        graph = find("dion.Muon, its graph", "dion", "dion.cuda_graph", "CudaGraphOptimizer")
        if graph and device.type == "cuda":
            captured = graph[1]
            found[graph[0]] = dion_muon(lambda *args, **kw: captured(dion[1](*args, **kw), warmup_steps=3))
    return found


def made(found: dict[str, Maker], models: dict[str, Llama], mesh: DeviceMesh | None) -> dict[str, Step]:
    """Return the steps; print which cannot be made, and why."""
    steps = {}
    for name, make in found.items():
        try:
            steps[name] = make(models[name], mesh)
        except Exception as e:
            if name == "pgolf":
                raise
            print(f"{name:<28} not usable: {describe(e)}")
    return steps


def distance(model: Llama, ours: Llama, start: Llama) -> float:
    """Return how far the update of all matrices is from that of `ours`, relative to the latter."""
    sums = torch.zeros(2, dtype=torch.float64)
    for p, q, s in zip(*map(matrices, (model, ours, start)), strict=True):
        p, q, s = (local(t.detach()) for t in (p, q, s))
        sums += torch.stack([(p - q).double().square().sum(), (q - s).double().square().sum()]).cpu()
    if td.is_initialized():
        td.all_reduce(sums)
    return float((sums[0] / sums[1]).sqrt())


def wall_ms(call: Step, device: torch.device) -> float:
    """Return milliseconds of a call from idle ranks until this rank is idle."""
    _wait(device)
    td.all_reduce(torch.zeros(1))  # on the host, so that all ranks are idle
    began = time.perf_counter()
    call()
    _wait(device)
    return (time.perf_counter() - began) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_ranks(
    calls: Mapping[str, Step], device: torch.device, *, repeats: int, warm_up: int
) -> dict[str, Sample]:
    """Time each call in turns; the milliseconds are those of the slowest rank of each measurement."""
    for name in [*calls] * warm_up:
        calls[name]()
    times = torch.tensor([[wall_ms(call, device) for call in calls.values()] for _ in range(repeats)])
    td.all_reduce(times, td.ReduceOp.MAX)
    return {name: Sample.of(times[:, i].tolist()) for i, name in enumerate(calls)}


def collectives(step: Step) -> int:
    """Return how many collectives a step starts."""
    # Compiled code refuses to run where operators are counted.
    with torch.compiler.set_stance("force_eager"), CommDebugMode() as counter:
        step()
    return int(counter.get_total_counts())


def measure(recorder: Recorder, shape: Shape, peers: list[str], repeats: int) -> None:
    """Measure one shape on all ranks, record it and print the table."""
    device, world = recorder.device, td.get_world_size()
    mesh, case = init_device_mesh(device.type, (world,)), shape.case(world, device)
    start = build(shape, device, mesh)
    sizes = [sum(p.numel() for p in params) for params in (matrices(start), others(start))]
    print(f"{sum(sizes):,} parameters, {sizes[0]:,} of them in {len(matrices(start))} matrices")
    passes = {torch_name("FSDP2"): lambda: forward_backward(start, shape, mesh.get_rank())}
    for name, both in time_ranks(passes, device, repeats=repeats, warm_up=3).items():
        recorder.add(case, name, "ms_fwd_bwd", both, "ms")
    found = only(makers(device), peers)
    models = {name: build(shape, device, mesh) for name in found}
    for model in models.values():
        for p, q in zip(model.parameters(), start.parameters(), strict=True):
            p.grad = q.grad.clone()
    steps = working(made(found, models, mesh))
    for name in steps:
        far = Sample(distance(models[name], models["pgolf"], start), 0.0, 1)
        recorder.add(case, name, "distance", far, "1")
    for name, step in steps.items():
        recorder.add(case, name, "collectives", Sample(collectives(step), 0.0, 1), "1")
    # A peer with a graph captures it in a later step than its first, and that may fail, too.
    later = {name: lambda step=step: [step() for _ in range(WARM_UP)] for name, step in steps.items()}
    steps = {name: steps[name] for name in working(later)}
    samples = time_ranks(steps, device, repeats=repeats, warm_up=0)
    for name, sample in samples.items():
        recorder.add(case, name, "ms_optimizer", sample, "ms")
    print(f"\n{'optimizer':<32} {'ms':>9} {'+-':>7} {'of pgolf':>9} {'share of the step':>18}")
    for name, sample in samples.items():
        share, ratio = sample.value / (sample.value + both.value), sample.value / samples["pgolf"].value
        print(f"{name:<32} {sample.value:9.3f} {sample.spread:7.3f} {ratio:8.2f}x {share:17.1%}")
    for step in steps.values():
        # A captured graph holds collectives, and the process group cannot end before them.
        getattr(getattr(step, "__self__", None), "release", lambda: None)()


def start_ranks(kind: str) -> torch.device:
    """Start torch.distributed, with one rank without torchrun, and return this rank's device."""
    own = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(own)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if "RANK" in os.environ:
        td.init_process_group(backend)
    else:
        td.init_process_group(backend, store=td.HashStore(), rank=0, world_size=1)
    return own


def main() -> None:
    """Parse arguments, measure on all ranks, and write on the first."""
    arguments = parser(__doc__ or "", ["llama"])
    for each in fields(Shape):
        arguments.add_argument(f"--{each.name}", type=int, default=each.default, help="size of the model")
    args = arguments.parse_args()
    shape = Shape(**{each.name: getattr(args, each.name) for each in fields(Shape)})
    if shape.width % HEAD:
        arguments.error(f"--width must be a multiple of {HEAD}, the width of a head; got {shape.width}")
    repeats = 3 if args.quick else args.repeats
    device = start_ranks(args.device)
    rank = td.get_rank()
    recorder = Recorder("fsdp2", device, None if args.quick or rank else args.out)
    with contextlib.redirect_stdout(io.StringIO() if rank else sys.stdout):
        measure(recorder, SMALL if args.quick else shape, args.only, repeats)
        recorder.write()
    td.destroy_process_group()


if __name__ == "__main__":
    main()
