"""`python -m bench.presets`: several presets on one text, and a table of what they reached."""

import json
import sys
from pathlib import Path

import pytest

from bench import presets as bench
from tests import forks
from tests.e2e.conftest import SMALL, VAL_TOKENS


@pytest.fixture(autouse=True)
def forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the trainings be processes that have PyTorch already."""
    monkeypatch.setattr(sys, "executable", str(forks.interpreter(tmp_path)))


def test_two_rows_become_one_table(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [f"tiny={shards}", f"tiny+again={shards}", "--seconds", "600", "--documents", "4"]
    words += ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results"), "--"]
    short = ["--train.warmup-steps=0", "--train.seconds=0", *(w for w in SMALL if w != "--seconds=0")]
    assert bench.main([*words, *short]) == 0, (tmp_path / "out/tiny.txt").read_text()
    printed = capsys.readouterr().out
    assert "tiny+again: scoring is done" in printed
    (file,) = (tmp_path / "results").glob("*_run-presets_600s_1gpu.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    bpb = {line["case"]: line["value"] for line in lines if line["metric"] == "bpb_quantized"}
    # The same preset, text and seed: the same figure, which the table shows.
    assert bpb["tiny_600s_1gpu"] == bpb["tiny+again_600s_1gpu"]
    row = next(line for line in printed.splitlines() if line.startswith("| tiny |"))
    assert [cell.strip() for cell in row.strip("|").split("|")][3] == "6"
    assert f"| {bpb['tiny_600s_1gpu']:.4f} |" in row
    # `tiny` scores with phases, as its settings say; the table has that score and the name of the way.
    found = {line["metric"]: line["value"] for line in lines if line["case"] == "tiny_600s_1gpu"}
    assert f"| {found['bpb_published']:.4f} | {found['gain_published']:.4f} |" in row and row.endswith(
        "| phased |"
    )
    assert found["tokens_published"] < VAL_TOKENS
    # Once more: nothing is trained again.
    assert bench.main([*words, *short]) == 0
    assert "begins" not in capsys.readouterr().out


def test_a_row_that_fails_does_not_stop_the_others(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    empty = tmp_path / "empty"
    empty.mkdir()
    words = [f"tiny={empty}", f"tiny+good={shards} train.seed=7", "--out", str(tmp_path / "out")]
    words += ["--results", str(tmp_path / "results"), "--", "--train.seconds=0"]
    assert bench.main([*words, *(w for w in SMALL if w != "--seconds=0")]) == 1
    out, err = capsys.readouterr()
    assert "tiny: training failed with status 2" in out and "tiny+good: training is done" in out
    assert "failed: tiny\n" in err
    (config,) = (tmp_path / "out/tiny+good").glob("*/config.json")
    assert json.loads(config.read_text())["train"]["seed"] == 7


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tiny"], "expected PRESET"),
        (["pr99=."], "expected PRESET"),
        (["tiny=. train.seed"], "expected PRESET"),
        (["tiny=nowhere"], "no folder nowhere"),
        (["tiny=.", "tiny=."], "given twice"),
    ],
)
def test_rows_that_are_wrong(words: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        bench.main([*words, "--out", "out"])
    assert told in capsys.readouterr().err
