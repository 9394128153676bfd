"""What a submission says, of summaries that are given: nothing here runs a model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pgolf.config import Config, from_dict
from pgolf.evaluate.bpb import Score
from pgolf.report.finished_runs import FinishedRun
from pgolf.report.submission import Entry, readme, results_table, rules, seconds_table, submission
from pgolf.report.summary import Phase, Summary

RESULT = Path(__file__).parents[2] / "bench" / "results" / "20261124_record_600s_1gpu_196k"


def finished(seed: int = 42, **changes: Any) -> FinishedRun:
    """Return the committed 600 s run, older than `total` and `versions`, as a run with that seed."""
    config = json.loads((RESULT / "config.json").read_text())
    config["train"]["seed"] = seed
    summary = replace(Summary.load(RESULT / "summary.json"), **changes)
    return FinishedRun(RESULT, from_dict(Config, config), summary, b"code", "0" * 64)


def score(bpb: float) -> Score:
    return replace(finished().summary.scores["quantized"], bpb=bpb, loss=2.5 * bpb)


def phases(**seconds: float) -> dict[str, Phase]:
    """Return the phases of the committed run with some of them changed or added."""
    summary = finished().summary
    for name, value in seconds.items():
        summary.put(name, value)
    return summary.phases


def cells(table: str) -> dict[str, list[str]]:
    """Return a table's rows by their first words that are not a place."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return {row[-2]: row for row in rows}


def test_one_seed_gives_its_own_figures_and_no_deviation():
    run = finished()
    data = submission([run], Entry())
    assert data["val_bpb"] == run.summary.scores["quantized"].bpb == data["val_bpb_quantized"]
    assert data["bytes_total"] == 15_988_501 and data["seed_results"]["42"]["steps"] == 2425
    assert data["seed_results"]["42"]["step_avg_ms"] == pytest.approx(1000 * 593.414326985 / 2425)
    assert data["track"] == "10min_16mb" and data["hardware"] == "1 x NVIDIA H100 80GB HBM3"
    unknown = {
        "author",
        "github_id",
        "date",
        "val_bpb_std",
        "pytorch_version",
        "flash_attn_version",
        "commit",
    }
    assert not unknown & data.keys(), "what nobody said is left out"
    text = readme([run], Entry(), {}, None)
    assert "one seed" in text and "standard deviation |" not in text
    assert "The process as a whole was not timed." in text
    assert "the challenge's machine is 8 x H100" in text and "not found" in text


def test_seeds_give_mean_and_deviation_by_hand():
    found = [0.9, 1.0, 1.4]  # mean 1.1, squares of deviations 0.04 + 0.01 + 0.09 over 2
    runs = [finished(seed, scores={"quantized": score(bpb)}) for seed, bpb in enumerate(found)]
    data = submission(runs, Entry(author="a", name="n", blurb="b", date="2026-01-02"))
    assert (data["val_bpb"], data["val_bpb_std"]) == pytest.approx((1.1, 0.07**0.5))
    assert data["val_loss_std"] == pytest.approx(2.5 * 0.07**0.5)
    row = "| bits per byte, quantized file | 0.90000 | 1.00000 | 1.40000 | 1.10000 | 0.26458 |"
    assert row in results_table(runs)
    assert [data[key] for key in ("author", "name", "blurb", "date")] == ["a", "n", "b", "2026-01-02"]


def test_versions_and_commit_are_said_of_all_runs_or_of_each():
    runs = [
        finished(seed, versions={"torch": torch, "cuda": "13.0"}, commit="c")
        for seed, torch in enumerate(("2.11.0", "2.12.0"))
    ]
    data = submission(runs, Entry())
    assert (data["cuda_version"], data["commit"]) == ("13.0", "c") and "pytorch_version" not in data
    assert "torch 2.11.0, cuda 13.0 and torch 2.12.0, cuda 13.0; sources" in readme(runs, Entry(), {}, None)
    assert submission(runs[:1], Entry())["pytorch_version"] == "2.11.0"


