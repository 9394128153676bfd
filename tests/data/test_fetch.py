"""Downloads of the challenge's files, from a server on this machine that breaks connections."""

import hashlib
import json
import lzma
import os
import shlex
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tyro

from pgolf.cli.main import main
from pgolf.data import challenge, fetch
from pgolf.data.challenge import SEQUENCE, VARIANTS, known_text
from pgolf.data.fetch import BEGINNINGS, DOCUMENTS, RECORD, FetchJob, known_beginning, stated_hash
from pgolf.data.manifest import NO_MANIFEST
from pgolf.data.shards import MARKER_NAME, TOKENIZER_NAME, find_shards, write_shard
from pgolf.data.text import iterate_documents, sample_paths
from pgolf.data.tokenizer import Tokenizer, find_tokenizer, train_tokenizer
from pgolf.evaluate.validation import DataFolder
from pgolf.files import file_sha256

CHALLENGE_FOLDER = os.environ.get("PGOLF_CHALLENGE", "")
PREFIX = "/datasets/some/repo/resolve/main/datasets/"


class Hub:
    """Files by path, and how the server misbehaves."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut_after: dict[str, list[int]] = {}
        """Path -> after how many bytes each of the next answers breaks off."""
        self.stated: dict[str, str] = {}
        """Path -> the hash that is stated, with a redirect."""
        self.ranges = True
        self.asked: list[tuple[str, str]] = []


@contextmanager
def serving(hub: Hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            path = self.path.removeprefix("/moved").removeprefix(PREFIX)
            hub.asked.append((path, self.headers.get("Range", "")))
            if path in hub.stated and not self.path.startswith("/moved"):
                self.send_response(302)
                self.send_header("X-Linked-Etag", f'"{hub.stated[path]}"')
                self.send_header("Location", f"/moved{self.path}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if path not in hub.files:
                self.send_error(404)
                return
            data, begin = hub.files[path], 0
            if hub.ranges and "Range" in self.headers:
                begin = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                if begin >= len(data):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(data)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(data) - begin))
            self.end_headers()
            cuts = hub.cut_after.get(path, [])
            end = begin + cuts.pop(0) if cuts else len(data)
            self.wfile.write(data[begin:end])
            if end < len(data):
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    texts = [json.loads(line)["text"] for line in _sample().splitlines()]
    return train_tokenizer(texts, path, vocab_size=512)


def _sample() -> str:
    return lzma.open(sample_paths()[1], "rt").read()


@pytest.fixture
def hub(tokenizer, tmp_path) -> Hub:
    """A repository with one validation shard and three training shards."""
    hub, rng = Hub(), np.random.default_rng(0)
    entry = {
        "name": "fineweb10B_small",
        "tokenizer_name": "small",
        "stats": {"files_train": 3, "files_val": 1},
    }
    listing = {"datasets": [entry], "tokenizers": [{"name": "small", "model_path": "tokenizers/small.model"}]}
    hub.files["manifest.json"] = json.dumps(listing).encode()
    hub.files["tokenizers/small.model"] = tokenizer.path.read_bytes()
    for name, count in (("val_000000", 3000), *((f"train_{i:06d}", 40_000) for i in range(3))):
        tokens = rng.integers(4, 512, count).astype(np.uint16)
        tokens[::500] = tokenizer.bos_id
        path = tmp_path / f"fineweb_{name}.bin"
        write_shard(path, tokens)
        hub.files[f"datasets/fineweb10B_small/fineweb_{name}.bin"] = path.read_bytes()
        path.unlink()
    return hub


def job(endpoint: str, out: Path, **changes) -> FetchJob:
    words = {"variant": "small", "repository": "some/repo", "endpoint": endpoint, "train_shards": 2}
    return FetchJob(**words | changes, out=out)


def run(hub: Hub, out: Path, **changes) -> tuple[dict, list[str]]:
    lines: list[str] = []
    with serving(hub) as endpoint:
        return fetch.fetch(job(endpoint, out, **changes), lines.append, sleep=lambda s: None), lines


def test_a_folder_is_downloaded_and_can_be_read(hub, tmp_path, tokenizer):
    out = tmp_path / "data"
    record, _ = run(hub, out)
    assert [p.name for p in find_shards(out, "train")] == [f"fineweb_train_{i:06d}.bin" for i in range(2)]
    assert len(find_shards(out, "val")) == 1 and find_tokenizer(out).vocab_size == 512
    for name, entry in record["files"].items():
        assert file_sha256(out / name) == entry["sha256"] and entry["compared"] == "first download"
    assert json.loads((out / RECORD).read_text()) == record
    assert not list(out.glob("*.part")) and not (out / MARKER_NAME).exists()


def test_what_is_there_is_not_asked_for_again_and_more_shards_are_added(hub, tmp_path):
    out = tmp_path / "data"
    run(hub, out, train_shards=1)
    hub.asked.clear()
    run(hub, out, train_shards=3)
    asked = [path.rpartition("/")[2] for path, _ in hub.asked]
    assert asked == ["manifest.json", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]


def test_a_broken_connection_goes_on_where_it_ended(hub, tmp_path):
    name = "datasets/fineweb10B_small/fineweb_train_000000.bin"
    hub.cut_after[name] = [1000, 0, 50_000]
    _, lines = run(hub, tmp_path / "data")
    assert [r for path, r in hub.asked if path == name] == ["", "bytes=1000-", "bytes=1000-", "bytes=51000-"]
    assert (tmp_path / "data" / "fineweb_train_000000.bin").read_bytes() == hub.files[name]
    assert sum("going on from byte" in line for line in lines) == 3


def test_a_stopped_download_goes_on_in_another_process(hub, tmp_path):
    out, name = tmp_path / "data", "fineweb_train_000001.bin"
    whole = hub.files[f"datasets/fineweb10B_small/{name}"]
    out.mkdir()
    (out / f"{name}.part").write_bytes(whole[:70_000])
    (out / "fineweb_val_000000.bin.part").write_bytes(
        hub.files["datasets/fineweb10B_small/fineweb_val_000000.bin"]
    )
    run(hub, out)
    assert (f"datasets/fineweb10B_small/{name}", "bytes=70000-") in hub.asked
    assert (out / name).read_bytes() == whole and (out / "fineweb_val_000000.bin").is_file()


def test_a_part_that_is_too_long_or_a_server_without_ranges_starts_again(hub, tmp_path):
    out, name = tmp_path / "data", "fineweb_train_000000.bin"
    whole = hub.files[f"datasets/fineweb10B_small/{name}"]
    out.mkdir()
    (out / f"{name}.part").write_bytes(whole + b"more")
    run(hub, out)
    assert (out / name).read_bytes() == whole
    hub.ranges = False
    (out / "fineweb_train_000002.bin.part").write_bytes(b"x" * 100)
    run(hub, out, train_shards=3)
    assert (out / "fineweb_train_000002.bin").read_bytes() == hub.files[
        "datasets/fineweb10B_small/fineweb_train_000002.bin"
    ]


def test_a_folder_is_no_data_set_until_all_of_it_is_there(hub, tmp_path):
    out, name = tmp_path / "data", "datasets/fineweb10B_small/fineweb_train_000001.bin"
    hub.cut_after[name] = [1000] + [0] * 20
    with pytest.raises(RuntimeError, match=r"6 attempts in a row brought nothing .* 1,000 bytes are kept"):
        run(hub, out)
    with pytest.raises(ValueError, match="pgolf data fetch --variant small"):
        find_tokenizer(out)
    hub.cut_after.clear()
    run(hub, out)
    assert find_tokenizer(out).vocab_size == 512


def test_the_documents_come_with_the_shards_if_they_are_asked_for(hub, tmp_path):
    sent = _sample().encode()
    hub.files[DOCUMENTS] = sent
    hub.stated[DOCUMENTS] = hashlib.sha256(sent).hexdigest()
    hub.cut_after[DOCUMENTS] = [len(sent) // 3]
    record, lines = run(hub, tmp_path / "data", train_shards=1, documents=True)
    assert (tmp_path / "data" / DOCUMENTS).read_bytes() == sent
    assert record["files"][DOCUMENTS]["compared"] == "stated by the server"
    assert any(f"going on from byte {len(sent) // 3:,}" in line for line in lines)
    run(hub, tmp_path / "without")
    assert not (tmp_path / "without" / DOCUMENTS).exists()
    del hub.files[DOCUMENTS]
    with pytest.raises(FileNotFoundError, match=r"answers 404 .*; run again without --documents and"):
        run(hub, tmp_path / "missing", train_shards=1, documents=True)


def test_the_command_in_the_marker_does_the_same_job(tmp_path):
    job = FetchJob(variant="sp1024", out=tmp_path, train_shards=1, documents=True)
    words = shlex.split(job.command)[3:]
    assert tyro.cli(FetchJob, args=words) == job and "--train-shards 1" in job.command


def test_the_stated_hash_is_compared_and_a_wrong_file_removed(hub, tmp_path):
    out, name = tmp_path / "data", "datasets/fineweb10B_small/fineweb_train_000000.bin"
    hub.stated[name] = hashlib.sha256(hub.files[name]).hexdigest()
    record, _ = run(hub, out)
    assert record["files"]["fineweb_train_000000.bin"]["compared"] == "stated by the server"
    (out / "fineweb_train_000000.bin").unlink()
    hub.files[name] = hub.files[name][:-2] + b"\x05\x00"
    with pytest.raises(ValueError, match=r"train_000000.bin: SHA-256 .*, expected .*stated by the server"):
        run(hub, out)
    assert not (out / "fineweb_train_000000.bin").exists()
    hub.stated.clear()  # then the hash of the first download counts
    with pytest.raises(ValueError, match="first download"):
        run(hub, out)


def test_the_hash_that_git_gives_a_small_file_is_not_taken_for_its_sha256(hub, tmp_path):
    name = "datasets/fineweb10B_small/fineweb_train_000000.bin"
    hub.stated[name] = hashlib.sha1(b"blob").hexdigest()
    record, _ = run(hub, tmp_path / "data")
    assert record["files"]["fineweb_train_000000.bin"]["compared"] == "first download"
    for text, wanted in (('"%s"', "a" * 64), ('W/"%s"', "a" * 64), ('"%s"', "a" * 40), ('"%s"', "")):
        assert stated_hash({"X-Linked-Etag": text % wanted}) == (wanted if len(wanted) == 64 else "")
    assert stated_hash({}) == ""


def test_the_challenges_tokenizer_is_pinned(hub, tmp_path, monkeypatch, tokenizer):
    pinned = challenge.Variant("some/repo", "0" * 64, None)
    monkeypatch.setitem(VARIANTS, "small", pinned)
    with pytest.raises(ValueError, match=rf"{TOKENIZER_NAME}: SHA-256 .*, expected 0+ \(pinned\)"):
        run(hub, tmp_path / "data")
    monkeypatch.setitem(VARIANTS, "small", challenge.Variant("some/repo", file_sha256(tokenizer.path), None))
    record, _ = run(hub, tmp_path / "data")
    assert record["files"][TOKENIZER_NAME]["compared"] == "pinned"


@pytest.mark.parametrize(("change", "told"), [(0, "are those of"), (1, "are NOT those of")])
def test_the_beginning_of_the_validation_text_is_compared(
    hub, tmp_path, monkeypatch, tokenizer, change, told
):
    shard = "fineweb_val_000000.bin"
    data = bytearray(hub.files[f"datasets/fineweb10B_small/{shard}"])
    first = hashlib.sha256(data[-3000 * 2 : -2000 * 2]).hexdigest()
    monkeypatch.setitem(BEGINNINGS, "small", (1000, first))
    data[-2500 * 2] ^= change
    hub.files[f"datasets/fineweb10B_small/{shard}"] = bytes(data)
    record, _ = run(hub, tmp_path / "data")
    assert told in record["files"][shard]["beginning"]
    assert not any("beginning" in entry for name, entry in record["files"].items() if name != shard)


@pytest.mark.skipif(
    not CHALLENGE_FOLDER,
    reason="PGOLF_CHALLENGE names no folder of fineweb_val_prefix.jsonl.xz and tokenizers/",
)
@pytest.mark.parametrize("variant", ["sp1024", "sp8192"])
def test_the_pinned_beginning_is_what_the_tokenizer_makes_of_the_text(variant):
    folder = Path(CHALLENGE_FOLDER)
    model = Tokenizer(folder / "tokenizers" / f"fineweb_{variant[2:]}_bpe.model")
    texts = [document.text for document in iterate_documents(folder / "fineweb_val_prefix.jsonl.xz")]
    ids = np.concatenate([[model.bos_id, *model._sp.encode(text)] for text in texts]).astype(np.uint16)
    assert ids.size == BEGINNINGS[variant][0]
    assert known_beginning(variant, ids).startswith("its first 902 documents are those")
    ids[-1] ^= 1
    assert "NOT" in known_beginning(variant, ids)
    assert known_beginning("sp4096", ids) == ""


def test_what_cannot_be_had_is_said(hub, tmp_path):
    with pytest.raises(ValueError, match="has no fineweb10B_other; it has fineweb10B_small"):
        run(hub, tmp_path / "data", variant="other")
    with pytest.raises(ValueError, match=r"train_shards must be in \[0, 3\]"):
        run(hub, tmp_path / "data", train_shards=4)
    del hub.files["datasets/fineweb10B_small/fineweb_val_000000.bin"]
    with pytest.raises(FileNotFoundError, match="the server answers 404"):
        run(hub, tmp_path / "data")
    with pytest.raises(ValueError, match="variant must be one of sp1024"):
        FetchJob(variant="sp7", out=tmp_path)
    run_one = tmp_path / "one"
    run_one.mkdir()
    (run_one / RECORD).write_text(json.dumps({"files": {}, "source": {"repository": "a", "variant": "b"}}))
    with pytest.raises(ValueError, match="choose another --out"):
        run(hub, run_one)


def test_the_command_says_what_was_compared(hub, tmp_path, capsys):
    with serving(hub) as endpoint:
        words = [
            "--variant",
            "small",
            "--repository",
            "some/repo",
            "--endpoint",
            endpoint,
            "--train-shards",
            "1",
        ]
        assert main(["data", "fetch", "--out", str(tmp_path / "data"), *words]) == 0
    text = capsys.readouterr().out
    assert "3 files of some/repo" in text and "SHA-256 recorded at the first download: 3 files" in text
    # The shards have the challenge's name and not its number of documents.
    assert main(["data", "inspect", str(tmp_path / "data")]) == 2
    assert "the challenge's validation text has 50,000" in capsys.readouterr().err


def test_a_part_of_the_challenges_text_is_named_as_one():
    variant = VARIANTS["sp8192"]
    assert variant.validation_tokens is not None
    whole = known_text(variant.tokenizer_sha256, variant.validation_tokens + 5)
    assert whole.startswith("as many validation tokens as the challenge's text has with sp8192")
    for targets in (variant.validation_tokens - 1, variant.validation_tokens + SEQUENCE, 9_500_000):
        assert known_text(variant.tokenizer_sha256, targets).startswith("NOT the challenge's validation text")
    assert known_text("0" * 64, 5) == "" == known_text(VARIANTS["sp4096"].tokenizer_sha256, 5)


def test_a_folder_without_a_manifest_says_what_is_known_of_its_text(hub, tmp_path, monkeypatch, tokenizer):
    out = tmp_path / "data"
    run(hub, out)
    sha256 = file_sha256(tokenizer.path)
    for tokens, begins in ((2048, "as many validation tokens"), (4096, challenge.PART)):
        monkeypatch.setitem(VARIANTS, "small", challenge.Variant("some/repo", sha256, tokens))
        assert f"; {begins}" in DataFolder.open(out, vocab_size=512).checked
    monkeypatch.delitem(VARIANTS, "small")
    assert DataFolder.open(out, vocab_size=512).checked == NO_MANIFEST
