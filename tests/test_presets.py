"""Presets: their sizes against the logs of their pull requests, and what the command line says of them."""

import math
from dataclasses import replace

import pytest

from pgolf.cli.main import main
from pgolf.cli.overrides import parse_config
from pgolf.config import Config, from_dict, to_dict
from pgolf.model.gpt import parameter_shapes
from pgolf.optim.schedule import context_at, ema_decay, muon_momentum
from pgolf.presets import PRESETS, best, best_1gpu, pr1787, pr1851, pr1855, pr2135
from pgolf.published import PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_as_many_parameters_as_its_pull_request_logged(name):
    shapes, found = parameter_shapes(PRESETS[name]().model), PUBLISHED[name]
    assert sum(map(math.prod, shapes.values())) == found.parameters - found.evaluation_parameters


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_named_as_it_is_called_and_survives_a_file(name):
    config = PRESETS[name]()
    assert from_dict(Config, to_dict(config), where="a file") == config
    assert config.name == name and PRESETS[name].__doc__ and not config.model.illegal


def test_the_coder_is_that_of_the_pull_request_where_python_has_it():
    found: dict[str, set[str]] = {}
    for name in PRESETS:
        found.setdefault(PRESETS[name]().artifact.coder, set()).add(name)
    assert found == {
        "zlib": {"naive"},
        "lzma": {"pr549", "pr1298"},
        "brotli": {
            *("pr1394", "pr1493", "pr1516", "pr1787", "pr1809", "pr1831", "pr1831_fixed", "pr1851", "pr1874")
        },
        "range": {"best_1gpu", "best", "pr1855", "pr2014", "pr2135", "tiny"},
    }


def test_pr1851_is_pr1787_with_two_changes():
    changed = pr1851()
    back = replace(
        changed,
        name="pr1787",
        model=replace(changed.model, smear_gate=False),
        quant=replace(changed.quant, lqer="off"),
    )
    assert back == pr1787()


def test_best_is_best_1gpu_for_eight_gpus_and_says_that_it_was_not_run(capsys):
    assert replace(best(), name="best_1gpu") == best_1gpu() and best().data.batch_tokens == 786_432
    assert main(["presets"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("best "))
    assert row.endswith("for eight GPUs, with 786,432 tokens per step. Not run.")


def test_pr2135_trains_with_2048_tokens_and_is_scored_with_2560():
    config = pr2135()
    assert config.model.max_context == 2560
    assert {context_at(frac, config.train) for frac in (0.0, 0.5, 0.9999)} == {2048}


def test_the_way_to_score_is_that_of_the_pull_request_and_does_not_run_by_itself():
    ways = {
        "sliding window of 2,048, stride 64": "sliding",
        "sliding window and score-first SGD": "sgd",
        "phased test-time training": "phased",
        "plain": "plain",
        "SLOT, which the challenge does not allow": "slot",
    }
    for name, found in PUBLISHED.items():
        evaluate = PRESETS[name]().evaluate
        assert evaluate.method == ways[found.scored.partition(" with ")[0]], name
        assert evaluate.ways == () and evaluate.headline == "plain"
        further = {evaluate.method} - {"plain"}
        assert set(replace(evaluate, published=True).ways) == further


def test_the_list_has_every_preset_and_the_published_figures(capsys):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines[1 : 1 + len(PRESETS)]}
    assert list(rows) == list(PRESETS)
    for name, found in PUBLISHED.items():
        assert f"{found.bpb:.5f}" in rows[name] and f"{found.bytes:,}" in rows[name]
    assert main(["presets", "pr1787"]) == 0
    text = capsys.readouterr().out
    assert PUBLISHED["pr1787"].url in text and "pgolf config pr1787 --diff pr1855" in text
    assert "of them in its evaluation" not in text
    assert main(["presets", "pr2135"]) == 0
    assert "parameters   35,945,673, 2 of them in its evaluation only" in capsys.readouterr().out
    assert rows["pr1298"].split()[3] == "SLOT" and rows["pr1787"].split()[3] == "phased"
    assert "PR #" not in rows["pr1855"] and "pgolf train` without a name trains best_1gpu" in lines[-2]
    for number in ("2135", "#2135"):
        assert main(["presets", number]) == 0
        assert capsys.readouterr().out.startswith("pr2135: PR #2135")
    assert main(["config", "#2135"]) == 2
    assert "the preset of the pull request #2135 is called pr2135" in capsys.readouterr().err
    assert main(["presets", "best_1gpu"]) == 0
    assert "--caseops --marker-pairs" in capsys.readouterr().out
    assert main(["presets", "pr1"]) == 2
    assert "no preset is called 'pr1'; did you mean pr" in capsys.readouterr().err
    assert main(["presets", "pr1855", "pr1787"]) == 2
    assert "expected one name of a preset, got 'pr1855 pr1787'" in capsys.readouterr().err
    assert main(["presets", "--help"]) == 0


def test_an_unknown_name_gets_a_suggestion(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for word, meant in (("best1gpu", "best_1gpu"), ("pr185", "pr1855"), ("tny", "tiny")):
        assert main(["train", word, "--data", "shards"]) == 2
        error = capsys.readouterr().err
        assert f"'{word}' is neither a preset nor a saved config.json; did you mean {meant}" in error
    assert main(["config", "nowhere.json"]) == 2
    assert "a saved config.json; `pgolf presets` lists the presets" in capsys.readouterr().err
    (tmp_path / "a-run").mkdir()
    (tmp_path / "a-run" / "config.json").write_text("{}")
    assert main(["train", "a-run"]) == 2
    assert (
        "a-run is the folder of a run, expected a preset or settings; pass a-run/config.json"
        in capsys.readouterr().err
    )


def test_the_schedules_of_the_log_are_a_command(capsys):
    assert main(["presets", "pr1855"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    command = next(row[2:] for row in rows if row[:2] == ["as", "logged"])
    assert command[:3] == ["pgolf", "train", "pr1855"]
    optim = parse_config("config", command[2:]).optim
    assert muon_momentum(0.239, optim.muon) < optim.muon.momentum == muon_momentum(0.24, optim.muon)
    steps = -1 / math.log(ema_decay(143.3 / 599_500, optim))  # steps of its end are 141 to 145 ms long
    assert steps == pytest.approx(-1 / math.log(0.9965), rel=0.02)


def test_a_difference_names_the_settings_and_both_values(capsys):
    for words in (
        ["pr1787", "--diff", "pr1851"],
        ["pr1787", "--diff=pr1851"],
        ["--diff", "pr1787", "pr1851"],
    ):
        assert main(["config", *words]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert rows == [
            ["setting", "pr1787", "pr1851"],
            ["model.smear_gate", "false", "true"],
            ["quant.lqer", '"off"', '"asym"'],
        ]
    assert main(["config", "pr1855", "--diff", "record"]) == 0
    assert "have the same settings" in capsys.readouterr().out
    assert main(["config", "pr1855", "--diff"]) == 2
    assert "expected two presets or config.json files" in capsys.readouterr().err
    assert main(["config", "pr1855", "--diff", "pr1"]) == 2
    assert "neither a preset" in capsys.readouterr().err
    assert pr1855() == Config()
