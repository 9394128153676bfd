"""What the two memory options of `pgolf.optim.Muon` change, on a small language model over real bytes.

    python -m bench.muon_memory --device cpu

The model is a transformer of two layers and width 128 on the bytes of the sample text that comes with pgolf;
its eight matrices (393,216 weights) belong to Muon, embeddings and norms to AdamW.

- `codes`: the momentum of one float32 run is also kept in 8 bits, with the same gradients, in several codes
  with blocks of at most 64 or 256 elements of a row. `error_momentum` is the relative error (Frobenius norm)
  of the momentum, `error_update` that of the orthogonalized Nesterov direction, `error_bf16` that of the
  latter if the momentum is exact and the iteration's input is rounded to bfloat16. Medians over matrices and
  steps. `pgolf` is `pgolf.optim.momentum`, `linear` has 255 equal steps, and `dynamic` is the signed table
  of bitsandbytes.
- `loss`: nats per byte of held-out text after the training, and `difference` from the run of the same seed
  whose weights and momentum are float32. `pgolf`, `linear` and `dynamic` have float32 weights and an 8-bit
  momentum; `bf16` has weights, momentum and moments in bfloat16; `split` is master_weights="split", and
  `split_8bit` both options. Every forward and backward pass computes in float32, so only the optimizer
  differs.
- `bytes`: of parameters, gradients and state, per weight of a matrix.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bench.common import Recorder, Sample, parser
from pgolf.data.text import iterate_documents, sample_paths
from pgolf.ops import newton_schulz
from pgolf.optim import Muon, momentum
from pgolf.optim.polar import JORDAN

WIDTH, HEADS, LAYERS, LENGTH, ROWS = 128, 4, 2, 64, 8
STEPS, SEEDS, EVERY = 300, 2, 20
LR, MU = 0.02, 0.95


class Block(nn.Module):
    """Attention and an MLP, each after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream `(rows, length, width)` after the block."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norms[1](x))).square())


class Net(nn.Module):
    """The language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(rows, length, 256)` of bytes `(rows, length)`."""
        return self.head(self.norm(self.blocks(self.embed(x) + self.place.weight)))


class Linear:
    """The code c = round(127 x / s)."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and scales."""
        blocks = momentum._blocks(x)
        scales = blocks.abs().amax(-1)
        codes = (127 * (blocks / scales.unsqueeze(-1)).nan_to_num(0.0)).round()
        return codes.flatten(-2)[..., : x.shape[-1]].to(torch.int8), scales

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return values."""
        values = momentum._blocks(codes).float() / 127 * scales.unsqueeze(-1)
        return values.flatten(-2)[..., : codes.shape[-1]]


class Dynamic:
    """The signed dynamic table of bitsandbytes, 256 values in [-0.993, 1]."""

    def __init__(self) -> None:
        values = [0.0, 1.0]
        for i in range(7):
            edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float64)
            means = (10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
            values += means + [-v for v in means]
        self.table = torch.tensor(sorted(values), dtype=torch.float32)
        self.middles = (self.table[:-1] + self.table[1:]) / 2

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and scales."""
        blocks = momentum._blocks(x)
        scales = blocks.abs().amax(-1)
        ratio = (blocks / scales.unsqueeze(-1)).nan_to_num(0.0)
        codes = torch.searchsorted(self.middles, ratio) - 128
        return codes.flatten(-2)[..., : x.shape[-1]].to(torch.int8), scales

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return values."""
        values = self.table[momentum._blocks(codes).long() + 128] * scales.unsqueeze(-1)
        return values.flatten(-2)[..., : codes.shape[-1]]


CODES: dict[str, Any] = {"pgolf": momentum, "linear": Linear(), "dynamic": Dynamic()}


@contextmanager
def code(name: str) -> Iterator[None]:
    """Let the optimizer keep its momentum in another code."""
    kept = momentum.encode, momentum.decode
    momentum.encode, momentum.decode = CODES[name].encode, CODES[name].decode
    try:
        yield
    finally:
        momentum.encode, momentum.decode = kept


def text(held_out: bool) -> Tensor:
    """Return the bytes of the sample text."""
    paths = sample_paths()
    documents = iterate_documents(paths.val if held_out else paths.train)
    return torch.frombuffer(bytearray("\n".join(d.text for d in documents).encode()), dtype=torch.uint8)


def batch(data: Tensor, rng: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets `(rows, length)` at random places."""
    starts = torch.randint(len(data) - LENGTH - 1, (rows, 1), generator=rng)
    found = data[starts + torch.arange(LENGTH + 1)].long()
    return found[:, :-1], found[:, 1:]


def loss_of(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """Return nats per byte, computed in float32."""
    weights = {name: p.float() for name, p in net.named_parameters()}
    return F.cross_entropy(functional_call(net, weights, (x,)).flatten(0, 1), y.flatten())


def is_matrix(name: str) -> bool:
    """Return whether a parameter belongs to Muon."""
    return name.startswith("blocks") and "norms" not in name


def train(
    data: Tensor,
    seed: int,
    steps: int,
    dtype: torch.dtype = torch.float32,
    watch: Callable[[int, dict[str, nn.Parameter]], None] | None = None,
    **options: Any,
) -> tuple[Net, Muon]:
    """Train with a learning rate that falls linearly to 0; `watch` sees the gradients of each step."""
    torch.manual_seed(seed)
    net = Net().to(dtype)
    named = dict(net.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if is_matrix(n)]},
        {"params": [p for n, p in named.items() if not is_matrix(n)], "use_muon": False, "lr": 3e-3},
    ]
    optimizer = Muon(groups, lr=LR, momentum=MU, weight_decay=0.01, **options)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps)
    rng = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(net, *batch(data, rng, ROWS)).backward()
        if watch is not None:
            watch(step, {n: p for n, p in named.items() if is_matrix(n)})
        optimizer.step()
        scheduler.step()
    return net, optimizer


