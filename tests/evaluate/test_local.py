"""Local attention: which tokens a token sees, and that nothing else has an effect on its loss."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pgolf.config import Config, TiltConfig
from pgolf.evaluate.documents import document_bounds
from pgolf.evaluate.local import LONGEST, local_pass
from pgolf.evaluate.predictor import evaluating
from pgolf.evaluate.sliding import window_questions
from pgolf.model import attention
from pgolf.model.attention import local_attention, sdpa_attention
from pgolf.report.submission import rules
from pgolf.report.summary import format_table
from tests.evaluate.legal_helpers import (
    BOS,
    CONTEXT,
    FakeDist,
    losses_of,
    make_text,
    random_documents,
    run_pass,
    small_model,
    token_losses,
)
from tests.report.test_submission import finished, score

# Documents of 1 token (a lone BOS), of less than a reach, of a reach, of one token more, and of several.
LENGTHS = [0, 3, 6, 7, 30, 31, 32, 150, 0, 1]
REACHES = [1, 2, 7, 32, 45]


@pytest.fixture(scope="module")
def text():
    return make_text(random_documents(LENGTHS))


@pytest.fixture(scope="module")
def model():
    return small_model()


def dense(q, k, v, cu_seqlens, reach):
    """Return local attention from the whole matrix of pairs, without SDPA."""
    ids = torch.arange(q.shape[0])
    segment = torch.bucketize(ids, cu_seqlens[1:-1].long(), right=True)
    behind = ids[:, None] - ids
    sees = (segment[:, None] == segment) & (behind >= 0) & (behind < reach)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[2])
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, -math.inf).softmax(-1), v)


def heads(tokens, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, h, 8, generator=rng, dtype=torch.float64) for h in (4, 2, 2)]


@pytest.mark.parametrize("block", [1, 5, 64, 512])
@pytest.mark.parametrize("reach", [1, 2, 7, 31, 64, 500])
def test_the_kernel_is_attention_with_a_dense_mask(monkeypatch, reach, block):
    monkeypatch.setattr(attention, "BLOCK", block)
    cu = torch.tensor([0, 1, 1, 8, 72, 73, 200], dtype=torch.int32)  # an empty one, one of 64 tokens
    q, k, v = heads(200)
    found = local_attention("sdpa", reach)(q, k, v, cu, 127)
    torch.testing.assert_close(found, dense(q, k, v, cu, reach), rtol=0, atol=1e-12)


def test_a_reach_of_the_longest_segment_is_the_plain_kernel_bit_for_bit():
    cu = torch.tensor([0, 1, 100, 700], dtype=torch.int32)
    q, k, v = heads(700)
    plain = sdpa_attention(q, k, v, cu, 600)
    assert local_attention("sdpa", 600)(q, k, v, cu, 600).equal(plain)
    assert not local_attention("sdpa", 599)(q, k, v, cu, 600).equal(plain)


@pytest.mark.parametrize(("name", "reach", "window"), [("doc", 7, (6, 0)), ("fa4", 1, (0, 0))])
def test_on_a_gpu_torchs_kernel_gets_the_window(monkeypatch, name, reach, window):
    asked = []
    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn",
        lambda q, *_, window_size, **__: asked.append(window_size) or q,
    )
    cu = torch.tensor([0, 20], dtype=torch.int32)
    local_attention(name, reach)(*heads(20), cu, 20)
    attention.varlen_attention(*heads(20), cu, 20)
    assert asked == [window, (-1, 0)]


def by_hand(model, text, reach, windows=None):
    """Return the losses of a model with dense attention, one window at a time; None: one document."""
    twin = small_model()
    twin.load_state_dict(model.state_dict())
    twin.config = replace(twin.config, max_context=1000)
    twin._attention = lambda q, k, v, cu, _: dense(q, k, v, cu, reach)
    ids, losses = torch.from_numpy(text.tokens.astype(np.int64)), np.full(text.tokens.size, np.nan)
    if windows is None:
        windows = [(start, start, start + length) for start, length in bounds(text)]
    for begin, first, end in windows:
        cu = torch.tensor([0, end - begin], dtype=torch.int32)
        with torch.no_grad():
            nats = twin(ids[begin:end], ids[begin + 1 : end + 1], cu, max_seqlen=end - begin, loop=True)
        losses[first + 1 : end + 1] = nats[first - begin :]
    return losses


def bounds(text):
    return [(int(start), int(length)) for start, length in zip(*document_bounds(text, BOS), strict=True)]


@pytest.mark.parametrize("reach", REACHES)
def test_each_loss_is_that_of_its_document_with_a_dense_mask(model, text, reach):
    got = token_losses("local", model, text, context=reach)
    np.testing.assert_allclose(got, by_hand(model, text, reach), atol=2e-5)


def test_a_context_of_0_is_that_of_the_model(model, text):
    got = token_losses("local", model, text)
    np.testing.assert_array_equal(got, token_losses("local", model, text, context=CONTEXT))


def test_documents_within_the_context_are_scored_as_plainly(model, text):
    local, plain = (token_losses(way, model, text, context=151) for way in ("local", "plain"))
    np.testing.assert_allclose(local, plain, atol=2e-5)
    # In longer ones the first `context` tokens are, and the others are not.
    local, plain = (token_losses(way, model, text, context=32) for way in ("local", "plain"))
    far = np.zeros(text.tokens.size, dtype=bool)
    for start, length in bounds(text):
        far[start + 33 : start + length + 1] = True
    np.testing.assert_allclose(local[~far], plain[~far], atol=2e-5)
    assert far.sum() > 100 and np.mean(np.abs(local - plain)[far] > 1e-3) > 0.9


@pytest.mark.parametrize("size", [1, 33, 100, 1000])  # one window a buffer, a longer one alone, several, all
def test_batch_tokens_do_not_change_the_score(model, text, size):
    losses = token_losses("local", model, text, context=7)
    score = run_pass("local", model, text, context=7, batch_tokens=size)
    assert score.nats == pytest.approx(np.nansum(losses), rel=1e-6)
    assert (score.tokens, score.bytes) == (text.tokens.size - 1, int(text.bytes.sum()))


def run(model, text, dist=None, **changes):
    sizes = {"bos_id": BOS, "context": 7, "batch_tokens": 64, **changes}
    return local_pass(model, text, dist or FakeDist(), **sizes)


def test_documents_are_read_once_in_buffers_no_longer_than_they_need(model, text):
    questions = [turn.questions[0] for turn in run(model, text).turns]
    lengths = document_bounds(text, BOS)[1]
    widths = [(w[:, 2] - w[:, 0]).tolist() for w in (q.windows for q in questions)]
    assert list(itertools.chain(*widths)) == lengths.tolist()
    assert [q.width for q in questions] == [max(w) for w in widths]
    assert [q.size for q in questions] == [-(-sum(w) // 64) * 64 for w in widths]
    assert all(sum(w) <= 64 or len(w) == 1 for w in widths) and max(q.size for q in questions) == 192


@pytest.mark.parametrize("world", [2, 3, 100])
def test_ranks_share_the_buffers(model, text, world):
    alone = [turn.questions[0] for turn in run(model, text).turns]
    shares = [run(model, text, FakeDist(rank, world)).turns for rank in range(world)]
    for index, question in enumerate(alone):
        theirs = shares[index % world][index // world].questions[0]
        np.testing.assert_array_equal(question.windows, theirs.windows)
        assert (question.width, question.size) == (theirs.width, theirs.size)
    assert sum(map(len, shares)) == len(alone)


@pytest.mark.parametrize(("reach", "longest"), [(7, 40), (1, 2), (20, 25)])
def test_longer_documents_are_cut_into_windows_that_overlap_by_the_reach(model, text, reach, longest):
    made = run(model, text, context=reach, longest=longest)
    with evaluating(model):
        got = losses_of(made, text)
    size = max(longest, 2 * reach)  # a reach of 20 moves windows of 40 tokens
    windows = []
    for start, length in bounds(text):
        for first in range(0, max(length - reach, 1), size - reach):
            new = reach if first else 0
            windows.append((start + first, start + first + new, start + min(first + size, length)))
    assert len(windows) > len(bounds(text)) + 3
    np.testing.assert_allclose(got, by_hand(model, text, reach, windows), atol=2e-5)
    # What is read again sees nothing before its window, which is felt through several layers only.
    gap = np.abs(got - by_hand(model, text, reach))
    assert (np.nanmax(gap) > 1e-4) == (reach > 1) and np.nanmedian(gap) < 1e-4
    assert LONGEST == 65_536


def test_the_model_is_left_as_it_was(model, text):
    config, kernel = model.config, model._attention
    before = token_losses("plain", model, text)
    made = run(model, text, batch_tokens=1000)
    losses_of(made, text)
    assert model.config is config and model._attention is kernel
    np.testing.assert_array_equal(token_losses("plain", model, text), before)
    read = losses_of(made, text)
    with torch.no_grad():  # its weights are those that are read, so that `pgolf legality` can nudge them
        kept = model.tok_emb.clone()
        model.tok_emb.mul_(1.1)
        changed = losses_of(made, text)
        model.tok_emb.copy_(kept)
    assert np.nanmax(np.abs(changed - read)) > 1e-3
    np.testing.assert_array_equal(losses_of(made, text), read)


def test_the_tilt_is_on_top(model):
    words = random_documents([40])[0] * 3
    text = make_text([words, random_documents([20], seed=1)[0]])
    tilt = TiltConfig(on=True, order=4)
    plain, tilted = (token_losses("local", model, text, context=9, **c) for c in ({}, {"tilt": tilt}))
    again = slice(50, 120)  # the words come again
    assert (tilted[again] < plain[again] - 0.5).all()
    np.testing.assert_array_equal(tilted[1:40], plain[1:40])


def test_a_run_can_ask_for_it():
    config = Config(evaluate=replace(Config().evaluate, local=True))
    assert config.evaluate.ways == ("local",) and config.evaluate.headline == "plain"
    asked = replace(Config().evaluate, method="local", published=True, context=48)
    assert asked.ways == ("local",) and asked.settings_of("local") == {"context": 48}
    assert asked.keeps_apart("local") and asked.remark("local") == ""
    with pytest.raises(ValueError, match=r"evaluate\.sliding, local, ttt and published score quantized"):
        replace(config, train=replace(config.train, quantize=False))


def test_a_submission_and_a_summary_name_it():
    done = finished(scores={"quantized": score(1.1), "local": score(1.0)})
    assert done.summary.headline == "quantized"
    rows = [line.split()[:2] for line in format_table(done.summary).splitlines() if line]
    assert ["local", "1.0000"] in rows
    said = "Local attention reads each document once; a token sees the last {} tokens."
    assert said.format("2,048") in rules([done], {}, None)
    longer = replace(done.config, evaluate=replace(done.config.evaluate, context=3072))
    assert said.format("3,072") in rules([replace(done, config=longer)], {}, None)
    assert not any("Local" in fact for fact in rules([finished()], {}, None))


def test_buffers_without_a_context_take_any_window():
    windows = np.array([[0, 0, 300], [300, 300, 301], [301, 301, 310]])
    questions = window_questions(windows, context=0, batch_tokens=20)
    assert [(q.width, q.size, len(q.windows)) for q in questions] == [(300, 320, 1), (9, 64, 2)]
