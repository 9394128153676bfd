import struct
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.data.text import iterate_documents, sample_paths
from pgolf.data.tokenizer import ESCAPE, Tokenizer, escape, find_tokenizer, train_tokenizer, unescape

NASTY = [
    "",
    " ",
    "  two  spaces  ",
    "\n\n\r\n\t\x0b\x85\u2028 line ends",
    "nul \0 inside\0",
    "\u2581 and \u2581\u2581",
    ESCAPE,
    ESCAPE + "\uf8f1" + ESCAPE * 3 + "\uf8f3\0\u2581",
    "<s></s><unk><pad><0x0A><0xFF>",
    "e\u0301 \uff21 \u2460 \ufb01 \u00a0 \u3000 \ufeff \u200b",
    "\U0001f600\U0010ffff\ue001\ue002\uffff\ufffd",
    "\u0627\u0644\u0639 \u4e2d\u6587 \U00020000",
    "0123456789" * 3,
]


def check(tokenizer: Tokenizer, text: str) -> None:
    ids, counts = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert ids.shape == counts.shape
    assert tokenizer.decode(ids) == text
    assert int(counts.sum()) == len(text.encode())
    assert counts.min(initial=0) >= 0
    assert not np.isin(ids, [0, 1, 2, 3]).any(), "control ids must not come from text"


