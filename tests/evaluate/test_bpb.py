import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from pgolf.evaluate.bpb import evaluate_bpb


@dataclass
class FakeBatch:
    inputs: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    target_bytes: torch.Tensor
    max_seqlen: int = 8


class Table(nn.Module):
    """A bigram table as the model: each loss is one look-up, so it can be computed in float64 too."""

    def __init__(self, vocab=13, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(torch.randn(vocab, vocab, generator=g))
        self.seen = []

    def forward(self, inputs, targets, cu_seqlens, *, max_seqlen, loop):
        assert not torch.is_grad_enabled()
        self.seen.append((self.training, max_seqlen, loop))
        return nn.functional.cross_entropy(self.logits[inputs], targets, ignore_index=-100, reduction="none")


class FakeDist:
    """A rank whose peers' sums are added on each all_reduce, as a process group would."""

    device = torch.device("cpu")

    def __init__(self, rank=0, world_size=1, others=()):
        self.rank, self.world_size, self.is_main = rank, world_size, rank == 0
        self.others, self.seen = list(others), []

    def all_reduce(self, tensor):
        self.seen.append(tensor.clone())
        if self.others:
            tensor += self.others.pop(0)
        return tensor


def split(count, tokens=21, vocab=13, seed=1):
    g = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        ids = torch.randint(0, vocab, (tokens + 1,), generator=g)
        targets, sizes = ids[1:].clone(), torch.randint(0, 9, (tokens,), generator=g)
        targets[torch.rand(tokens, generator=g) < 0.2] = -100
        # Ignored targets have bytes here, which must not be counted.
        cu = torch.tensor([0, 8, tokens], dtype=torch.int32)
        result.append(FakeBatch(ids[:-1], targets, cu, sizes))
    return result


def totals(batches):
    tokens = sum(int((b.targets != -100).sum()) for b in batches)
    return {
        "expected_tokens": tokens,
        "expected_bytes": sum(int(b.target_bytes[b.targets != -100].sum()) for b in batches),
    }


def dull_nats(model, batches):
    log_p = torch.log_softmax(model.logits.detach().double(), dim=-1)
    return sum(
        -log_p[x, y].item()
        for b in batches
        for x, y in zip(b.inputs.tolist(), b.targets.tolist(), strict=True)
        if y != -100
    )


def test_score_equals_the_definition_in_float64():
    model, batches = Table().train(), split(7)
    want = totals(batches)
    score = evaluate_bpb(model, iter(batches), FakeDist(), **want, loop=False)
    nats = dull_nats(model, batches)
    assert (score.tokens, score.bytes) == (want["expected_tokens"], want["expected_bytes"])
    assert score.nats == pytest.approx(nats, rel=1e-6)
    assert score.loss == pytest.approx(nats / want["expected_tokens"], rel=1e-6)
    assert score.bpb == pytest.approx(nats / math.log(2) / want["expected_bytes"], rel=1e-6)
    assert score.seconds > 0
    assert model.training and set(model.seen) == {(False, 8, False)}


def test_sums_do_not_lose_small_losses():
    """2^25 + 1 is not a float32: many batches after a huge one must still count."""

    class Constant(nn.Module):
        def forward(self, inputs, targets, cu_seqlens, *, max_seqlen, loop):
            return inputs.float()

    def batch(value):
        return FakeBatch(
            torch.tensor([value]), torch.tensor([1]), torch.tensor([0, 1]), torch.tensor([1]), max_seqlen=1
        )

    score = evaluate_bpb(
        Constant(), [batch(2**25), *[batch(1)] * 100], FakeDist(), expected_tokens=101, expected_bytes=101
    )
    assert score.nats == 2**25 + 100


@pytest.mark.parametrize("world_size", [2, 3, 8])  # 8 ranks of 7 batches: one rank has nothing to do
def test_score_does_not_depend_on_the_number_of_ranks(world_size):
    model, batches = Table(), split(7)
    want = totals(batches)
    alone = evaluate_bpb(model, batches, FakeDist(), **want)
    sent = []
    for rank in range(world_size):
        dist = FakeDist(rank, world_size)
        mine = batches[rank::world_size]
        with pytest.raises(ValueError, match="scored"):
            evaluate_bpb(model, mine, dist, **want)
        sent.append(dist.seen)
    for rank in range(world_size):
        others = [sum(s[i] for r, s in enumerate(sent) if r != rank) for i in range(2)]
        score = evaluate_bpb(model, batches[rank::world_size], FakeDist(rank, world_size, others), **want)
        assert (score.tokens, score.bytes) == (alone.tokens, alone.bytes)
        assert score.nats == pytest.approx(alone.nats, rel=1e-12)


@pytest.mark.parametrize(
    ("what", "off", "message"),
    [
        ("tokens", -3, r"scored [0-9]+ tokens, expected [0-9]+ \(\+3\)"),
        ("tokens", 5, r"scored [0-9]+ tokens, expected [0-9]+ \(-5\)"),
        ("bytes", 1, r"scored [0-9]+ bytes, expected [0-9]+ \(-1\); the batches of all ranks together"),
    ],
)
def test_missing_and_doubled_tokens_are_errors(what, off, message):
    batches = split(2)
    want = totals(batches)
    want[f"expected_{what}"] += off
    with pytest.raises(ValueError, match=message):
        evaluate_bpb(Table(), batches, FakeDist(), **want)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_losses_name_the_first_bad_batch_on_every_rank(value):
    model, batches = Table(), split(6)
    want = totals(batches)
    for b in batches[2], batches[4]:
        b.inputs[:] = 5
        b.targets[3] = 7
    with torch.no_grad():
        model.logits[5, 7] = -value
    for b in batches[0], batches[1], batches[3], batches[5]:
        b.inputs[b.inputs == 5] = 4
    dist = FakeDist(rank=1, world_size=3)
    with pytest.raises(RuntimeError, match=r"NaN or infinite, first in batch 2 of rank 1; these weights"):
        evaluate_bpb(model, batches, dist, **want)
    sums, bad = dist.seen
    healthy = FakeDist(rank=0, world_size=3, others=[sums, bad])
    with pytest.raises(RuntimeError, match=r"first in batch 2 of rank 1;"):
        evaluate_bpb(model, batches[:2], healthy, **want)


def test_empty_split_is_refused():
    with pytest.raises(ValueError, match="not empty, got 0 tokens and 0 bytes"):
        evaluate_bpb(Table(), [], FakeDist(), expected_tokens=0, expected_bytes=0)
