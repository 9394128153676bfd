"""`pgolf info`: versions, GPUs and kernels of this installation, and what is missing and why."""

from __future__ import annotations

import platform

import pgolf
from pgolf.env import commit_name
from pgolf.peers import Peer, find_peer

PACKAGES = ("torch", "numpy", "sentencepiece", "brotli", "safetensors", "tyro")
OPTIONAL = {
    "matplotlib": ("matplotlib.pyplot", "no plots; pip install 'pgolf[plot]'"),
    "flash-attn-4": (
        "pgolf.model.fa4",
        "no train.attention=fa4, which only Hopper GPUs run, and only models need whose heads pgolf's own "
        "attention does not take; pip install 'pgolf[fa4]'",
    ),
    "pyarrow": ("pyarrow.parquet", "no parquet input; pip install 'pgolf[parquet]'"),
    "tensorboard": (
        "torch.utils.tensorboard",
        "no train.track=tensorboard: pip install 'pgolf[tensorboard]'",
    ),
    "wandb": ("wandb", "no train.track=wandb; pip install 'pgolf[wandb]'"),
}
"""By package: the module that is imported, and what is not available without it."""
NOTE = """
cpu no: there PyTorch's operators compute the same. The CUDA kernels of norm_mlp, qkv_rope and
doc_attention are for Hopper GPUs alone; other GPUs get PyTorch's operators for them."""


def state(peer: Peer, without: str) -> str:
    """Return the version of a package, or why it cannot be imported and what is not available without it."""
    if peer.usable:
        return peer.version or "version unknown"
    return f"{f'{peer.version} {peer.problem}'.strip()}: {without}"


def main(argv: list[str]) -> int:
    """Print versions, devices and the kernel table."""
    if argv:
        print("usage: pgolf info\n\nprints versions, GPUs, the kernels of each operator, and what is missing")
        return 0 if argv[0] in ("-h", "--help") else 2
    import torch

    print(f"pgolf          {pgolf.__version__}, commit {commit_name(12) or 'unknown'}")
    print(f"python         {platform.python_version()} on {platform.machine()}")
    for package in PACKAGES:
        print(f"{package:<15}{state(find_peer(package, package), 'required; pip install -e .')}")
    for package, (module, without) in OPTIONAL.items():
        print(f"{package:<15}{state(find_peer(package, module), without)}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(count):
        p = torch.cuda.get_device_properties(i)
        print(f"gpu {i}          {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    if not count:
        print(f"gpu            none: torch {torch.__version__} sees no CUDA device")
    try:
        from pgolf import _C
        from pgolf.ops import kernel_table
    except ImportError as e:
        print(f"extension      missing: {e}; build it with `pip install --no-build-isolation -e .`")
        return 1
    for key, value in _C.build_info().items():
        print(f"build          {key}: {value}")
    rows = kernel_table()
    width = 2 + max(len(row["op"]) for row in rows)
    for row in rows:
        have = "  ".join(f"{kind} {'yes' if row[kind] else 'no '}" for kind in ("cpu", "cuda"))
        print(f"op             {row['op']:<{width}}{have}  {row['reason']}")
    print(NOTE)
    return 0
