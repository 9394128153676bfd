"""Clip, AdamW, average and zeroing of the replicated parameters, compared with torch's fused kernels.

`record` is the embedding (8,192 x 512) and 60 small tensors of preset pr1855; `tiny` is for machines without
a GPU. All tensors are float32. Every contender measures the norm, clips, steps, moves the averages and zeroes
the gradients.
gbytes is the traffic that the step alone needs: 40 bytes per element.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.common import Recorder, Sample, parser, time_graph, time_launched, torch_name
from pgolf.ops import AdamRule, AdamTensor, adam_step, clip_scale, square_sums
from pgolf.ops.adam_step import CLIP_STATE
from pgolf.ops.muon_step import AVERAGE_WEIGHT, HYPER

CASES = {
    "tiny": [(512, 64), *[(64,)] * 10],
    "record": [(8192, 512), *[(512,)] * 60],
}
RULE = AdamRule(weight_decay=0.085, beta1=0.9, beta2=0.99, eps=1e-8)
CLIP, LR, WEIGHT = 0.3, 0.03, 0.004


def tensors(shapes: list[tuple[int, ...]], device: torch.device) -> list[AdamTensor]:
    """Return parameters with gradients, zero moments and averages."""
    rng = torch.Generator(device).manual_seed(0)
    found = []
    for shape in shapes:
        param, grad = (torch.randn(shape, generator=rng, device=device) for _ in range(2))
        zeros = (torch.zeros(shape, device=device) for _ in range(2))
        found.append(AdamTensor(param, grad, *zeros, param.clone()))
    return found


def ours(shapes: list[tuple[int, ...]], device: torch.device) -> Callable[[], object]:
    """Return the step by the operators of pgolf."""
    own, lr = tensors(shapes, device), torch.tensor(LR, device=device)
    hyper, corrections = torch.zeros(HYPER, device=device), torch.zeros(2, device=device)
    hyper[AVERAGE_WEIGHT] = WEIGHT
    state = torch.zeros(CLIP_STATE, device=device)

    def step() -> None:
        sums = square_sums([t.grad for t in own])
        clip_scale(sums, state, hyper, corrections, clip=CLIP, beta1=RULE.beta1, beta2=RULE.beta2)
        adam_step(own, lr, hyper, corrections, RULE)

    return step


def torch_fused(shapes: list[tuple[int, ...]], device: torch.device) -> Callable[[], object]:
    """Return the step by the multi-tensor kernels of torch."""
    own = tensors(shapes, device)
    params = [torch.nn.Parameter(t.param) for t in own]
    grads: list[Tensor] = []
    for p, t in zip(params, own, strict=True):
        p.grad = t.grad
        grads.append(t.grad)
    averages = [p.detach().clone() for p in params]
    betas = (RULE.beta1, RULE.beta2)
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(params, LR, betas, RULE.eps, RULE.weight_decay, fused=True, capturable=cuda)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, CLIP, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(averages, [p.detach() for p in params], WEIGHT)
        torch._foreach_zero_(grads)

    return step


def main() -> None:
    """Parse arguments, measure, write."""
    args = parser(__doc__ or "", list(CASES)).parse_args()
    device = torch.device(args.device)
    recorder = Recorder("adam_step", device, None if args.quick else args.out)
    repeats = 3 if args.quick else args.repeats
    with torch.no_grad():
        for case in ["tiny"] if args.quick else args.cases:
            shapes = CASES[case]
            calls = {"pgolf": ours(shapes, device), torch_name("fused"): torch_fused(shapes, device)}
            for name, sample in time_launched(calls, device, repeats=repeats).items():
                recorder.add(case, name, "ms_launched", sample, "ms")
            for name, sample in time_graph(calls, device, repeats=repeats).items():
                recorder.add(case, name, "ms_graph", sample, "ms")
            size = 40e-9 * sum(torch.Size(shape).numel() for shape in shapes)
            recorder.add(case, "pgolf", "gbytes", Sample(size, 0.0, 1), "GB")
    recorder.write()


if __name__ == "__main__":
    main()
