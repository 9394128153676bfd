"""CaseOps: the transform against a slow version of its rules, and tokenizers that have its operators."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgolf.data import caseops
from pgolf.data.caseops import ALLCAPS, CAPNEXT, CASE_OPERATORS, ESC, TITLE
from pgolf.data.text import iterate_documents, sample_paths
from pgolf.data.tokenizer import ESCAPE, Tokenizer, escape, train_tokenizer, unescape

# The challenge's own model is not part of the repository; name a copy to test with it.
CHALLENGE_MODEL = os.environ.get("PGOLF_CASEOPS_MODEL", "")
needs_challenge_model = pytest.mark.skipif(
    not CHALLENGE_MODEL, reason="PGOLF_CASEOPS_MODEL does not name the challenge's CaseOps tokenizer"
)
UPPER, LOWER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz"
TEXT = st.text(
    st.one_of(
        st.sampled_from(UPPER[:3] + LOWER[:3]),
        st.sampled_from(
            " \n\u2581\0\u00c9\u00e9\uff21\u0130\u212a" + ESCAPE + "\uf8f1" + "".join(CASE_OPERATORS)
        ),
        st.characters(exclude_categories=["Cs"]),
    )
)
CASES = [
    ("", ""),
    ("the cat", "the cat"),
    ("The NASA iPhone", f"{TITLE}the {ALLCAPS}nasa i{CAPNEXT}phone"),
    ("A", f"{TITLE}a"),
    ("AB", f"{ALLCAPS}ab"),
    ("Ab", f"{TITLE}ab"),
    ("aB", f"a{CAPNEXT}b"),
    ("ABc", f"{TITLE}a{CAPNEXT}bc"),
    ("aBCd", f"a{CAPNEXT}b{CAPNEXT}cd"),
    ("McDonald", f"{TITLE}mc{CAPNEXT}donald"),
    ("A1B2c", f"{TITLE}a1{TITLE}b2c"),
    ("don'T", f"don'{TITLE}t"),
    ("\u00c9Ab\u00e9AB", f"\u00c9{TITLE}ab\u00e9{ALLCAPS}ab"),
    ("\uff21\u0130\u212a", "\uff21\u0130\u212a"),
    (TITLE, ESC + TITLE),
    (ESC * 2 + "A" + CAPNEXT, f"{ESC}{ESC}{ESC}{ESC}{TITLE}a{ESC}{CAPNEXT}"),
    (f"a{ALLCAPS}B", f"a{ESC}{ALLCAPS}{TITLE}b"),
    ("\ue000\ue005", "\ue000\ue005"),
]


def slow_encode(text: str) -> str:
    """Encode one character after the other."""
    out, at = "", 0
    while at < len(text):
        if text[at] not in UPPER + LOWER:
            out += ESC * (text[at] in CASE_OPERATORS) + text[at]
            at += 1
            continue
        end = at
        while end < len(text) and text[end] in UPPER + LOWER:
            end += 1
        run, at = text[at:end], end
        if len(run) > 1 and all(c in UPPER for c in run):
            out += ALLCAPS + run.lower()
            continue
        for index, letter in enumerate(run):
            out += (CAPNEXT if index else TITLE) * (letter in UPPER) + letter.lower()
    return out


@pytest.mark.parametrize(("text", "encoded"), CASES)
def test_every_rule(text: str, encoded: str) -> None:
    assert caseops.encode(text) == slow_encode(text) == encoded
    assert caseops.decode(encoded) == text


@settings(max_examples=500, deadline=None)
@given(TEXT)
def test_any_text_comes_back_and_follows_the_rules(text: str) -> None:
    encoded = caseops.encode(text)
    assert encoded == slow_encode(text)
    assert not set(UPPER) & set(encoded)
    assert caseops.decode(encoded) == caseops.decode_written(encoded) == text


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_the_order_of_caseops_and_the_escape_does_not_matter(text: str) -> None:
    both = escape(caseops.encode(text))
    assert both == caseops.encode(escape(text))
    assert caseops.decode(unescape(both)) == unescape(caseops.decode(both)) == text


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from("aB 1" + "".join(CASE_OPERATORS)), max_size=12))
def test_what_a_model_may_write_decodes_and_grows_only_at_its_end(written: str) -> None:
    whole = caseops.decode_written(written)
    for end in range(len(written)):
        assert whole.startswith(caseops.decode_written(written[:end])), ascii(written)
    try:
        assert caseops.decode(written) == whole
    except ValueError as e:
        assert "dangling operator" in str(e)
    else:
        assert caseops.decode(caseops.encode(whole)) == whole


@pytest.mark.parametrize(
    ("text", "at"),
    [
        (f"a {TITLE}", 2),
        (f"{ALLCAPS} a", 0),
        (f"{ALLCAPS}\u00e9", 0),
        (f"a{CAPNEXT}1", 1),
        (f"a{CAPNEXT}{CAPNEXT}b", 1),
        (f"{TITLE}{ALLCAPS}b", 0),
        (f"{TITLE}{ESC}{ESC}", 0),
        (f"{ALLCAPS}a{CAPNEXT}", 2),
        (ESC, 0),
        (f"{ESC}a", 0),
        (ESC * 3, 2),
        (f"a{TITLE}b", 1),
        (f"{TITLE}a{ALLCAPS}b", 2),
    ],
)
def test_a_dangling_operator_is_refused(text: str, at: int) -> None:
    message = f"dangling operator U\\+{ord(text[at]):04X} at character {at}: expected .* the text was cut"
    with pytest.raises(ValueError, match=message):
        caseops.decode(text)


def test_an_operator_that_only_a_model_writes_but_that_is_clear_is_read() -> None:
    assert caseops.decode(f"{CAPNEXT}ab {ALLCAPS}a{CAPNEXT}bc D") == "Ab ABC D"


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a lone surrogate at character 2\); repair it"):
        caseops.encode("ab\ud800")


def check(tokenizer: Tokenizer, text: str) -> None:
    ids, counts = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(counts.sum()) == len(text.encode())
    assert counts.min(initial=0) >= 0


def test_a_tokenizer_is_recognised_by_its_operators(cased: Tokenizer, tokenizer: Tokenizer) -> None:
    assert cased.caseops and cased.lossless and not cased.lossy_because
    assert not tokenizer.caseops
    pieces = [cased._sp.id_to_piece(i) for i in range(cased.vocab_size)]
    assert pieces[:9] == ["<pad>", "<s>", "</s>", "<unk>", *CASE_OPERATORS, "\n"]
    words = [piece for i, piece in enumerate(pieces) if i > 3 and not cased._sp.is_byte(i)]
    assert not any(set(piece) & set(UPPER) for piece in words)
    assert sum(bool(set(piece) & set(CASE_OPERATORS)) for piece in words) == 4


@pytest.mark.parametrize(("text", "encoded"), CASES)
def test_every_rule_through_a_tokenizer(cased: Tokenizer, text: str, encoded: str) -> None:
    check(cased, text)
    ids = cased.encode_ids([text])[0]
    assert unescape(cased._sp.decode(ids.tolist())) == encoded


@settings(max_examples=300, deadline=None)
@given(TEXT)
@example(f"{ESC}{TITLE} \u2581{ESCAPE}{ESCAPE}\uf8f1{ESC}\0{ALLCAPS}A")
def test_any_text_round_trips_with_exact_bytes(cased: Tokenizer, text: str) -> None:
    check(cased, text)


def test_operators_count_nothing_and_literal_ones_three_bytes(cased: Tokenizer) -> None:
    ids, counts = cased.encode(f"X{TITLE}{ESC}")
    assert ids[[0, 2, 3, 4, 5]].tolist() == [4, 7, 4, 7, 7]
    assert counts.tolist() == [0, 1, 0, 3, 0, 3]


def test_every_spelling_of_a_word_shares_its_tokens(cased: Tokenizer) -> None:
    lower, title, upper = (cased.encode_ids([t])[0].tolist() for t in ("river", "River", "RIVER"))
    assert (title, upper) == ([4, *lower], [5, *lower])


def test_real_text_has_the_bytes_of_its_documents(cased: Tokenizer) -> None:
    texts = [document.text for document in iterate_documents(sample_paths().val)]
    for text, (ids, counts) in zip(texts, cased.encode_batch(texts), strict=True):
        assert cased.decode(ids) == text
        assert int(counts.sum()) == len(text.encode())
        assert counts[(ids >= 4) & (ids <= 7)].max(initial=0) == 0
        assert np.array_equal(counts, cased._encode_by_surface(text)[1])


def test_marker_pairs_are_tokens_of_a_space_and_an_operator(paired: Tokenizer, cased: Tokenizer) -> None:
    assert paired.caseops and paired.lossless, paired.lossy_because
    pieces = [paired._sp.id_to_piece(i) for i in range(12)]
    assert pieces[4:] == [*CASE_OPERATORS, *("\u2581" + operator for operator in CASE_OPERATORS[:3]), "\n"]
    ids, counts = paired.encode("A The  NASA\nX")
    assert ids[ids < 12].tolist() == [4, 8, 9, 11, 4]
    assert counts[ids < 12].tolist() == [0, 1, 1, 1, 0]
    texts = [document.text for document in iterate_documents(sample_paths().val)]
    for text, (found, sizes) in zip(texts, paired.encode_batch(texts), strict=True):
        assert paired.decode(found) == text
        assert int(sizes.sum()) == len(text.encode())
        assert np.array_equal(sizes, paired._encode_by_surface(text)[1])
    fewer, more = (sum(map(len, t.encode_ids(texts))) for t in (paired, cased))
    assert fewer < 0.95 * more


@settings(max_examples=300, deadline=None)
@given(TEXT)
@example(f" {TITLE} {ESC}A \u2581A \u2581{ALLCAPS}B")
def test_any_text_round_trips_with_marker_pairs(paired: Tokenizer, text: str) -> None:
    check(paired, text)


def test_marker_pairs_need_caseops(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"marker pairs are pieces with an operator.*switch CaseOps on too"):
        train_tokenizer(["x"], tmp_path / "x.model", vocab_size=300, marker_pairs=True)


def test_a_caseops_tokenizer_has_no_byte_table(cased: Tokenizer) -> None:
    with pytest.raises(
        ValueError, match=r"has no byte table.*validation shards need their byte sidecars.*copy them"
    ):
        cased.byte_table()


def test_ids_that_no_text_has_decode(cased: Tokenizer) -> None:
    a = cased._sp.piece_to_id("a")
    assert cased.decode([4, 4, a, 6, 1, 7]) == "A"
    assert cased.decode([a, 4, a, 5]) == "aa"


@needs_challenge_model
def test_the_challenges_tokenizer_counts_the_original_bytes() -> None:
    challenge = Tokenizer(Path(CHALLENGE_MODEL))
    assert challenge.caseops and not challenge.lossless
    assert challenge._sp.piece_to_id("\u2581") == 8133
    plain = f"The NASA iPhone, {TITLE} and {ESC}: 12 \u4e2d\u00e9\U0001f600 \u00c9A."
    check(challenge, plain)
    for text in ("  A\n\nB  ", "\uff21BC", "e\u0301 \ufb01 \x01The", "\x01 The\x02", plain, f"a {TITLE}"):
        assert int(challenge.encode(text)[1].sum()) == len(text.encode()), ascii(text)
    ids, counts = challenge.encode("the Cat NASA")
    assert ids[counts == 0].tolist() == [4, 5]
    assert counts.tolist() == [3, 1, 0, 3, 1, 0, *counts[6:].tolist()]
