"""Replace the loss of a Hugging Face style causal language model by one line: python fused_loss_dropin.py

`CausalLM` below has the parts of such a model (`model`, `lm_head`, `config.final_logit_softcapping`), so that
this program runs without transformers. With a model of transformers (Gemma 2, whose cap is 30; Llama and
others, whose cap is None):

    hidden = lm.model(input_ids, attention_mask=mask).last_hidden_state
    cap = getattr(lm.config, "final_logit_softcapping", None)
    loss = linear_softcap_ce(hidden[:, :-1], lm.lm_head.weight, labels[:, 1:], cap)

As in transformers, labels of -100 are ignored and the loss is the mean over the others. A head with a bias is
not supported.
"""

import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf.ops import linear_softcap_ce

VOCAB, WIDTH, BATCH, LENGTH, STEPS = 8192, 128, 4, 129, 6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Body(nn.Module):
    """A stand-in for the transformer: embeddings and a residual MLP that sees the previous token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.mix = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        """Map `(batch, length)` to an object with last_hidden_state `(batch, length, WIDTH)`."""
        x = self.embed(input_ids)
        previous = F.pad(x, (0, 0, 1, 0))[:, :-1]
        x = x + torch.tanh(self.mix(torch.cat((x, previous), dim=-1)))
        return SimpleNamespace(last_hidden_state=F.rms_norm(x, (WIDTH,)))


class CausalLM(nn.Module):
    """A body, a head and a cap, with the names that transformers uses."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(final_logit_softcapping=30.0)
        self.model = Body()
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)


def usual_loss(lm: CausalLM, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the loss as such models compute it: all logits, capped, in float32, shifted by one token."""
    cap = lm.config.final_logit_softcapping
    logits = lm.lm_head(hidden)
    logits = cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


def fused_loss(lm: CausalLM, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the same loss by one line."""
    return linear_softcap_ce(
        hidden[:, :-1], lm.lm_head.weight, labels[:, 1:], lm.config.final_logit_softcapping
    )


def fused_loss_low(lm: CausalLM, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the same loss with less memory."""
    cap = lm.config.final_logit_softcapping
    return linear_softcap_ce(hidden[:, :-1], lm.lm_head.weight, labels[:, 1:], cap, memory="low")


def train(name: str, loss_of) -> tuple[float, float]:
    """Train from the same weights; print and return the last loss and the MiB that it keeps for backward."""
    torch.manual_seed(0)
    lm = CausalLM().to(DEVICE)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    ids = torch.randint(VOCAB, (BATCH, LENGTH)).to(DEVICE)
    labels = ids.clone()
    labels[:, :8] = -100  # a prompt, which is read but not learned
    times = []
    for _ in range(STEPS):
        hidden = lm.model(ids).last_hidden_state
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = loss_of(lm, hidden, labels)
        optimizer.zero_grad()
        loss.backward()
        last = loss.item()  # waits for the GPU
        times.append(1e3 * (time.perf_counter() - start))
        optimizer.step()
    mib = sum(kept.values()) / 2**20
    median = sorted(times)[STEPS // 2]
    print(f"{name:<36} {last:9.5f} {median:10.1f} ms {mib:10.1f} MiB")
    return last, mib


if __name__ == "__main__":
    print(
        f"{f'{STEPS} steps on {DEVICE}':<36} {'last loss':>9} {'head per step':>13} {'kept for backward':>14}"
    )
    train("before: lm_head, F.cross_entropy", usual_loss)
    train("after: linear_softcap_ce", fused_loss)
    train('after: linear_softcap_ce, "low"', fused_loss_low)
