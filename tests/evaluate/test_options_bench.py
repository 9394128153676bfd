"""The bench of the options of scoring: its rows, and the losses of documents that it compares."""

from types import SimpleNamespace

import numpy as np
import pytest

from bench.documents import Documents
from bench.options import ROWS, Kept, Row, Scored, mixed
from pgolf.evaluate.documents import document_bounds
from tests.evaluate.legal_helpers import BOS, FakeDist, make_text, random_documents, small_model

LENGTHS = [5, 70, 9, 31, 0, 17]


@pytest.mark.parametrize("name", ROWS)
def test_every_row_has_settings_of_its_own(name):
    row = Row.read(name)
    assert row.name == name and row.way == ROWS[name].split()[0]
    for change in ROWS[name].split()[1:]:
        key, _, value = change.partition("=")
        found = row.settings
        for part in key.split("."):
            found = getattr(found, part)
        assert str(found).lower() in (
            value,
            str(float(value)) if value[0].isdigit() and "," not in value else "",
        )


def test_a_row_can_be_written_out():
    row = Row.read("mine=ttt context=3072 adapters.on=k,o adapters.rank=4 tilt.on=true")
    assert (row.name, row.way, row.settings.context) == ("mine", "ttt", 3072)
    assert (row.settings.adapters.on, row.settings.adapters.rank, row.settings.tilt.on) == ("k,o", 4, True)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tttt", "expected one of plain, .*got 'tttt'"),
        ("mine=", "expected one of plain, .*got 'mine='"),
        ("mine=ttt context", "expected KEY=VALUE, got 'context'"),
        ("mine=ttt contxt=3", "row mine: .*contxt"),
        ("mine=ttt context=-1", "evaluate.context must be >= 0"),
    ],
)
def test_a_row_that_cannot_be_read_is_an_error(word, message):
    with pytest.raises(ValueError, match=message):
        Row.read(word)


@pytest.mark.parametrize("way", ["plain", "ttt"])
def test_the_losses_of_documents_are_those_of_the_score(way):
    text = make_text(random_documents(LENGTHS))
    folder = SimpleNamespace(tokenizer=SimpleNamespace(bos_id=BOS))
    documents = Documents(folder, text, FakeDist(), 64)
    score, nats = documents.score(small_model(), way)
    assert nats.size == document_bounds(text, BOS)[0].size
    np.testing.assert_allclose(nats.sum(), score.nats, rtol=1e-12)
    np.testing.assert_allclose(nats.sum() / documents.bits, score.bpb, rtol=1e-12)
    found = documents.against(nats + 1.0, nats)
    np.testing.assert_allclose(found.mean, nats.size / documents.bits, rtol=1e-9)
    assert found.low <= found.mean <= found.high


def test_a_row_that_is_kept_is_read_again_and_refused_for_anything_else(tmp_path):
    kept, row = Kept(tmp_path / "kept", {"artifact": "a", "tokens": 9}), Row.read("mine=ttt adapters.rank=4")
    assert kept.read(row) is None
    values = [("bpb", 1.5, "bpb"), ("seconds", 2.25, "s")]
    kept.write(row, Scored("pgolf, shared GPU", values, np.array([0.125, 7.0]), {"device": "NVIDIA H200"}))
    found = kept.read(row)
    assert found[:2] == ("pgolf, shared GPU", values) and found.nats.tolist() == [0.125, 7.0]
    assert found.origin == {"device": "NVIDIA H200"}
    assert kept.read(Row.read("other=ttt adapters.rank=4")) is None
    for other, of in ((kept, Row.read("mine=ttt")), (Kept(tmp_path / "kept", {"artifact": "b"}), row)):
        with pytest.raises(ValueError, match=r"mine\.npz has a row of this name with other settings"):
            other.read(of)


def test_rows_of_several_commits_are_named():
    rows = {"a": {"device": "cpu", "commit": "1"}, "b": {"device": "cpu", "commit": "1"}}
    assert mixed(rows) == ""
    said = mixed(rows | {"c": {"device": "cpu", "commit": "2"}})
    assert said.endswith("a, b on cpu at 1; c on cpu at 2\n") and said.startswith("note: ")
