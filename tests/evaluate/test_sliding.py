"""Sliding windows: which window scores a token, and with how much context."""

import functools
import math
import re

import numpy as np
import pytest
import torch

from pgolf.config import METHODS
from pgolf.data.loader import validation_segments
from pgolf.evaluate.documents import document_bounds, first_documents
from pgolf.evaluate.sliding import sliding_windows, window_questions
from pgolf.log import Progress
from tests.evaluate.legal_helpers import (
    BOS,
    CONTEXT,
    make_pass,
    make_text,
    random_documents,
    run_pass,
    small_model,
    token_losses,
)

# A lone BOS, around one window, around one window and a stride, and many windows.
LENGTHS = [0, 30, 31, 32, 35, 36, 37, 150, 1]


@pytest.fixture(scope="module")
def text():
    return make_text(random_documents(LENGTHS))


@pytest.mark.parametrize("stride", [1, 5, 31, 32])
def test_windows_score_each_token_once_with_all_the_context_there_is(text, stride):
    starts, lengths = document_bounds(text, BOS)
    windows = sliding_windows(starts, lengths, context=CONTEXT, stride=stride)
    scored = np.concatenate([np.arange(first, end) for _, first, end in windows.tolist()])
    np.testing.assert_array_equal(scored, np.arange(text.tokens.size - 1))
    for begin, first, end in windows.tolist():
        document = int(np.searchsorted(starts, begin, side="right")) - 1
        assert starts[document] <= begin <= first < end <= starts[document] + lengths[document]
        assert end - begin <= CONTEXT
        context = first - begin
        assert context >= min(first - starts[document], CONTEXT - stride)


def test_a_stride_of_the_whole_context_is_the_plain_pass(text):
    starts, lengths = document_bounds(text, BOS)
    windows = sliding_windows(starts, lengths, context=CONTEXT, stride=CONTEXT)
    segments, sizes = validation_segments(text.tokens, bos_id=BOS, max_context=CONTEXT)
    np.testing.assert_array_equal(windows[:, 0], segments)
    np.testing.assert_array_equal(windows[:, 1], segments)
    np.testing.assert_array_equal(windows[:, 2], segments + sizes)