@pytest.mark.parametrize("text", NASTY)
def test_nasty_text_round_trips_with_exact_bytes(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.lossless
    check(tokenizer, text)


@settings(max_examples=200, deadline=None)
@given(
    st.text(
        st.one_of(
            st.characters(exclude_categories=["Cs"]),
            st.sampled_from(" \n\u2581\0" + ESCAPE + "\uf8f1\uf8f2\uf8f3"),
        )
    )
)
def test_any_unicode_round_trips_with_exact_bytes(tokenizer: Tokenizer, text: str) -> None:
    assert unescape(escape(text)) == text
    check(tokenizer, text)


def test_sample_round_trips_and_batches_agree_with_single_texts(tokenizer: Tokenizer) -> None:
    texts = [document.text for document in iterate_documents(sample_paths().val)]
    batch = tokenizer.encode_batch(texts)
    ids_only = tokenizer.encode_ids(texts, threads=2)
    for text, (ids, counts), fast in zip(texts, batch, ids_only, strict=True):
        assert np.array_equal(ids, fast)
        assert tokenizer.decode(ids) == text
        assert int(counts.sum()) == len(text.encode())


def test_byte_counts_agree_with_the_encoders_own_offsets(tokenizer: Tokenizer) -> None:
    # _encode_by_surface reads the surfaces that SentencePiece reports; lossless models use the piece lengths.
    for document in list(iterate_documents(sample_paths().val))[:10]:
        ids, counts = tokenizer.encode(document.text)
        surface_ids, surface_counts = tokenizer._encode_by_surface(document.text)
        assert np.array_equal(ids, surface_ids)
        assert np.array_equal(counts, surface_counts)


def test_bytes_of_an_escaped_character_are_those_of_the_original(tokenizer: Tokenizer) -> None:
    ids, counts = tokenizer.encode("a\u2581\0b")
    assert int(counts.sum()) == 6
    assert [tokenizer.decode(ids[:1]), tokenizer.decode(ids[-1:])] == ["a", "b"]
    assert counts[0] == counts[-1] == 1
    assert counts[1:-1].tolist() == [1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0]  # byte pieces of two escapes


def test_byte_table_follows_the_challenge_rule(tokenizer: Tokenizer) -> None:
    table = tokenizer.byte_table()
    piece_id = tokenizer._sp.piece_to_id
    for special in ("<pad>", "<s>", "</s>", "<unk>"):
        assert table.is_boundary[piece_id(special)]
        assert table.base_bytes[piece_id(special)] == 0
    byte, space, word = piece_id("<0xE2>"), piece_id("\u2581"), piece_id("\u2581the")
    assert (table.base_bytes[byte], table.has_leading_space[byte]) == (1, False)
    assert (table.base_bytes[space], table.has_leading_space[space]) == (0, True)
    assert (table.base_bytes[word], table.has_leading_space[word]) == (3, True)
    bos = tokenizer.bos_id
    previous = np.array([bos, word, bos, byte], dtype=np.uint16)
    target = np.array([word, word, byte, bos], dtype=np.uint16)
    assert table.target_bytes(previous, target).tolist() == [3, 4, 1, 0]


def test_byte_table_agrees_with_exact_counts_on_ordinary_text(tokenizer: Tokenizer) -> None:
    for document in list(iterate_documents(sample_paths().val))[:10]:
        ids, counts = tokenizer.encode(document.text)
        stream = np.concatenate((np.array([tokenizer.bos_id], dtype=np.uint16), ids))
        assert np.array_equal(tokenizer.byte_table().target_bytes(stream[:-1], stream[1:]), counts)


@pytest.fixture(scope="module")
def normalizing(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer with the settings of the challenge: nmt_nfkc, extra white space removed."""
    prefix = tmp_path_factory.mktemp("foreign") / "foreign"
    lines = [d.text[:4000] for d in list(iterate_documents(sample_paths().train))[:60]]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(prefix),
        vocab_size=512,
        model_type="bpe",
        add_dummy_prefix=False,
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return Tokenizer(prefix.with_suffix(".model"))


@pytest.mark.parametrize(
    "text", ["plain words", "  a\n\n b  ", "\uff21\u2460\ufb01 e\u0301", "\u4e2d\U0001f600x"]
)
def test_normalizing_tokenizer_still_accounts_for_the_original_bytes(
    normalizing: Tokenizer, text: str
) -> None:
    assert not normalizing.lossless
    ids, counts = normalizing.encode(text)
    assert int(counts.sum()) == len(text.encode())
    assert ids.size == counts.size


def test_byte_table_equals_surfaces_on_text_that_the_normalizer_keeps(normalizing: Tokenizer) -> None:
    text = "Some plain words, 12 of them: \u4e2d \U0001f600!"
    ids, counts = normalizing.encode(text)
    stream = np.concatenate((np.array([1], dtype=np.uint16), ids))
    assert np.array_equal(normalizing.byte_table().target_bytes(stream[:-1], stream[1:]), counts)
    assert normalizing.decode(ids) == text


def test_training_is_deterministic_and_uses_the_challenge_ids(tmp_path: Path) -> None:
    texts = ["some words, and more words\n" * 20, "\u2581\0" + ESCAPE, "x" * 9000]
    one = train_tokenizer(texts, tmp_path / "1.model", vocab_size=300)
    train_tokenizer(iter(texts), tmp_path / "2.model", vocab_size=300)
    assert one.path.read_bytes() == (tmp_path / "2.model").read_bytes()
    assert [one._sp.id_to_piece(i) for i in range(5)] == ["<pad>", "<s>", "</s>", "<unk>", "\n"]
    assert one.bos_id == 1


def test_training_on_too_little_text_keeps_the_tokenizer_that_is_there(tmp_path: Path) -> None:
    texts = [document.text for document in iterate_documents(sample_paths().val)]
    path = tmp_path / "x.model"
    train_tokenizer(texts, path, vocab_size=512)
    with pytest.raises(ValueError, match=r"the text gives only \d+ of 30000 pieces"):
        train_tokenizer(texts, path, vocab_size=30_000)
    assert Tokenizer(path).vocab_size == 512
    assert [p.name for p in tmp_path.iterdir()] == ["x.model"]


def test_training_on_too_little_text_fails_and_leaves_no_file(tmp_path: Path) -> None:
    for texts in ([], ["abc abc"]):
        with pytest.raises(ValueError, match="give more text or lower vocab_size"):
            train_tokenizer(texts, tmp_path / "x.model", vocab_size=500)
    with pytest.raises(ValueError, match=r"vocab_size must be in \[300, 65536\].*got 299"):
        train_tokenizer(["abc"], tmp_path / "x.model", vocab_size=299)
    assert list(tmp_path.iterdir()) == []


def test_loading_what_is_not_a_tokenizer_fails(tmp_path: Path) -> None:
    path = tmp_path / "x.model"
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*pgolf data tokenizer"):
        Tokenizer(path)
    for content in (b"", b"nonsense", struct.pack("<256i", *range(256))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.model: not a SentencePiece model"):
            Tokenizer(path)


def test_decoding_an_id_outside_the_vocabulary_fails(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 1024\) .*got 5..1024"):
        tokenizer.decode(np.array([5, 1024]))


def test_find_tokenizer_prefers_the_named_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.model in .*found no \.model file"):
        find_tokenizer(tmp_path)
    for name in ("a.model", "b.model"):
        (tmp_path / name).write_bytes(tokenizer.path.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"found \['a\.model', 'b\.model'\]"):
        find_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    assert find_tokenizer(tmp_path).path.name == "tokenizer.model"


def spaceless(folder: Path, **changes: object) -> Tokenizer:
    """Train as `train_tokenizer` does except for `changes`, on text without a space."""
    settings: dict[str, object] = {
        "model_prefix": str(folder / "made"),
        "vocab_size": 300,
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "byte_fallback": True,
        "hard_vocab_limit": False,
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
        "minloglevel": 2,
    }
    rng = np.random.default_rng(1)
    lines = ("".join(rng.choice(list("ACGT"), 400)) for _ in range(60))
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, **{**settings, **changes})
    return Tokenizer(folder / "made.model")


@pytest.mark.parametrize(
    "line", ["ACGTTGCA" * 50, "\u4e2d\u6587" * 100, "\u0e01\u0e02\u0e04" * 99, "1a2b3" * 80]
)
def test_text_without_a_space_trains_a_tokenizer_that_keeps_spaces(tmp_path: Path, line: str) -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(rng.permutation(list(line))) for _ in range(60)]
    made = train_tokenizer(texts, tmp_path / "x.model", vocab_size=320)
    assert made.lossless and made.lossy_because == ""
    for text in ("ACG TTA", " ", "  a b  ", "\u2581 \u2581", *NASTY):
        check(made, text)
    ids, counts = made.encode("A C")
    assert counts.tolist() == [1, 1, 1]
    stream = np.concatenate((np.array([1], dtype=np.uint16), ids))
    assert made.byte_table().target_bytes(stream[:-1], stream[1:]).tolist() == [1, 1, 1]


def test_a_space_that_comes_back_as_another_character_is_not_lossless(tmp_path: Path) -> None:
    made = spaceless(tmp_path)
    assert not made.lossless
    assert made.lossy_because == "it has no piece for the space, which would come back as U+2581"
    for text in ("ACG TTA", "\u2581 \0", *NASTY):
        assert int(made.encode(text)[1].sum()) == len(text.encode()), "the bytes are still exact"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"byte_fallback": False}, "no piece for 256 of the 256 bytes"),
        ({"add_dummy_prefix": True}, "puts a space before the text"),
        ({"remove_extra_whitespaces": True}, "removes spaces"),
        ({"normalization_rule_name": "nfkc"}, "its normalizer replaces characters"),
        # One of a million characters; no trial text contains it.
        ({"rule": "13A60\t41\n"}, "its normalizer replaces characters"),
        ({"rule_back": "41\t42\n"}, "its normalizer replaces characters"),
    ],
)
def test_what_a_tokenizer_loses_is_said(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    for key, option in (("rule", "normalization_rule_tsv"), ("rule_back", "denormalization_rule_tsv")):
        if key in changes:
            (tmp_path / "rule.tsv").write_text(str(changes.pop(key)))
            changes[option] = str(tmp_path / "rule.tsv")
    made = spaceless(tmp_path, required_chars="\u2581", **changes)
    assert not made.lossless
    assert reason in made.lossy_because


def test_the_same_settings_without_a_fault_are_lossless(tmp_path: Path) -> None:
    made = spaceless(tmp_path, required_chars="\u2581")
    assert made.lossless, made.lossy_because


def test_more_ids_than_a_shard_can_hold_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "vocab_size", lambda self: 65_537)
    with pytest.raises(ValueError, match="has 65537 ids, but shards hold uint16, so at most 65536"):
        Tokenizer(tokenizer.path)
