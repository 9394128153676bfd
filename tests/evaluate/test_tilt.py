"""The n-gram tilt: hints as a dictionary gives them token by token, and distributions as the formula says."""

import time
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from pgolf.config import Config, EvaluateConfig, TiltConfig, TttConfig
from pgolf.data.loader import ValidationText
from pgolf.errors import UserError
from pgolf.evaluate.legality import check_way
from pgolf.evaluate.predictor import evaluating, read
from pgolf.evaluate.tilt import TiltedHead, find_hints, repeated_classes
from tests.evaluate.legal_helpers import (
    BOS,
    MODES,
    TTT,
    VOCAB,
    FakeDist,
    losses_of,
    make_pass,
    make_text,
    run_pass,
    shallow_model,
)
from tests.evaluate.violators import Vectors

TILT = TiltConfig(on=True, order=4, threshold=0.6, boost=2.0)


def walked(tokens, config):
    """Return the hints token by token: read what the table says, then write into it."""
    length = config.order - 1
    counts, best = defaultdict(Counter), {}
    hints = np.full(len(tokens), -1)
    for t in range(length, len(tokens)):
        context = tuple(tokens[t - length : t])
        earlier = sum(counts[context].values())
        if earlier >= config.seen and best[context][1] / earlier >= config.threshold:
            hints[t - 1] = best[context][0]
        counts[context][tokens[t]] += 1
        if counts[context][tokens[t]] > best.get(context, (0, 0))[1]:
            best[context] = (tokens[t], counts[context][tokens[t]])
    return hints


@pytest.mark.parametrize("order", [2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("seen", [1, 3])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 3000])
def test_hints_are_those_of_a_table_that_is_walked(order, seen, size):
    rng = np.random.default_rng(order)
    # Pieces of a few phrases, so that long contexts come back with one or several tokens after them.
    phrases = [rng.integers(0, 5, rng.integers(4, 40)) for _ in range(9)]
    tokens = np.concatenate([phrases[k] for k in rng.integers(0, 9, 200)])[:size]
    config = TiltConfig(order=order, threshold=0.5, seen=seen)
    found = find_hints(torch.from_numpy(tokens), config).numpy()
    np.testing.assert_array_equal(found, walked(tokens.tolist(), config))
    if size == 3000:
        assert 0 < (found >= 0).sum() < size


def test_the_token_that_reached_the_highest_count_first_is_the_hint_and_the_threshold_is_met_exactly():
    # After 7: 3, 4, 4, 3, 3; the counts before each are (), 3:1, 3:1 4:1, 4:2 3:1, 4:2 3:2.
    tokens = torch.tensor([7, 3, 7, 4, 7, 4, 7, 3, 7, 3, 7])
    found = find_hints(tokens, TiltConfig(order=2, threshold=0.5))
    assert found[[0, 2, 4, 6, 8]].tolist() == [-1, 3, 3, 4, 4]
    four_of_five = torch.tensor([7, 3, 7, 3, 7, 4, 7, 3, 7, 3, 7, 0])
    assert find_hints(four_of_five, TiltConfig(order=2, threshold=0.8))[10] == 3
    followers = [3] * 14 + [4] * 11
    fourteen_of_25 = torch.tensor([token for after in followers for token in (7, after)] + [7, 0])
    assert find_hints(fourteen_of_25, TiltConfig(order=2, threshold=0.56))[50] == 3


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 8, 15])
def test_places_are_of_one_class_if_the_tokens_after_them_are_equal(length):
    tokens = np.random.default_rng(0).integers(0, 2, 300)
    classes = repeated_classes(torch.from_numpy(tokens), length).numpy()
    pieces = [tuple(tokens[i : i + length]) for i in range(300)]
    whole = 300 - length + 1
    times = Counter(pieces[:whole])
    for i in range(300):
        assert (classes[i] >= 0) == (i < whole and times[pieces[i]] > 1)
    numbers = defaultdict(set)
    for i in range(whole):
        numbers[pieces[i]].add(classes[i])
    assert all(len(found) == 1 for found in numbers.values())
    kept = [next(iter(found)) for piece, found in numbers.items() if times[piece] > 1]
    assert len(set(kept)) == len(kept)


