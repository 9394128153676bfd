"""The program that each rank of the distributed tests runs; it writes its results and asserts nothing.

rank_program.py FOLDER DEVICE: reads resume.safetensors and candidates.safetensors, and writes
rank<r>.json and rank<r>.safetensors in FOLDER.
"""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pgolf.config import MuonConfig, OptimConfig
from pgolf.dist import Dist
from pgolf.model.agree import agree_on_kernels
from pgolf.model.attention import Attention, attention_branch
from pgolf.model.gpt import GPT
from pgolf.model.own_attention import doc_kernel
from pgolf.optim.step import Optimizer
from pgolf.presets import tiny

# Momentum rises and the learning rate falls within the run; clipping is active in every step.
CONFIG = OptimConfig(muon=MuonConfig(lr=0.05), grad_clip=0.3)
CANDIDATES = replace(
    CONFIG,
    muon=MuonConfig(lr=0.05, normalize=0.9, cautious=True, slow_age=0.2),
    ema_nesterov=0.5,
    ema_nesterov_horizon=0.3,
    ema_nesterov_from=0.0,
)
"""With every setting that is off by default and has state or work of its own."""
STEPS = 4
RESUME_AT = 2


class Toy(nn.Module):
    """Numbers of matrices that 2 and 4 ranks do not divide (5, 3, 1: empty shards) and one that they do."""

    bank_names = ("few", "five", "one", "four")
    embed_names = ("emb",)

    def __init__(self):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        shapes = {"gain": (3,), "emb": (11, 6)}
        shapes |= {"few": (3, 6, 9), "five": (5, 8, 6), "one": (1, 5, 5), "four": (4, 3, 8)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=rng)))
        self.lamb = nn.Parameter(torch.ones(()))


def accumulate(model, step, rank, world_size):
    """Set this rank's gradient: a part that all ranks share, and a larger part that cancels in the mean."""
    rng = torch.Generator().manual_seed(1000 + step)
    for p in model.parameters():
        shared, own = (torch.randn(p.shape, generator=rng) for _ in range(2))
        p.grad += (shared + 5 * own * (rank - (world_size - 1) / 2)).to(p.device)


