"""muon_step on the model's weight banks: momentum, row normalization, iteration, decay and float32 update.

`bank66` is all 66 matrices of preset pr1855, `eighth` the share of one rank of eight; `tiny` is for machines
without a GPU; `BxMxN` are the large cases of bench_newton_schulz. Gradients and parameters are float32,
momentum is bfloat16; there are 5 iterations of `polar_express_golf`. The other implementations do the same
work: as the baseline script does it (banks, bfloat16, eager and compiled), and without row normalization
torch.optim.Muon on the separate matrices, with its own coefficients, and dion's Muon on the banks, if
installed, also as the CUDA graph that it captures.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.ce_peers import find, working
from bench.common import Recorder, parser, time_graph, time_launched, torch_name
from bench.ops.bench_newton_schulz import LARGE
from bench.polar_peers import Table
from pgolf.ops import MuonBank, MuonRule, muon_step
from pgolf.optim.polar import coefficients
from pgolf.optim.update_rules import lr_scale
from pgolf.peers import describe

CASES = {
    "tiny": [(4, 64, 64), (4, 32, 64), (2, 256, 64), (2, 64, 256)],
    "eighth": [(3, 512, 512), (3, 256, 512), (2, 2048, 512), (2, 512, 2048)],
    "bank66": [(22, 512, 512), (22, 256, 512), (11, 2048, 512), (11, 512, 2048)],
} | {f"{b}x{m}x{n}": [(b, m, n)] for b, m, n in LARGE}
OWN_GRAPH = "its graph"
Shapes = list[tuple[int, int, int]]

LR, MOMENTUM, WEIGHT_DECAY = 0.026, 0.97, 0.095
TABLE = coefficients("polar_express_golf", 5)


def banked_step(param: Tensor, grad: Tensor, momentum: Tensor, table: Table = TABLE) -> None:
    """One bank's step as the baseline script writes it: bfloat16 throughout, float32 parameters."""
    g = grad.to(momentum.dtype)
    momentum.mul_(MOMENTUM).add_(g)
    u = g.add(momentum, alpha=MOMENTUM)
    u = u / u.float().norm(dim=-1, keepdim=True).clamp(min=1e-7).to(u.dtype)
    tall = u.shape[-2] > u.shape[-1]
    x = u.mT if tall else u
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in table:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    update = x.mT if tall else x
    param.mul_(1 - LR * WEIGHT_DECAY)
    param.add_(update.to(param.dtype), alpha=-LR * lr_scale(*param.shape[-2:]))


def banks(shapes: Shapes, device: torch.device) -> list[MuonBank]:
    """Return random banks with 16-bit momentum and updates on CUDA, float32 on CPU."""
    rng = torch.Generator(device).manual_seed(0)
    state = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = []
    for shape in shapes:
        param, grad = (torch.randn(shape, generator=rng, device=device) for _ in range(2))
        momentum, update = (torch.zeros(shape, dtype=state, device=device) for _ in range(2))
        found.append(MuonBank(grad, momentum, update, param, lr_scale=lr_scale(*shape[1:])))
    return found


def contenders(case: str, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return every implementation as a call over all banks; each has separate tensors."""
    ours, eager, compiled = (banks(CASES[case], device) for _ in range(3))
    hyper = torch.tensor([LR, MOMENTUM, WEIGHT_DECAY, 1.0, 0.0, 0.0, 0.0], device=device)
    rule = MuonRule(TABLE, row_normalize=True)
    compiled_step = torch.compile(banked_step, dynamic=False, fullgraph=True)
    found: dict[str, Callable[[], object]] = {
        "pgolf": lambda: muon_step(ours, hyper, rule),
        torch_name("eager"): lambda: [banked_step(b.param, b.grad, b.momentum) for b in eager],
        torch_name("compile"): lambda: [compiled_step(b.param, b.grad, b.momentum) for b in compiled],
        torch_name("optim.Muon"): torch_muon(CASES[case], device),
        **dion_muon(CASES[case], device),
    }
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
        gram = rule._replace(algorithm="gram")
        found["pgolf gram"] = lambda: muon_step(ours, hyper, gram)
    return found


def torch_muon(shapes: Shapes, device: torch.device) -> Callable[[], object]:
    """Return a step of torch.optim.Muon on the matrices of the banks."""
    params = []
    for bank in banks(shapes, device):
        assert bank.param is not None
        for p, g in zip(bank.param, bank.grad, strict=True):
            params.append(torch.nn.Parameter(p.clone()))
            params[-1].grad = g.clone()
    optimizer = torch.optim.Muon(params, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    return optimizer.step


def dion_muon(shapes: Shapes, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return a step of dion's Muon on the banks, as it is and as the CUDA graph that it captures itself."""
    found = find("dion.Muon", "dion", "dion", "Muon")
    graph = find(f"dion.Muon, {OWN_GRAPH}", "dion", "dion.cuda_graph", "CudaGraphOptimizer")

    def make() -> torch.optim.Optimizer:
        params = []
        for bank in banks(shapes, device):
            assert bank.param is not None
            params.append(torch.nn.Parameter(bank.param))
            params[-1].grad = bank.grad
        settings = {"weight_decay": WEIGHT_DECAY, "nesterov": True, "use_triton": device.type == "cuda"}
        return found[1](params, lr=LR, mu=MOMENTUM, **settings)

    calls: dict[str, Callable[[], object]] = {}
    try:
        if found:
            calls[found[0]] = make().step
        if found and graph and device.type == "cuda":
            captured = graph[1](make(), warmup_steps=2).step
            for _ in range(4):
                captured()  # the third call captures, and that may fail, too
            calls[graph[0]] = captured
    except Exception as e:
        print(f"{'dion.Muon':<28} not usable: {describe(e)}")
    return calls


def capturable(calls: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Return the calls that a bench may capture: not those that replay a graph of their own."""
    return {name: call for name, call in calls.items() if OWN_GRAPH not in name}


def main() -> None:
    """Parse arguments, measure, write."""
    args = parser(__doc__ or "", list(CASES)).parse_args()
    device = torch.device(args.device)
    recorder = Recorder("muon_step", device, None if args.quick else args.out)
    cases = ["tiny"] if args.quick else args.cases
    with torch.no_grad():
        for case in cases:
            torch.compiler.reset()
            calls = working(contenders(case, device), recorder.first_calls(case))
            repeats = 3 if args.quick else args.repeats
            for name, sample in time_launched(calls, device, repeats=repeats).items():
                recorder.add(case, name, "ms_launched", sample, "ms")
            for name, sample in time_graph(capturable(calls), device, repeats=repeats).items():
                recorder.add(case, name, "ms_graph", sample, "ms")
    recorder.write()


if __name__ == "__main__":
    main()
