"""Train one network with torch.optim.Muon and with pgolf.optim.Muon, and compare: python muon_dropin.py

A residual MLP learns the outputs of a fixed random network, each time from the same weights on the same
batches. The code of the first two runs differs in one word; the third run uses options that only pgolf has.
On the CPU pgolf iterates in float32, torch in bfloat16.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import pgolf.optim

WIDTH, DEPTH, BATCH, STEPS = 256, 6, 512, 50
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Net(nn.Module):
    """A residual MLP: `DEPTH` square matrices for Muon, gains and the output layer for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))
        self.gain = nn.Parameter(torch.full((DEPTH,), 0.5))
        self.out = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(rows, WIDTH)` to `(rows, 8)`."""
        for gain, layer in zip(self.gain, self.hidden, strict=True):
            x = x + gain * torch.relu(layer(x))
        return self.out(x / (1 + x.square().mean(dim=-1, keepdim=True)).sqrt())


def train(name: str, optimizers_of: Callable[[list, list], list[Optimizer]]) -> None:
    """Train from the same weights; print the first and the last loss and the time of an optimizer step."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, 8)).to(DEVICE)
    net = Net().to(DEVICE)
    optimizers = optimizers_of(list(net.hidden.parameters()), [net.gain, *net.out.parameters()])
    losses, times = [], []
    for _ in range(STEPS):
        x = torch.randn(BATCH, WIDTH).to(DEVICE)
        loss = (net(x) - 3 * teacher(x).detach()).square().mean()
        net.zero_grad()
        loss.backward()
        losses.append(loss.item())  # waits for the GPU
        start = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    last = sum(losses[-10:]) / 10
    print(f"{name:<38} loss {losses[0]:.4f} -> {last:.4f}   {sorted(times)[STEPS // 2]:.2f} ms per step")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small, and one thread makes the times comparable
    train("torch.optim.Muon and AdamW", lambda m, r: [torch.optim.Muon(m, lr=0.02), AdamW(r, lr=3e-3)])
    train("pgolf.optim.Muon and AdamW", lambda m, r: [pgolf.optim.Muon(m, lr=0.02), AdamW(r, lr=3e-3)])
    own = {"lr": 0.02, "ns_coefficients": "polar_express_golf", "ns_steps": 4, "row_normalize": True}
    rest = {"use_muon": False, "lr": 3e-3}
    train(
        "pgolf.optim.Muon alone, 4 iterations",
        lambda m, r: [pgolf.optim.Muon([{"params": m}, {"params": r, **rest}], **own)],
    )