def test_the_distribution_is_the_formula_in_float64_and_sums_to_one():
    rng = torch.Generator().manual_seed(0)
    p = torch.softmax(3 * torch.randn(6, VOCAB, generator=rng, dtype=torch.float64), dim=-1)
    p[4] = torch.nn.functional.one_hot(torch.tensor(3), VOCAB) * (1 - 1e-9) + 1e-9 / VOCAB
    hints = torch.tensor([5, -1, 0, VOCAB - 1, 3, 2])
    boost = 2.625
    expected = p.clone()
    for row, hint in enumerate(hints.tolist()):
        if hint >= 0:
            expected[row, hint] *= np.exp(boost)
            expected[row] /= expected[row].sum()
    head = TiltedHead(Vectors(p.log().float()), hints, torch.nonzero(hints >= 0)[:, 0], boost)
    logs = head.log_probabilities(torch.arange(6))
    torch.testing.assert_close(logs.double(), expected.log(), atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(
        logs.double().exp().sum(-1), torch.ones(6, dtype=torch.float64), atol=1e-6, rtol=0
    )
    for token in range(VOCAB):
        nats = head.nats(torch.full((6,), token))
        torch.testing.assert_close(nats.double(), -expected[:, token].log(), atol=2e-6, rtol=2e-6)
    assert head.nats(torch.full((6,), -100)).tolist() == [0.0] * 6
    assert head.log_probabilities(torch.tensor([3, 1])).equal(logs[[3, 1]])


@pytest.fixture(scope="module")
def model():
    return shallow_model()


@pytest.fixture(scope="module")
def text():
    """Documents that share phrases, so that hints cross documents and are right and wrong."""
    rng = np.random.default_rng(1)
    phrases = [rng.integers(2, VOCAB, n).tolist() for n in (9, 12, 7)]
    return make_text([[t for k in rng.integers(0, 3, n) for t in phrases[k]] for n in (1, 5, 2, 4)])


@pytest.mark.parametrize("mode", ["plain", "sliding", "ttt", "sgd", "phased"])
def test_the_tilt_changes_the_losses_as_the_formula_says_and_nothing_is_learned_from_it(model, text, mode):
    """A loss with tilt follows from the loss and the distribution without it, also after many lessons."""
    hints = find_hints(torch.from_numpy(text.tokens.astype(np.int64)), TILT).numpy()
    plain, logs = np.full(text.tokens.size, np.nan), np.full(text.tokens.size, np.nan)

    def see(question, distributions, nats) -> None:
        for row, first, count in question.rows():
            vectors = distributions.log_probabilities(torch.arange(row, row + count)).detach()
            plain[first + 1 : first + 1 + count] = nats[row : row + count]
            for k in range(count):
                if hints[first + k] >= 0:
                    logs[first + k + 1] = vectors[k, hints[first + k]]

    with evaluating(model):
        read(make_pass(mode, model, text), text, FakeDist(), bos_id=BOS, observe=see)
        found = losses_of(make_pass(mode, model, text, tilt=TILT), text)
    expected, fired = plain.copy(), 0
    for t in range(1, text.tokens.size):
        if hints[t - 1] >= 0:
            fired += 1
            expected[t] += np.log1p(np.exp(logs[t]) * np.expm1(2.0)) - 2.0 * (hints[t - 1] == text.tokens[t])
    np.testing.assert_allclose(found[1:], expected[1:], atol=2e-5)
    right = sum(hints[t - 1] == text.tokens[t] for t in range(1, text.tokens.size))
    assert fired > 20 and 0 < right < fired
    assert np.abs(found[1:] - plain[1:]).max() > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_a_tilted_way_meets_all_conditions(model, text, mode):
    def make(part):
        return make_pass(mode, model, part, whole=text.tokens.size, tilt=TILT)

    found = check_way(make, text, bos_id=BOS, vocab_size=VOCAB, dist=FakeDist())
    assert {t.verdict for t in found} == {"ok"}, found


def test_a_tilt_on_phases_is_accepted_where_what_comes_later_is_also_scored_later(model, text):
    def make(part):
        return make_pass("phased", model, part, config=replace(TTT, batch_documents=1), tilt=TILT)

    found = check_way(make, text, bos_id=BOS, vocab_size=VOCAB, dist=FakeDist(), loose=True, tilted=True)
    assert [t.verdict for t in found] == ["ok"] * 4 + ["accepted"], found


@pytest.mark.parametrize("place", [20, 45, 80])
def test_changing_a_token_and_all_after_it_changes_no_loss_before_it(model, text, place):
    rng = np.random.default_rng(place)
    with evaluating(model):
        base = losses_of(make_pass("plain", model, text, tilt=TILT), text)
        tokens = text.tokens.copy()
        tokens[place:-1] = np.where(
            tokens[place:-1] == BOS, BOS, rng.integers(2, VOCAB, tokens.size - place - 1)
        )
        other = losses_of(make_pass("plain", model, text._replace(tokens=tokens), tilt=TILT), text)
        cut = ValidationText(text.tokens[: place + 1], text.bytes[: place + 1])
        short = losses_of(make_pass("plain", model, cut, tilt=TILT), cut)
    np.testing.assert_allclose(other[1:place], base[1:place], atol=2e-5)
    np.testing.assert_allclose(short[1:], base[1 : place + 1], atol=2e-5)
    assert np.abs(other[place:] - base[place:]).max() > 1e-2


def test_a_tilt_that_counts_the_whole_text_is_caught(model, text):
    """A table that is filled before it is read, as in a first pass over the text."""
    length = TILT.order - 1

    def two_passes(part):
        tokens = part.tokens.astype(np.int64)
        follows = defaultdict(Counter)
        for t in range(length, tokens.size):
            follows[tuple(tokens[t - length : t])][int(tokens[t])] += 1
        run = make_pass("plain", model, part, tilt=TILT)
        hints = torch.full((tokens.size,), -1)
        for t in range(length, tokens.size):
            hints[t - 1] = follows[tuple(tokens[t - length : t])].most_common(1)[0][0]
        run.predictor._hints = hints
        return run

    found = check_way(two_passes, text, bos_id=BOS, vocab_size=VOCAB, dist=FakeDist())
    assert {t.condition for t in found if t.verdict == "fails"} == {"C1"}, found


def test_the_tilt_is_off_unless_it_is_asked_for_and_its_settings_are_checked():
    assert not EvaluateConfig().tilt.on and not Config().evaluate.tilt.on
    published = TiltConfig()
    assert (published.order, published.threshold, published.boost) == (16, 0.8, 2.625)  # of PR #2135
    assert "tilt.order" not in EvaluateConfig().settings_of("ttt")
    assert EvaluateConfig(tilt=TILT).settings_of("ttt")["tilt.order"] == 4
    for wrong, message in (
        ({"order": 1}, r"tilt.order must be in \[2, 1024\], got 1"),
        ({"threshold": 0.0}, r"tilt.threshold must be in \(0, 1\], got 0.0"),
        ({"boost": -1.0}, r"tilt.boost must be in \[0, 50\], got -1.0"),
        ({"boost": float("nan")}, "tilt.boost must be a finite number"),
        ({"seen": 0}, "tilt.seen must be >= 1, got 0"),
    ):
        with pytest.raises(UserError, match=message):
            TiltConfig(**wrong)


def test_finding_the_hints_is_part_of_the_time_of_scoring(model, text, monkeypatch):
    def slowly(tokens, config):
        time.sleep(0.5)
        return find_hints(tokens, config)

    monkeypatch.setattr("pgolf.evaluate.tilt.find_hints", slowly)
    began = time.perf_counter()
    assert 0.5 <= run_pass("plain", model, text, tilt=TILT).seconds <= time.perf_counter() - began


def test_adapters_are_those_without_tilt(model, text):
    """The gradient of a tilted loss is that without tilt, so the state after a pass is the same."""
    states = []
    with evaluating(model):
        for tilt in (TiltConfig(), TILT):
            run = make_pass("ttt", model, text, config=replace(TTT, lr=0.05), tilt=tilt)
            read(run, text, FakeDist(), bos_id=BOS)
            states.append([t.clone() for t in run.predictor.state()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert isinstance(TTT, TttConfig) and any(t.abs().max() > 0.05 for t in states[0])
