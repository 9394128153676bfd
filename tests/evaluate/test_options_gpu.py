"""SLOT, the tilt, the ensemble and the tests of legality on a GPU."""

from dataclasses import replace

import pytest
import torch

from pgolf.config import TiltConfig
from pgolf.dist import Dist
from pgolf.evaluate.legality import check_way
from pgolf.evaluate.neighbours import check_neighbours
from pgolf.evaluate.predictor import evaluating
from pgolf.evaluate.rounding import measured_limit
from pgolf.evaluate.tilt import find_hints
from pgolf.model.attention import local_attention
from tests.conftest import requires_gpu
from tests.evaluate.legal_helpers import (
    ALONE,
    BOS,
    MODES,
    TTT,
    VOCAB,
    FakeDist,
    make_pass,
    make_text,
    random_documents,
    run_pass,
    small_config,
    small_model,
)

pytestmark = requires_gpu
LENGTHS = [5, 100, 9, 31, 60]
SHAPE = replace(small_config(), width=128, heads=2, kv_heads=1, rope_dims=16)


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("slot", {}),
        ("causal_slot", {}),
        ("local", {"context": 24}),  # which ends within tiles of a kernel, and documents
        ("local", {"context": 1}),
        ("local", {"context": 200}),
        ("plain", {"tilt": TiltConfig(on=True, order=2, threshold=0.3)}),
        ("ttt", {"config": replace(TTT, rank=8, alpha=16.0, lr=1e-3, members=2)}),
        ("ttt", {"config": replace(TTT, rank=8, alpha=16.0, lr=1e-3, gradient="chunk")}),
    ],
)
def test_cuda_scores_as_the_cpu_does(mode, changes):
    """CUDA computes in bfloat16, the CPU in float32: losses differ by the rounding, their mean hardly."""
    text, scores = make_text(random_documents(LENGTHS)), []
    for device in (torch.device("cpu"), torch.device("cuda")):
        model, dist = small_model(shape=SHAPE).prepare(device), FakeDist()
        dist.device = device
        scores.append(run_pass(mode, model, text, dist, **changes))
    assert (scores[0].tokens, scores[0].bytes) == (scores[1].tokens, scores[1].bytes)
    assert scores[1].loss == pytest.approx(scores[0].loss, rel=1e-2)


@pytest.mark.parametrize("reach", [1, 2, 63, 64, 300, 2048, 100_000])
def test_the_window_of_the_varlen_kernel_is_the_band_of_the_cpu(reach):
    cu = torch.tensor([0, 1, 130, 130, 2178, 2179, 5000], dtype=torch.int32)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5000, h, 64, generator=rng).bfloat16() for h in (4, 2, 2))
    wanted = local_attention("sdpa", reach)(q.double(), k.double(), v.double(), cu, 2821)
    on_gpu = (t.cuda() for t in (q, k, v, cu))
    found = local_attention("doc", reach)(*on_gpu, 2821)
    assert (found.double().cpu() - wanted).norm() < 0.01 * wanted.norm()
    assert (found.double().cpu() - wanted).abs().max() < 0.05


def test_a_compiled_model_attends_locally_for_a_while_and_scores_plainly_as_before():
    text, dist = make_text(random_documents(LENGTHS)), FakeDist()
    dist.device = torch.device("cuda")
    models = [small_model(shape=SHAPE).prepare(dist.device, compile=how) for how in ("blocks", "off")]
    before = run_pass("plain", models[0], text, dist)
    local = [run_pass("local", model, text, dist, context=24) for model in models]
    after = run_pass("plain", models[0], text, dist)
    assert (after.nats, after.tokens) == (before.nats, before.tokens)
    assert local[0].nats == local[1].nats != before.nats


def test_hints_are_those_of_the_cpu():
    tokens = torch.from_numpy(make_text(random_documents([3000])).tokens.astype("int64")) % 5
    config = TiltConfig(order=6, threshold=0.4)
    found = find_hints(tokens, config)
    assert (found >= 0).sum() > 100 and find_hints(tokens.cuda(), config).cpu().equal(found)


@pytest.mark.parametrize("mode", MODES)
def test_legal_ways_are_legal_on_a_gpu_with_the_limit_that_is_measured_there(mode):
    text, dist = make_text(random_documents([9, 50, 4, 35])), Dist.start("cuda")
    model = small_model(shape=SHAPE).prepare(dist.device, attention="sdpa").exact()

    def start(part, place):
        return make_pass(mode, model, part, place, whole=text.tokens.size)

    def make(part):
        return start(part, dist)

    with evaluating(model):
        limit = measured_limit(make, text, model, bos_id=BOS, dist=dist)
        found = check_way(make, text, bos_id=BOS, vocab_size=VOCAB, dist=dist, limit=limit.nats)
        found += check_neighbours(start, text, bos_id=BOS, dist=dist, apart=mode in ALONE, limit=limit.nats)
    assert not [t for t in found if t.verdict == "fails"], (limit, found)
