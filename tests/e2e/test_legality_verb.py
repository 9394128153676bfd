"""`pgolf legality RUN`: the report of a real artifact, in the submission folder."""

import json

import pytest

from pgolf.cli.main import main


@pytest.mark.parametrize("mode", ["plain", "ttt"])
def test_the_report_of_a_run_names_its_artifact_and_goes_into_the_submission(
    run, shards, tmp_path, capsys, mode
):
    out = tmp_path / "legality.json"
    words = ["legality", str(run), "--mode", mode, "--sample", "256", "--out", str(out), "--device", "cpu"]
    assert main(words) == 0, capsys.readouterr().out
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:5]] == [
        ["ok", "C4", "once"],
        ["ok", "C2", "sum"],
        ["ok", "C3", "state"],
        ["ok", "C1", "self"],
        ["ok", "C1", "future"],
    ]
    report = json.loads(out.read_text())
    assert report["legal"] and report["mode"] == mode and len(report["conditions"]) == 5
    if mode == "ttt":
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