def test_a_run_whose_evaluation_takes_too_long_is_not_of_the_track():
    slow = finished(2, phases=phases(read=601.0))
    assert "track" not in submission([finished(1), slow], Entry())


def test_a_model_that_leaks_is_not_of_the_track_and_the_rules_say_so():
    run = finished()
    assert submission([run], Entry())["track"] == "10min_16mb"
    leaky = replace(run.config.model, smear_over_bos=True)
    run = replace(run, config=replace(run.config, model=leaky))
    assert "track" not in submission([run], Entry())
    (fact,) = (fact for fact in rules([run], {}, None) if "illegal" in fact)
    assert fact.startswith("Warning: model.smear_over_bos=true leaks") and fact.endswith("packed.")


def test_the_headline_is_test_time_training_where_it_was_run_and_both_are_given():
    run = finished(scores={"quantized": score(1.1), "ttt": score(1.0)})
    data = submission([run], Entry())
    assert (data["headline_score"], data["val_bpb"], data["val_bpb_quantized"]) == ("ttt", 1.0, 1.1)
    text = readme([run], Entry(), {}, None)
    assert "**1.00000 bits per byte** (quantized file, test-time training; one seed)" in text
    assert "The same file without adaptation: 1.10000." in text
    assert any("scores first" in fact for fact in rules([run], {}, None))
    assert "--ttt" in text.split("## Again")[1]


def test_every_second_of_the_clock_and_of_the_process_is_in_the_table():
    run = finished(phases=phases(start=5.0, plot=1.0), total=700.0)
    table = cells(seconds_table([run]))
    inside = [float(row[-1]) for row in table.values() if row[0] == "inside the clock"]
    assert sum(inside) == pytest.approx(598.30, abs=0.03) == float(table["**the clock**"][-1])
    rows = seconds_table([run]).splitlines()[2:]
    listed = [
        float(row.strip("| ").split(" | ")[-1]) for row in rows if "**" not in row and "its limit" not in row
    ]
    assert sum(listed) == pytest.approx(700.0, abs=0.1)
    assert "score_ema: score of the averaged weights" in "".join(table)


def test_what_the_rules_say_follows_the_figures():
    slow = finished(phases=phases(read=601.0), clock=700.0, world_size=8)
    text = "\n".join(rules([slow], {}, None))
    assert "700.00 s at most, NOT within 600 s." in text
    assert "602.36 s at most, NOT within 600 s." in text
    assert "2,790,264 tokens, 9,998,657 bytes" in text
    assert "No test-time training" in text


def test_the_commands_start_as_many_ranks_as_ran():
    commands = {n: readme([finished(world_size=n)], Entry(), {}, None).split("## Again")[1] for n in (1, 8)}
    assert "python -m pgolf train config.json --data SHARDS --seed 42" in commands[1]
    start = "torchrun --standalone --nproc_per_node=8 "
    assert f"{start}-m pgolf train config.json --data SHARDS --seed 42" in commands[8]
    assert f"{start}evaluate_gpt.py model_seed42.pgolf --data SHARDS" in commands[8]
    older = readme([replace(finished(), code_name="code.br")], Entry(), {}, None)
    assert "python score.py model_seed42.pgolf" in older and "extension (which this code needs)" in older


def test_what_somebody_says_must_be_text_and_a_number():
    name = b"J\xc3\xbcrgen".decode("ascii", "surrogateescape")  # as Python reads it where LANG=C
    for key in ("author", "github_id", "name", "blurb", "date"):
        with pytest.raises(ValueError, match=f"{key} is not Unicode text: .*; set LC_ALL=C.UTF-8"):
            Entry(**{key: name})
    for seconds in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="prepare_seconds must be a number >= 0"):
            Entry(prepare_seconds=seconds)