@torch.no_grad()
def held_out(net: Net, data: Tensor) -> float:
    """Return nats per byte of held-out text."""
    rng = torch.Generator().manual_seed(99)
    return sum(loss_of(net, *batch(data, rng, 128)).item() for _ in range(8)) / 8


def measure_codes(recorder: Recorder, data: Tensor, steps: int) -> None:
    """Record the errors of the codes along one run."""
    contenders = [(name, width) for name in CODES for width in (64, 256)]
    exact: dict[str, Tensor] = {}
    kept: dict[tuple[str, int, str], tuple[Tensor, Tensor]] = {}
    errors: dict[tuple[str, int], list[tuple[float, float]]] = {c: [] for c in contenders}
    rounded: list[float] = []

    def polar(u: Tensor) -> Tensor:
        return newton_schulz(u[None], (JORDAN,) * 5)[0]

    def error(found: Tensor, wanted: Tensor) -> float:
        return ((found - wanted).norm() / wanted.norm()).item()

    def watch(step: int, matrices: dict[str, nn.Parameter]) -> None:
        look = step % EVERY == EVERY - 1
        for name, p in matrices.items():
            g = p.grad
            assert g is not None
            exact[name] = exact.get(name, torch.zeros_like(g)).lerp(g, 1 - MU)
            if look:
                wanted = polar(g.lerp(exact[name], MU))
                rounded.append(error(polar(g.lerp(exact[name], MU).bfloat16().float()), wanted))
            for contender in contenders:
                momentum.BLOCK = contender[1]
                encoder = CODES[contender[0]]
                key = (*contender, name)
                before = encoder.decode(*kept[key]) if key in kept else torch.zeros_like(g)
                now = before.lerp(g, 1 - MU)
                kept[key] = encoder.encode(now)
                if look:
                    found = (
                        error(encoder.decode(*kept[key]), exact[name]),
                        error(polar(g.lerp(now, MU)), wanted),
                    )
                    errors[contender].append(found)
        momentum.BLOCK = 256

    train(data, 0, steps, watch=watch)
    for (name, width), found in errors.items():
        for metric, values in zip(("error_momentum", "error_update"), zip(*found, strict=True), strict=True):
            recorder.add("codes", f"{name}_{width}", metric, Sample.of(list(values)), "1")
    recorder.add("codes", "exact", "error_bf16", Sample.of(rounded), "1")


ARMS: dict[str, dict[str, Any]] = {
    "float32": {},
    **{name: {"momentum_bits": 8} for name in CODES},
    "bf16": {"dtype": torch.bfloat16},
    "split": {"dtype": torch.bfloat16, "master_weights": "split"},
    "split_8bit": {"dtype": torch.bfloat16, "master_weights": "split", "momentum_bits": 8},
}


def measure_losses(recorder: Recorder, data: Tensor, test: Tensor, steps: int, seeds: int) -> None:
    """Record the held-out loss of each arm, and the bytes per weight."""
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        for arm, options in ARMS.items():
            with code(arm if arm in CODES else "pgolf"):
                net, optimizer = train(data, seed, steps, **options)
            matrices = [p for n, p in net.named_parameters() if is_matrix(n)]
            if seed == 0 and (arm == "pgolf" or arm not in CODES):
                state = [t for p in matrices for t in optimizer.state[p].values()]
                size = sum(t.numel() * t.element_size() for t in [*state, *matrices, *matrices])
                size_per_weight = size / sum(p.numel() for p in matrices)
                recorder.add("bytes", arm, "bytes_per_weight", Sample(size_per_weight, 0.0, 1), "B")
            found.setdefault(arm, []).append(held_out(net, test))
            print(f"seed {seed} {arm}: {found[arm][-1]:.4f}", flush=True)
    for arm, losses in found.items():
        recorder.add("loss", arm, "loss", Sample.of(losses), "nats/byte")
        differences = [a - b for a, b in zip(losses, found["float32"], strict=True)]
        if arm != "float32":
            recorder.add("loss", arm, "difference", Sample.of(differences), "nats/byte")


def main() -> int:
    """Measure; return 0."""
    arguments = parser(__doc__ or "", ["codes", "loss"]).parse_args()
    quick = arguments.quick
    steps, seeds = (EVERY, 1) if quick else (STEPS, SEEDS)
    recorder = Recorder("muon_memory", torch.device("cpu"), None if quick else arguments.out)
    torch.set_num_threads(1)
    data, test = text(held_out=False), text(held_out=True)
    if "codes" in arguments.cases:
        measure_codes(recorder, data, steps)
    if "loss" in arguments.cases:
        measure_losses(recorder, data, test, steps, seeds)
    recorder.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
