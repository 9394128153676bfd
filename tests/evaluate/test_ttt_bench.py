"""The bench of the costly ways to score: the sliding window as the scripts of the challenge had it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.common import Recorder
from bench.step import Kernel, family
from bench.ttt import STREAM, Bench, by_family, profile
from pgolf.config import EvaluateConfig
from pgolf.errors import UserError
from tests.evaluate.legal_helpers import (
    BOS,
    TTT,
    FakeDist,
    make_text,
    random_documents,
    small_config,
    small_model,
)


def make_bench(text) -> Bench:
    return Bench(None, text, FakeDist(), BOS, 64, EvaluateConfig())


def test_the_window_over_the_whole_text_scores_each_token_once_after_all_those_before_it():
    context = 128
    model = small_model(shape=replace(small_config(), max_context=context))
    text = make_text(random_documents([context - 9, 70, 0, 9, 2 * context]))
    found, _, _ = make_bench(text).score(STREAM, model, "eager")
    tokens = torch.from_numpy(text.tokens.astype(np.int64))
    nats = []
    with torch.no_grad():
        for place in range(1, tokens.numel()):  # the window of each token, by hand
            begin = 0 if place <= context else -(-(place - context) // 64) * 64
            window = tokens[begin : place + 1]
            cut = torch.tensor([0, place - begin], dtype=torch.int32)
            nats.append(model(window[:-1], window[1:], cut, max_seqlen=context, loop=True)[-1].item())
    assert found.tokens == len(nats) and found.bytes == int(text.bytes[1:].sum())
    assert found.nats == pytest.approx(sum(nats), rel=1e-5)
    assert found.bpb == pytest.approx(found.nats / np.log(2) / found.bytes)


def test_several_ranks_are_refused():
    bench = replace(make_bench(make_text(random_documents([9]))), dist=FakeDist(world_size=2))
    with pytest.raises(ValueError, match="sliding64_stream is measured on one rank"):
        bench.stream(small_model())


def test_a_profile_has_some_steps_by_operator_and_ends_the_pass(monkeypatch):
    text = make_text(random_documents([90, 80, 70]))
    bench = replace(make_bench(text), settings=EvaluateConfig(adapters=TTT))
    monkeypatch.setattr(Bench, "model", lambda *_, **__: small_model())
    recorder = Recorder("ttt", torch.device("cpu"))
    profile(bench, "record_adapters", "eager", recorder, "name", (1, 2))
    found = {str(line["metric"]): line["value"] for line in recorder.lines}
    assert found.pop("window_tokens") >= 3 * TTT.chunk
    assert found["ms_of_aten::bmm"] > 0 and all(name.startswith("ms_of_") for name in found)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    with pytest.raises(UserError, match="fewer than 2001 steps"):
        profile(bench, "record_adapters", "eager", recorder, "name", (1, 1000))


def test_kernels_are_told_apart_by_their_names():
    names = "nvjet_tst_64x32", "multi_tensor_apply_kernel<FusedAdamMathFunctor>", "Memcpy DtoD", "odd"
    kernels = [Kernel(name, 1000 * i, 1000 * i + 500) for i, name in enumerate(names)]
    found = by_family(kernels)
    assert found == {"products": 0.5, "adam": 0.5, "copies": 0.5, "other": 0.5, "idle": 1.5}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("pgolf::product::scheduled_kernel<pgolf::(anonymous namespace)::CeEpilogue<Form, true>>", "loss"),
        ("pgolf::plain_product::product_kernel<pgolf::(anonymous namespace)::HiddenEpilogue>", "loss"),
        ("pgolf::plain_product::product_kernel<pgolf::norm_mlp_sum::SumEpilogue>", "mlp"),
    ],
)
def test_products_belong_to_the_family_of_their_epilogue(name: str, found: str):
    assert family(name) == found
