"""`pgolf legality RUN`: the report of a real artifact, in the submission folder."""

import json
import re

import pytest

from pgolf.cli.main import main
from pgolf.config import ILLEGAL, Config, from_dict, read_json
from pgolf.dist import Dist
from pgolf.evaluate import legality
from pgolf.evaluate.legality import sample_text
from pgolf.evaluate.rounding import Limit
from pgolf.evaluate.validation import DataFolder
from pgolf.files import file_sha256
from pgolf.report.reproduced import check_code, find_program, libraries_without_pgolf
from tests.e2e.conftest import SMALL


@pytest.mark.parametrize("mode", ["plain", "local", "ttt"])
def test_the_report_of_a_run_names_its_artifact_and_goes_into_the_submission(
    run, shards, tmp_path, capsys, mode
):
    out = tmp_path / "legality.json"
    words = ["legality", str(run), "--mode", mode, "--sample", "256", "--out", str(out), "--device", "cpu"]
    assert main(words) == 0, capsys.readouterr().out
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("rounding: one rounding of every weight moves a loss by ")
    assert [line.split()[:3] for line in lines[1:9]] == [
        ["ok", "C4", "once"],
        ["ok", "C2", "sum"],
        ["ok", "C3", "state"],
        ["ok", "C1", "self"],
        ["ok", "C1", "future"],
        ["ok", "C1", "alone"],
        ["ok", "C4", "ranks"],
        ["ok", "C1", "code"],
    ]
    report = json.loads(out.read_text())
    assert report["legal"] and report["mode"] == mode and len(report["conditions"]) == 8
    assert report["code"] == file_sha256(run / "evaluate_gpt.py")
    assert 0 < report["limit"]["rounding"] < report["limit"]["nats"] <= 1e-3
    if mode != "plain":
        return
    (run / "legality.json").write_bytes(out.read_bytes())
    try:
        folder = tmp_path / "record"
        assert main(["submit", str(run), "--out", str(folder)]) == 0
        assert (folder / "legality_seed42.json").read_bytes() == out.read_bytes()
        text = (folder / "README.md").read_text()
        assert "none of the four conditions of issue 1017 fails" in text
        failed = {**report, "legal": False}
        failed["conditions"][0]["verdict"] = "fails"
        (run / "legality.json").write_text(json.dumps(failed))
        assert main(["submit", str(run), "--out", str(tmp_path / "other")]) == 2
        assert "C4 FAIL of the conditions" in capsys.readouterr().err
        words = ["submit", str(run), "--out", str(tmp_path / "other"), "--although-illegal"]
        assert main(words) == 0
        assert "C4 FAIL of the conditions" in (tmp_path / "other" / "README.md").read_text()
    finally:
        (run / "legality.json").unlink()


def test_a_sample_that_is_too_small_is_refused(run, capsys):
    assert main(["legality", str(run), "--sample", "10"]) == 2
    assert "--sample must be at least 256 tokens, got 10" in capsys.readouterr().err


def test_slot_fails_and_says_so(run, tmp_path, capsys):
    out = tmp_path / "legality.json"
    words = ["legality", str(run), "--mode", "slot", "--sample", "256", "--out", str(out), "--device", "cpu"]
    assert main(words) == 1
    text = capsys.readouterr().out
    assert f"slot: NOT LEGAL ({ILLEGAL})" in text
    report = json.loads(out.read_text())
    assert not report["legal"] and report["remark"] == ILLEGAL
    assert {c["test"] for c in report["conditions"] if c["verdict"] == "fails"} == {"self", "future"}


