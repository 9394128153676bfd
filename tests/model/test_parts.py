"""The parts of the model compared with their formulas in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from pgolf.model.attention import find_fa4, sdpa_attention, select_attention, varlen_attention
from pgolf.model.gates import (
    Skip,
    exclude_self,
    head_gate,
    mix_and_norm,
    mix_lane,
    mix_streams,
    rms_norm,
    smear,
    smear_channels,
)
from pgolf.model.mlp import mlp
from pgolf.model.rope import rope_tables, rotate
from pgolf.ops import stream_mix_ref
from tests.conftest import requires_gpu


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_exclusive_attention_is_orthogonal_to_the_own_value():
    y, v = randn(7, 8, 16), randn(7, 4, 16, seed=1)
    out = exclude_self(y, v)
    own = v.repeat_interleave(2, dim=1)  # query heads 2g and 2g + 1 share kv head g
    assert (out * own).sum(-1).abs().max() < 1e-5
    torch.testing.assert_close(
        out,
        y - (y * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True) * own,
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("beyond", [None, torch.zeros(8)], ids=["plain", "strength"])
def test_exclusive_attention_of_no_tokens_is_empty(beyond):
    y, v = torch.zeros(0, 8, 16, requires_grad=True), torch.zeros(0, 4, 16)
    out = exclude_self(y, v, beyond)
    assert out.shape == (0, 8, 16)
    out.sum().backward()
    assert y.grad.shape == y.shape


def test_smear_adds_the_previous_token_except_at_segment_starts():
    x, weight, strength = randn(5, 16), randn(1, 12, seed=1), torch.tensor([0.7], dtype=torch.float64)
    first = torch.tensor([True, False, False, True, False])
    out = smear(x, first, weight, strength)
    for t in range(5):
        gate = 0.0 if first[t] else 0.7 * torch.sigmoid(weight[0] @ x[t, :12])
        torch.testing.assert_close(out[t], x[t] + gate * x[t - 1])


@pytest.mark.parametrize("over_bos", [False, True])
def test_smear_by_channel_mixes_in_the_previous_token_except_at_segment_starts(over_bos):
    x, logit = randn(5, 16), randn(16, seed=1)
    first = torch.tensor([True, False, False, True, False])
    out = smear_channels(x, None if over_bos else first, logit)
    for t in range(5):
        for c in range(16):
            gate = 1 / (1 + math.exp(-logit[c].item()))
            previous = x[t - 1, c].item() if t and (over_bos or not first[t]) else 0.0
            assert out[t, c].item() == pytest.approx((1 - gate) * x[t, c].item() + gate * previous)


def test_smear_by_channel_begins_as_the_mean_of_two_tokens():
    x = randn(3, 16)
    torch.testing.assert_close(smear_channels(x, None, torch.zeros(16))[1:], (x[1:] + x[:-1]) / 2)


def test_rope_rotates_by_position_and_passes_the_rest():
    cos, sin = rope_tables(50, 16, base=10000.0, device=torch.device("cpu"))
    x = randn(50, 2, 64).float()
    out = rotate(x, cos, sin)
    assert torch.equal(out[..., 16:], x[..., 16:])
    angle = 37 * 10000 ** (-2 * 3 / 16)
    expected = x[37, 1, 3] * math.cos(angle) + x[37, 1, 11] * math.sin(angle)
    torch.testing.assert_close(out[37, 1, 3], expected)
    q, k = randn(64, seed=2).float(), randn(64, seed=3).float()
    rotated_q, rotated_k = (rotate(z.expand(50, 1, 64), cos, sin)[:, 0] for z in (q, k))
    scores = rotated_q @ rotated_k.T
    torch.testing.assert_close(scores[10, 4], scores[45, 39])  # only the distance counts


def test_rope_stays_exact_at_the_end_of_a_record_batch():
    cos, _ = rope_tables(98_304, 16, base=10000.0, device=torch.device("cpu"))
    assert abs(cos[98_303, 0, 0].item() - math.cos(98_303)) < 1e-6


@pytest.mark.parametrize("kind, columns", [("sparse", 12), ("dense", 32), ("out", 12)])
def test_head_gate_follows_its_formula(kind, columns):
    n, weight = randn(5, 32), randn(4, columns, seed=1)
    logit = n[:, :columns] @ weight.T
    expected = {
        "sparse": torch.sigmoid(0.5 * logit),
        "dense": torch.sigmoid(logit),
        "out": 2 * torch.sigmoid(logit),
    }
    torch.testing.assert_close(head_gate(kind, n, weight, scale=0.5)[..., 0], expected[kind])


def test_exclusive_attention_removes_nothing_along_a_value_of_zeros():
    y = randn(3, 4, 8).requires_grad_()
    v = torch.zeros(3, 2, 8, dtype=torch.float64, requires_grad=True)
    out = exclude_self(y, v)
    out.sum().backward()
    torch.testing.assert_close(out, y)
    assert torch.isfinite(y.grad).all() and (v.grad == 0).all()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_streams_are_joined_and_mixed_in_that_order(gated, mixed):
    shapes = [(3, 8), (3, 8), (3, 8), (8,), (8,), (2, 8)]
    x, s, x0, w, g, m = (randn(*shape, seed=i) for i, shape in enumerate(shapes))
    y, u = mix_streams(x, Skip(s, w, g if gated else None), x0, m if mixed else None)
    joined = torch.lerp(w * s, x, torch.sigmoid(g)) if gated else x + w * s
    torch.testing.assert_close(y, joined)
    torch.testing.assert_close(u, m[0] * joined + m[1] * x0 if mixed else joined)
    y, u = mix_streams(x, None, x0, m if mixed else None)
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(u, m[0] * x + m[1] * x0 if mixed else x)


@pytest.mark.parametrize("mixed", [mix_and_norm, mix_lane])
def test_compiled_mixes_leave_their_inputs_as_they_are(mixed):
    torch._dynamo.reset()
    shapes = [(3, 8), (3, 8), (3, 8), (8,), (2, 8)]
    inputs = [randn(*shape, seed=i).float().requires_grad_() for i, shape in enumerate(shapes)]
    before = [t.detach().clone() for t in inputs]

    def run(x, s, x0, w, m):
        return sum(t.sin().sum() for t in mixed(stream_mix_ref, x, Skip(s, w, None), x0, m))

    found, wanted = (
        torch.autograd.grad(fn(*inputs), inputs) for fn in (torch.compile(run, fullgraph=True), run)
    )
    assert all(map(torch.equal, inputs, before))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("slope", [0.5, 0.3, 0.0])
def test_mlp_squares_the_leaky_relu(slope):
    n, up, down = randn(5, 8), randn(32, 8, seed=1), randn(8, 32, seed=2)
    p = n @ up.T
    expected = torch.where(p > 0, p, slope * p).square() @ down.T
    torch.testing.assert_close(mlp(n, up, down, slope=slope), expected)


def test_rms_norm_keeps_tiny_embeddings_at_unit_scale():
    x = 0.005 * randn(4, 512).to(torch.bfloat16)
    assert abs(rms_norm(x).float().square().mean().item() - 1) < 0.02


def test_sdpa_attention_matches_a_masked_softmax():
    q, k, v = randn(20, 4, 8), randn(20, 2, 8, seed=1), randn(20, 2, 8, seed=2)
    cu = torch.tensor([0, 1, 8, 20, 20, 20], dtype=torch.int32)
    segment = torch.bucketize(torch.arange(20), cu[1:].long(), right=True)
    allowed = (segment[:, None] == segment[None]) & torch.ones(20, 20).tril().bool()
    scores = torch.einsum("thk,shk->hts", q, k.repeat_interleave(2, 1)) / math.sqrt(8)
    weights = F.softmax(scores.masked_fill(~allowed, -math.inf), -1)
    expected = torch.einsum("hts,shk->thk", weights, v.repeat_interleave(2, 1))
    torch.testing.assert_close(sdpa_attention(q, k, v, cu, 12), expected)


def test_attention_that_cannot_run_here_is_refused():
    cpu = torch.device("cpu")
    assert select_attention("auto", cpu)[0] == "sdpa"
    with pytest.raises(RuntimeError, match=r"varlen needs a CUDA device.*use train.attention=sdpa"):
        select_attention("varlen", cpu)
    with pytest.raises(RuntimeError, match=r"fa4 needs a Hopper GPU"):
        select_attention("fa4", cpu)
    with pytest.raises(
        RuntimeError, match=r"doc needs a Hopper GPU.*here: no Hopper.*use train.attention=auto"
    ):
        select_attention("doc", cpu)


@requires_gpu
def test_cuda_attention_matches_sdpa_forward_and_backward():
    device = torch.device("cuda")
    cu = torch.tensor([0, 1, 130, 700, 1000, 1000], dtype=torch.int32, device=device)
    kernels = [varlen_attention]
    if torch.cuda.get_device_capability()[0] == 9:
        # Asked for by name, so that a kernel that fails its trial fails this test.
        assert select_attention("auto", device).name == "doc"
        kernels.append(select_attention("doc", device).kernel)
        if (peer := find_fa4()).usable:
            kernels.append(peer.found)
    inputs = [randn(1000, h, 64, seed=h).to(device, torch.bfloat16) for h in (8, 4, 4)]
    grad = randn(1000, 8, 64, seed=9).to(device, torch.bfloat16)

    def run(kernel, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        out = kernel(*leaves, cu, 1024)
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    truth = run(sdpa_attention, torch.float32)
    eager = run(sdpa_attention, torch.bfloat16)
    for kernel in kernels:
        for ours, theirs, exact in zip(run(kernel, torch.bfloat16), eager, truth, strict=True):
            error, allowed = (ours - exact).abs().max(), 2 * (theirs - exact).abs().max()
            assert error <= allowed + 1e-3, f"{kernel.__name__}: {error} above {allowed}"
