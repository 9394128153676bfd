"""Shards in the form of CaseOps: bytes of the original text, the manifest, and folders of other tools."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pgolf.cli.main import main
from pgolf.data.build import ShardsJob, build_shards
from pgolf.data.foreign import check_foreign
from pgolf.data.loader import load_validation, validation_totals
from pgolf.data.manifest import verify_folder
from pgolf.data.shards import find_shards, read_manifest, read_shard, write_shard
from pgolf.data.text import iterate_documents, sample_paths
from pgolf.data.tokenizer import Tokenizer, find_tokenizer
from pgolf.model.generate import text_pieces

SHARD, SIDE = "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"
ODD = [
    "\ue001 \ue004 \ue004\ue001 literal OPERATORS \ue002",
    "\u2581 \0 NUL \uf8f0\uf8f1",
    "",
    " The space",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, cased: Tokenizer) -> Path:
    """Shards of the sample and of odd texts; the validation text has several shards."""
    folder = tmp_path_factory.mktemp("cased")
    odd = folder / "odd.jsonl"
    odd.write_text("".join(json.dumps({"text": text}) + "\n" for text in ODD))
    sample = sample_paths()
    job = ShardsJob(
        train=(sample.train,),
        val=(odd, sample.val),
        tokenizer=cased.path,
        out=folder / "shards",
        shard_tokens=20_000,
        jobs=1,
    )
    build_shards(job, report=lambda line: None)
    return job.out


@pytest.fixture
def foreign(made: Path, tmp_path: Path) -> Path:
    """A folder without a manifest, as other tools make it."""
    folder = Path(shutil.copytree(made, tmp_path / "shards"))
    (folder / "manifest.json").unlink()
    return folder


def texts() -> list[str]:
    return [*ODD, *(document.text for document in iterate_documents(sample_paths().val))]


def test_shards_have_the_documents_and_the_bytes_of_the_original_text(made: Path) -> None:
    manifest = read_manifest(made)
    assert manifest.caseops and manifest.lossless
    assert len(find_shards(made, "val")) > 1
    tokenizer = find_tokenizer(made)
    text = load_validation(made)
    starts = np.flatnonzero(text.tokens == 1)
    parts = np.split(text.tokens, starts)[1:]
    assert [tokenizer.decode(part) for part in parts] == texts()
    sizes = [len(t.encode()) for t in texts()]
    assert np.add.reduceat(text.bytes, starts).tolist() == sizes
    assert text.bytes[starts].max() == 0
    assert validation_totals(made) == (text.tokens.size - 1, sum(sizes))
    assert manifest.total("val").bytes == sum(sizes)
    assert verify_folder(made, training=True) == manifest


def test_bits_per_byte_divide_by_the_original_bytes(made: Path) -> None:
    total = int(load_validation(made).bytes[1:].sum())  # of all targets
    assert total == sum(len(t.encode()) for t in texts())


def test_a_manifest_that_says_nothing_means_no_caseops(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "shards"))
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    assert data.pop("caseops") is True
    path.write_text(json.dumps(data))
    assert not read_manifest(folder).caseops
    with pytest.raises(ValueError, match=r"tokenizer.model: caseops 1, but manifest.json says 0"):
        verify_folder(folder)
    path.write_text(json.dumps({**data, "caseops": 1}))
    with pytest.raises(ValueError, match=r"damaged manifest \(caseops is 1, expected true or false\)"):
        verify_folder(folder)


def test_a_folder_of_another_tool_is_used_as_it_is(foreign: Path, made: Path) -> None:
    assert verify_folder(foreign, training=True) is None
    check_foreign(foreign, training=True)
    assert np.array_equal(load_validation(foreign).bytes, load_validation(made).bytes)


def test_without_sidecars_caseops_shards_are_not_scored(foreign: Path) -> None:
    for side in foreign.glob("*_val_bytes_*"):
        side.unlink()
    with pytest.raises(ValueError, match=r"a CaseOps tokenizer has no byte table.*need their byte sidecars"):
        load_validation(foreign)


def test_a_sidecar_of_other_data_or_another_count_is_refused(foreign: Path) -> None:
    side = foreign / "text_val_bytes_000001.bin"
    tokens, sizes = (np.array(read_shard(foreign / name)) for name in ("text_val_000001.bin", side.name))
    write_shard(side, np.roll(sizes, 1))
    with pytest.raises(
        ValueError, match=r"text_val_bytes_000001\.bin: \d+ bytes at position \d+ for (BOS|an o)"
    ):
        check_foreign(foreign)
    operators = (tokens >= 4) & (tokens <= 7)
    write_shard(side, sizes + 3 * operators)  # counted as if the operators were text
    with pytest.raises(ValueError, match=r"3 bytes at position \d+ for an operator of CaseOps"):
        check_foreign(foreign)
    write_shard(side, np.where(sizes > 0, 9, 0))
    with pytest.raises(
        ValueError, match=r"only \d+ % of its entries are the bytes of the tokens in tokenizer"
    ):
        check_foreign(foreign)
    write_shard(side, sizes)
    check_foreign(foreign)


def test_a_tokenizer_of_other_shards_is_refused(foreign: Path, tokenizer: Tokenizer) -> None:
    shutil.copyfile(tokenizer.path, foreign / "tokenizer.model")
    with pytest.raises(ValueError, match=r"only \d+ % .* with the tokenizer that made it"):
        check_foreign(foreign)


def test_plain_shards_with_a_caseops_tokenizer_are_refused(
    sample_shards: Path, cased: Tokenizer, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sample_shards, tmp_path / "shards"))
    (folder / "manifest.json").unlink()
    check_foreign(folder, training=True)
    shutil.copyfile(cased.path, folder / "tokenizer.model")
    with pytest.raises(
        ValueError, match=r"bytes at position \d+ for an operator|only \d+ % .* do not belong together"
    ):
        check_foreign(folder)


def test_validation_documents_in_the_training_shards_are_found(foreign: Path) -> None:
    shutil.copyfile(foreign / "text_val_000001.bin", foreign / "text_train_000099.bin")
    check_foreign(foreign)
    with pytest.raises(ValueError, match=r"\d+ of the \d+ validation documents are in the training shards"):
        check_foreign(foreign, training=True)


def test_the_challenges_validation_text_must_be_whole(
    foreign: Path, cased: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in foreign.glob("text_*.bin"):
        path.rename(path.with_name(path.name.replace("text_", "fineweb_")))
    count = len(texts())
    with pytest.raises(ValueError, match=rf"fineweb_val_\*\.bin: {count} documents, but .* has 50,000"):
        check_foreign(foreign)
    sample = sample_paths()
    job = ShardsJob(
        train=(sample.train,),
        val=(sample.val,),
        tokenizer=cased.path,
        out=tmp_path / "o",
        name="fineweb",
        jobs=1,
    )
    with pytest.raises(ValueError, match="but the challenge's validation text has 50,000"):
        build_shards(job, report=lambda line: None)
    monkeypatch.setattr("pgolf.data.shards.CHALLENGE_DOCUMENTS", count)
    check_foreign(foreign)


def test_the_commands_need_no_further_flag(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, train = tmp_path / "x.model", str(sample_paths().train)
    words = ["--inputs", train, "--out", str(model), "--vocab-size", "512", "--caseops"]
    assert main(["data", "tokenizer", *words]) == 0
    assert "512 ids, bos 1, lossless True, CaseOps" in capsys.readouterr().out
    assert Tokenizer(model).caseops
    assert main(["data", "inspect", str(made)]) == 0
    out = capsys.readouterr().out
    assert "begins: '\\ue001 \\ue004" in out, "the text, not its operators"
    assert f"{sum(len(t.encode()) for t in texts()):,} bytes" in out


def test_generated_text_has_no_operators_and_keeps_the_case_of_long_words(cased: Tokenizer) -> None:
    text = "The NASA iPhone \ue001\ue004 \u2581 \u20ac ABc. " * 30 + "AHA" * 300 + " End\ue004"
    bos = [cased.bos_id]
    prompt, rest = text[:9], text[9:]
    ids, more = ([int(i) for i in cased.encode_ids([t])[0]] for t in (prompt, rest))
    pieces = list(text_pieces(cased, bos + ids, iter(more)))
    assert "".join(pieces) == rest and len(pieces) > 200
    assert len(cased.encode_ids(["AHA" * 300])[0]) > 320, "longer than what is kept"
