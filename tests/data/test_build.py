import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from pgolf.cli.data import main
from pgolf.data.build import ShardsJob, build_shards, command_of
from pgolf.data.loader import load_validation
from pgolf.data.manifest import verify_folder
from pgolf.data.shards import Manifest, find_shards, read_manifest, read_shard, verify_manifest, write_shard
from pgolf.data.tokenizer import Tokenizer, find_tokenizer

VAL = ["first val", " leading space", "nul \0 and \u2581 and \U0001f600", "", "\n\nlines\n"]
TRAIN = [f"training document {n}\n" + "words " * (n % 37) for n in range(200)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def job(tmp_path: Path, tokenizer: Tokenizer, **changes: object) -> ShardsJob:
    values: dict[str, object] = {
        "train": (write_jsonl(tmp_path / "train.jsonl", changes.pop("train_texts", TRAIN)),),
        "val": (write_jsonl(tmp_path / "val.jsonl", VAL),),
        "tokenizer": changes.pop("model", tokenizer.path),
        "out": tmp_path / "out",
        "shard_tokens": 1000,
        "jobs": 1,
    }
    return ShardsJob(**{**values, **changes})


def build(made: ShardsJob) -> Manifest:
    return build_shards(made, report=lambda line: None)


def documents(folder: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    stream = np.concatenate([read_shard(p) for p in find_shards(folder, split)])
    return [tokenizer.decode(part) for part in np.split(stream, np.flatnonzero(stream == 1))[1:]]


def test_shards_give_back_every_document_in_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = job(tmp_path, tokenizer)
    manifest = build(made)
    assert documents(made.out, "val", tokenizer) == VAL
    assert documents(made.out, "train", tokenizer) == TRAIN
    assert read_manifest(made.out) == manifest
    verify_manifest(made.out, manifest)
    assert (made.out / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()
    assert manifest.lossless
    assert manifest.total("train").documents == len(TRAIN)
    assert manifest.total("train").bytes == sum(len(t.encode()) for t in TRAIN)
    assert manifest.total("val").bytes == sum(len(t.encode()) for t in VAL)


def test_shards_end_between_documents_and_below_the_limit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = job(tmp_path, tokenizer, train_texts=[*TRAIN, "x" * 5000, "end"])
    build(made)
    shards = [read_shard(p) for p in find_shards(made.out, "train")]
    assert len(shards) > 5
    assert all(shard[0] == 1 for shard in shards)
    sizes = [shard.size for shard in shards]
    assert sum(size > 1000 for size in sizes) == 1, "only the long document has a larger shard"
    assert [p.name for p in find_shards(made.out, "train")][:2] == [
        "text_train_000000.bin",
        "text_train_000001.bin",
    ]


def test_sidecar_counts_each_documents_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = job(tmp_path, tokenizer)
    build(made)
    tokens = read_shard(made.out / "text_val_000000.bin")
    sizes = read_shard(made.out / "text_val_bytes_000000.bin")
    begins = np.flatnonzero(tokens == 1)
    assert (sizes[begins] == 0).all()
    assert np.add.reduceat(sizes.astype(int), begins).tolist() == [len(t.encode()) for t in VAL]


def test_processes_make_the_same_files_as_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    one = build(job(tmp_path, tokenizer))
    two = build(job(tmp_path, tokenizer, jobs=2, out=tmp_path / "two"))
    assert one == two


def test_overlap_is_named_with_both_places(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = job(tmp_path, tokenizer, train_texts=[*TRAIN[:4], VAL[1], *TRAIN[4:]])
    message = (
        r"'leading space' is in both splits: .*train\.jsonl, line 5 and .*val\.jsonl, line 2; .*--drop-ove"
    )
    with pytest.raises(ValueError, match=message):
        build(made)
    assert not (made.out / "manifest.json").exists()


def test_drop_overlap_leaves_the_document_out_of_training(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines: list[str] = []
    made = job(tmp_path, tokenizer, train_texts=[VAL[0], *TRAIN, VAL[0], VAL[2]], drop_overlap=True)
    build_shards(made, report=lines.append)
    assert documents(made.out, "train", tokenizer) == TRAIN
    assert documents(made.out, "val", tokenizer) == VAL
    assert "3 dropped (also in val)" in lines[-1]


def test_a_folder_with_shards_is_left_alone_unless_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = job(tmp_path, tokenizer)
    build(made)
    with pytest.raises(FileExistsError, match=r"already holds \d+ shards .*--overwrite"):
        build(made)
    stale = made.out / "old_train_000009.bin"
    write_shard(stale, np.array([1, 2]))
    build(job(tmp_path, tokenizer, overwrite=True, train_texts=TRAIN[:3]))
    assert not stale.exists()
    assert documents(made.out, "train", tokenizer) == TRAIN[:3]


def test_a_bad_line_stops_the_build_even_in_a_process(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for jobs in (1, 2):
        made = job(tmp_path, tokenizer, jobs=jobs, out=tmp_path / str(jobs))
        (tmp_path / "train.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
        with pytest.raises(
            ValueError, match=r'train\.jsonl, line 2: expected an object with a string "text"'
        ):
            build(made)


def test_missing_inputs_and_bad_settings_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(FileNotFoundError, match=r"no text file at .*none\.jsonl"):
        build(job(tmp_path, tokenizer, val=(tmp_path / "none.jsonl",)))
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        build(job(tmp_path, tokenizer, model=tmp_path / "none.model"))
    with pytest.raises(ValueError, match="val: expected at least one text file"):
        job(tmp_path, tokenizer, val=())
    for wrong in (0, 2**31):
        with pytest.raises(ValueError, match=rf"shard_tokens must be >= 1 and below 2\^31, got {wrong}"):
            job(tmp_path, tokenizer, shard_tokens=wrong)
    for wrong in (-1, 10**9):
        with pytest.raises(ValueError, match=rf"jobs must be >= 0 and at most 4,096, got {wrong}"):
            job(tmp_path, tokenizer, jobs=wrong)
    for name in ("a/b", "", ".", "..", "two\nlines", "-x", "n" * 129):
        with pytest.raises(ValueError, match="name is part of the shards' names: 1 to 128 bytes, printable"):
            job(tmp_path, tokenizer, name=name)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(ValueError, match=r"no train documents in .*empty\.jsonl"):
        build(job(tmp_path, tokenizer, train=(empty,)))
    lines: list[str] = []
    made = job(tmp_path, tokenizer, overwrite=True)
    build_shards(replace(made, train=(*made.train, empty)), report=lines.append)
    assert lines[0] == f"note: {empty} is empty"
    with pytest.raises(ValueError, match="cannot train 300 pieces: there is no text"):
        main(["tokenizer", "--inputs", str(empty), "--out", str(tmp_path / "t"), "--vocab-size", "300"])
    with pytest.raises(FileNotFoundError, match="no data folder or shard at nowhere"):
        main(["inspect", "nowhere"])


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    prefix = tmp_path_factory.mktemp("lossy") / "lossy"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAIN),
        model_prefix=str(prefix),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return Tokenizer(prefix.with_suffix(".model"))


def test_lossy_tokenizer_is_reported_in_manifest_and_summary(tmp_path: Path, lossy: Tokenizer) -> None:
    lines: list[str] = []
    made = job(tmp_path, lossy, val=(write_jsonl(tmp_path / "v.jsonl", ["plain", "two  spaces"]),))
    manifest = build_shards(made, report=lines.append)
    assert not manifest.lossless
    assert any("lossy: 1 documents do not decode exactly" in line for line in lines)


def test_a_manifest_may_not_claim_that_lossy_ids_decode_exactly(tmp_path: Path, lossy: Tokenizer) -> None:
    made = job(tmp_path, lossy, val=(write_jsonl(tmp_path / "v.jsonl", ["plain", "plain again"]),))
    assert build(made).lossless and verify_folder(made.out), "these documents do come back"
    made = replace(made, val=(write_jsonl(tmp_path / "v.jsonl", ["plain", "two  spaces"]),), overwrite=True)
    assert not build(made).lossless and verify_folder(made.out)
    text = (made.out / "manifest.json").read_text()
    (made.out / "manifest.json").write_text(text.replace('"lossless": false', '"lossless": true'))
    with pytest.raises(ValueError, match=r"text_val_000000\.bin: document 2 does not decode exactly"):
        verify_folder(made.out)


def test_text_of_which_no_token_is_left_stops_the_build(tmp_path: Path, lossy: Tokenizer) -> None:
    made = job(tmp_path, lossy, val=(write_jsonl(tmp_path / "v.jsonl", ["fine", "\n \n"]),))
    with pytest.raises(ValueError, match=r"v\.jsonl, line 2: the tokens account for 0 of 3 bytes"):
        build(made)


def test_commands_train_build_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = str(write_jsonl(tmp_path / "train.jsonl", TRAIN))
    val = str(write_jsonl(tmp_path / "val.jsonl", VAL))
    model, out = str(tmp_path / "a" / "t.model"), tmp_path / "out"
    assert main(["tokenizer", "--inputs", train, "--out", model, "--vocab-size", "300"]) == 0
    assert "300 ids, bos 1, lossless True" in capsys.readouterr().out
    shards = [
        "shards",
        "--train",
        train,
        "--val",
        val,
        "--tokenizer",
        model,
        "--out",
        str(out),
        "--jobs",
        "1",
    ]
    assert main(shards) == 0
    assert "val: 5 documents" in capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0
    printed = capsys.readouterr().out
    size = sum(len(t.encode()) for t in VAL)
    for part in (
        "200 documents",
        "begins: 'training document 0",
        f"{size:,} bytes",
        "have the listed SHA-256",
    ):
        assert part in printed


def test_inspect_reads_other_tools_shards_and_reports_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "f_train_000000.bin", np.array([1, 500, 600]))
    write_shard(tmp_path / "f_val_000000.bin", np.array([1, 5]))
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for part in ("3 tokens, 1 documents, largest id 600", "bytes: unknown", "another tool made the shards"):
        assert part in printed
    assert main(["inspect", str(tmp_path / "f_val_000000.bin")]) == 0
    (tmp_path / "f_val_000000.bin").write_bytes(b"xx")
    with pytest.raises(ValueError, match=r"f_val_000000\.bin: a shard starts with a header"):
        main(["inspect", str(tmp_path)])


def test_a_lossy_tokenizer_is_named_before_anything_is_encoded(tmp_path: Path, lossy: Tokenizer) -> None:
    lines: list[str] = []
    made = job(tmp_path, lossy, val=(write_jsonl(tmp_path / "v.jsonl", ["plain"]),))
    build_shards(made, report=lines.append)
    assert lines[0].startswith("note: the tokenizer is not lossless: its normalizer")


def test_a_validation_text_without_a_byte_is_refused_before_the_training_text_is_read(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    lines: list[str] = []
    for split in ("val", "train"):
        texts = {"val": (write_jsonl(tmp_path / "v.jsonl", ["held out"]),)}
        texts[split] = (write_jsonl(tmp_path / "e.jsonl", ["", ""]),)
        made = job(tmp_path, tokenizer, **texts)
        with pytest.raises(
            ValueError, match=rf"the {split} text has no bytes: all of the 2 documents in .*e\.j"
        ):
            build_shards(made, report=lines.append)
        written = [line.split(":")[0] for line in lines if "MB/s" in line]
        assert written == ([] if split == "val" else ["val"])
        assert not (made.out / "manifest.json").exists()


def refused(folder: Path, command: str) -> None:
    """Every function that opens such a folder refuses it, and names the command that finishes it."""
    for use in (
        lambda: find_shards(folder, "train"),
        lambda: load_validation(folder),
        lambda: read_manifest(folder),
        lambda: verify_folder(folder),
        lambda: find_tokenizer(folder),
        lambda: main(["inspect", str(folder)]),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{folder} holds an unfinished build of shards")) as e:
            use()
        assert command in str(e.value)


def test_a_build_that_failed_is_no_data_set_until_it_is_done_again(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    lines: list[str] = []
    made = job(tmp_path, tokenizer, name="odd name", train_texts=[*TRAIN, VAL[0]])
    with pytest.raises(ValueError, match="is in both splits"):
        build_shards(made, report=lines.append)
    assert "is marked as unfinished" in lines[-1]
    assert find_files(made.out), "some shards were written"
    command = command_of(made)
    refused(made.out, command)
    (made.out / ".odd name_train_000099.bin.99.tmp").touch()  # of a writer that was killed
    write_jsonl(tmp_path / "train.jsonl", TRAIN)
    assert main([*shlex.split(command)[2:]]) == 0, "the very same command, without --overwrite"
    assert verify_folder(made.out, training=True) == build(
        job(tmp_path, tokenizer, name="odd name", out=tmp_path / "b")
    )
    assert {p.name for p in made.out.iterdir()} == {p.name for p in (tmp_path / "b").iterdir()}


def find_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.bin"))


def test_overwriting_marks_the_folder_before_the_old_shards_go(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = job(tmp_path, tokenizer)
    build(made)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("write_manifest", "write_shard", "_remove_old"):  # from the last step to the first
        with monkeypatch.context() as patch:
            patch.setattr(f"pgolf.data.build.{name}", full)
            with pytest.raises(OSError, match="No space left"):
                build(job(tmp_path, tokenizer, overwrite=True))
        refused(made.out, "--overwrite")
    assert build(made) == read_manifest(made.out)


def test_a_file_that_cannot_be_read_leaves_the_old_shards_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = job(tmp_path, tokenizer)
    manifest = build(made)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "a.csv").touch()
    for path, error in ((tmp_path / "folder.jsonl", IsADirectoryError), (tmp_path / "a.csv", ValueError)):
        with pytest.raises(error):
            build(job(tmp_path, tokenizer, train=(path,), overwrite=True))
    assert verify_folder(made.out, training=True) == manifest
    with pytest.raises(NotADirectoryError, match=r"train\.jsonl is a file, expected a folder"):
        build(job(tmp_path, tokenizer, out=tmp_path / "train.jsonl"))


def test_another_key_of_the_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name, texts in (("train", TRAIN), ("val", VAL)):
        lines = "".join(json.dumps({"body": t, "text": "other"}) + "\n" for t in texts)
        (tmp_path / f"{name}.ndjson").write_text(lines)
    files = {split: (tmp_path / f"{split}.ndjson",) for split in ("train", "val")}
    for jobs in (1, 2):
        made = job(tmp_path, tokenizer, **files, text_key="body", jobs=jobs, overwrite=True)
        build(made)
        assert documents(made.out, "train", tokenizer) == TRAIN
        assert documents(made.out, "val", tokenizer) == VAL


def broken(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_mark_that_cannot_be_written_leaves_the_old_shards_a_data_set(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = job(tmp_path, tokenizer)
    manifest = build(made)
    again = replace(made, overwrite=True)
    for call in ("write", "fsync", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(f"pgolf.data.build.os.{call}", broken(28))
            with pytest.raises(OSError, match=r"cannot write .*UNFINISHED: No space left on device; noth"):
                build(again)
        assert verify_folder(made.out, training=True) == manifest


def test_the_mark_holds_any_path(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Python represents bytes of paths that are not valid in the locale's encoding by surrogates."""
    folder = tmp_path / b"\xc3\xa4 \xff".decode("ascii", "surrogateescape")
    folder.mkdir()
    made = job(folder, tokenizer, train_texts=[*TRAIN, VAL[0]])
    with pytest.raises(ValueError, match="is in both splits"):
        build(made)
    assert b"\xc3\xa4 \xff" in (made.out / "UNFINISHED").read_bytes()
    with pytest.raises(ValueError, match="holds an unfinished build") as e:
        verify_folder(made.out)
    command = str(e.value).split("finish it with: ")[1]
    assert os.fsencode(shlex.split(command)[-1]) in os.fsencode(command_of(made))


def test_a_build_that_finished_meanwhile_is_not_removed(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = job(tmp_path, tokenizer)
    manifest = build(made)
    with monkeypatch.context() as patch:
        patch.setattr("pgolf.data.build._check_out", lambda job: None)  # it looked before the other was done
        with pytest.raises(FileExistsError, match=r"already holds \d+ shards"):
            build(made)
    assert verify_folder(made.out, training=True) == manifest


def test_links_to_nothing_are_no_other_tools_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = job(tmp_path, tokenizer)
    build(made)
    (made.out / "manifest.json").unlink()
    (made.out / "manifest.json").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"manifest\.json is not a file \(perhaps a broken link"):
        verify_folder(made.out)
    (made.out / "UNFINISHED").symlink_to(tmp_path / "gone")
    refused(made.out, "pgolf data shards --train TEXT")
    with pytest.raises(OSError, match=r"cannot write .*UNFINISHED: .*; nothing was changed"):
        build(replace(made, overwrite=True))
    assert not (tmp_path / "gone").exists()


def test_text_that_is_no_good_does_not_cost_the_old_shards(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines: list[str] = []
    made = job(tmp_path, tokenizer)
    manifest = build(made)
    before = {p.name for p in made.out.iterdir()}
    again = job(tmp_path, tokenizer, overwrite=True, name="new", train_texts=[*TRAIN[:50], VAL[0]])
    with pytest.raises(ValueError, match="is in both splits"):
        build_shards(again, report=lines.append)
    assert lines[-1] == f"{made.out} is unchanged"
    assert verify_folder(made.out, training=True) == manifest
    assert {p.name for p in made.out.iterdir()} == before
    good = job(tmp_path, tokenizer, overwrite=True, name="new", train_texts=TRAIN[:50])
    assert build(good) == verify_folder(made.out, training=True)
    assert documents(made.out, "train", tokenizer) == TRAIN[:50]
    assert {p.name.split("_")[0] for p in made.out.iterdir()} == {"new", "manifest.json", "tokenizer.model"}
