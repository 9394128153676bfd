import gzip
import json
import lzma
from pathlib import Path

import pytest

from pgolf.data.text import iterate_documents, read_batches, sample_paths


def texts(path: Path) -> list[str]:
    return [document.text for document in iterate_documents(path)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz"])
def test_jsonl_keeps_text_and_line_numbers(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.b{suffix}"
    lines = ['{"text": "one\\n\\u00e9", "id": 3}', "", '{"text": ""}', '{"text": " x "}']
    raw = "\n".join(lines).encode()
    path.write_bytes(lzma.compress(raw) if suffix.endswith("xz") else raw)
    documents = list(iterate_documents(path))
    assert [d.text for d in documents] == ["one\n\u00e9", "", " x "]
    assert [d.line for d in documents] == [1, 3, 4]
    assert {d.source for d in documents} == {str(path)}


def test_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\n\ntwo <|endoftext|> \u00e9".encode())
    assert texts(path) == ["one\r\n\ntwo <|endoftext|> \u00e9"]


def test_text_file_is_cut_at_separator_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"<|endoftext|>\none\nmore\n<|endoftext|>\r\ntwo\n<|endoftext|>\n")
    assert texts(path) == ["one\nmore\n", "two\n"]
    assert [d.line for d in iterate_documents(path)] == [2, 5]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b'"text"', 'expected an object with a string "text"'),
        (b'{"txt": "a"}', 'expected an object with a string "text"'),
        (b'{"text": 3}', 'expected an object with a string "text"'),
        (b'{"text": "a\\ud800"}', "lone surrogate at character 1"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 3: .*{message}"):
        texts(path)


def test_bad_text_file_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b"ok\n<|endoftext|>\nab\xff")
    with pytest.raises(ValueError, match=r"bad\.txt, line 3: not UTF-8 at byte 2"):
        texts(path)


def test_truncated_xz_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes(lzma.compress(json.dumps({"text": "abc" * 1000}).encode())[:-20])
    with pytest.raises(ValueError, match=r"a\.jsonl\.xz: damaged or truncated xz data"):
        texts(path)


def test_unknown_and_missing_files_are_refused(tmp_path: Path) -> None:
    for name in ("a.csv", "a.parquet.xz", "jsonl"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=r"unknown text format, expected one of \.jsonl"):
            texts(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no text file at"):
        texts(tmp_path / "none.jsonl")


def test_parquet_is_read_or_asks_for_pyarrow(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        with pytest.raises(RuntimeError, match="pip install pyarrow"):
            texts(path)
        return
    parquet.write_table(pyarrow.table({"text": ["one", "\u00e9"]}), path)
    assert texts(path) == ["one", "\u00e9"]


def test_batches_hold_all_documents_in_order_and_report_progress(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    expected = [f"{n} " + "x" * (n % 50) for n in range(500)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in expected))
    batches = list(read_batches(path, batch_bytes=1000))
    assert len(batches) > 10
    assert [d.text for b in batches for d in b.documents()] == expected
    assert batches[-1].consumed == path.stat().st_size


def test_sample_is_there_disjoint_and_as_large_as_its_licence_file_says() -> None:
    train, val = (texts(path) for path in sample_paths())
    notes = (sample_paths().train.parent / "LICENSE").read_text()
    for part in (train, val):
        size = sum(len(t.encode()) for t in part)
        assert f"{len(part)} documents, {size:>7,} bytes" in notes
    assert not set(train) & set(val)
    assert "CC BY-SA 3.0" in notes


def test_ndjson_and_another_key_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.ndjson"
    path.write_text('{"content": "one", "text": 3}\n{"content": "two"}\n')
    assert [d.text for d in iterate_documents(path, text_key="content")] == ["one", "two"]
    with pytest.raises(ValueError, match=r'a string "text".*strings at content: choose one with --text-key'):
        texts(path)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".txt.gz"])
def test_a_byte_order_mark_is_no_text_but_only_at_the_beginning(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    want = "\ufeffone\n\ufefftwo"
    raw = ("\ufeff" + (want if "txt" in suffix else json.dumps({"text": want}, ensure_ascii=False))).encode()
    path.write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
    assert texts(path) == [want]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_other_encodings_are_named(tmp_path: Path, name: str, encoding: str) -> None:
    (tmp_path / name).write_bytes('{"text": "one"}\n{"text": "two"}\n'.encode(encoding))
    found = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    with pytest.raises(ValueError, match=rf"the file is {found}, expected UTF-8; .*iconv -f {found} "):
        texts(tmp_path / name)


def test_text_with_zero_bytes_is_still_text(tmp_path: Path) -> None:
    for content in ("\0", "a\0", "\0\0\0\0", "a\0b\0c", "\0a\0", "ab\0\0cd"):
        (tmp_path / "a.txt").write_text(content)
        assert texts(tmp_path / "a.txt") == [content]


def test_json_that_is_deep_or_has_huge_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": ' + "7" * 5000 + ', "text": "fine"}\n{"text": 7' + "7" * 5000 + "}\n")
    with pytest.raises(ValueError, match=r'a\.jsonl, line 2: expected an object with a string "text"'):
        texts(path)
    path.write_text('{"id": ' + "7" * 5000 + ', "text": "fine"}\n')
    assert texts(path) == ["fine"]
    path.write_text('{"text": ' + "[" * 200_000 + "]" * 200_000 + "}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: JSON nested too deeply"):
        texts(path)


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(IsADirectoryError, match=r"a\.jsonl is a folder, expected text files"):
        texts(tmp_path / "a.jsonl")


def test_parquet_columns_of_bytes_other_names_and_other_types(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    words = ["one", "\u00e9"]
    packed = [w.encode() for w in words]
    for kind in (pyarrow.binary(), pyarrow.large_binary(), pyarrow.large_string(), pyarrow.string()):
        parquet.write_table(pyarrow.table({"body": pyarrow.array(packed).cast(kind)}), path)
        assert [d.text for d in iterate_documents(path, text_key="body")] == words
    parquet.write_table(pyarrow.table({"body": pyarrow.array(words).dictionary_encode()}), path)
    assert [d.text for d in iterate_documents(path, text_key="body")] == words
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text'; columns: body; .*--text-key"):
        texts(path)
    for values, message in (
        ([b"fine", b"\xff"], r"line 2: not UTF-8 at byte 0"),
        ([3], "holds int64, expected string or binary"),
        ([["a"]], "expected string or binary"),
        (["a", None], "line 2: the text is null"),
    ):
        parquet.write_table(pyarrow.table({"text": values}), path)
        with pytest.raises(ValueError, match=rf"a\.parquet.*{message}"):
            texts(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a\.parquet: "):
        texts(path)


def test_a_key_twice_is_refused_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "one", "meta": {"a": 1, "a": 2}}\n')
    with pytest.raises(ValueError, match=r"twice\.jsonl, line 2: given twice: 'a'"):
        list(iterate_documents(path))


def test_two_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, path)
    with pytest.raises(ValueError, match=r"a\.parquet: 2 columns are called 'text'; rename all except"):
        list(iterate_documents(path))
