"""Whether a submission may rest on a legality report."""

import json
from dataclasses import replace

import pytest

from pgolf.config import LOOSE
from pgolf.errors import UserError
from pgolf.files import file_sha256
from pgolf.report.legality_report import NAME, checked_reports, read_report
from pgolf.report.submission import Entry, readme, rules
from pgolf.report.summary import format_table
from tests.report.test_submission import finished, score


@pytest.fixture
def run(tmp_path):
    (tmp_path / "model.pgolf").write_bytes(b"weights")
    run = replace(finished(scores={"quantized": score(1.1), "ttt": score(1.0)}), folder=tmp_path)
    evaluate = replace(run.config.evaluate, ttt=True)
    return replace(run, config=replace(run.config, evaluate=evaluate))


def write(run, **changes):
    report = {
        "artifact": file_sha256(run.folder / "model.pgolf"),
        "mode": "ttt",
        "settings": run.config.evaluate.settings_of("ttt"),
        "sample": 2048,
        "legal": True,
        "remark": "",
        "conditions": [{"condition": c, "verdict": "ok", "test": "", "text": ""} for c in ("C1", "C2")],
        **changes,
    }
    (run.folder / NAME).write_text(json.dumps(report))


FAILED = {"legal": False, "conditions": [{"condition": "C1", "verdict": "fails", "test": "self", "text": ""}]}


def test_a_report_of_the_run_is_taken_and_a_run_without_one_says_so(run):
    assert checked_reports([run], illegal=False) == {}
    assert any("not tested (`pgolf legality RUN` does it)" in fact for fact in rules([run], {}, None))
    write(run)
    ((path, said),) = checked_reports([run], illegal=False).values()
    assert path == run.folder / NAME and said == "none of the four conditions of issue 1017 fails"
    facts = rules([run], {"legality_seed42.json": said}, None)
    assert any(f"Legality of the way to score: `legality_seed42.json`, {said}." in fact for fact in facts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"artifact": "0" * 64}, "is of another file than"),
        ({"code": "0" * 64}, "tested another program than the run's evaluate_gpt.py"),
        ({"mode": "plain"}, "tested plain, the run's headline is ttt"),
        ({"settings": {"context": 5}}, "tested other settings than the run's config.json has"),
        (FAILED, r"C1 FAIL of the conditions .* write the folder all the same with --although-illegal"),
        ({"legal": False}, "is no report of `pgolf legality`"),
        ({"conditions": FAILED["conditions"]}, "is no report of `pgolf legality`"),
        ({"conditions": 5}, "is no report of `pgolf legality`"),
    ],
)
def test_a_report_of_something_else_or_of_a_failure_is_refused(run, change, message):
    write(run, **change)
    with pytest.raises(UserError, match=message):
        checked_reports([run], illegal=False)


def test_what_was_not_tested_is_said(run):
    untested = {"condition": "C1", "verdict": "untested", "test": "code", "text": ""}
    write(run, conditions=[untested])
    ((_, said),) = checked_reports([run], illegal=False).values()
    assert said == "none of the four conditions of issue 1017 fails; not tested: code"


def test_a_failure_is_taken_if_the_user_says_so_and_the_folder_tells(run):
    write(run, **FAILED)
    ((_, said),) = checked_reports([run], illegal=True).values()
    assert said == "C1 FAIL of the conditions of issue 1017"


def test_a_score_that_fails_the_strict_reading_says_so_in_the_table_and_in_the_readme(run):
    phased = replace(
        run, summary=replace(run.summary, scores={"quantized": score(1.1), "phased": score(1.0)})
    )
    assert f"phased: {LOOSE}" in format_table(phased.summary).splitlines()
    assert LOOSE not in format_table(run.summary)
    assert f"The headline score is {LOOSE}." in rules([phased], {}, None)
    assert not any(LOOSE in fact for fact in rules([run], {}, None))
    warm = replace(run.config.evaluate, adapters=replace(run.config.evaluate.adapters, warm_a=True))
    warm_run = replace(run, config=replace(run.config, evaluate=warm))
    assert f"The headline score is {LOOSE}." in rules([warm_run], {}, None)
    assert "--mode phased" in readme([phased], Entry(), {}, None).split("## Again")[1]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"legal": true}'])
def test_a_file_that_is_no_report_is_refused(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(UserError, match="is no report of `pgolf legality`"):
        read_report(tmp_path / NAME)