def test_a_run_with_slot_is_labelled_everywhere_and_its_submission_is_refused(shards, tmp_path, capsys):
    words = ["train", "tiny", "--data", str(shards), "--out", str(tmp_path / "runs"), *SMALL, "--steps=2"]
    words += ["--evaluate.method", "slot", "--evaluate.published", "--evaluate.slot.steps", "1"]
    assert main([*words, "--evaluate.stride", "64", "--evaluate.no-raw", "--evaluate.no-ema"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert (
        f"({ILLEGAL})" in (folder / "log.txt").read_text() and f"slot: {ILLEGAL}" in capsys.readouterr().out
    )
    record = tmp_path / "record"
    assert main(["submit", str(folder), "--out", str(record)]) == 2
    said = capsys.readouterr().err
    assert f"the headline score is slot, {ILLEGAL}" in said and not record.exists()
    assert main(["submit", str(folder), "--out", str(record), "--although-illegal"]) == 0
    assert f"The headline score is {ILLEGAL}." in (record / "README.md").read_text()
    words = ["evaluate", str(folder / "model.pgolf"), "--data", str(shards), "--documents", "2"]
    assert main([*words, "--mode", "slot", "--slot.steps", "1", "--stride", "64", "--device", "cpu"]) == 0
    assert f"({ILLEGAL})" in capsys.readouterr().out


def test_evaluate_tests_the_ways_that_it_scores_with_their_settings(
    run, shards, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("pgolf.cli.legality.SAMPLE", 256)
    asked = []
    monkeypatch.setattr(
        "pgolf.cli.legality._test", lambda way, *rest: asked.append((way, rest)) or found_of(way)
    )
    out = tmp_path / "scores.json"
    words = ["evaluate", str(run / "model.pgolf"), "--data", str(shards), "--documents", "2", "--legality"]
    words += ["--json", str(out), "--device", "cpu", "--stride", "48", "--tokens", "512"]
    assert main([*words, "--mode", "sliding"]) == 0
    assert asked[-1][0] == "sliding" and asked[-1][1][3].stride == 48
    assert "sliding: no condition fails" in capsys.readouterr().out
    report = json.loads(out.read_text())["legality"]["sliding"]
    assert report["settings"] == {"context": 0, "stride": 48}
    assert [c["verdict"] for c in report["conditions"] if c["test"] == "code"] == ["ok"]
    assert main([*words, "--mode", "slot"]) == 1
    assert f"slot: NOT LEGAL ({ILLEGAL})" in capsys.readouterr().out


def found_of(way):
    return Limit(1e-5, 1e-6), [legality.Tested("C1", "self", "fails" if way == "slot" else "ok", "")]


WRONG = {
    "another_number": ("print('0.9000000 bpb')", r"alone gives 0\.9000000 bpb on the sample, pgolf \d"),
    "the_installed_package": ("import pgolf", "does not score: exit status 1, ModuleNotFoundError.*pgolf"),
    "a_file_of_the_run": ("open('summary.json')", "does not score: .*FileNotFoundError.*summary.json"),
    "silence": ("", "does not score: exit status 0, nothing was printed"),
}
"""Programs that do not give the score by themselves, and what is found."""


@pytest.mark.parametrize("name", WRONG)
def test_a_program_that_does_not_give_the_score_alone_is_caught(run, shards, tmp_path, name):
    source, message = WRONG[name]
    for file in ("model.pgolf", "config.json", "summary.json"):
        (tmp_path / file).write_bytes((run / file).read_bytes())
    (tmp_path / "evaluate_gpt.py").write_text(source)
    found = code_test(tmp_path, shards)
    assert (found.condition, found.test, found.verdict) == ("C1", "code", "fails")
    assert re.search(message, found.text), found.text


def code_test(folder, shards):
    config = from_dict(Config, read_json(folder / "config.json"))
    data_folder = DataFolder.open(shards, vocab_size=config.model.vocab_size)
    text = sample_text(data_folder.validation(), data_folder.tokenizer.bos_id, 256)
    return check_code(
        folder / "model.pgolf",
        text,
        way="plain",
        folder=data_folder,
        config=config,
        dist=Dist.start("cpu"),
        limit=1e-5,
    )


@pytest.mark.parametrize("attention", ["doc", "fa4"])
def test_a_run_with_the_attention_of_a_gpu_is_tested_without_one(run, shards, tmp_path, attention):
    for file in ("model.pgolf", "evaluate_gpt.py"):
        (tmp_path / file).write_bytes((run / file).read_bytes())
    saved = read_json(run / "config.json")
    saved["train"]["attention"] = attention
    (tmp_path / "config.json").write_text(json.dumps(saved))
    found = code_test(tmp_path, shards)
    assert found.verdict == "ok", found.text


def test_an_artifact_without_a_program_is_not_tested_for_that(run, shards, tmp_path):
    for file in ("model.pgolf", "config.json"):
        (tmp_path / file).write_bytes((run / file).read_bytes())
    found = code_test(tmp_path, shards)
    assert found.verdict == "untested" and "no evaluate_gpt.py or train_gpt.py next to" in found.text
    assert find_program(run / "model.pgolf") == run / "evaluate_gpt.py"


def test_the_libraries_of_the_program_are_all_but_pgolf(tmp_path):
    names = {path.name for path in libraries_without_pgolf(tmp_path / "libraries").iterdir()}
    assert {"torch", "numpy", "sentencepiece"} <= names
    assert not [name for name in names if "pgolf" in name.lower() or name.endswith(".pth")]