# One window per buffer, padding in each buffer, everything in one.
@pytest.mark.parametrize("batch_tokens", [CONTEXT, 75, 10**6])
def test_buffers_hold_every_target_once_and_padding_at_the_end(text, batch_tokens):
    windows = sliding_windows(*document_bounds(text, BOS), context=CONTEXT, stride=CONTEXT)
    inputs, targets, sizes = [], [], []
    for question in window_questions(windows, context=CONTEXT, batch_tokens=batch_tokens):
        seen, wanted = question.tensors(text, torch.device("cpu"))
        sizes.append(seen.ids.numel())
        count = question.work
        assert seen.ids.shape == wanted.shape == seen.positions.shape == (question.size,)
        assert not seen.ids[count:].any() and (wanted[count:] == -100).all()
        assert (seen.positions[count:] == -1).all()
        starts = seen.cu_seqlens[:-1][seen.cu_seqlens.diff() > 0].tolist()
        assert seen.cu_seqlens.numel() % 64 == 0 and seen.cu_seqlens[-1] == question.size
        assert int(seen.cu_seqlens.diff().max()) <= CONTEXT
        begins = (np.flatnonzero(seen.ids[:count].numpy() == BOS)).tolist()
        assert set(begins) <= set(starts), "two documents in one segment"
        inputs += seen.ids[:count].tolist()
        targets += wanted[:count].tolist()
    assert inputs == text.tokens[:-1].tolist() and targets == text.tokens[1:].tolist()
    # The last buffer ends with the text, rounded up, so a million tokens of padding are not computed.
    assert set(sizes[:-1]) <= {batch_tokens} and sizes[-1] <= min(batch_tokens, -(-len(inputs) // 64) * 64)


def test_a_window_must_fit_the_buffer(text):
    windows = sliding_windows(*document_bounds(text, BOS), context=CONTEXT, stride=CONTEXT)
    with pytest.raises(ValueError, match=rf"at least max_context={CONTEXT}, got {CONTEXT - 1}"):
        window_questions(windows, context=CONTEXT, batch_tokens=CONTEXT - 1)


@pytest.mark.parametrize("stride", [5, 32])
def test_each_loss_is_that_of_its_window_alone(text, stride):
    model = small_model()
    starts, lengths = document_bounds(text, BOS)
    got = token_losses("sliding", model, text, stride=stride)
    ids = torch.from_numpy(text.tokens.astype(np.int64))
    for begin, first, end in sliding_windows(starts, lengths, context=CONTEXT, stride=stride).tolist():
        cu = torch.tensor([0, end - begin], dtype=torch.int32)
        with torch.no_grad():
            nats = model(ids[begin:end], ids[begin + 1 : end + 1], cu, max_seqlen=CONTEXT, loop=True)
        np.testing.assert_allclose(got[first + 1 : end + 1], nats[first - begin :], atol=2e-5)


@pytest.mark.parametrize("size", [32, 33, 100, 1000])  # windows per buffer: one, one and a part, several, all
def test_the_buffer_size_does_not_change_the_score(text, size):
    model = small_model()
    losses = token_losses("sliding", model, text)
    score = run_pass("sliding", model, text, batch_tokens=size)
    assert score.nats == pytest.approx(np.nansum(losses), rel=1e-5)
    assert (score.tokens, score.bytes) == (text.tokens.size - 1, int(text.bytes.sum()))


@pytest.mark.parametrize(("mode", "stride"), [("plain", CONTEXT), ("sliding", 5)])
def test_the_score_is_bit_for_bit_the_sum_over_the_models_losses_of_each_buffer(text, mode, stride):
    """float64 sums of a few hundred float32 losses are exact, and the sum over documents does not round."""
    model, found = small_model(), []
    windows = sliding_windows(*document_bounds(text, BOS), context=CONTEXT, stride=stride)
    for question in window_questions(windows, context=CONTEXT, batch_tokens=96):
        inputs, targets = question.tensors(text, torch.device("cpu"))
        with torch.no_grad():
            nats = model(inputs.ids, targets, inputs.cu_seqlens, max_seqlen=CONTEXT, loop=True)
        found += nats.double().tolist()
    assert run_pass(mode, model, text).nats == math.fsum(found)


def test_ranks_share_the_buffers(text):
    windows = sliding_windows(*document_bounds(text, BOS), context=CONTEXT, stride=5)
    sizes = {"context": CONTEXT, "batch_tokens": 64}
    alone = window_questions(windows, **sizes)
    for world in (2, 3, 100):
        shares = [window_questions(windows, rank=r, world_size=world, **sizes) for r in range(world)]
        for index, question in enumerate(alone):
            np.testing.assert_array_equal(question.windows, shares[index % world][index // world].windows)
        assert sum(map(len, shares)) == len(alone)


def test_a_short_text_is_not_padded_to_the_whole_buffer(text):
    windows = sliding_windows(*document_bounds(text, BOS), context=CONTEXT, stride=32)
    sizes = [q.size for q in window_questions(windows, context=CONTEXT, batch_tokens=98_304)]
    tokens = text.tokens.size - 1
    assert len(sizes) == 1 and tokens <= sizes[0] < tokens + 64


@pytest.mark.parametrize("mode", METHODS)
def test_a_handful_of_tokens_is_not_padded_in_any_mode(mode):
    short = make_text(random_documents([9, 6]))
    run = make_pass(mode, small_model(), short, batch_tokens=98_304)
    fed = [q.size or q.width * len(q.windows) for turn in run.turns for q in turn.questions]
    assert 0 < sum(fed) <= 4 * short.tokens.size, fed


@pytest.mark.parametrize(("mode", "label"), [("plain", "plain: "), ("sliding", "sliding, stride 5: ")])
def test_progress_names_what_runs_and_ends_at_100(text, mode, label, monkeypatch, capsys):
    monkeypatch.setattr("pgolf.evaluate.predictor.Progress", functools.partial(Progress, every_s=0.0))
    monkeypatch.setattr("pgolf.evaluate.predictor.LONG_WORK", 1)
    run_pass(mode, small_model(), text, batch_tokens=64)
    first, *lines = capsys.readouterr().err.splitlines()
    assert first.startswith(label) and f"0 %  {text.tokens.size - 1:,} tokens to score" in first
    shares = [int(re.search(r"(\d+) %", line)[1]) for line in lines]
    assert all(line.startswith(label) for line in lines)
    assert len(lines) > 1 and shares == sorted(shares) and shares[-1] == 100 and 0 < shares[0] < 100


@pytest.mark.parametrize("stride", [0, -1, 33])
def test_a_stride_out_of_range_is_refused(text, stride):
    with pytest.raises(ValueError, match=rf"stride must be in \[1, max_context=32\], got {stride}"):
        sliding_windows(*document_bounds(text, BOS), context=CONTEXT, stride=stride)


def test_first_documents_are_a_split_of_their_own(text):
    starts, lengths = document_bounds(text, BOS)
    part = first_documents(text, BOS, 3)
    assert part.tokens.size == lengths[:3].sum() + 1
    np.testing.assert_array_equal(document_bounds(part, BOS)[0], starts[:3])
    assert first_documents(text, BOS, 100).tokens.size == text.tokens.size
    with pytest.raises(ValueError, match="documents must be at least 1, got -2"):
        first_documents(text, BOS, -2)