def train(dist, first, last, state=None, broken=None, config=CONFIG):
    """Run steps first to last - 1; return the parameters, the optimizer's state and the gradient norms.

    In step `broken` the last rank's gradient of one bank is not finite.
    """
    model = Toy().to(dist.device)
    optimizer = Optimizer(model, config, dist)
    if state is not None:
        model.load_state_dict(
            {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        )
        optimizer.load_state_dict(
            {k.removeprefix("optim."): v for k, v in state.items() if k.startswith("optim.")}
        )
    norms = []
    for step in range(first, last):
        accumulate(model, step, dist.rank, dist.world_size)
        if step == broken and dist.rank == dist.world_size - 1:
            model.one.grad[0, 0, 0] = float("inf")
        optimizer.step(step / STEPS, delta=1 / STEPS)
        norms.append(optimizer.grad_norm.item())
    tensors = {f"model.{k}": v.clone() for k, v in model.state_dict().items()}
    tensors.update({f"optim.{k}": v for k, v in optimizer.state_dict().items()})
    tensors["skipped"] = optimizer.skipped.clone()
    return tensors, norms


def message(call, *arguments):
    """Return the text of the RuntimeError that the call raises, or None."""
    try:
        call(*arguments)
    except RuntimeError as e:
        return str(e)
    return None


def collectives(dist, dtype):
    """Run each tensor collective on small whole numbers, exact in every dtype; return the values."""
    world, rank = dist.world_size, dist.rank
    whole = torch.arange(2 * world, dtype=dtype, device=dist.device) + 4 * rank
    part, gathered = whole.new_zeros(2), whole.new_zeros(2 * world)
    dist.reduce_scatter_avg(part, whole.clone()).wait()
    dist.all_gather(gathered, part).wait()
    mean = whole.clone()
    dist.all_reduce_avg(mean).wait()
    total = dist.all_reduce(whole.clone())
    return {
        "part": part.tolist(),
        "gathered": gathered.tolist(),
        "mean": mean.tolist(),
        "sum": total.tolist(),
    }


def replica_messages(dist):
    """Return the messages of assert_replicas_equal for equal and for slightly different replicas."""
    same = {"a": torch.ones(3, 2), "b": torch.tensor(float("nan")), "c": torch.ones(4, dtype=torch.bfloat16)}
    flipped = {k: v.clone() for k, v in same.items()}
    permuted = {"a": torch.tensor([1.0, 2.0] if dist.rank else [2.0, 1.0])}
    shaped = {"a": torch.zeros(2, 3) if dist.rank else torch.zeros(3, 2)}
    if dist.rank == dist.world_size - 1:
        flipped["c"][3] = 1.0078125  # the next bfloat16
    counts = {str(i): torch.zeros(1) for i in range(1 + dist.rank)}
    cases = {"same": same, "flipped": flipped, "permuted": permuted, "shaped": shaped, "counts": counts}
    return {
        name: message(dist.assert_replicas_equal, to_device(tensors, dist)) for name, tensors in cases.items()
    }


def agreed(dist, first, last, problem=""):
    """Return what a model has after its ranks agreed, and the warnings of that.

    Each rank had attention `first`, and the last one `last`; there the trial of the heads found `problem`.
    """
    is_last = dist.rank == dist.world_size - 1
    own, note = (last, "it is new" if last != first else "") if is_last else (first, "")

    def select(name, *_, **__):
        return Attention(own, doc_kernel, note) if name == "auto" else Attention(name, doc_kernel, "")

    with (
        patch("pgolf.model.gpt.select_attention", select),
        patch("pgolf.model.heads._takes", lambda _: True),
        patch("pgolf.model.heads._problem", lambda *_: problem if is_last else ""),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        model = GPT(tiny().model).prepare(dist.device)
        caught.clear()
        agree_on_kernels(model, dist, compile="off")
    composed = model._branch is attention_branch
    said = [str(w.message) for w in caught]
    return [model.attention_name, model.heads_name, composed, model.attention_note, said]


def to_device(tensors, dist):
    return {name: t.to(dist.device) for name, t in tensors.items()}


def main(folder, device):
    """Run every case on this rank."""
    torch.set_num_threads(1)
    dist = Dist.start(device, timeout_s=240)
    rank, last = dist.rank, dist.world_size - 1
    tensors, norms = train(dist, 0, STEPS)
    start, _ = train(dist, 0, 0)
    broken, _ = train(dist, 0, 1, broken=0)
    resumed, _ = train(dist, RESUME_AT, STEPS, load_file(folder / "resume.safetensors"))
    candidates, _ = train(
        dist, RESUME_AT, STEPS, load_file(folder / "candidates.safetensors"), config=CANDIDATES
    )
    seen = {
        "norms": norms,
        "trained": message(dist.assert_replicas_equal, tensors),
        "float32": collectives(dist, torch.float32),
        "bfloat16": collectives(dist, torch.bfloat16),
        "share": dist.share([0.1 + rank, 1e300, float(rank)]),
        "check_ok": message(dist.check, None),
        "check_one": message(dist.check, "the disk is full: \u00e9" if rank == last else None),
        "check_all": message(dist.check, f"no {rank}"),
        "check_empty": message(dist.check, "" if rank == 0 else None),
        "texts": dist.gather_texts("\u00e9" * dist.rank),
        "agreed": agreed(dist, "doc", "doc"),
        "other_attention": agreed(dist, "sdpa", "doc"),
        "no_common_attention": agreed(dist, "fa4", "doc"),
        "other_heads": agreed(dist, "doc", "doc", "the output differs"),
        "replicas": replica_messages(dist),
        "is_main": dist.is_main,
        "device": dist.device.type,
    }
    saved = tensors | {f"resumed.{k}": v for k, v in resumed.items()}
    saved |= {f"candidates.{k}": v for k, v in candidates.items()}
    saved |= {f"start.{k}": v for k, v in start.items()} | {f"broken.{k}": v for k, v in broken.items()}
    save_file(saved, folder / f"rank{rank}.safetensors")
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    dist.close()
    dist.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
