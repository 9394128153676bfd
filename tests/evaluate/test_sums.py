"""An interrupted evaluation goes on from its file of sums, with the same score; damaged and other files."""

import itertools
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from pgolf.evaluate import sums as sums_module
from pgolf.evaluate.bpb import Piece
from pgolf.evaluate.predictor import evaluating, read
from pgolf.evaluate.sums import kept_facts, open_sums, text_sha256
from tests.evaluate.legal_helpers import (
    BOS,
    TTT,
    FakeDist,
    make_pass,
    make_text,
    random_documents,
    run_pass,
    small_model,
)

LENGTHS = [5, 100, 9, 31, 60, 0, 17, 44, 3]
COLD = replace(TTT, batch_tokens=64)
"""Several batches of documents; what is learned in one does not reach another."""


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def text():
    return make_text(random_documents(LENGTHS))


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(sums_module, "EVERY_S", 0.0)


class Cut(Exception):
    """Stands for the end of the process."""


def evaluate(folder, mode, model, text, *, dist=None, cut=0, seen=None):
    """Score with sums in `folder`; before the result of question number `cut` is kept, the process ends."""
    dist, asked = dist or FakeDist(), []

    def see(question, distributions, nats):
        asked.append(question)
        if len(asked) == cut:
            raise Cut

    with evaluating(model), open_sums(folder, {"way": mode, "artifact": "a"}, dist) as sums:
        run = make_pass(mode, model, text, dist, config=COLD, done=sums.done)
        try:
            return read(run, text, dist, bos_id=BOS, observe=see, sums=sums)
        finally:
            if seen is not None:
                seen.append(len(asked))


