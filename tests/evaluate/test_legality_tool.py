"""The tool that tests the conditions of a submission: our ways to score pass, known violators are caught."""

import numpy as np
import pytest

from pgolf.data.loader import ValidationText
from pgolf.evaluate.legality import check_way, sample_text
from tests.evaluate.legal_helpers import (
    BOS,
    MODES,
    VOCAB,
    FakeDist,
    make_pass,
    make_text,
    random_documents,
    shallow_model,
)
from tests.evaluate.violators import VIOLATORS

LENGTHS = [9, 50, 4, 35]


@pytest.fixture(scope="module")
def model():
    return shallow_model()


@pytest.fixture(scope="module")
def text():
    return make_text(random_documents(LENGTHS))


def verdicts(make, text, **more):
    found = check_way(make, text, bos_id=BOS, vocab_size=VOCAB, dist=FakeDist(), **more)
    return found, {(t.condition, t.test): t.verdict for t in found}


@pytest.mark.parametrize("mode", MODES)
def test_a_way_that_is_legal_meets_all_conditions(model, text, mode):
    def make(part):
        return make_pass(mode, model, part, whole=text.tokens.size)

    found, by_test = verdicts(make, text)
    assert set(by_test.values()) == {"ok"}, found
    assert [t.condition for t in found] == ["C4", "C2", "C3", "C1", "C1"]
    assert ("lessons:" in found[2].text) == (mode in ("ttt", "sgd"))


def test_phases_are_accepted_and_fail_the_strict_reading(model, text):
    make = VIOLATORS["undeclared_phases"][0](model)
    found, by_test = verdicts(make, text, loose=True)
    assert by_test.pop(("C1", "future")) == "accepted" and set(by_test.values()) == {"ok"}, found
    assert "fails the strict reading" in found[-1].text


@pytest.mark.parametrize("name", VIOLATORS)
def test_known_violators_are_caught_by_the_right_condition(model, text, name):
    make, condition = VIOLATORS[name]
    found, _ = verdicts(make(model), text)
    failed = {t.condition for t in found if t.verdict == "fails"}
    assert condition in failed, found
    if condition in ("C2", "C4"):
        assert failed == {condition}, found


def test_a_sample_is_the_beginning_of_several_documents():
    text = make_text(random_documents([100, 3, 0, 70, 90]))
    sample = sample_text(text, BOS, 64)
    assert sample.tokens.size == 46 and sample.tokens[-1] == BOS and sample.bytes[0] == 0
    np.testing.assert_array_equal(sample.tokens[:16], text.tokens[:16])
    assert np.flatnonzero(sample.tokens == BOS).tolist() == [0, 16, 20, 21, 37, 45]
    short = sample_text(text, BOS, 10_000)
    assert isinstance(short, ValidationText) and short.tokens.size == text.tokens.size
    with pytest.raises(ValueError, match="at least 32 tokens, got 5"):
        sample_text(text, BOS, 5)