@pytest.mark.parametrize("mode", ["plain", "sliding", "local", "ttt", "sgd", "phased", "slot", "causal_slot"])
@pytest.mark.parametrize("parts", [1, 3])
def test_the_score_of_an_interrupted_evaluation_is_the_same_to_the_last_bit(
    mode, parts, model, text, tmp_path
):
    alone = run_pass(mode, model, text, config=COLD)
    seen: list[int] = []
    evaluate(tmp_path / "whole", mode, model, text, seen=seen)
    for cut in [seen[0] * 3 // 4, 7, 6][:parts]:
        try:
            evaluate(tmp_path / "sums", mode, model, text, cut=cut, seen=seen)
        except Cut:
            continue
    found = evaluate(tmp_path / "sums", mode, model, text, seen=seen)
    assert (found.nats, found.tokens, found.bytes) == (alone.nats, alone.tokens, alone.bytes)
    assert found.kept > 0 and seen[-1] < seen[0]
    again = evaluate(tmp_path / "sums", mode, model, text, seen=seen)
    assert again.nats == alone.nats and again.kept == again.tokens and seen[-1] == 0


@pytest.mark.parametrize("mode", ["plain", "sliding", "local", "ttt", "slot", "causal_slot"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_another_number_of_ranks_goes_on(mode, world_size, model, text, tmp_path):
    """Of three ranks, the last is killed before it scores anything; each of the others ends its part."""
    for rank in (0, 1):
        with pytest.raises(ValueError, match=r"scored [0-9]+ tokens, expected"):
            evaluate(tmp_path, mode, model, text, dist=FakeDist(rank, 3))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{mode}.1.sums", f"{mode}.sums"]
    sent = []
    for rank in range(1, world_size):
        dist = FakeDist(rank, world_size)
        folder = tmp_path / str(rank)  # as all ranks see what was there before any of them wrote
        folder.mkdir()
        for file in tmp_path.glob("*.sums"):
            (folder / file.name).write_bytes(file.read_bytes())
        with pytest.raises(ValueError, match="scored"):
            evaluate(folder, mode, model, text, dist=dist)
        sent.append(dist.seen)
    others = [sum(s[i] for s in sent) for i in range(3)] if sent else []
    found = evaluate(tmp_path, mode, model, text, dist=FakeDist(0, world_size, others))
    alone = run_pass(mode, model, text, config=COLD)
    assert found.nats == alone.nats and found.tokens > found.kept > 0


def test_the_sums_of_a_file_are_those_of_the_documents(model, text, tmp_path):
    evaluate(tmp_path, "ttt", model, text)
    lines = (tmp_path / "ttt.sums").read_text().splitlines()
    rows = sorted(row for line in lines[1:] for row in json.loads(line.rpartition(" ")[0]))
    starts = np.cumsum([0, *(n + 1 for n in LENGTHS)])
    assert [row[:2] for row in rows] == [[a, b] for a, b in itertools.pairwise(starts)]
    losses = []

    def see(question, distributions, nats):
        losses.extend((first, nats[row : row + n].double()) for row, first, n in question.rows())

    with evaluating(model):
        read(make_pass("ttt", model, text, config=COLD), text, FakeDist(), bos_id=BOS, observe=see)
    for begin, end, nats in rows:
        assert nats == sum(float(x.sum()) for first, x in losses if begin <= first < end)


def a_file(folder, rows=3):
    """Write a file with a first line and some others; return its path."""
    with open_sums(folder, {"way": "plain", "artifact": "a"}, FakeDist()) as sums:
        for n in range(rows):
            span = np.array([10 * n, 10 * n + 5]), np.array([10 * n + 5, 10 * n + 10])
            sums.add(Piece(*span, torch.tensor([n + 0.1, n / 3], dtype=torch.float64)))
    return folder / "plain.sums"


def before(folder, facts=None):
    with open_sums(folder, {"way": "plain", "artifact": "a"} | (facts or {}), FakeDist()) as sums:
        return sums.before


def test_a_line_that_was_being_written_is_dropped_and_written_again(tmp_path):
    path = a_file(tmp_path)
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        lines = max(sum(end <= size for end in ends) - 1, 0)
        found = before(tmp_path)
        assert found.first.size == 2 * lines, size
        a_file_goes_on = path.read_bytes()
        assert a_file_goes_on == data[: ends[lines]], size
    path.write_bytes(data[: ends[1] + 7])
    with open_sums(tmp_path, {"way": "plain", "artifact": "a"}, FakeDist()) as sums:
        for n in (1, 2):
            span = np.array([10 * n, 10 * n + 5]), np.array([10 * n + 5, 10 * n + 10])
            sums.add(Piece(*span, torch.tensor([n + 0.1, n / 3], dtype=torch.float64)))
    assert path.read_bytes() == data


def test_a_changed_byte_is_found_wherever_it_is(tmp_path):
    path = a_file(tmp_path)
    data = path.read_bytes()
    for place in range(len(data) - 1):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"plain.sums is damaged in line [1-4]: its checksum"):
            before(tmp_path)
    # In the last line's end it looks like a line that was being written.
    path.write_bytes(data[:-1] + b"x")
    assert before(tmp_path).first.size == 4


@pytest.mark.parametrize("text", [b"notes", b"\0" * 9, b"{"])
def test_a_file_without_a_line_is_kept_unless_it_is_the_beginning_of_one(text, tmp_path):
    path = tmp_path / "plain.sums"
    path.write_bytes(text)
    if text == b"{":
        assert before(tmp_path).first.size == 0
        return
    with pytest.raises(ValueError, match=r"plain\.sums is not a file of sums; move it away"):
        before(tmp_path)
    assert path.read_bytes() == text


def test_facts_that_are_kept_are_those_of_the_first_whole_line(tmp_path):
    assert kept_facts(tmp_path / "none", "plain") == {}
    path = a_file(tmp_path)
    assert kept_facts(tmp_path, "plain")["artifact"] == "a" and kept_facts(tmp_path, "ttt") == {}
    for text in (path.read_bytes()[:20], b"[1, 2] 00\n", b"\xff\xfe 00\n", b"\n"):
        path.write_bytes(text)
        assert kept_facts(tmp_path, "plain") == {}


def test_a_missing_or_repeated_line_is_found(tmp_path):
    path = a_file(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    for order in ([0, 2, 3], [0, 1, 1, 2, 3], [0, 2, 1, 3], [1, 2, 3]):
        path.write_bytes(b"".join(lines[i] for i in order))
        with pytest.raises(ValueError, match="is damaged in line"):
            before(tmp_path)


def test_sums_of_something_else_are_refused_by_name(tmp_path):
    a_file(tmp_path)
    with pytest.raises(ValueError, match=r"sums of another evaluation: artifact is b now and was a\. "):
        before(tmp_path, {"artifact": "b"})
    with pytest.raises(ValueError, match="stride is 64 now and was None"):
        before(tmp_path, {"stride": 64})
    assert before(tmp_path, {"way": "ttt", "artifact": "b"}).first.size == 0  # a file of its own
    a_file(tmp_path / "other")
    (tmp_path / "other" / "plain.sums").replace(tmp_path / "plain.1.sums")
    with pytest.raises(ValueError, match=r"token 1 is in two sums; all ranks must see the same folder"):
        before(tmp_path)


def test_a_file_is_written_by_one_evaluation_at_a_time(tmp_path):
    facts = {"way": "plain", "artifact": "a"}
    with (
        open_sums(tmp_path, facts, FakeDist()),
        pytest.raises(ValueError, match="is in use by another evaluation"),
        open_sums(tmp_path, facts, FakeDist()),
    ):
        pass
    before(tmp_path)


def test_ranks_that_see_different_folders_are_told(tmp_path):
    class Apart(FakeDist):
        def gather_ints(self, values):
            return [values, [7]]

    with (
        pytest.raises(ValueError, match="has other files on other hosts; pass a folder that all ranks share"),
        open_sums(tmp_path, {"way": "plain"}, Apart()),
    ):
        pass


def test_beginning_anew_forgets_the_files_of_all_ranks(tmp_path):
    a_file(tmp_path)
    a_file(tmp_path / "other", rows=1).replace(tmp_path / "plain.3.sums")
    with open_sums(tmp_path, {"way": "plain", "artifact": "b"}, FakeDist(), fresh=True) as sums:
        assert sums.tokens == 0
    assert before(tmp_path, {"artifact": "b"}).first.size == 0


def test_sums_of_other_batches_are_refused(model, text, tmp_path):
    with open_sums(tmp_path, {"way": "plain", "artifact": "a"}, FakeDist()) as sums:
        sums.add(Piece(np.array([0]), np.array([3]), torch.ones(1, dtype=torch.float64)))
    with pytest.raises(ValueError, match="the sums are of other batches than those that are scored now"):
        evaluate(tmp_path, "plain", model, text)


def test_losses_that_are_not_finite_are_not_kept(tmp_path):
    with open_sums(tmp_path, {"way": "plain", "artifact": "a"}, FakeDist()) as sums:
        for n, value in enumerate((1.0, float("nan"), 2.0)):
            sums.add(Piece(np.array([n]), np.array([n + 1]), torch.tensor([value], dtype=torch.float64)))
    assert before(tmp_path).nats.tolist() == [1.0, 2.0]


def test_a_full_disk_says_that_the_same_command_goes_on(tmp_path, monkeypatch):
    def full(file, data):
        raise OSError(28, "No space left on device")

    path = a_file(tmp_path)
    with open_sums(tmp_path, {"way": "plain", "artifact": "a"}, FakeDist()) as sums:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match=r"plain.sums: No space left on device; the same command goes on"):
            sums.add(Piece(np.array([90]), np.array([95]), torch.ones(1, dtype=torch.float64)))
    monkeypatch.undo()
    assert path.exists() and before(tmp_path).first.size == 6


def test_the_hash_of_a_text_is_of_its_tokens_and_bytes(text):
    other = text._replace(bytes=np.roll(text.bytes, 1))
    assert len({text_sha256(text), text_sha256(other), text_sha256(make_text(random_documents([5])))}) == 3
